"""Reads the text of a compiled program: the named scopes of its operations, its arguments, its collectives."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

CONTAINERS = {"while", "conditional", "call"}  # the operations inside them are timed as well
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "broadcast", "iota", "reshape"}

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?[\]})]) ([\w\-]+)\(([^)]*)\)(.*)$")
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")
_ARRAY = re.compile(r"\b([a-z]+)(\d+)?(?:e\d+m\d+\w*)?\[([\d,]*)\]")
_COLLECTIVE = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ((?:all|collective|reduce-scatter)[\w\-]*)\(")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a program.

    Attributes:
        shares: the share of its time that belongs to each scope, adding up to 1; "" stands for no scope.
        container: whether it only runs other operations: a loop, a branch or a call.
    """

    shares: dict[str, float]
    container: bool


class Collective(NamedTuple):
    """An operation for which devices exchange data.

    Attributes:
        kind: such as all-reduce.
        bytes: size of its result on one device.
    """

    kind: str
    bytes: int


@dataclasses.dataclass
class _Instruction:
    """A line of the text.

    Attributes:
        name: name of the instruction, unique in the program.
        opcode: what it does.
        shape: shape of its first result.
        arguments: the text between its parentheses.
        attributes: the text after them.
    """

    name: str
    opcode: str
    shape: tuple[int, ...]
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results it reads."""
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @property
    def path(self) -> str | None:
        """Its scopes, outermost first, separated by slashes; None if XLA has added the instruction itself."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else None

    @property
    def fused(self) -> str | None:
        """The name of the computation that a fusion performs."""
        match = re.search(r"calls=%?([\w.\-]+)", self.attributes)
        return match[1] if match and self.opcode == "fusion" else None


def module_name(text: str) -> str:
    """The name of the program, such as jit_loop."""
    return text.split(maxsplit=2)[1].rstrip(",")


def argument_bytes(text: str) -> int:
    """Bytes of a program's arguments; of one device's part of them if it runs on several."""
    return _array_bytes(text.partition("entry_computation_layout={(")[2].partition(")->")[0])


def collectives(text: str) -> list[Collective]:
    """The collectives of a program in the order of its text; one in a loop counts once."""
    found = [match for line in text.splitlines() if (match := _COLLECTIVE.match(line))]
    return [
        Collective(match[2].removesuffix("-start"), _array_bytes(match[1]))
        for match in found
        if not match[2].endswith("-done")
    ]


def operations(text: str, scopes: Sequence[str]) -> dict[str, Operation]:
    """Every operation of a program by its name.

    An operation belongs to the innermost of its scopes. One that XLA has added, such as a copy or a product in another
    form, belongs to the scope of the operation that reads it. A fusion of operations from several scopes is divided
    among them by the number of elements that each computes. This is an estimate: a fusion is one loop, whose parts are
    not timed separately.

    Args:
        text: text of the optimised program, `compiled.as_text()`.
        scopes: names of the scopes to look for.
    """
    computations = _computations(text)
    owners = _Owners(computations, scopes)
    found = {}
    for computation in computations.values():
        for line in computation.values():
            shares = {owners.scope(computation, line.name): 1.0}
            if line.fused is not None:
                shares = _fusion_shares(computations[line.fused], owners) or shares
            found[line.name] = Operation(shares, line.opcode in CONTAINERS)
    return found


def _computations(text: str) -> dict[str, dict[str, _Instruction]]:
    """The instructions of every computation by name."""
    found: dict[str, dict[str, _Instruction]] = {}
    lines: dict[str, _Instruction] = {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = found.setdefault(header[1], {})
        elif match := _INSTRUCTION.match(line):
            name, result, opcode, arguments, attributes = match.groups()
            lines[name] = _Instruction(name, opcode, _dimensions(result), arguments, attributes)
    return found


def _dimensions(result: str) -> tuple[int, ...]:
    """The shape of the first array in a type such as f32[2,768]{1,0}."""
    match = _SHAPE.search(result)
    return tuple(int(size) for size in match[1].split(",") if size) if match else ()


def _array_bytes(types: str) -> int:
    """Bytes of all arrays in a type such as (f32[2,768]{1,0}, pred[2])."""
    total = 0
    for _, bits, sizes in _ARRAY.findall(types):
        total += math.prod(int(size) for size in sizes.split(",") if size) * int(bits or 8) // 8
    return total


class _Owners:
    """Finds the scopes of instructions."""

    def __init__(self, computations: dict[str, dict[str, _Instruction]], scopes: Sequence[str]) -> None:
        self._computations = computations
        self._scopes = scopes
        self._readers: dict[str, _Instruction] = {}  # for each instruction, the first one that reads it
        for computation in computations.values():
            for line in computation.values():
                for operand in line.operands:
                    self._readers.setdefault(operand, line)

    def scope(self, computation: dict[str, _Instruction], name: str) -> str:
        """The innermost scope of an instruction or, if it has no path, of its first reader; "" if there is none."""
        path = self._path(computation, name) or ""
        return next((part for part in reversed(path.split("/")) if part in self._scopes), "")

    def _path(self, computation: dict[str, _Instruction], name: str) -> str | None:
        line = computation[name]
        if line.path is not None or name not in self._readers:
            return line.path
        reader = self._readers[name]
        if reader.fused is None:
            return self._path(computation, reader.name)
        # Inside a fusion the reader is what reads the parameter that represents the instruction.
        inner = self._computations[reader.fused]
        number = str(reader.operands.index(name))
        parameter = next(each for each in inner.values() if each.opcode == "parameter" and each.arguments == number)
        return self._path(inner, parameter.name) or self._path(computation, reader.name)


def _fusion_shares(computation: dict[str, _Instruction], owners: _Owners) -> dict[str, float]:
    """The shares of the scopes in a fusion's computation; empty if it computes nothing."""
    work: dict[str, float] = {}
    for line in computation.values():
        if line.opcode not in FREE:
            scope = owners.scope(computation, line.name)
            work[scope] = work.get(scope, 0.0) + _work(line, computation)
    total = sum(work.values())
    return {scope: each / total for scope, each in work.items()} if total else {}


def _work(line: _Instruction, computation: dict[str, _Instruction]) -> float:
    """How many elements an instruction computes or, if it writes into a buffer or reduces one, processes."""
    shapes = [computation[name].shape for name in line.operands]
    if line.opcode == "dynamic-update-slice":
        return math.prod(shapes[1])
    if line.opcode in ("reduce", "reduce-window"):
        return math.prod(shapes[0])
    if line.opcode == "dot":
        match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.attributes)
        contracted = [int(axis) for axis in match[1].split(",") if axis] if match else []
        return math.prod(line.shape) * math.prod(shapes[0][axis] for axis in contracted)
    return math.prod(line.shape)
