"""`calib-jax report` and `calib-jax sweep` from the command line."""

import csv
import dataclasses
import html.parser
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from stand_in import InMemory, noisy_case

import calib_jax
from calib_jax import cli
from calib_jax._case_loop import Progress, Stopped, for_each_case
from calib_jax._kept import safe_name
from calib_jax.calibrators import Calibrator
from calib_jax.commands import options as shared
from calib_jax.report import ModelResult, findings, gains, study, wording
from calib_jax.report.__main__ import main as make_again
from calib_jax.report.gains import cross_validate, cross_validate_local
from calib_jax.report.measure import measure
from calib_jax.report.study import measure_cases

NASTY = "<script>alert(1)</script> & “$x$”"

BINS = study.Bins("hard", 20)


def write_folders(root, models=("a",), cases=4, **options):
    """Folders of `.npy` probabilities and labels, and what `--probs` is to be."""
    (root / "labels").mkdir(parents=True)
    probs = []
    for number, model in enumerate(models):
        folder = root / f"model{number}"
        folder.mkdir()
        probs += ["--probs", f"{model}={folder}" if len(models) > 1 else str(folder)]
        for i in range(cases):
            case = noisy_case(seed=i, sharpness=4.0 - 2 * number, **options)
            np.save(folder / f"case_{i}.npy", case.probs)
            np.save(root / "labels" / f"case_{i}.npy", case.labels)
    return [*probs, "--labels", str(root / "labels")]


@pytest.fixture
def no_figures(monkeypatch):
    """Pages without figures and cross-validation, which take seconds."""
    monkeypatch.setattr("calib_jax.report.figures.report_figures", lambda *_, **__: [])
    monkeypatch.setattr("calib_jax.report.gains.SHOWN", ())


@pytest.fixture
def in_memory(monkeypatch):
    """Puts predictions in memory in place of the folders of a command."""

    def put(predictions):
        monkeypatch.setattr(shared, "open_folders", lambda options: predictions)
        return ["--probs", "anywhere", "--labels", "anywhere"]

    return put


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report with everything in it, to look at and not to change: folder, and status."""
    root = tmp_path_factory.mktemp("whole")
    arguments = write_folders(root, ("first", NASTY), cases=5, classes=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calib_jax.report.gains.SHOWN", ("temperature",))
        status = cli.main(["report", *arguments, "--out", str(root / "out")])
    return root / "out", status


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; fails where tags do not nest."""

    EMPTY = frozenset({"meta", "img", "br", "hr", "link"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


class TestReport:
    def test_writes_everything(self, written):
        folder, status = written
        assert status == 0
        assert {path.name for path in folder.iterdir()} == {
            *("index.html", "metrics.csv", "cases.csv", "report.json", "figures", "results", "cases")
        }
        figures = {path.name for path in (folder / "figures").iterdir()}
        kinds = ("cases", "reliability-all", "histogram-all", "boundary", "volumes")
        assert {f"{kind}.{ending}" for kind in kinds for ending in ("svg", "png")} <= figures

    def test_page_is_self_contained_and_escapes_names(self, written):
        page = Page((written[0] / "index.html").read_text(encoding="utf-8"))
        links = [
            v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "srcset", "action")
        ]
        assert links
        assert all(link.startswith(("data:image/", "#")) for link in links)
        assert [tag for tag, _ in page.tags].count("script") == 1
        assert any(NASTY in text for text in page.text)
        text = " ".join(page.text)
        for words in (
            "over-confident",
            "Near borders",
            "Worst",
            "Best",
            "What each number means",
            "calib-jax ",
        ):
            assert words in text

    def test_pictures_are_of_the_worst_and_the_best_case(self, written):
        data = json.loads((written[0] / "report.json").read_text(encoding="utf-8"))
        pictures = [x for x in data["details"]["pictures"] if x["model"] == "first"]
        ace = {}
        for row in table(written[0] / "cases.csv"):
            if row["model"] == "first":
                ace.setdefault(row["case"], []).append(float(row["ace"]))
        order = sorted(ace, key=lambda case: -np.mean(ace[case]))
        assert [x["case"] for x in pictures] == [*order[:3], order[-1]]
        assert [x["rank"] for x in pictures] == ["Worst"] * 3 + ["Best"]

    def test_cases_have_all_digits_and_are_the_librarys_figures(self, written):
        rows = table(written[0] / "cases.csv")
        assert len(rows) == 2 * 5
        case = noisy_case(seed=3, classes=2)
        stats = calib_jax.bin_statistics(case.probs[None], case.labels[None])
        row = next(
            x for x in rows if (x["model"], x["case"], x["class"]) == ("first", "case_3", "foreground")
        )
        for column, name in (("ace", "average"), ("ece", "expected"), ("mce", "maximum")):
            error = getattr(calib_jax, f"{name}_calibration_error")(stats)[0, 1]
            assert float(row[column]) == pytest.approx(float(error), rel=1e-6)
        brier = calib_jax.brier_score(case.probs[None], case.labels[None])[0, 1]
        assert float(row["brier"]) == pytest.approx(float(brier), rel=1e-6)
        assert int(row["true_voxels"]) == (case.labels == 1).sum()
        assert float(row["true_ml"]) == pytest.approx(int(row["true_voxels"]) / 1000)
        assert float(row["expected_voxels"]) == pytest.approx(float(case.probs[..., 1].sum(dtype=float)))

    def test_metrics_are_the_means_of_the_cases(self, written):
        rows, cases = table(written[0] / "metrics.csv"), table(written[0] / "cases.csv")
        for metric in ("ACE", "Brier", "NLL", "Dice"):
            (row,) = [
                x for x in rows if (x["model"], x["metric"], x["class"]) == ("first", metric, "foreground")
            ]
            values = [
                float(x[metric.lower()]) for x in cases if (x["model"], x["class"]) == ("first", "foreground")
            ]
            assert float(row["mean"]) == pytest.approx(np.mean(values), rel=1e-12)

    @pytest.mark.usefixtures("no_figures")
    def test_page_can_be_made_again(self, written, tmp_path, capsys):
        copy = shutil.copytree(written[0], tmp_path / "copy")
        assert make_again([str(copy), "--title", "Again"]) == 0
        text = (copy / "index.html").read_text(encoding="utf-8")
        assert "<title>Again</title>" in text
        assert text.count("data:image/png") == (written[0] / "index.html").read_text(encoding="utf-8").count(
            "data:image/png"
        )

    @pytest.mark.usefixtures("no_figures")
    def test_a_page_made_elsewhere_keeps_its_pictures_and_cases(self, written, tmp_path):
        assert make_again([str(written[0]), "--out", str(tmp_path / "other")]) == 0
        pages = [
            (folder / "index.html").read_text(encoding="utf-8") for folder in (written[0], tmp_path / "other")
        ]
        assert pages[1].count("data:image/png") == pages[0].count("data:image/png") > 0
        assert (tmp_path / "other" / "cases.csv").read_bytes() == (written[0] / "cases.csv").read_bytes()

    def test_results_load_with_scores_and_borders(self, written):
        result = ModelResult.load(written[0] / "results" / "00-first.npz")
        assert list(result.metrics()) == ["Dice", "ACE", "ECE", "MCE", "Brier", "NLL"]
        assert result.boundary is not None and result.interior is not None  # noqa: PT018
        np.testing.assert_array_equal(result.boundary.count + result.interior.count, result.stats.count)

    def test_a_result_without_scores_loads_as_before(self, written, tmp_path):
        whole = ModelResult.load(written[0] / "results" / "00-first.npz")
        dataclasses.replace(whole, brier=None, nll=None, boundary=None).save(tmp_path / "old.npz")
        with np.load(tmp_path / "old.npz") as file:
            assert not {"brier", "nll", "boundary_count"} & set(file.files)
        assert list(ModelResult.load(tmp_path / "old.npz").metrics()) == ["Dice", "ACE", "ECE", "MCE"]


@pytest.mark.usefixtures("no_figures")
class TestRestart:
    def test_a_second_start_reads_what_has_changed_alone(self, tmp_path, monkeypatch):
        arguments = ["report", *write_folders(tmp_path), "--out", str(tmp_path / "out")]
        read = []
        original = measure
        monkeypatch.setattr(
            study, "measure", lambda case, bins: read.append(case.name) or original(case, bins)
        )
        assert cli.main(arguments) == 0
        assert sorted(read) == [f"case_{i}" for i in range(4)]
        before = (tmp_path / "out" / "cases.csv").read_bytes()
        read.clear()
        assert cli.main(arguments) == 0
        assert read == []
        assert (tmp_path / "out" / "cases.csv").read_bytes() == before
        np.save(tmp_path / "labels" / "case_2.npy", noisy_case(seed=9).labels)
        os.utime(tmp_path / "labels" / "case_2.npy", ns=(1, 1))
        assert cli.main(arguments) == 0
        assert read == ["case_2"]
        assert cli.main([*arguments, "--num-bins", "10"]) == 0
        assert len(read) == 5

    def test_ctrl_c_keeps_what_is_done(self, tmp_path, in_memory, capsys):
        predictions = InMemory({"m": {f"c{i}": noisy_case(f"c{i}", "m", seed=i) for i in range(4)}})
        original = predictions.read

        def read(name, model=None):
            if name == "c2":
                raise KeyboardInterrupt
            return original(name, model)

        predictions.read = read
        arguments = ["report", *in_memory(predictions), "--out", str(tmp_path / "out")]
        assert cli.main(arguments) == 130
        assert "cases are measured. They are kept in" in capsys.readouterr().err
        assert {path.stem for path in (tmp_path / "out" / "cases" / "m").glob("*.npz")} >= {"c0", "c1"}
        predictions.read = original
        predictions.read_cases.clear()
        assert cli.main(arguments) == 0
        assert ("m", "c0") not in predictions.read_cases

    def test_jobs_change_nothing(self, tmp_path):
        arguments = ["report", *write_folders(tmp_path, cases=6)]
        for jobs in ("1", "3"):
            assert cli.main([*arguments, "--out", str(tmp_path / jobs), "--jobs", jobs]) == 0
        files = [(tmp_path / jobs / "cases.csv").read_bytes() for jobs in ("1", "3")]
        assert files[0] == files[1]
        # Several jobs draw in a process of its own, which `no_figures` does not reach.
        assert (tmp_path / "3" / "figures" / "reliability-all.svg").is_file()
        assert "data:image/svg+xml" in (tmp_path / "3" / "index.html").read_text()


@pytest.mark.usefixtures("no_figures")
class TestFaults:
    def test_a_broken_case_is_said_and_the_others_are_reported(self, tmp_path, capsys):
        arguments = ["report", *write_folders(tmp_path), "--out", str(tmp_path / "out")]
        (tmp_path / "model0" / "case_1.npy").write_bytes(b"\x93NUMPY\x01\x00")
        assert cli.main(arguments) == 1
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("fault: ")]
        assert "case_1.npy" in line
        page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
        assert "1 fault" in page
        assert "case_1.npy" in page
        assert {row["case"] for row in table(tmp_path / "out" / "cases.csv")} == {
            "case_0",
            "case_2",
            "case_3",
        }

    def test_names_cannot_leave_the_folder(self, tmp_path, in_memory):
        names = ["../../escaped", "/absolute", "..", "a/b", "x" * 300, NASTY]
        predictions = InMemory(
            {"../m": {name: noisy_case(name, "../m", seed=i) for i, name in enumerate(names)}}
        )
        out = tmp_path / "deep" / "out"
        assert cli.main(["report", *in_memory(predictions), "--out", str(out)]) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["deep"]
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        assert len(list((out / "cases").rglob("*.npz"))) == len(names)

    def test_every_case_broken(self, tmp_path, in_memory, capsys):
        arguments = in_memory(InMemory({"m": {"a": "a.npz: truncated; write it again."}}))
        assert cli.main(["report", *arguments, "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.splitlines() == [
            *("fault: a.npz: truncated; write it again.", "1 of 1 cases, 0 s"),
            "error: no case could be read, see the sentences above.",
        ]

    @pytest.mark.parametrize(
        ("further", "message"),
        [
            (["--num-bins", "0"], "--num-bins must be at least 1; got 0."),
            (["--jobs", "0"], "--jobs must be at least 1; got 0."),
            (["--baseline", "z"], "--baseline 'z' is no model: there are m."),
            (
                ["--subjects", "p("],
                "--subjects 'p(' is no regular expression: missing ), unterminated subpattern at position 1.",
            ),
            *(
                (
                    ["--subjects", pattern],
                    f"--subjects {pattern!r} finds no subject in the name of the case 'a': give an expression that "
                    "fits every name.",
                )
                for pattern in ("p[0-9]", "x?")
            ),
        ],
    )
    def test_wrong_options(self, further, message, tmp_path, in_memory, capsys):
        arguments = in_memory(InMemory({"m": {"a": noisy_case("a", "m")}}))
        assert cli.main(["report", *arguments, "--out", str(tmp_path / "out"), *further]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"

    def test_absent_folder(self, tmp_path, capsys):
        arguments = [
            "--probs",
            str(tmp_path / "no"),
            "--labels",
            str(tmp_path),
            "--out",
            str(tmp_path / "out"),
        ]
        assert cli.main(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1

    @pytest.mark.parametrize("command", ["report", "sweep"])
    def test_no_report_among_the_files_that_it_is_about(self, command, tmp_path, capsys):
        arguments = write_folders(tmp_path, cases=1)
        assert cli.main([command, *arguments, "--out", str(tmp_path / "model0")]) == 2
        assert "is a folder to read: choose another output folder." in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "model0").iterdir()] == ["case_0.npy"]

    def test_what_was_noticed_when_a_case_was_read_stays_on_the_page(self, tmp_path, in_memory):
        predictions = InMemory({"m": {"a": noisy_case("a", "m")}}, notices=("a.npz holds logits.",))
        arguments = ["report", *in_memory(predictions), "--out", str(tmp_path / "out")]
        assert cli.main(arguments) == 0
        predictions.notices = ()
        assert cli.main(arguments) == 0
        assert "a.npz holds logits." in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")

    def test_one_case_of_a_folder(self, tmp_path, in_memory, capsys):
        """No interval, no cross-validation, no second picture: and still a page."""
        arguments = in_memory(InMemory({"m": {"a": noisy_case("a", "m", image=True)}}))
        assert cli.main(["report", *arguments, "--out", str(tmp_path / "out")]) == 0
        assert "Wrote" in capsys.readouterr().out


@pytest.mark.usefixtures("no_figures")
class TestKinds:
    def test_regions(self, tmp_path, in_memory):
        def case(i):
            one = noisy_case(f"c{i}", "m", seed=i)
            labels = np.stack([one.labels > 0, one.labels > 1], -1)
            probs = np.stack([one.probs[..., 1:].sum(-1), one.probs[..., 2]], -1)
            return dataclasses.replace(one, labels=labels, probs=np.clip(probs, 0, 1))

        predictions = InMemory({"m": {f"c{i}": case(i) for i in range(3)}}, ("whole", "core"), regions=True)
        assert cli.main(["report", *in_memory(predictions), "--out", str(tmp_path)]) == 0
        assert {row["class"] for row in table(tmp_path / "cases.csv")} == {"whole", "core"}

    @pytest.mark.parametrize("binning", ["soft", "adaptive"])
    def test_binning(self, binning, tmp_path, in_memory):
        case = noisy_case("c", "m")
        arguments = in_memory(InMemory({"m": {"c": case, "d": noisy_case("d", "m", seed=1)}}))
        options = ["--binning", binning, "--include-background"]
        assert cli.main(["report", *arguments, "--out", str(tmp_path), *options]) == 0
        rows = [row for row in table(tmp_path / "cases.csv") if row["case"] == "c"]
        stats = calib_jax.bin_statistics(case.probs[None], case.labels[None], binning=binning)
        ace = calib_jax.average_calibration_error(stats)[0]
        assert [row["class"] for row in rows] == ["background", "anterior", "posterior"]
        np.testing.assert_allclose([float(row["ace"]) for row in rows], ace, rtol=1e-5)

    def test_images_of_two_axes(self, tmp_path, in_memory):
        cases = {f"c{i}": noisy_case(f"c{i}", "m", seed=i, shape=(20, 30), image=True) for i in range(2)}
        assert cli.main(["report", *in_memory(InMemory({"m": cases})), "--out", str(tmp_path)]) == 0
        assert len(list((tmp_path / "figures" / "slices").glob("*-image.png"))) == 2


class TestSubjects:
    """Cases of one subject are never on both sides of a fold or an interval."""

    @pytest.mark.usefixtures("no_figures")
    def test_intervals_are_over_subjects(self, tmp_path, in_memory):
        cases = {f"p{i}_{scan}": noisy_case(f"p{i}_{scan}", "m", seed=i) for i in range(4) for scan in "ab"}
        arguments = in_memory(InMemory({"m": cases}))
        found = {}
        for name, further in (("cases", []), ("subjects", ["--subjects", "p[0-9]"])):
            assert cli.main(["report", *arguments, "--out", str(tmp_path / name), *further]) == 0
            rows = table(tmp_path / name / "metrics.csv")
            found[name] = next(row for row in rows if (row["metric"], row["class"]) == ("ACE", "mean"))
            assert cli.main(["sweep", *arguments, "--out", str(tmp_path / f"{name}-sweep"), *further]) == 0
            wanted = {"class": "mean", "binning": "hard", "num_bins": "20", "metric": "ACE"}
            rows = table(tmp_path / f"{name}-sweep" / "sweep.csv")
            found[f"{name}-sweep"] = next(row for row in rows if wanted.items() <= row.items())
        assert (found["cases"]["subjects"], found["subjects"]["subjects"]) == ("8", "4")
        for ending in ("", "-sweep"):
            alone, together = (found[name + ending] for name in ("cases", "subjects"))
            assert alone["mean"] == together["mean"]
            assert (
                float(together["low"]) < float(alone["low"]) < float(alone["high"]) < float(together["high"])
            )

    def test_one_subject_in_every_name_is_a_mistake(self, tmp_path, in_memory, capsys):
        arguments = in_memory(InMemory({"m": {name: noisy_case(name, "m") for name in ("p1_a", "p2_a")}}))
        assert cli.main(["report", *arguments, "--out", str(tmp_path / "out"), "--subjects", "p"]) == 2
        assert capsys.readouterr().err == (
            "error: --subjects 'p' finds 'p' in the names of all 2 cases: give an expression that tells subjects "
            "apart.\n"
        )

    def test_folds_hold_out_whole_subjects(self, monkeypatch):
        measured = [measure(noisy_case(f"p{i // 2}_{i % 2}", seed=i), BINS) for i in range(8)]
        (result,) = study.results_of(
            study.Study({"m": measured}, BINS),
            ("background", "a", "b"),
            first_class=1,
            subjects={case.name: case.name[:2] for case in measured},
        )
        sides = []
        monkeypatch.setattr(gains, "SHOWN", ("vector",))
        monkeypatch.setattr(gains, "_fit", lambda calibrator, samples, regions: sides.append(samples))
        monkeypatch.setattr(gains, "_applied", lambda calibrator, probs, *_: [sides.append(probs), probs][1])
        (gain,) = cross_validate(measured, result, BINS, first_class=1, regions=False)
        assert gain.folds == 4
        for i, (fitted, held_out) in enumerate(zip(sides[::2], sides[1::2], strict=True)):
            own = [measured[j].sample.probs for j in (2 * i, 2 * i + 1)]
            assert all(x is y for x, y in zip(held_out, own, strict=True))
            assert len(fitted) == 6
            assert not any(sample.probs is x for sample in fitted for x in held_out)


def test_cross_validation_finds_the_temperature():
    cases = [measure(noisy_case(f"c{i}", seed=i, shape=(14, 14, 14)), BINS) for i in range(4)]
    (result,) = study.results_of(study.Study({"m": cases}, BINS), ("background", "a", "b"), first_class=1)
    found = cross_validate(cases, result, BINS, first_class=1, regions=False)
    temperature = next(gain for gain in found if gain.calibrator == "temperature")
    assert temperature.keeps_labels
    probs = np.concatenate([noisy_case(f"c{i}", seed=i, shape=(14, 14, 14)).probs for i in range(4)])
    labels = np.concatenate([noisy_case(f"c{i}", seed=i, shape=(14, 14, 14)).labels for i in range(4)])
    exact = float(calib_jax.fit_temperature(np.log(probs)[None], labels[None]))
    assert float(temperature.params.split("\N{NO-BREAK SPACE}")[-1]) == pytest.approx(exact, rel=0.05)
    assert temperature.row.metrics["NLL"].change.difference < 0


@pytest.mark.parametrize("regions", [False, True])
def test_local_calibration_is_judged_on_cases_that_it_was_not_fitted_to(regions, monkeypatch):
    cases = {f"c{i}": noisy_case(f"c{i}", "m", seed=i) for i in range(4)}
    names = ("background", "a", "b")
    if regions:
        cases = {
            name: dataclasses.replace(
                case, labels=np.stack([case.labels > 0, case.labels > 1], -1), probs=case.probs[..., 1:]
            )
            for name, case in cases.items()
        }
        names = ("a", "b")
    first = 0 if regions else 1
    predictions = InMemory({"m": cases}, names, regions=regions)
    measured = [measure(case, BINS) for case in cases.values()]
    (result,) = study.results_of(study.Study({"m": measured}, BINS), names, first_class=first)
    fitted, applied = [], []

    def fit(batches, *, regions, spacing):
        fitted.append([logits for logits, _, _ in batches()])
        assert spacing == (1.0, 1.0, 1.0)
        return 1.5

    def apply(logits, params):
        applied.append((len(fitted), logits))
        return logits / params

    monkeypatch.setattr(gains, "CALIBRATORS", {"local": Calibrator(fit, apply, True, "")})
    (gain,) = cross_validate_local(predictions, result, BINS, first_class=first)
    assert gain.row.metrics["NLL"].change.difference != 0
    if not regions:
        likelihoods = [
            calib_jax.negative_log_likelihood(np.log(case.probs)[None] / 1.5, case.labels[None])
            for case in cases.values()
        ]
        assert gain.row.metrics["NLL"].mean == pytest.approx(float(np.mean(likelihoods)), rel=1e-5)
    assert gain.row.metrics["Dice"].change.difference == 0
    assert len(applied) == 4
    for fold, logits in applied:
        assert not any(np.array_equal(logits, other) for other in fitted[fold - 1])


class TestProgress:
    def test_plain_lines_where_there_is_no_terminal(self, capsys):
        with Progress() as progress:
            for done in range(1, 101):
                progress(done, 100)
        assert capsys.readouterr().err == "100 of 100 cases, 0 s\n"

    def test_stopped_is_an_interrupt(self):
        assert issubclass(Stopped, KeyboardInterrupt)

    def test_measures_without_progress(self, tmp_path):
        predictions = InMemory({"m": {"a": noisy_case("a", "m"), "b": "b.npz: broken."}})
        found = measure_cases(predictions, study.Bins("hard", 5), tmp_path, options={})
        assert [case.name for case in found.cases["m"]] == ["a"]
        assert found.faults == ["b of m: b.npz: broken."] or found.faults == ["b.npz: broken."]


def test_a_case_that_fails_among_others_is_tried_alone():
    calls = []

    def work(model, name):
        calls.append(name)
        if name == "b" and calls.count("b") == 1:
            raise SystemError("AST constructor recursion depth mismatch")
        if name == "c":
            raise ValueError("c.npz is truncated: write it again.")
        return name

    found, faults, _ = for_each_case([("m", name) for name in "abc"], work, jobs=2)
    assert found == {("m", "a"): "a", ("m", "b"): "b"}
    assert faults == ["c.npz is truncated: write it again."]
    assert sorted(calls) == ["a", "b", "b", "c", "c"]


def test_a_name_cannot_steer_the_terminal(tmp_path, capsys):
    arguments = write_folders(tmp_path, cases=3)
    (tmp_path / "model0" / "\x1b[2J\u202e.npy").write_bytes(b"nothing")
    (tmp_path / "labels" / "\x1b[2J\u202e.npy").write_bytes(b"nothing")
    assert cli.main(["sweep", *arguments, "--num-bins", "5", "--out", str(tmp_path / "out")]) == 1
    printed = "".join(capsys.readouterr())
    assert "\\x1b[2J\\u202e" in printed
    assert "\x1b" not in printed
    assert "\u202e" not in printed


def test_safe_names_differ():
    names = ["a", "A b", "A-b", "../a", "a/", "", ".", "..", "é", "CON", "x" * 90, "x" * 91]
    safe = [safe_name(name) for name in names]
    assert len(set(safe)) == len(names)
    assert all("/" not in name and name.strip(".") for name in safe)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["x"], Path("x")),
        (["A=x", "B=y"], {"A": Path("x"), "B": Path("y")}),
        (["r/x", "r/y"], {"x": Path("r/x"), "y": Path("r/y")}),
        (["A=b=c"], {"A": Path("b=c")}),
    ],
)
def test_named_folders(given, expected):
    assert shared.named_folders(given) == expected


def test_two_folders_of_one_name():
    with pytest.raises(ValueError, match="two folders are called 'x'"):
        shared.named_folders(["a/x", "b/x"])


class TestSweep:
    def test_writes_and_prints(self, tmp_path, capsys):
        arguments = write_folders(tmp_path, ("a", "b"), cases=3)
        options = ["--num-bins", "5", "20", "--out", str(tmp_path / "out")]
        assert cli.main(["sweep", *arguments, *options]) == 0
        rows = table(tmp_path / "out" / "sweep.csv")
        assert len(rows) == 2 * 2 * 2 * 3 * 3
        case_errors = []
        for i in range(3):
            case = noisy_case(seed=i)
            stats = calib_jax.bin_statistics(case.probs[None], case.labels[None], num_bins=20)
            case_errors.append(calib_jax.average_calibration_error(stats)[0, 1:].mean())
        wanted = {"model": "a", "class": "mean", "binning": "hard", "num_bins": "20", "metric": "ACE"}
        (row,) = [x for x in rows if wanted.items() <= x.items()]
        assert float(row["mean"]) == pytest.approx(float(np.mean(case_errors)), rel=1e-6)
        data = json.loads((tmp_path / "out" / "sweep.json").read_text(encoding="utf-8"))
        assert len(data["sweep"]) == len(rows)
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            *(f"sweep.{x}" for x in ("csv", "json", "svg", "png")),
            "sweep_cases",
        }
        printed = capsys.readouterr().out
        assert "equal width" in printed
        assert f"{float(row['mean']):.3f}" in printed


class TestHelp:
    @pytest.mark.parametrize("command", ["report", "sweep"])
    def test_has_an_example(self, command, capsys):
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])
        text = capsys.readouterr().out
        assert f"calib-jax {command} --probs" in text
        assert max(map(len, text.splitlines())) <= 120

    def test_lists_the_commands(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            cli.main(["--help"])
        text = capsys.readouterr().out
        assert all(command in text for command in cli.COMMANDS)

    @pytest.mark.parametrize("arguments", [[], ["nonsense"], ["report"]])
    def test_wrong_usage_is_status_2(self, arguments, capsys):
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments)
        assert "usage: calib-jax" in capsys.readouterr().err

    def test_imports_nothing_heavy(self):
        program = (
            "import sys\nfrom calib_jax.cli import main\n"
            "try: main(['report', '--help'])\nexcept SystemExit: pass\n"
            "heavy = {'matplotlib', 'scipy.stats', 'jinja2', 'nibabel', 'PIL', 'tqdm', 'optax'}\n"
            "print(sorted(heavy & set(sys.modules)))"
        )
        environment = dict(os.environ, PYTHONPATH=str(Path(calib_jax.__file__).parents[1]))
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"

    def test_what_is_missing_is_named(self, tmp_path, monkeypatch, capsys):
        def missing(options):
            raise ModuleNotFoundError("No module named 'jinja2'", name="jinja2")

        monkeypatch.setattr("calib_jax.commands.report.run", missing)
        assert cli.main(["report", "--probs", "x", "--labels", "y", "--out", str(tmp_path)]) == 2
        assert "pip install 'calib_jax[report]'" in capsys.readouterr().err


def test_module_is_the_command(tmp_path):
    environment = dict(os.environ, PYTHONPATH=str(Path(calib_jax.__file__).parents[1]))
    command = [sys.executable, "-m", "calib_jax", "report"]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2, time.monotonic() - start
    assert "calib-jax report: error: the following arguments are required" in done.stderr


def test_the_interval_of_a_volume_is_judged_on_cases_that_did_not_make_it():
    expected = np.full(20, 10.0)
    true = np.arange(1, 21.0)  # of the smallest and the largest the others' interval is too narrow
    subjects = np.arange(20)
    assert findings._volume_interval(expected, true, subjects) == ("−90% to +100%", "90%")
    assert findings._volume_interval(expected[1:], true[1:], subjects[1:]) == ("n/a", "n/a")
    double = [np.repeat(x, 2) for x in (expected, true, subjects)]  # a second scan that says the same
    assert findings._volume_interval(*double) == ("−90% to +100%", "90%")


def test_thresholds_are_judged_by_the_voxels_above_them():
    measured = [measure(noisy_case(f"c{i}", seed=i, shape=(14, 14, 14)), BINS) for i in range(3)]
    (result,) = study.results_of(study.Study({"m": measured}, BINS), ("background", "a", "b"), first_class=1)
    section = findings._thresholds([result])
    thresholds = np.asarray(calib_jax.dice_thresholds(result.stats), np.float64)
    for j, line in enumerate(section.lines[1:]):
        dice = []
        for i, threshold in enumerate(thresholds[:, j]):
            case = noisy_case(seed=i, shape=(14, 14, 14))
            above, true = case.probs[..., 1 + j] > np.float32(threshold), case.labels == 1 + j
            dice.append(2 * (above & true).sum() / (above.sum() + true.sum()))
        numbers = (thresholds[:, j].mean(), result.dice[:, j].mean(), np.mean(dice))
        assert list(line[2:]) == [wording.number(float(x)) for x in numbers]
