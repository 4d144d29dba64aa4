"""What a run leaves on disk: which checkpoints are kept, full disks, half-written logs, who is at work."""

import gc
import json
import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from calib_jax import BinStatistics
from calib_jax.report import ModelResult
from train.config import TrainingConfig, read_config
from train.errors import InputError, NotFinite, Stopped
from train.run.checkpoint import Checkpoints
from train.run.folder import claimed, open_run, process_of, stop_on_signal, writing
from train.run.logs import CsvLog, RunLog, divergence, parse_log, read_log
from train.run.status import status
from train.step import TrainState

KEEP = TrainingConfig(keep_best="dice-ace")
CASES = ["case 1", "case 2"]


# Objects of Orbax whose write failed complain of their closed event loop when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def _collected_here() -> Iterator[None]:
    yield
    gc.collect()


write_fails = pytest.mark.usefixtures("_collected_here")


def state(step: int, size: int = 4) -> TrainState:
    noise = np.random.default_rng(step).normal(size=size).astype(np.float32)
    return TrainState(jnp.int32(step), {"w": jnp.asarray(noise)}, {}, {"m": jnp.float32(step)})


@contextmanager
def full_disk(most: int = 0) -> Iterator[None]:
    """No file may grow beyond `most` bytes, root's included."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_two_and_the_best_are_kept(tmp_path: Path) -> None:
    measured = [
        {},
        {"Dice": 0.8, "ACE": 0.1},
        {"Dice": 0.9, "ACE": 0.3},  # the best Dice, but not Dice - ACE
        {"Dice": float("nan"), "ACE": 0.0},
        {"Dice": 0.5, "ACE": 0.1},
        {},
    ]
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        assert checkpoints.latest_step is None
        checkpoints.save(state(1), {"n": 1}, measured[0])
        assert checkpoints.best_step is None  # it was not validated
        for step, metrics in enumerate(measured[1:], 2):
            checkpoints.save(state(step), {"n": step}, metrics)
    assert kept(tmp_path) == ["2", "5", "6"]
    assert json.loads((tmp_path / "2" / "metrics" / "metrics").read_text()) == measured[1]
    with Checkpoints(tmp_path, KEEP) as checkpoints:  # as a resumed run does
        assert (checkpoints.latest_step, checkpoints.best_step) == (6, 2)
        checkpoints.save(state(7), {"n": 7}, {"Dice": 0.7, "ACE": 0.1})
        checkpoints.save(state(8), {"n": 8}, {})
    assert kept(tmp_path) == ["2", "7", "8"]
    with Checkpoints(tmp_path, KEEP, read_only=True) as checkpoints:
        for which, step in (("last", 8), ("best", 2)):
            restored, data = checkpoints.restore(state(0), which)
            np.testing.assert_array_equal(restored.params["w"], state(step).params["w"])
            assert data == {"n": step}


def test_a_network_is_read_without_the_moments(tmp_path: Path) -> None:
    def bytes_read() -> int:
        (metric,) = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
        return sum(value["value"] for value in metric["values"])

    moments = {"m": jnp.asarray(np.random.default_rng(0).normal(size=500_000), jnp.float32)}
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        checkpoints.save(state(1)._replace(opt_state=moments), {"n": 1}, {})
    with Checkpoints(tmp_path, KEEP, read_only=True) as checkpoints:
        before = bytes_read()
        network, data = checkpoints.restore(state(0)._replace(opt_state=None))
        assert bytes_read() - before < 100_000
        assert network.opt_state is None
        assert data == {"n": 1}
        np.testing.assert_array_equal(network.params["w"], state(1).params["w"])
        whole, _ = checkpoints.restore(state(0)._replace(opt_state=moments))
        assert bytes_read() - before > 1_000_000
        np.testing.assert_array_equal(whole.opt_state["m"], moments["m"])


@pytest.mark.parametrize("params", [{"w": jnp.zeros(5)}, {"w": jnp.zeros(4), "more": jnp.zeros(2)}])
@write_fails
def test_a_checkpoint_of_another_network_is_refused(params: dict[str, jax.Array], tmp_path: Path) -> None:
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        checkpoints.save(state(1), {}, {})
    with Checkpoints(tmp_path, KEEP, read_only=True) as checkpoints:
        for like in (state(0)._replace(params=params), state(0)._replace(params=params, opt_state=None)):
            with pytest.raises(InputError, match=r"Checkpoint .*1 could not be read"):
                checkpoints.restore(like)


# Characters that mean something in patterns, URLs, shells, and the rest; no name holds a slash or a null.
NAMES = st.text("[]*?\\{}%#:'\"\n\t ~$&|<>-.=ab09éé日", min_size=1, max_size=12) | st.text(
    st.characters(exclude_characters="/\0", max_codepoint=0x2FF), min_size=1, max_size=12
)


@settings(max_examples=6, deadline=None)
@example("fold[0]")
@example("a*")
@example("back\\slash")
@example("gs:")
@example("s3:")
@example("ends in dots...")
@example("\udc80 is no Unicode")
@example("x" * 255)
@given(NAMES.filter(lambda name: name not in (".", "..")))
def test_a_run_folder_may_have_any_name(name: str) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, name, "checkpoints")
        with Checkpoints(folder, KEEP) as checkpoints:
            checkpoints.save(state(1), {"n": 1}, {"Dice": 0.5, "ACE": 0.1})
        with Checkpoints(folder, KEEP, read_only=True) as checkpoints:
            restored, data = checkpoints.restore(state(0))
        np.testing.assert_array_equal(restored.params["w"], state(1).params["w"])
        assert data == {"n": 1}


def test_folders_whose_names_are_patterns_of_one_another(tmp_path: Path) -> None:
    for step, name in enumerate(("run 1", "run ?", "run *", "run [12]", "run 2")):
        with Checkpoints(tmp_path / name, KEEP) as checkpoints:
            checkpoints.save(state(step), {}, {})
    for step, name in enumerate(("run 1", "run ?", "run *", "run [12]", "run 2")):
        with Checkpoints(tmp_path / name, KEEP, read_only=True) as checkpoints:
            np.testing.assert_array_equal(
                checkpoints.restore(state(9))[0].params["w"], state(step).params["w"]
            )


def damage(folder: Path) -> None:
    """Waits for the checkpoint of step 1, and takes its arrays away."""
    while not (folder / "1").exists():
        time.sleep(0.01)
    for file in (folder / "1" / "state").rglob("*"):
        if file.is_file() and file.name != "_METADATA":
            file.write_bytes(b"")


@write_fails
def test_the_first_checkpoint_is_read_back(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        checkpoints.save(state(1), {}, {})
        damage(tmp_path)
        with pytest.raises(
            InputError, match=r"1 was written but cannot be read back \(.*choose another --out"
        ):
            check_until_it_fails(checkpoints)


@write_fails
def test_the_first_checkpoint_holds_what_was_saved(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "other", KEEP) as checkpoints:
        checkpoints.save(state(1)._replace(opt_state={"m": jnp.float32(7)}), {}, {})
    with Checkpoints(tmp_path / "run", KEEP) as checkpoints:
        checkpoints.save(state(1), {}, {})
        damage(tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "1")
        shutil.copytree(tmp_path / "other" / "1", tmp_path / "run" / "1")
        with pytest.raises(
            InputError, match=r"run/1 was written .* \(it holds other numbers than were saved\)"
        ):
            checkpoints.save(state(2), {}, {})


def test_without_a_best_one_the_newest_two(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, TrainingConfig()) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(state(step), {}, {"Dice": 1 / step, "ACE": 0.1})
        assert checkpoints.best_step is None
        with pytest.raises(InputError, match="keeps no best checkpoint: train with --keep-best"):
            checkpoints.restore(state(0), "best")
    assert kept(tmp_path) == ["2", "3"]


@pytest.mark.parametrize(
    ("keep_best", "score"),
    [("dice", 0.8), ("ace", -0.1), ("mce", -0.3), ("dice-ace", 0.7), ("ece", -np.inf)],
)
def test_scores(keep_best: str, score: float) -> None:
    config = TrainingConfig(keep_best=keep_best)
    assert config.score({"Dice": 0.8, "ACE": 0.1, "MCE": 0.3, "ECE": float("nan")}) == pytest.approx(score)
    assert config.score({}) == -np.inf


@write_fails
def test_a_full_disk_loses_the_newest_checkpoint_and_says_so(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state(step, 50_000), {}, {"Dice": 0.5, "ACE": 0.1})
        checkpoints.wait()
        with full_disk(20_000):
            checkpoints.save(state(3, 50_000), {}, {"Dice": 0.9, "ACE": 0.1})
            with pytest.raises(InputError) as failed:
                checkpoints.wait()
    message = str(failed.value)
    newest = f"from step 2, whose checkpoint is {tmp_path / '2'}"
    for words in ("could not be written", str(tmp_path), "--resume", newest):
        assert words in message
    assert "\n" not in message
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        assert (checkpoints.latest_step, checkpoints.best_step) == (2, 2)
        restored, _ = checkpoints.restore(state(0, 50_000))
        np.testing.assert_array_equal(restored.params["w"], state(2, 50_000).params["w"])
        checkpoints.save(state(3, 50_000), {}, {"Dice": 0.9, "ACE": 0.1})
    assert kept(tmp_path) == ["2", "3"]  # what was half written is gone


@write_fails
def test_a_checkpoint_that_failed_is_noticed_before_the_next(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        checkpoints.save(state(1, 50_000), {}, {"Dice": 0.5, "ACE": 0.1})
        checkpoints.save(state(2, 50_000), {}, {})
        checkpoints.wait()
        checkpoints.check()
        with full_disk(20_000):
            checkpoints.save(state(3, 50_000), {}, {"Dice": 0.9, "ACE": 0.1})
            with pytest.raises(InputError, match="from step 2"):
                check_until_it_fails(checkpoints)
    assert {"1", "2"} <= set(kept(tmp_path))  # the best until then as well


def check_until_it_fails(checkpoints: Checkpoints) -> None:
    for _ in range(30_000):  # as a run does now and then
        checkpoints.check()
        time.sleep(0.001)


def save_in_vain(folder: Path) -> None:
    with full_disk(20_000), Checkpoints(folder, KEEP) as checkpoints:
        checkpoints.save(state(1, 50_000), {}, {})


def save_in_vain_and_fail(folder: Path) -> None:
    with full_disk(20_000), Checkpoints(folder, KEEP) as checkpoints:
        checkpoints.save(state(1, 50_000), {}, {})
        raise NotFinite("The loss is not finite", CASES)


@write_fails
def test_what_goes_wrong_first_is_what_is_told(tmp_path: Path) -> None:
    """The last checkpoint's failure is told when the run ends, and hides nothing that came before."""
    with pytest.raises(InputError, match="could not be written"):
        save_in_vain(tmp_path)
    with pytest.raises(NotFinite):
        save_in_vain_and_fail(tmp_path)


def row(step: int, **more: float) -> dict[str, float]:
    return {"step": step, "loss": 1 / (step + 3), "grad_norm": 1.0, **more}


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0, 4) as log:
        log.add_step(row(0), CASES)
        log.flush()
        size = (tmp_path / "log.csv").stat().st_size
        log.add_step(row(1), CASES)
        cut_short = full_disk(size + 5)
        with cut_short, pytest.raises(InputError, match=r"log.csv could not be written .*: make room"):
            log.flush()
    assert [r["step"] for r in read_log(tmp_path / "log.csv")] == [0]
    with RunLog(tmp_path, 1, 4) as log:
        log.add_step(row(1), CASES)
        log.flush()
    assert [r["step"] for r in read_log(tmp_path / "log.csv")] == [0, 1]


def test_tensorboard_that_cannot_be_written(tmp_path: Path) -> None:
    count = np.ones((1, 1, 2), int)
    stats = BinStatistics(count, 0.5 * count, 0.5 * count)
    result = ModelResult("m", ("case 1",), ("c",), stats, np.array([[0.5]]))
    # Room for the CSV, not for the picture; and closing fails as well.
    refused = pytest.raises(InputError, match=r"tensorboard could not be written .*: make room")
    with full_disk(1000), RunLog(tmp_path, 0, 4) as log, refused:
        log.validation(1, {"Dice": 0.5}, result)
    assert [r["step"] for r in read_log(tmp_path / "validation.csv")] == [1]


def test_a_picture_that_fails_is_one_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("matplotlib.figure.Figure.add_subplot", fail)
    count = np.ones((1, 1, 2), int)
    stats = BinStatistics(count, 0.5 * count, 0.5 * count)
    with RunLog(tmp_path, 0, 4) as log:
        for step in (1, 2):
            log.validation(
                step, {"Dice": 0.5}, ModelResult("m", ("case 1",), ("c",), stats, np.array([[0.5]]))
            )
    assert [r["step"] for r in read_log(tmp_path / "validation.csv")] == [1, 2]
    assert capsys.readouterr().out.count("note: ") == 1


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_numbers_that_are_not_finite_stop_a_run(name: str, tmp_path: Path) -> None:
    with RunLog(tmp_path, 0, 4) as log:
        log.add_step(row(0), ["another"])
        log.add_step(row(1) | {name: float("inf")}, CASES)
        with pytest.raises(NotFinite, match=r"from step 1 on, .* case 1, case 2"):
            log.flush()
    assert len(read_log(tmp_path / "log.csv")) == 2


@pytest.mark.parametrize("cut", [2, 5, 8])
def test_half_a_line_is_no_row(cut: int, tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "log.csv")
    log.add([row(step) for step in range(3)])
    whole = (tmp_path / "log.csv").read_bytes()
    (tmp_path / "log.csv").write_bytes(whole[:-cut])
    assert [r["step"] for r in read_log(tmp_path / "log.csv")] == [0, 1]
    CsvLog(tmp_path / "log.csv", before_step=2).add([row(2)])
    assert (tmp_path / "log.csv").read_bytes() == whole


GARBLED = [
    "",
    "x",
    "1,2",
    "1,2,3,4",
    "1,two,3",
    "\0\0\0",
    ",,",
    '"',
    "nan,1,1",
    "0.5,1,1",
    "\ufffd",
    "-1,0,0",
]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(GARBLED) | st.text("01,.e\"'\0é\x1c", max_size=6), min_size=1, max_size=4),
    st.data(),
)
def test_garbled_lines_are_left_out(tmp_path: Path, garbled: list[str], data: st.DataObject) -> None:
    file = tmp_path / "log.csv"
    file.unlink(missing_ok=True)
    CsvLog(file).add([row(step) for step in range(3)])
    header, *lines = file.read_text().split("\n")[:-1]
    for text in garbled:
        # A line of three numbers is a row, whoever wrote it.
        lines.insert(data.draw(st.integers(0, len(lines))), text + ("," if text.count(",") == 2 else ""))
    file.write_text("\n".join([header, *lines]) + "\n", newline="")
    rows, broken = parse_log(file)
    assert [r["step"] for r in rows] == [0, 1, 2]
    assert len(broken) == len(garbled)
    CsvLog(file, before_step=2).add([row(2)])
    assert parse_log(file)[1] == []
    assert [r["step"] for r in read_log(file)] == [0, 1, 2]
    assert "\n".join(lines) in (tmp_path / "log.csv.damaged").read_bytes().decode()


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe\n1\n", b"loss\n0.5\n", b"\0" * 9 + b"\n1,2\n"])
def test_a_log_whose_header_is_garbled_has_no_row(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes(content)
    assert read_log(tmp_path / "log.csv") == []
    CsvLog(tmp_path / "log.csv").add([row(0)])
    assert [r["step"] for r in read_log(tmp_path / "log.csv")] == [0]


def losses(*values: float, **more: float) -> list[dict[str, float]]:
    return [{"step": step, "loss": 0.0, "ce": ce, **more} for step, ce in enumerate(values)]


def test_a_training_that_has_diverged_is_told() -> None:
    falling, noise = np.geomspace(0.7, 0.01, 100), np.random.default_rng(0).uniform(0.5, 2, 100)
    assert divergence(losses(*falling, ace=1.0)) == ""
    assert divergence(losses(*falling * noise)) == ""
    assert divergence(losses(*[0.7] * 39, 1e9)) == ""  # one batch is no training
    assert divergence(losses(*[1e-3] * 50, *[0.7] * 50)) == ""  # nor is an uncertain network a broken one
    assert divergence(losses(*[1e9] * 30)) == ""
    assert "ce is 1e+09 at step 5 and was 0.7" in divergence(losses(0.7, *[1e9] * 5))
    assert "ce is 1e+09 at step 99 and was 0.7" in divergence(losses(*[0.7] * 50, *[1e9] * 50))


@pytest.mark.parametrize(
    "content", ["[]", "{}", "null", '"', "\0", '{"name": []}', '{"name": 1, "state": 2}']
)
def test_a_garbled_process_file(content: str, tmp_path: Path) -> None:
    (tmp_path / "process.json").write_text(content)
    found = process_of(tmp_path)
    assert found is None or not found.running


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", '"config"', '{"config": [1]}', '{"config": {"loss": 1, "data": []}}', "\0", "\ud800"],
)
def test_a_garbled_configuration(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogatepass"))
    for action in (status, read_config, lambda folder: open_run(folder, KEEP, resume=True)):
        with pytest.raises(InputError, match=r"config\.json"):
            action(tmp_path)


def test_a_log_of_a_version_that_logged_less(tmp_path: Path) -> None:
    CsvLog(tmp_path / "log.csv").add([row(0)])
    CsvLog(tmp_path / "log.csv", before_step=1).add([row(1, more=2.0)])
    rows = read_log(tmp_path / "log.csv")
    assert rows[1]["more"] == 2.0
    assert np.isnan(rows[0]["more"])


def test_one_process_at_a_time_and_how_it_ended(tmp_path: Path) -> None:
    assert process_of(tmp_path) is None
    with claimed(tmp_path):
        found = process_of(tmp_path)
        assert found is not None
        assert found.running
        assert str(os.getpid()) in found.name
        with pytest.raises(InputError, match=f"in use by process {os.getpid()}"), claimed(tmp_path):
            pass
    for error, ended in (
        (Stopped("asked to", 143), "stopped"),
        (KeyboardInterrupt(), "stopped"),
        (InputError("bad"), "failed: bad"),
    ):
        with pytest.raises(type(error)), claimed(tmp_path):
            raise error
        found = process_of(tmp_path)
        assert found is not None
        assert (found.running, found.state) == (False, ended)
    (tmp_path / "process.json").write_text("{")  # half written
    assert process_of(tmp_path) is None


def test_signals_ask_once_and_ctrl_c_twice_interrupts(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_on_signal() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == signal.SIGTERM
    with stop_on_signal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == signal.SIGINT
        assert "Ctrl-C again" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_run_killed_at_its_very_start_can_be_begun_again(tmp_path: Path) -> None:
    (tmp_path / "config.json.partial").write_text("{")
    open_run(tmp_path, KEEP, resume=True)
    with pytest.raises(InputError, match="already holds another run"):
        open_run(tmp_path, KEEP, resume=False)


def test_writing_names_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"absent/file could not be written \(No such file"),
        writing(tmp_path),
    ):
        (tmp_path / "absent" / "file").write_text("")
