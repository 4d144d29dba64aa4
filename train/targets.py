"""Devices to compile for that need not be here: XLA's compilers for GPUs and TPUs run on any machine.

Each program is compiled in a process of its own: its environment says which devices there are, what the compiler
prints stays out of the user's sight, and a compiler that crashes or takes too long ends nothing else. This module
imports nothing heavy.
"""

import contextlib
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from train.errors import InputError

GIB = 2**30

# Public figures of an H100 80GB SXM, which the compiler asks for.
_H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 patch: 1 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 clock_rate_ghz: 1.98 fpus_per_core: 128
  device_memory_size: 84978434048 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
"""
_H100_BYTES = 84978434048
_GPUS_OF_A_HOST = 8
# What JAX takes of a GPU's memory unless the environment says otherwise.
_GPU_SHARE = 0.75
# GiB that the compiler may use of a chip's memory: the rest is the runtime's.
_TPU_GIB = {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25}
_NAMES = "cpu, cpu:8, h100, h100:8, v5e:2x2, v5p:2x2x1, v6e:4x4"


@dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
        name: as the user writes it, such as `v5e:4x4`.
        platform: what JAX calls the platform.
        num_devices: number of devices.
        memory: bytes of each device that a program may hope for.
        share: the share of `memory` that may be planned for; the rest is a margin.
        margin: what the margin is for.
        title: the devices in words.
    """

    name: str
    platform: Literal["cpu", "cuda", "tpu"]
    num_devices: int
    memory: int
    share: float
    margin: str
    title: str

    @property
    def usable(self) -> int:
        """Bytes of each device that may be planned for."""
        return int(self.share * self.memory)

    @property
    def install(self) -> str:
        """The command that installs the compiler; empty if it is there."""
        packages = [distribution.name.lower() for distribution in metadata.distributions()]
        # A folder `libtpu` in the working directory could be imported too, so look for the package's metadata.
        there = {
            "cpu": True,
            "cuda": any(re.fullmatch(r"jax[-_]cuda\d+[-_]pjrt", name) for name in packages),
            "tpu": "libtpu" in packages,
        }
        if there[self.platform]:
            return ""
        extra = {"cuda": "cuda13", "tpu": "tpu"}[self.platform]
        return f"pip install 'jax[{extra}]=={metadata.version('jax')}'"

    def check_installed(self) -> None:
        """Raises `InputError` with the command that installs the compiler, if it is not installed."""
        if command := self.install:
            raise InputError(f"The compiler for {self.name} is not installed: {command}")

    def environment(self) -> dict[str, str]:
        """Environment variables of a process that compiles for the devices."""
        # The devices are described, not opened: another process may hold them, or there are none.
        variables = {"JAX_PLATFORMS": "cpu"}
        if self.platform == "cuda":
            variables["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        elif self.platform == "tpu":
            variables["TPU_SKIP_MDS_QUERY"] = "1"
            # The compiler takes no chip, so it need not wait for a process that has one.
            variables["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
        else:
            count = "--xla_force_host_platform_device_count"
            others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(count)]
            variables["XLA_FLAGS"] = " ".join([*others, f"{count}={self.num_devices}"])
        return variables

    def devices(self) -> Any:
        """The devices, to make a mesh of. Call it in a process with the `environment` of the target."""
        import jax
        from jax.experimental import topologies

        if self.platform == "cpu":
            return jax.devices("cpu")
        if self.platform == "cuda":
            jax.devices()  # JAX loads the plugins of platforms when it first looks for devices
            hosts = -(-self.num_devices // _GPUS_OF_A_HOST)
            shape = f"1x{hosts}x{self.num_devices // hosts}"
            return topologies.get_topology_desc(shape, "cuda", topology=shape, target_config=_H100).devices
        # By default a host has four chips.
        one_chip = {"chips_per_host_bounds": (1, 1, 1)} if self.num_devices == 1 else {}
        return topologies.get_topology_desc(self.name, "tpu", **one_chip).devices

    def compiler_options(self) -> dict[str, Any]:
        """Options for `jax.stages.Lowered.compile`."""
        # Without a device nothing can be timed to choose between algorithms.
        return {"xla_gpu_autotune_level": 0} if self.platform == "cuda" else {}


def parse_target(name: str) -> Target:
    """The devices that a name stands for.

    Args:
        name: `cpu` or `cpu:8` for devices that share this machine, `h100` or `h100:8`, or a TPU with its topology,
            `v5e:4x4`.

    Raises:
        InputError: there are no such devices.

    Example:
        >>> parse_target("v5e:4x4").title, parse_target("h100:8").num_devices
        ('16 TPU v5e chips', 8)
    """
    kind, _, size = name.partition(":")
    if kind in ("cpu", "h100"):
        count = size or "1"
        if not count.isdecimal() or not int(count):
            raise InputError(
                f"target {name!r} has the size {size!r}: give a number of devices, as in {kind}:8."
            )
        return _cpu(name, int(count)) if kind == "cpu" else _h100(name, int(count))
    if kind in _TPU_GIB:
        axes = 3 if kind == "v5p" else 2
        sides = size.split("x")
        if len(sides) != axes or not all(side.isdecimal() and int(side) for side in sides):
            example = "2x2x1" if axes == 3 else "4x4"
            raise InputError(f"target {name!r} has the topology {size!r}: give one such as {kind}:{example}.")
        count = math.prod(map(int, sides))
        if count > 1 and any(int(side) % 2 for side in sides[:2]):
            raise InputError(
                f"target {name!r} is no whole number of hosts of 2x2 chips: let its sides be even."
            )
        chips = "chip" if count == 1 else "chips"
        memory = int(_TPU_GIB[kind] * GIB)
        return Target(name, "tpu", count, memory, 0.95, "5% for fragments", f"{count} TPU {kind} {chips}")
    raise InputError(f"target is {name!r}: give one such as {_NAMES}.")


def _cpu(name: str, count: int) -> Target:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // count
    devices = "1 CPU" if count == 1 else f"{count} CPU devices that share this machine"
    return Target(name, "cpu", count, memory, 0.9, "10% for the system and the loader", devices)


def _h100(name: str, count: int) -> Target:
    if count > _GPUS_OF_A_HOST and count % _GPUS_OF_A_HOST:
        raise InputError(f"target {name!r} is no whole number of hosts of 8 GPUs: give a multiple of 8.")
    share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", _GPU_SHARE))
    margin = f"{1 - share:.0%} that JAX leaves unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise"
    return Target(name, "cuda", count, _H100_BYTES, share, margin, f"{count} H100 80GB")


def use_no_device() -> None:
    """Keeps this process from opening GPUs and TPUs: others may hold them, and a plan needs none."""
    import jax

    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    config: Any = jax.config
    config.update("jax_platforms", "cpu")


class CompilationFailed(Exception):
    """A compiler gave up: says why in a few lines."""


def run_for(target: Target, function: str, request: Any, limit_s: float) -> Any:
    """Calls a function in a fresh process that sees the target's devices.

    Args:
        target: must be installed.
        function: `module:name` of a function from (target, request) to plain JSON values.
        request: plain JSON values.
        limit_s: seconds after which the process is ended.

    Raises:
        InputError: the function raised it, or the compiler is not installed.
        CompilationFailed: the function raised anything else, or the process crashed or took too long.
    """
    target.check_installed()
    root = str(Path(__file__).resolve().parents[1])
    # The paths of this process: its networks and data sets may come from outside the project.
    paths = dict.fromkeys([root, os.getcwd(), *filter(None, sys.path)])
    with tempfile.TemporaryDirectory() as folder:
        answer, told = Path(folder) / "answer.json", Path(folder) / "stderr"
        variables = {
            **os.environ,
            **target.environment(),
            "PYTHONPATH": os.pathsep.join(paths),
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # a program from the cache takes no time
        }
        command = [sys.executable, "-c", "from train.targets import _answer; _answer()"]
        with told.open("w") as stderr:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=stderr,
                stderr=stderr,
                env=variables,
                text=True,
                start_new_session=True,
            )
            try:
                task = {
                    "target": target.name,
                    "function": function,
                    "request": request,
                    "answer": str(answer),
                }
                process.communicate(json.dumps(task), timeout=limit_s)
            except subprocess.TimeoutExpired:
                raise CompilationFailed(f"not done after {limit_s:g} s") from None
            finally:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if not answer.exists():
            last = told.read_text(errors="replace").strip().splitlines()[-5:]
            raise CompilationFailed(
                "\n".join([f"the compiler ended with status {process.returncode}", *last])
            )
        found = json.loads(answer.read_text())
    if "refused" in found:
        raise InputError(found["refused"])
    if "failed" in found:
        raise CompilationFailed(found["failed"])
    return found["result"]


def _answer() -> None:
    """The other side of `run_for`: reads the request from stdin and writes the answer to its file."""
    task = json.load(sys.stdin)
    module, _, name = task["function"].partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        found = {"result": function(parse_target(task["target"]), task["request"])}
    except InputError as error:
        found = {"refused": str(error)}
    except Exception as error:  # a compiler may raise anything
        found = {"failed": f"{type(error).__name__}: {error}"}
    file = Path(task["answer"])
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(found))
    partial.rename(file)


def format_bytes(count: float) -> str:
    """Bytes in the unit in which they have one to four digits.

    Example:
        >>> format_bytes(1536), format_bytes(3 * 2**30)
        ('1.50 KiB', '3.00 GiB')
    """
    units = ("bytes", "KiB", "MiB", "GiB")
    power = min(int(math.log(max(count, 1), 1000)), len(units) - 1)
    value = count / 1024**power
    return f"{value:.0f} {units[power]}" if not power or value >= 100 else f"{value:#.3g} {units[power]}"
