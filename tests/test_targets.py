"""Devices by name, and the processes that compile for them."""

import time
from pathlib import Path

import pytest

from train.errors import InputError
from train.targets import CompilationFailed, parse_target, run_for


def answer(name: str, target: str = "cpu:3", limit_s: float = 60) -> object:
    return run_for(parse_target(target), f"target_tasks:{name}", {"n": [1]}, limit_s)


@pytest.mark.parametrize(
    ("name", "platform", "count", "title"),
    [
        ("cpu", "cpu", 1, "1 CPU"),
        ("cpu:8", "cpu", 8, "8 CPU devices that share this machine"),
        ("h100", "cuda", 1, "1 H100 80GB"),
        ("h100:16", "cuda", 16, "16 H100 80GB"),
        ("v5e:1x1", "tpu", 1, "1 TPU v5e chip"),
        ("v5e:16x16", "tpu", 256, "256 TPU v5e chips"),
        ("v5p:2x2x1", "tpu", 4, "4 TPU v5p chips"),
        ("v6e:4x4", "tpu", 16, "16 TPU v6e chips"),
    ],
)
def test_names_of_devices(name: str, platform: str, count: int, title: str) -> None:
    target = parse_target(name)
    assert (target.platform, target.num_devices, target.title) == (platform, count, title)
    assert 0 < target.usable < target.memory


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v7:2x2", "target is 'v7:2x2': give one such as cpu"),
        ("cpu:0", "size '0': give a number of devices, as in cpu:8"),
        ("h100:x", "size 'x'"),
        ("h100:12", "no whole number of hosts of 8 GPUs: give a multiple of 8"),
        ("v5e", "topology '': give one such as v5e:4x4"),
        ("v5e:2x2x1", "topology '2x2x1'"),
        ("v5p:2x2", "give one such as v5p:2x2x1"),
        ("v6e:3x2", "no whole number of hosts"),
    ],
)
def test_devices_that_are_not_there(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_target(name)


def test_the_share_of_a_gpu_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    target = parse_target("h100")
    assert target.usable == int(0.9 * target.memory)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    assert parse_target("h100").usable == int(0.75 * target.memory)


@pytest.mark.parametrize(("name", "extra"), [("h100:8", "cuda13"), ("v5e:2x2", "tpu")])
def test_what_is_not_installed_is_named(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    monkeypatch.setattr("importlib.metadata.distributions", lambda: iter(()))
    words = rf"compiler for {name} is not installed: pip install 'jax\[{extra}\]=={jax.__version__}'"
    with pytest.raises(InputError, match=words):
        answer("tell", name)
    assert parse_target("cpu").install == ""


def test_a_process_has_the_environment_of_its_target(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2 --xla_dump_to=nowhere")
    monkeypatch.delenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", raising=False)
    told = answer("tell")
    assert told == {
        "target": "cpu:3",
        "request": {"n": [1]},
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_dump_to=nowhere --xla_force_host_platform_device_count=3",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": None,
    }
    assert parse_target("v5e:2x2").environment()["TPU_SKIP_MDS_QUERY"] == "1"
    assert parse_target("h100").environment()["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] == "1"
    assert capfd.readouterr() == ("", "")  # what a compiler prints is kept from the user


def test_fake_cpus() -> None:
    assert answer("count_devices") == 3


def test_bad_input_comes_back_as_such() -> None:
    with pytest.raises(InputError, match=r"patch is 7: give 8\."):
        answer("refuse")


def test_failures_say_what_the_compiler_said() -> None:
    with pytest.raises(CompilationFailed, match="RuntimeError: RESOURCE_EXHAUSTED: no memory"):
        answer("fail")
    with pytest.raises(CompilationFailed, match="ended with status 3\nthe last words"):
        answer("crash")


def _processes() -> set[str]:
    """Processes that this one has started, as Linux lists them."""
    return {pid for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()}


def test_a_compilation_that_takes_too_long_is_ended() -> None:
    start, before = time.monotonic(), _processes()
    with pytest.raises(CompilationFailed, match="not done after 1 s"):
        answer("hang", limit_s=1)
    assert time.monotonic() - start < 20
    assert _processes() <= before


@pytest.mark.parametrize("name", ["v5e:1x1", "v5e:4x4", "v5p:2x2x1", "v6e:2x2", "h100", "h100:8"])
def test_devices_of_a_compiler(name: str) -> None:
    target = parse_target(name)
    if target.install:
        pytest.skip(f"needs the compiler for {name}: {target.install}")
    assert answer("count_devices", name) == target.num_devices
