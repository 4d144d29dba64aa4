"""The report: its numbers by hand, its files there and back, its page whole and safe."""

import csv
import dataclasses
import html.parser
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

import calib_jax
from calib_jax import BinStatistics
from calib_jax._terminal import print_in_any_encoding
from calib_jax.report import (
    ModelResult,
    RepeatedResult,
    compare_models,
    format_table,
    headline,
    to_json,
    write_csv,
    write_report,
)
from calib_jax.report.__main__ import main


def result(name, gaps, dice=0.8, *, cases=None, classes=("tumour",)):
    """A result of one bin per case and class, so that ACE = ECE = MCE = the gap; NaN counts nothing."""
    gaps = np.asarray(gaps, float).reshape(-1, len(classes))
    counted = ~np.isnan(gaps)
    count = np.where(counted, 100, 0)[..., None]
    label_sum = 100 * np.where(counted, 0.5 - np.nan_to_num(gaps), 0)[..., None]
    dice = np.broadcast_to(np.asarray(dice, float), gaps.shape).copy()
    names = tuple(cases or [f"case {i}" for i in range(len(gaps))])
    return ModelResult(name, names, tuple(classes), BinStatistics(count, 0.5 * count, label_sum), dice)


def of_subjects(model, subjects):
    return dataclasses.replace(model, subjects=tuple(subjects))


def random_result(name, scale, *, seed=0, cases=12, classes=("anterior", "posterior"), bins=10):
    rng = np.random.default_rng(seed)
    count = rng.integers(0, 200, (cases, len(classes), bins))
    prob = (np.arange(bins) + 0.5) / bins
    frequency = np.clip(prob + scale * (0.5 - prob) + rng.normal(0, 0.03, count.shape), 0, 1)
    dice = rng.uniform(0.7, 0.9, count.shape[:2])
    return ModelResult(
        name,
        tuple(f"case_{i:02d}" for i in range(cases)),
        classes,
        BinStatistics(count, prob * count, frequency * count),
        dice,
    )


class TestModelResult:
    def test_metrics_by_hand(self):
        stats = BinStatistics(
            np.array([[[80, 20, 0]]]), np.array([[[8.0, 10.0, 0.0]]]), np.array([[[8.0, 2.0, 0.0]]])
        )
        metrics = ModelResult("m", ("c",), ("k",), stats, np.array([[0.7]])).metrics()
        found = {name: round(value.item(), 6) for name, value in metrics.items()}
        assert found == {"Dice": 0.7, "ACE": 0.2, "ECE": 0.08, "MCE": 0.4}

    def test_save_and_load(self, tmp_path):
        before = random_result("Dice + “CE” λ=0.3", 0.4)
        before.save(tmp_path / "v1.2 result")
        after = ModelResult.load(tmp_path / "v1.2 result")
        assert (after.name, after.case_names, after.class_names) == (
            before.name,
            before.case_names,
            before.class_names,
        )
        np.testing.assert_array_equal(after.dice, before.dice)
        for field in dataclasses.fields(BinStatistics):
            x, y = getattr(after.stats, field.name), getattr(before.stats, field.name)
            np.testing.assert_array_equal(x, y)
            assert x.dtype == y.dtype

    def test_load_refuses_other_files(self, tmp_path):
        (tmp_path / "text.npz").write_text("not a zip file")
        np.savez(tmp_path / "other.npz", x=np.zeros(3))
        for name in ("text.npz", "other.npz"):
            with pytest.raises(ValueError, match=f"{name} is not a result saved by"):
                ModelResult.load(tmp_path / name)
        with pytest.raises(FileNotFoundError):
            ModelResult.load(tmp_path / "absent.npz")

    def test_case_csv(self, tmp_path):
        made = result("m", [[0.1, 0.2], [0.3, np.nan]], classes=("a, b", "c"), cases=['x "1"', "y"])
        made.write_case_csv(tmp_path / "cases.csv")
        with open(tmp_path / "cases.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [(row["case"], row["class"]) for row in rows] == list(
            itertools.product(['x "1"', "y"], ["a, b", "c"])
        )
        assert [float(row["ace"]) for row in rows] == [
            pytest.approx(0.1),
            pytest.approx(0.2),
            pytest.approx(0.3),
            pytest.approx(np.nan, nan_ok=True),
        ]
        assert {float(row["dice"]) for row in rows} == {0.8}

    def test_shapes_and_names_must_fit(self):
        with pytest.raises(ValueError, match="1 case names and 1 class names"):
            result("m", [0.1, 0.2], cases=["only one"])
        with pytest.raises(ValueError, match="case names of 'm' must differ, but 'x' occurs twice"):
            result("m", [0.1, 0.2], cases=["x", "x"])
        with pytest.raises(ValueError, match="'m' has 1 subjects and 2 case names: name the subject of each"):
            of_subjects(result("m", [0.1, 0.2]), ["p1"])

    def test_subjects_are_saved_and_each_case_is_one_by_default(self, tmp_path):
        alone = result("m", [0.1, 0.2], cases=["x", "y"])
        assert alone.subjects == ("x", "y")
        of_subjects(alone, ["p1", "p1"]).save(tmp_path / "result")
        assert ModelResult.load(tmp_path / "result").subjects == ("p1", "p1")
        with np.load(tmp_path / "result") as file:  # as written before results had subjects
            np.savez(tmp_path / "older.npz", **{x: file[x] for x in file.files if x != "subjects"})
        assert ModelResult.load(tmp_path / "older.npz").subjects == ("x", "y")


class TestCompareModels:
    def test_values_by_hand(self):
        base = result("base", [[0.4, 0.2], [0.2, 0.2], [0.6, 0.2]], 0.5, classes=("a", "b"))
        other = result("other", [[0.1, 0.1], [0.1, 0.2], [0.3, 0.1]], 0.6, classes=("a", "b"))
        rows = compare_models([base, other])
        assert [(row.name, row.role) for row in rows] == [("base", "baseline"), ("other", "model")]
        before, after = (row.metrics["ACE"] for row in rows)
        assert before.change is None
        assert before.mean == pytest.approx((0.3 + 0.2 + 0.4) / 3)
        assert dict(before.per_class) == {"a": pytest.approx(0.4), "b": pytest.approx(0.2)}
        assert after.mean == pytest.approx((0.1 + 0.15 + 0.2) / 3)
        assert after.change.difference == pytest.approx(-0.15)
        assert after.change.relative == pytest.approx(-0.5)
        assert after.change.pairs == 3
        assert after.change.p_value == pytest.approx(2 / 2**3)
        assert rows[1].metrics["Dice"].change.difference == pytest.approx(0.1)
        assert after.low <= after.mean <= after.high

    def test_nan_is_left_out(self):
        only = result("m", [[0.4, np.nan], [0.2, 0.6], [np.nan, np.nan]], classes=("a", "b"))
        ace = compare_models([only])[0].metrics["ACE"]
        assert ace.mean == pytest.approx((0.4 + (0.2 + 0.6) / 2) / 2)
        assert ace.cases == 2
        assert dict(ace.per_class) == {"a": pytest.approx(0.3), "b": pytest.approx(0.6)}

    def test_bootstrap_is_repeatable_and_close_to_the_normal_interval(self):
        gaps = np.random.default_rng(1).uniform(0.1, 0.3, 200)
        ace, again = (compare_models([result("m", gaps)])[0].metrics["ACE"] for _ in range(2))
        assert repr(ace) == repr(again)  # from Python 3.13 on, a NaN in a dataclass does not equal itself
        half = 1.96 * gaps.std() / math.sqrt(200)
        assert ace.low == pytest.approx(gaps.mean() - half, abs=0.1 * half)
        assert ace.high == pytest.approx(gaps.mean() + half, abs=0.1 * half)

    def test_few_cases(self):
        one = compare_models([result("a", [0.4]), result("b", [0.1])])[1].metrics["ACE"]
        assert math.isnan(one.low)
        assert (one.cases, one.change.pairs, one.change.p_value) == (1, 1, 1.0)
        none = compare_models([result("a", [0.4], cases=["x"]), result("b", [0.1], cases=["y"])])[1]
        assert none.metrics["ACE"].change.pairs == 0
        assert math.isnan(none.metrics["ACE"].change.p_value)

    def test_no_difference(self):
        same = compare_models([result("a", [0.4, 0.2, 0.1]), result("b", [0.4, 0.2, 0.1])])[1].metrics["ACE"]
        assert (same.change.difference, same.change.relative, same.change.p_value) == (0, 0, 1)

    def test_pairs_cases_by_name(self):
        base = result("a", [0.1, 0.2, 0.3], cases=["x", "y", "z"])
        other = result("b", [0.3, 0.1], cases=["z", "x"])
        change = compare_models([base, other])[1].metrics["ACE"].change
        assert (change.difference, change.pairs) == (0, 2)

    def test_baseline_by_name_and_reference_without_a_test(self):
        rows = compare_models(
            [result("a", [0.1, 0.2]), result("b", [0.2, 0.4])],
            baseline="b",
            reference=result("truth", [0.0, 0.0]),
        )
        assert [(row.name, row.role) for row in rows] == [
            ("a", "model"),
            ("b", "baseline"),
            ("truth", "reference"),
        ]
        assert rows[0].metrics["MCE"].change.relative == pytest.approx(-0.5)
        assert rows[2].metrics["MCE"].change is None

    @pytest.mark.parametrize(
        ("results", "options", "message"),
        [
            ([], {}, "at least one"),
            ([result("a", [0.1]), result("a", [0.1])], {}, "two results are called 'a'"),
            (
                [result("a", [0.1]), result("b", [0.1], classes=("liver",))],
                {},
                "the classes liver and 'a' has tumour",
            ),
            ([result("a", [0.1])], {"baseline": "z"}, "no result is called 'z'"),
            ([result("a", [0.1])], {"baseline": 1}, "baseline 1 is out of range"),
            ([result("a", [0.1])], {"reference": result("a", [0.1])}, "two results are called 'a'"),
        ],
    )
    def test_says_what_cannot_be_compared(self, results, options, message):
        with pytest.raises(ValueError, match=message):
            compare_models(results, **options)


class TestSubjects:
    """Intervals and tests where a subject has several cases."""

    def test_a_case_and_its_double_count_once(self):
        gaps, others = np.random.default_rng(0).uniform(0.1, 0.4, (2, 8))
        once = compare_models([result("a", gaps), result("b", others)])
        subjects = [f"p{i}" for i in range(8) for _ in range(2)]
        twice = compare_models(
            [of_subjects(result(name, np.repeat(x, 2)), subjects) for name, x in (("a", gaps), ("b", others))]
        )
        for x, y in zip(once, twice, strict=True):
            one, two = x.metrics["ACE"], y.metrics["ACE"]
            assert (two.mean, two.low, two.high) == pytest.approx((one.mean, one.low, one.high))
            assert (two.cases, two.subjects) == (16, 8)
        one, two = (rows[1].metrics["ACE"].change for rows in (once, twice))
        assert (two.difference_low, two.difference_high) == pytest.approx(
            (one.difference_low, one.difference_high)
        )
        assert (two.p_value, two.pairs) == (pytest.approx(one.p_value), 16)
        unaware, aware = (
            rows[0].metrics["ACE"] for rows in (compare_models([result("a", np.repeat(gaps, 2))]), twice)
        )
        assert unaware.high - unaware.low < 0.8 * (aware.high - aware.low)

    def test_subjects_with_different_numbers_of_cases(self):
        model = of_subjects(result("m", [0.1, 0.2, 0.3, 0.4, np.nan]), ["p", "p", "p", "q", "q"])
        ace = compare_models([model])[0].metrics["ACE"]
        assert ace.mean == pytest.approx(0.25)  # of the cases
        assert (ace.low, ace.high) == pytest.approx((0.2, 0.4))  # p twice and q twice
        assert (ace.cases, ace.subjects) == (4, 2)

    def test_one_subject_has_no_interval(self):
        ace = compare_models([of_subjects(result("m", [0.1, 0.3]), ["p", "p"])])[0].metrics["ACE"]
        assert math.isnan(ace.low)
        assert ace.mean == pytest.approx(0.2)

    def test_the_table_says_so(self):
        alone, other = result("a", [0.4, 0.2]), result("b", [0.1, 0.3])
        assert "bootstrap interval over cases." in " ".join(
            format_table(compare_models([alone, other])).split()
        )
        both = compare_models([of_subjects(x, ["p", "q"]) for x in (alone, other)])
        assert "over subjects" not in format_table(both)  # of one case each
        shared = compare_models([of_subjects(x, ["p", "p"]) for x in (alone, other)])
        text = " ".join(format_table(shared).split())
        assert "bootstrap interval over subjects, each of whom is drawn with all cases." in text
        assert "over paired means of subjects" in text


class TestRepeatedResult:
    def both(self, name="both"):
        return RepeatedResult(
            name,
            {
                "seed 0": result("a", [[0.4, 0.2], [0.2, np.nan]], 0.5, classes=("a", "b")),
                "seed 1": result("b", [[0.2, 0.2], [0.4, 0.1]], 0.7, classes=("a", "b")),
            },
        )

    def test_a_case_is_the_mean_over_its_repeats(self):
        base = result("base", [[0.5, 0.5], [0.5, 0.5]], classes=("a", "b"))
        rows = compare_models([base, self.both()])
        alone, ace = (row.metrics["ACE"] for row in rows)
        assert ace.mean == pytest.approx((0.25 + 0.2) / 2)  # cases: 0.3 and 0.2; 0.3 and 0.1
        assert dict(ace.per_repeat) == {"seed 0": pytest.approx(0.25), "seed 1": pytest.approx(0.225)}
        assert ace.spread == pytest.approx(0.025 / math.sqrt(2))
        assert (ace.cases, ace.change.pairs) == (2, 2)
        assert rows[1].metrics["Dice"].mean == pytest.approx(0.6)
        assert dict(alone.per_repeat) == {}
        assert math.isnan(alone.spread)

    def test_equal_repeats_are_as_one(self):
        one = random_result("one", 0.4)
        summary, repeated = (
            compare_models([model])[0].metrics["MCE"]
            for model in (one, RepeatedResult("three", {str(i): one for i in range(3)}))
        )
        assert repeated.mean == pytest.approx(summary.mean)
        assert (repeated.low, repeated.high) == pytest.approx((summary.low, summary.high))
        assert repeated.spread == pytest.approx(0, abs=1e-12)

    def test_must_share_cases_and_classes(self):
        with pytest.raises(ValueError, match="has no repeat"):
            RepeatedResult("m", {})
        with pytest.raises(
            ValueError, match="repeat 'y' of 'm' has other cases, classes or subjects than 'x'"
        ):
            RepeatedResult("m", {"x": result("a", [0.1]), "y": result("b", [0.1, 0.2])})

    @pytest.mark.usefixtures("no_figures")
    def test_page_and_back(self, tmp_path, capsys):
        repeats = {"seed 0": result("a", [0.4, 0.2]), "seed 1": result("b", [0.2, 0.3])}
        page = write_report(tmp_path, [RepeatedResult("Dice", repeats)], title="seeds")
        before = page.read_text(encoding="utf-8")
        assert "±0.035, 2 repeats" in before
        with open(tmp_path / "cases" / "00-dice.csv", newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        assert [line["repeat"] for line in lines] == ["seed 0"] * 2 + ["seed 1"] * 2
        with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
            means = [x for x in csv.DictReader(file) if (x["model"], x["metric"]) == ("Dice", "ACE")]
        assert [line["repeat"] for line in means] == ["", "seed 0", "seed 1", ""]
        assert main([str(tmp_path)]) == 0
        assert page.read_text(encoding="utf-8") == before
        assert "±0.035, 2 repeats" in capsys.readouterr().out


@pytest.fixture(scope="module")
def rows():
    """A table of three models and a reference."""
    models = [random_result(f"a model with quite a long name, {i}", 0.9 - 0.3 * i) for i in range(3)]
    return compare_models(models, reference=random_result("true posterior", 0))


class TestText:
    @pytest.mark.parametrize("per_class", [False, True])
    def test_table_is_aligned_and_fits(self, per_class, rows):
        lines = format_table(rows, per_class=per_class).splitlines()
        assert max(map(len, lines)) <= 120
        at = lines[0].index("Dice")
        ends = [line for line in lines[2 : lines.index("")] if line.strip()]
        assert all(line[at - 1] == " " and line[at] != " " for line in ends)
        assert len(ends) == (14 if per_class else 6)

    def test_csv_and_json(self, tmp_path, rows):
        write_csv(rows, tmp_path / "table.csv")
        with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        assert len(lines) == len(rows) * 4 * 3
        (line,) = [x for x in lines if (x["model"], x["metric"], x["class"]) == (rows[1].name, "ACE", "mean")]
        assert float(line["mean"]) == rows[1].metrics["ACE"].mean
        assert float(line["difference_high"]) == rows[1].metrics["ACE"].change.difference_high
        alone = to_json(compare_models([result("m", [0.1])]))
        assert json.loads(json.dumps(alone, allow_nan=False))["models"][0]["metrics"]["ACE"]["low"] is None

    def test_headline(self):
        base, better = (
            result("Dice", [0.2, 0.3, 0.25, 0.2, 0.3, 0.4, 0.2], 0.811),
            result("+ mL1-ACE", [0.1, 0.15, 0.125, 0.1, 0.15, 0.2, 0.1], 0.807),
        )
        assert headline(compare_models([base, better])) == (
            "Compared with “Dice”, “+ mL1-ACE” cuts ACE by 50% and MCE by 50%; Dice changes by −0.004."
        )
        few = headline(compare_models([result("a", [0.2, 0.2]), result("b", [0.1, 0.1])]))
        assert few.endswith("Over 2 paired cases the change in ACE cannot be told from chance (p = 0.50).")
        assert "Dice stays the same" in few
        assert headline(compare_models([base])) == (
            "“Dice” has an ACE of 0.264, an MCE of 0.264 and a Dice of 0.811 over 7 cases."
        )


class Page(html.parser.HTMLParser):
    """Collects what a page refers to, and fails where its tags do not nest."""

    EMPTY = frozenset({"meta", "img", "br", "hr", "link"})

    def __init__(self, text):
        super().__init__()
        self.open, self.references, self.text, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


NASTY = "<script>alert('$x$ & \"y\"')</script>"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report with everything in it, to look at and not to change."""
    models = [random_result("Dice", 0.6), random_result(NASTY, 0.2, seed=1)]
    models[0] = dataclasses.replace(models[0], case_names=(NASTY, *models[0].case_names[1:]))
    models[1] = dataclasses.replace(models[1], case_names=(NASTY, *models[1].case_names[1:]))
    history = {
        "epoch": [1, 2],
        "train_loss": [0.9, 0.5],
        "val_loss": [0.8, None],
        "val_ace": np.array([0.3, 0.2]),
    }
    return write_report(
        tmp_path_factory.mktemp("written"),
        models,
        title="A & B <i>",
        histories={"Dice": history, NASTY: history},
        provenance={"command": "train --loss 'dice <ace>'", "data": "https://example.org/data"},
        reference=random_result("true posterior", 0, seed=2),
    )


@pytest.fixture
def report(written, tmp_path):
    """A copy of it."""
    return shutil.copytree(written.parent, tmp_path / "report") / "index.html"


@pytest.fixture
def no_figures(monkeypatch):
    """Pages without figures, which take seconds to draw."""
    monkeypatch.setattr("calib_jax.report.figures.report_figures", lambda *_, **__: [])


class TestPage:
    def test_is_whole_and_self_contained(self, written):
        text = written.read_text(encoding="utf-8")
        page = Page(text)
        assert page.references
        assert all(uri.startswith("data:image/svg+xml;base64,") for uri in page.references)
        assert page.tags.count("img") == 1 + 3 + 3 + 1
        assert "url(" not in text
        assert "@import" not in text
        assert "link" not in page.tags

    def test_escapes_names(self, written):
        page = Page(written.read_text(encoding="utf-8"))
        assert "script" not in page.tags
        assert "i" not in page.tags
        assert any(NASTY in text for text in page.text)

    def test_leaves_figures_and_tables_beside_it(self, written):
        files = sorted(
            str(path.relative_to(written.parent)) for path in written.parent.rglob("*") if path.is_file()
        )
        model = "01-script-alert-x-y-script"
        assert files == sorted(
            [
                "index.html",
                "report.json",
                "table.csv",
                "table.json",
                "cases/00-dice.csv",
                f"cases/{model}.csv",
                "results/00-dice.npz",
                f"results/{model}.npz",
                "results/02-true-posterior.npz",
                *(
                    f"figures/{kind}-{of}.png"
                    for kind in ("reliability", "histogram")
                    for of in ("all", "class-0", "class-1")
                ),
                "figures/cases.png",
                "figures/training.png",
            ]
        )

    def test_leaks_no_figure(self, written):
        assert plt.get_fignums() == []

    def test_many_models(self, tmp_path):
        """Twelve with long names, as six losses with and without temperature scaling are."""
        names = [f"dice+ce+{i}*softace with a long name" for i in range(12)]
        many = [random_result(name, 0.1, cases=3, classes=("t",), bins=2) for name in names]
        many[1] = RepeatedResult(names[1], {"seed 0": many[0], "seed 1": many[1]})
        page = write_report(tmp_path, many, title="t").read_text(encoding="utf-8")
        assert all(one.name in page for one in many)
        assert (tmp_path / "figures" / "cases.png").exists()

    def test_one_model_one_class_and_nothing_else(self, tmp_path):
        page = Page(
            write_report(tmp_path, [result("m", [0.1, np.nan])], title="t").read_text(encoding="utf-8")
        )
        assert page.tags.count("img") == 3

    def test_nothing_counted(self, tmp_path):
        empty = result("m", [np.nan, np.nan], np.nan)
        text = write_report(tmp_path, [empty, dataclasses.replace(empty, name="n")], title="t").read_text(
            encoding="utf-8"
        )
        assert "n/a" in text
        assert ">nan" not in text


@pytest.mark.usefixtures("no_figures")
def test_rows_are_computed_once_and_must_be_of_the_same_models(tmp_path, monkeypatch):
    models = [result("a", [0.1, 0.2]), result("b", [0.2, 0.3])]
    rows = compare_models(models)
    pages = [tmp_path / "computed", tmp_path / "passed"]
    write_report(pages[0], models, title="t")
    monkeypatch.setattr("calib_jax.report.page.compare_models", None)
    write_report(pages[1], models, title="t", rows=rows)
    assert pages[0].joinpath("index.html").read_bytes() == pages[1].joinpath("index.html").read_bytes()
    for others, options in ((models[:1], {}), (models, {"baseline": "b"})):
        with pytest.raises(ValueError, match="rows are of a, b"):
            write_report(tmp_path / "other", others, title="t", rows=rows, **options)


class TestCommandLine:
    def test_makes_the_same_page_again(self, report, capsys):
        before = report.read_bytes()
        report.unlink()
        assert main([str(report.parent)]) == 0
        assert report.read_bytes() == before
        assert f"Wrote {report}" in capsys.readouterr().out

    @pytest.mark.usefixtures("no_figures")
    def test_options_replace_what_was_saved(self, report, tmp_path, capsys):
        out = tmp_path / "again"
        options = ["--out", str(out), "--title", "New", "--baseline", "true posterior", "--reference", "Dice"]
        assert main([str(report.parent), *options]) == 0
        saved = json.loads((out / "report.json").read_text(encoding="utf-8"))
        assert (saved["title"], saved["baseline"]) == ("New", "true posterior")
        assert "dice" in saved["reference"]

    @pytest.mark.usefixtures("no_figures")
    def test_takes_bare_results(self, tmp_path, capsys):
        for i in range(2):
            random_result(f"model {i}", 0.5 - 0.4 * i).save(tmp_path / f"{i}.npz")
        assert main([str(tmp_path), "--per-class"]) == 0
        assert "anterior" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("prepare", "options", "message"),
        [
            (lambda folder: None, ["--baseline", "z"], "no result is called 'z'"),
            (lambda folder: None, ["--reference", "z"], "no result is called 'z'"),
            (lambda folder: (folder / "m.npz").write_text("x"), [], "m.npz is not a result"),
            (lambda folder: (folder / "m.npz").unlink(), [], "holds neither a report.json nor a result"),
            (lambda folder: (folder / "report.json").write_text("{}"), [], "is not an index"),
            (
                lambda folder: (folder / "m.npz").rename(folder.parent / "gone"),
                ["--title", "x"],
                "holds neither",
            ),
        ],
    )
    def test_errors_are_one_line_and_status_2(self, prepare, options, message, tmp_path, capsys):
        folder = tmp_path / "results"
        folder.mkdir()
        result("m", [0.1]).save(folder / "m.npz")
        prepare(folder)
        assert main([str(folder), *options]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1

    def test_absent_folder(self, tmp_path, capsys):
        assert main([str(tmp_path / "absent")]) == 2
        assert "there is no folder" in capsys.readouterr().err

    def test_help(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            main(["--help"])
        assert "examples:" in capsys.readouterr().out


HOSTILE = {
    "text.usetex": True,
    "font.family": ["serif"],
    "axes.formatter.use_locale": True,
    "axes.prop_cycle": matplotlib.cycler(color=["red"]),
    "figure.autolayout": True,
    "figure.constrained_layout.use": True,
    "savefig.bbox": "tight",
    "savefig.dpi": 30,
    "savefig.transparent": True,
    "path.sketch": (3, 100, 2),
    "interactive": True,
}
CONFIGURED = r"""
import sys, warnings
warnings.simplefilter("error")
import numpy as np
from calib_jax import BinStatistics
from calib_jax.report import ModelResult, write_report
count = np.full((2, 1, 2), 5)
stats = BinStatistics(count, 0.3 * count, 0.2 * count)
result = ModelResult("\u4e2d", ("a", "b"), ("c",), stats, np.full((2, 1), 0.8))
write_report(sys.argv[1], [result], title="t", provenance={"file": "caf\udce9"})
import matplotlib.rcsetup
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.rcParams._get("backend") is matplotlib.rcsetup._auto_backend_sentinel
from calib_jax.report.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


class TestSurroundings:
    def test_figures_do_not_depend_on_parameters_of_matplotlib_and_change_none(self, tmp_path):
        pages = []
        for parameters in ({}, HOSTILE):
            with matplotlib.rc_context(parameters):
                before = matplotlib.rcParams.copy()
                one = [random_result("Dice_CE & 100%", 0.5, cases=3, classes=("t",), bins=2)]
                pages.append(write_report(tmp_path / str(len(pages)), one, title="t"))
                assert matplotlib.rcParams == before
        assert pages[0].read_bytes() == pages[1].read_bytes()
        figures = [sorted(page.parent.glob("figures/*.png")) for page in pages]
        assert [file.read_bytes() for file in figures[0]] == [file.read_bytes() for file in figures[1]]

    def test_a_figure_that_fails_leaves_the_parameters_and_the_page(self, tmp_path, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("no font")

        monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
        before = matplotlib.rcParams.copy()
        with pytest.warns(RuntimeWarning, match="lacks figures.*no font"):
            page = write_report(tmp_path, [random_result("a", 0.5, cases=3)], title="t")
        assert "case_00" in page.read_text(encoding="utf-8")
        assert matplotlib.rcParams == before

    def test_neither_configuration_nor_home_nor_locale_matter(self, tmp_path):
        """The backend is unknown, the configuration no text, HOME a file, the terminal ASCII."""
        (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe")
        (tmp_path / "home").write_text("")
        names = ("XLA_FLAGS", "MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "PYTHONUTF8")
        environment = {name: value for name, value in os.environ.items() if name not in names}
        environment |= {"MPLBACKEND": "nonsense", "HOME": str(tmp_path / "home"), "PYTHONCOERCECLOCALE": "0"}
        environment |= {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
        environment["PYTHONPATH"] = str(Path(calib_jax.__file__).parents[1])
        command = [sys.executable, "-c", CONFIGURED, str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "Dice ^" in done.stdout
        assert len(list(tmp_path.glob("out/figures/*.png"))) == 3
        assert "caf\\udce9" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_print_puts_ascii_in_place_of_what_the_encoding_lacks(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    print_in_any_encoding()
    print("−0.1 ± 0.2 …\u4e2d\udce9", flush=True)
    assert stream.buffer.getvalue() == b"-0.1 +/- 0.2 ...\\u4e2d\\udce9\n"
