"""What a compiled program does, read from the text that XLA prints of it (HLO)."""

import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

_COMPUTATION = re.compile(r"(ENTRY )?%?(?P<name>[\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<rest>.*)$")
_OPCODE = re.compile(r"\s*(?P<opcode>[\w-]+)\(")
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*\w*)\[(?P<sizes>[\d,<=]*)\](?:\{(?P<layout>[^{}]*)\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_CALLED_LISTS = re.compile(r"(?:branch_computations|called_computations)=\{([^{}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_ALONE = re.compile(r"replica_groups=(?:\{\{\d+\}|\[\d+,1\]<=)")
_OPERAND = re.compile(r"%([\w.-]+)")
_TILE = re.compile(r"T\(([\d,]+)\)")
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")
# These write no array: names for parts of others, and the halves of a copy or exchange that are told by the other.
_WRITE_NOTHING = {
    "after-all",
    "async-done",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "copy-start",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
}


@dataclass(frozen=True)
class HloArray:
    """An array of a program, on one device.

    Attributes:
        shape: as XLA writes it, such as `f32[8,128]`.
        bytes: with the padding of its layout.
        net_bytes: without it.
        in_memory: False for arrays in a TPU's on-chip memory, which take none of the device's.
    """

    shape: str
    bytes: int
    net_bytes: int
    in_memory: bool = True


@dataclass(frozen=True)
class Instruction:
    """An instruction of a program.

    Attributes:
        name: unique in its computation.
        opcode: what it does.
        arrays: that it gives.
        operands: names of the instructions whose arrays it takes.
        called: names of computations.
        trips: how often a loop calls its body; 1 if unknown.
        op_name: where it comes from in the Python program.
        is_alone: whether it is an exchange of each device with itself.
    """

    name: str
    opcode: str
    arrays: tuple[HloArray, ...]
    operands: tuple[str, ...]
    called: tuple[str, ...]
    trips: int
    op_name: str
    is_alone: bool

    @property
    def net_bytes(self) -> int:
        """Of its arrays, without padding."""
        return sum(array.net_bytes for array in self.arrays)


@dataclass(frozen=True)
class Program:
    """A compiled program, as one device runs it.

    Attributes:
        computations: instructions by name, by the name of the computation.
        entry: name of the first computation.
    """

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str

    def instructions(self, *, into_fusions: bool = False) -> Iterator[tuple[Instruction, str, int]]:
        """Each instruction that runs, its computation's name, and how often it runs.

        Args:
            into_fusions: also those within fusions and reductions, which write no array of their own.
        """
        yield from self._of(self.entry, 1, into_fusions)

    def _of(self, name: str, times: int, into_fusions: bool) -> Iterator[tuple[Instruction, str, int]]:
        for instruction in self.computations.get(name, {}).values():
            yield instruction, name, times
            if instruction.opcode in ("async-update", "async-done"):
                continue  # the start has said what runs
            outer = instruction.opcode in ("while", "conditional", "call", "async-start")
            if outer or into_fusions:
                for called in instruction.called:
                    yield from self._of(called, times * instruction.trips, into_fusions)


def parse_program(text: str) -> Program:
    """Reads the text of an optimised program, as `jax.stages.Compiled.as_text` gives it."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if start := _COMPUTATION.match(line):
                current = computations.setdefault(start["name"], {})
                entry = start["name"] if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            instruction = _parse_instruction(found["name"], found["rest"])
            current[instruction.name] = instruction
    return Program(computations, entry)


def _parse_instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode = _OPCODE.match(text, end)
    assert opcode is not None, text
    last = _closing(text, opcode.end() - 1)
    attributes = text[last:]
    called = [*_CALLED.findall(attributes)]
    for names in _CALLED_LISTS.findall(attributes):
        called += [each.strip().removeprefix("%") for each in names.split(",")]
    trips, op_name = _TRIPS.search(attributes), _OP_NAME.search(attributes)
    return Instruction(
        name,
        opcode["opcode"],
        tuple(_parse_array(found) for found in _ARRAY.finditer(text[:end])),
        tuple(_OPERAND.findall(text[opcode.end() : last])),
        tuple(called),
        int(trips[1]) if trips and opcode["opcode"] == "while" else 1,
        op_name[1] if op_name else "",
        _ALONE.search(attributes) is not None,
    )


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    raise ValueError(f"no closing parenthesis: {text}")


def _parse_array(found: re.Match[str]) -> HloArray:
    dtype, layout = found["dtype"], found["layout"] or ""
    sizes = [int(size.removeprefix("<=")) for size in found["sizes"].split(",") if size]
    order, _, tiling = layout.partition(":")
    axes = [int(axis) for axis in order.split(",") if axis] or list(range(len(sizes)))[::-1]
    physical = [sizes[axis] for axis in reversed(axes)] if len(axes) == len(sizes) else list(sizes)
    if tile := _TILE.search(tiling):
        sides = [int(side) for side in tile[1].split(",")]
        physical = [1] * (len(sides) - len(physical)) + physical
        first = len(physical) - len(sides)
        physical[first:] = [
            -(-size // side) * side for size, side in zip(physical[first:], sides, strict=True)
        ]
    space = _MEMORY_SPACE.search(tiling)
    padded, net = (-(-math.prod(shape) * _bits(dtype) // 8) for shape in (physical, sizes))
    return HloArray(f"{dtype}[{found['sizes']}]", padded, net, not space or space[1] == "0")


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0  # a token


def collectives(program: Program) -> dict[str, dict[str, int]]:
    """What devices exchange in one run of a program: `{"all-reduce": {"count": 2, "bytes": 1200}}`.

    Bytes are the larger of what a device gives and what it gets. How much of that crosses a wire depends on the
    number of devices. Exchanges in a loop count as often as the loop runs.
    """
    found: dict[str, dict[str, int]] = {}
    for kind, _, size, times in _exchanges(program):
        row = found.setdefault(kind, {"count": 0, "bytes": 0})
        row["count"] += times
        row["bytes"] += times * size
    return {kind: found[kind] for kind in COLLECTIVES if kind in found}


def largest_exchanges(program: Program, most: int = 5) -> list[dict[str, Any]]:
    """The exchanges of most bytes in one run of a program, those of one origin together, the largest first."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for kind, origin, size, times in _exchanges(program):
        row = found.setdefault((kind, origin), {"kind": kind, "count": 0, "bytes": 0, "written_by": origin})
        row["count"] += times
        row["bytes"] += times * size
    return sorted(found.values(), key=lambda row: -row["bytes"])[:most]


def _exchanges(program: Program) -> Iterator[tuple[str, str, int, int]]:
    """Kind, origin, bytes and number of times of each exchange between devices."""
    for instruction, computation, times in program.instructions(into_fusions=True):
        # Of an exchange in two halves the second one gives the arrays.
        kind = instruction.opcode.removesuffix("-done")
        operands = program.computations[computation]
        halves = instruction.opcode.endswith("-done")
        start = operands.get(instruction.operands[0]) if halves and instruction.operands else instruction
        first = start or instruction
        if kind in COLLECTIVES and not first.is_alone:
            given = 0 if halves else sum(operands[n].net_bytes for n in instruction.operands if n in operands)
            origin = first.op_name or instruction.op_name or instruction.name
            yield kind, origin, max(instruction.net_bytes, given), times


def largest_arrays(program: Program, most: int = 5) -> list[dict[str, Any]]:
    """The largest arrays that a program writes to memory, equal shapes together, the largest first.

    These are the results of instructions and fusions of the program and its loops. Arrays may share memory, one
    after the other.
    """
    found: dict[str, dict[str, Any]] = {}
    for instruction, _, _ in program.instructions():
        if instruction.opcode in _WRITE_NOTHING or instruction.opcode.endswith("-start"):
            continue
        for array in instruction.arrays:
            if array.in_memory:
                row = {"shape": array.shape, "bytes": array.bytes, "count": 0, "written_by": []}
                row = found.setdefault(f"{array.shape} {array.bytes}", row)
                row["count"] += 1
                origin = instruction.op_name or instruction.name
                if origin not in row["written_by"] and len(row["written_by"]) < 3:
                    row["written_by"].append(origin)
    return sorted(found.values(), key=lambda row: -row["bytes"])[:most]


def bytes_moved(program: Program) -> int | None:
    """Bytes of the arrays that the instructions and fusions of a program take and give, each array once.

    An instruction that takes a part of an array counts as if it took the whole. Loops take many parts, so that of a
    program with a loop nothing is said.
    """
    moved = 0
    for instruction, computation, _ in program.instructions():
        if instruction.opcode == "while":
            return None
        if instruction.opcode in _WRITE_NOTHING or instruction.opcode.endswith("-start"):
            continue
        halves = instruction.opcode.endswith("-done")
        taken = (program.computations[computation].get(name) for name in instruction.operands if not halves)
        moved += sum(each.net_bytes for each in (instruction, *taken) if each)
    return moved


def describe_program(compiled: Any) -> dict[str, Any]:
    """Memory, work and exchanges of a compiled program, on one device, as plain JSON values.

    Args:
        compiled: a `jax.stages.Compiled`.
    """
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    program = parse_program(compiled.as_text())
    names = ("argument", "output", "alias", "temp", "generated_code")
    sizes = {f"{name}_bytes": getattr(memory, f"{name}_size_in_bytes") for name in names}
    total = sum(sizes.values()) - 2 * sizes["alias_bytes"]
    return {
        **sizes,
        "total_bytes": total,
        "flops": cost.get("flops"),
        "bytes_accessed": cost.get("bytes accessed", bytes_moved(program)),  # GPUs' compiler does not say
        "collectives": collectives(program),
        "largest_exchanges": largest_exchanges(program),
        "largest_arrays": largest_arrays(program),
    }


def compile_and_describe(
    function: Any, arguments: Iterable[Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Seconds to trace and to compile a jitted function, and `describe_program`.

    Args:
        function: from `jax.jit`.
        arguments: shapes with shardings, which name the devices.
        options: of the compiler.
    """
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile(dict(options) or None)
    seconds = {"trace_s": traced - start, "compile_s": time.perf_counter() - traced}
    return {**{name: round(value, 2) for name, value in seconds.items()}, **describe_program(compiled)}
