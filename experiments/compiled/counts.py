"""Counts what a compiled program does: bytes by kind of collective, FLOPs of products.

XLA's own figures count the body of a loop once. Here a body counts as often as its
loop runs, which the program says in one of three ways: `known_trip_count`; a condition
`counter < N` on a counter that starts at 0 and rises by 1, which is what `lax.scan`
makes; or a flag that the body lowers, one turn at most. A loop that says none of these
counts once and is reported as unknown.

Only text is read, in the form of `compiled.as_text()`, for the partitioned program of
one device.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Self

from experiments.compiled.hlo import (
    Instruction,
    Program,
    bytes_of,
    read_program,
    shape_of,
)

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_CALLED = re.compile(r"\b(?:calls|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}"
    r"|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+))"
)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one device does in one run of a program.

    Attributes:
        sent: Bytes that a device sends, by kind of collective, as rings do it: of an
            array of S bytes among g devices an all-gather, reduce-scatter or
            all-to-all sends S (g - 1) / g, an all-reduce twice that, a permute S.
        flops: Operations of matrix products (dots and convolutions), a multiply-add
            counted as two. Factorisations' own kernels are not among them.
        unknown_loops: Loops that do not say how often they run, counted once.
    """

    sent: Mapping[str, float] = dataclasses.field(default_factory=dict)
    flops: float = 0.0
    unknown_loops: int = 0

    def __add__(self, other: Self) -> "Counts":
        """Add what is done one after the other."""
        kinds = self.sent.keys() | other.sent.keys()
        return Counts(
            {kind: self.sent.get(kind, 0) + other.sent.get(kind, 0) for kind in kinds},
            self.flops + other.flops,
            self.unknown_loops + other.unknown_loops,
        )

    def times(self, repetitions: int) -> "Counts":
        """Repeat; a loop in a loop is still one loop."""
        sent = {kind: count * repetitions for kind, count in self.sent.items()}
        return Counts(sent, self.flops * repetitions, self.unknown_loops)

    def at_most(self, other: Self) -> "Counts":
        """Take the larger of two of which one is done."""
        kinds = self.sent.keys() | other.sent.keys()
        return Counts(
            {k: max(self.sent.get(k, 0), other.sent.get(k, 0)) for k in kinds},
            max(self.flops, other.flops),
            max(self.unknown_loops, other.unknown_loops),
        )


def count(program: str) -> Counts:
    """Counts the collectives and products of a compiled program.

    Args:
        program: `compiled.as_text()`.

    Raises:
        ValueError: The text is no compiled program.
    """
    counter = _Counter(read_program(program))
    return counter.computation(counter.program.entry)


class _Counter:
    """Counts each computation of a program once, and adds up who calls whom."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.computation = functools.cache(self._computation)

    def _computation(self, name: str) -> Counts:
        instructions = self.program.computations[name]
        types = {i.name: i.type for i in instructions}
        total = Counts()
        for instruction in instructions:
            total += self._one(instruction, types, name)
        return total

    def _one(
        self, instruction: Instruction, types: Mapping[str, str], computation: str
    ) -> Counts:
        attributes, opcode = instruction.attributes, instruction.opcode
        operands = [types.get(name, "") for name in instruction.operands]
        kind = opcode.removesuffix("-start")
        if kind in _COLLECTIVES:
            return self._collective(kind, instruction, operands, computation)
        match opcode:
            case "dot":
                return Counts(flops=_dot_flops(instruction, operands))
            case "convolution":
                return Counts(flops=_convolution_flops(instruction, operands))
            case "while":
                names = dict(re.findall(r"\b(body|condition)=%?([\w.\-]+)", attributes))
                trips = self._trip_count(attributes, names["condition"], names["body"])
                body = self.computation(names["body"])
                if trips is None:
                    return body + Counts(unknown_loops=1)
                return body.times(trips)
            case "conditional":
                branches = ",".join(filter(None, _BRANCHES.search(attributes).groups()))
                counts = [
                    self.computation(branch.strip().lstrip("%"))
                    for branch in branches.split(",")
                ]
                return functools.reduce(Counts.at_most, counts)
            case "call":
                called = re.search(r"\bto_apply=%?([\w.\-]+)", attributes)
                return self.computation(called[1])
            case _ if called := _CALLED.search(attributes):
                return self.computation(called[1])
        return Counts()

    def _trip_count(self, attributes: str, condition: str, body: str) -> int | None:
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', attributes):
            return int(known[1])
        by_name = {i.name: i for i in self.program.computations[condition]}
        root = next(i for i in by_name.values() if i.is_root)
        if root.opcode == "get-tuple-element":
            return 1 if self._lowers(body, root.attributes) else None
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        counter, limit = (by_name[name] for name in root.operands)
        if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
            return None
        return int(limit.operands[0])

    def _lowers(self, body: str, flag: str) -> bool:
        """Whether a loop's body makes a flag of its state false whatever happens."""
        by_name = {i.name: i for i in self.program.computations[body]}
        root = next(i for i in by_name.values() if i.is_root)
        index = int(re.search(r"\bindex=(\d+)", flag)[1])
        value = by_name.get(root.operands[index]) if root.opcode == "tuple" else None
        while value is not None and value.opcode in ("copy", "bitcast", "broadcast"):
            value = by_name.get(value.operands[0])
        return (
            value is not None
            and value.opcode == "constant"
            and value.operands == ("false",)
        )

    def _collective(
        self,
        kind: str,
        instruction: Instruction,
        operands: list[str],
        computation: str,
    ) -> Counts:
        # A TPU overlaps an all-gather with products by splitting it over several
        # fusions, each of which names it; only the one that starts it counts.
        if "chain_id=" in instruction.attributes and not any(
            "AsyncCollectiveStart" in i.attributes
            for i in self.program.computations[computation]
        ):
            return Counts()
        # And its reduce-scatter is a fusion of an all-reduce and a slice.
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        size = sum(map(bytes_of, operands))
        if kind == "collective-permute":
            return Counts({kind: size})
        group = self._group_size(instruction.attributes)
        # An all-gather's operand is a share of S, the others' is S.
        share = {"all-gather": group - 1, "all-reduce": 2 * (group - 1) / group}
        return Counts({kind: size * share.get(kind, (group - 1) / group)})

    def _group_size(self, attributes: str) -> int:
        """Devices that take part in one collective."""
        if explicit := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
            return len(explicit[1].split(","))
        if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
            return int(iota[1])
        if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
            # 'axis' is a whole axis, 'axis':(before)size a part of one.
            axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        return self.program.devices


def _dot_flops(instruction: Instruction, operands: list[str]) -> float:
    left = shape_of(operands[0])
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    contracted = [left[int(axis)] for axis in axes[1].split(",") if axis]
    return 2.0 * math.prod(shape_of(instruction.type)) * math.prod(contracted)


def _convolution_flops(instruction: Instruction, operands: list[str]) -> float:
    """Multiply-adds with padding left out; a TPU writes every product this way."""
    attributes = instruction.attributes
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes).groups()
    image, kernel, out = (
        dict(zip(order, shape_of(type_), strict=True))
        for order, type_ in zip(labels, (*operands, instruction.type), strict=True)
    )
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    group = re.search(r"batch_group_count=(\d+)", attributes)
    products = kernel["i"] * kernel["o"] * image["b"] / (int(group[1]) if group else 1)
    for axis in (label for label in labels[0] if label.isdigit()):
        products *= _valid_positions(
            image[axis], kernel[axis], out[axis], fields, int(axis)
        )
    return 2.0 * products


def _valid_positions(
    image: int, kernel: int, out: int, fields: Mapping[str, str], axis: int
) -> int:
    """Pairs of output and kernel positions that meet an element of the image."""

    def field(name: str, default: str) -> str:
        return fields[name].split("x")[axis] if name in fields else default

    stride, base = int(field("stride", "1")), int(field("lhs_dilate", "1"))
    dilation = int(field("rhs_dilate", "1"))
    before = int(field("pad", "0_0").split("_")[0])
    counted = collections.Counter(
        o * stride - before + k * dilation for o in range(out) for k in range(kernel)
    )
    reached = range(0, (image - 1) * base + 1, base)
    return sum(counted[position] for position in reached)
