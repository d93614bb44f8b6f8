"""What the compiler made of a kernel: registers, spills, shared memory, and the instructions of its main loops.

NVIDIA: the machine code, by cuobjdump and nvdisasm, which come inside the triton package. AMD: the assembly that the
compiler keeps. Main loops are found in the control-flow graph (natural loops of back edges, by dominators), since their
blocks need not be neighbours in memory. In the same graph reads of uniform registers are looked for that no path there
has set: ptxas 12.8, which comes with Triton 3.6, has made such (docs/notes/2026-11-gpu-attention.md).
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import subprocess
import tempfile
from collections import Counter
from typing import Any

import triton
from triton.compiler import CompiledKernel

MATRIX = re.compile(r"^(HMMA|HGMMA|UTC\w*MMA|QGMMA|v_mfma_\w+|DMMA|IMMA|OMMA|QMMA)")
_LABEL = re.compile(r"^\s*(\.L_x_\w+|\.LBB\w+|_\w+):")
_SASS_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_AMD_INSTRUCTION = re.compile(r"^\s+([a-z]\w+)(?:\s+([^;]*))?")


@dataclasses.dataclass(frozen=True)
class Loop:
    """One natural loop: its instructions (mnemonics), without those of loops inside it."""

    instructions: tuple[str, ...]

    def count(self, pattern: str) -> int:
        return sum(1 for name in self.instructions if re.match(pattern, name))

    @property
    def matrix(self) -> int:
        return sum(1 for name in self.instructions if MATRIX.match(name))

    def non_matrix_per_element(self, elements: int, num_warps: int, warp_size: int = 32) -> float:
        """Instructions that are not matrix instructions, times lanes, per element of the tile of one iteration."""
        return (len(self.instructions) - self.matrix) * num_warps * warp_size / elements


@dataclasses.dataclass(frozen=True)
class Facts:
    name: str
    arch: str
    registers: int
    spill_bytes: int  # stack or scratch memory of one thread
    shared_bytes: int
    num_warps: int
    instructions: tuple[str, ...]
    loops: tuple[Loop, ...]
    unset_reads: tuple[str, ...]  # NVIDIA: instructions that read a uniform register before anything set it

    @property
    def main_loops(self) -> list[Loop]:
        """The innermost loops with matrix instructions, the shortest first."""
        return sorted((loop for loop in self.loops if loop.matrix), key=lambda loop: len(loop.instructions))

    def count(self, pattern: str) -> int:
        return sum(1 for name in self.instructions if re.match(pattern, name))


def facts(kernel: CompiledKernel) -> Facts:
    """Everything above of one compiled kernel."""
    target = kernel.metadata.target
    if target.backend == "cuda":
        registers, spill_bytes, text = _read_cubin(kernel.asm["cubin"])
        blocks = _blocks(text, _sass_line)
        arch = f"sm_{target.arch}"
    else:
        text = kernel.asm["amdgcn"]
        registers = _amd_field(text, "vgpr_count")
        # A spilled vector register costs scratch memory; a scalar one goes to a lane of a vector register.
        spill_bytes = max(_amd_field(text, "private_segment_fixed_size"), 4 * _amd_field(text, "vgpr_spill_count"))
        blocks = _blocks(text.split(".section")[0], _amd_line)
        arch = str(target.arch)
    return Facts(
        name=kernel.metadata.name,
        arch=arch,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        instructions=tuple(name for block in blocks for name in block.instructions),
        loops=_loops(blocks),
        unset_reads=_unset_reads(blocks) if target.backend == "cuda" else (),
    )


def _amd_field(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s*(\d+)", text)
    if found is None:
        raise ValueError(f"amdgcn assembly: expected a .{name} entry, got none")
    return int(found.group(1))


def _read_cubin(cubin: bytes) -> tuple[int, int, str]:
    """(registers, bytes of stack and local memory, disassembly)"""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        text = _run(triton.knobs.nvidia.nvdisasm.path, "-c", str(path))
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump -res-usage: expected REG, STACK and LOCAL, got {usage!r}")
    return int(found.group(1)), int(found.group(2)) + int(found.group(3)), text


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclasses.dataclass
class _Block:
    instructions: list[str] = dataclasses.field(default_factory=list)
    lines: list[str] = dataclasses.field(default_factory=list)
    targets: list[Any] = dataclasses.field(default_factory=list)  # labels, and in the end the places of their blocks
    falls_through: bool = True


def _sass_line(line: str) -> tuple[str, str | None, bool] | None:
    """(mnemonic, where it may jump, whether it may go on) of a line of nvdisasm's, None if it has no instruction."""
    found = _SASS_INSTRUCTION.match(line)
    if found is None:
        return None
    predicate, name, operands = found.groups()
    label = re.search(r"\.L_x_\w+", operands)
    # A far jump under a predicate is written as a call from which nobody returns.
    if name.startswith(("BRA", "JMP")) or (name.startswith("CALL.REL.NOINC") and label is not None):
        # "BRA.U UP0" and "BRA P1" carry a condition among their operands.
        conditional = predicate is not None or re.match(r"!?U?P\d", operands) is not None or ".DIV" in name
        return name, label.group(0) if label else None, conditional
    return name, None, not (name.startswith(("EXIT", "RET")) and predicate is None)


def _amd_line(line: str) -> tuple[str, str | None, bool] | None:
    found = _AMD_INSTRUCTION.match(line)
    if found is None:
        return None
    name, operands = found.group(1), found.group(2) or ""
    if name.startswith(("s_branch", "s_cbranch")):
        return name, operands.strip(), name.startswith("s_cbranch")
    return name, None, name != "s_endpgm"


def _blocks(text: str, read: object) -> list[_Block]:
    """The basic blocks in order; block i may go on to block i + 1, and to those its targets name."""
    blocks, places = [_Block()], {}
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label is not None:
            blocks.append(_Block())
            places[label.group(1)] = len(blocks) - 1
            continue
        instruction = read(line)  # type: ignore[operator]
        if instruction is None:
            continue
        name, target, goes_on = instruction
        blocks[-1].instructions.append(name)
        blocks[-1].lines.append(line)
        if target is not None:
            blocks[-1].targets.append(target)
        if target is not None or not goes_on:
            blocks[-1].falls_through = goes_on
            blocks.append(_Block())
    for block in blocks:
        block.targets = [places[target] for target in block.targets if target in places]
    return blocks


def _successors(blocks: list[_Block]) -> list[list[int]]:
    return [
        [*block.targets, *([i + 1] if block.falls_through and i + 1 < len(blocks) else [])]
        for i, block in enumerate(blocks)
    ]


def _uniform_registers(line: str) -> tuple[set[int], set[int]]:
    """(set, read) by a line of nvdisasm's. Where an operand may be several registers wide: all that are surely set, and
    of those that are read only what is certain."""
    found = _SASS_INSTRUCTION.match(line)
    if found is None:
        return set(), set()
    _, name, operands = found.groups()
    if ".SPILL" in name:  # a copy aside, of pairs of which one half may mean nothing
        return set(), set()
    written: set[int] = set()
    # What is set comes first, or after a predicate that is set too: "ULOP3.LUT UP1, UR12, UR11, ...".
    set_first = None if "SETP" in name else re.match(r"(?:U?P\w+, )?UR(\d+)\b", operands)
    if set_first is not None:
        width = max({"64": 2, "WIDE": 2, "128": 4}.get(part, 1) for part in name.split("."))
        written = {int(set_first.group(1)) + i for i in range(width)}
    others = operands if set_first is None else operands[set_first.end() :]
    read = {int(number) for number in re.findall(r"\bUR(\d+)", re.sub(r"gdesc\[UR\d+\]", "", others))}
    # Descriptors of operands in memory take two registers each. HGMMA names the first of four for both of its operands,
    # whose left one may be in registers.
    for number in map(int, re.findall(r"gdesc\[UR(\d+)\]", others)):
        if not name.startswith("HGMMA") or re.match(r"R\d+, R\d+, gdesc", operands) is None:
            read |= {number, number + 1}
        if name.startswith("HGMMA"):
            read |= {number + 2, number + 3}
    return written, read


def _unset_reads(blocks: list[_Block]) -> tuple[str, ...]:
    """Lines that read a uniform register which is set on no path from the entry to there."""
    successors = _successors(blocks)
    uses = [[_uniform_registers(line) for line in block.lines] for block in blocks]
    before: list[set[int] | None] = [set(), *(None for _ in blocks[1:])]
    waiting = [0]
    while waiting:
        i = waiting.pop()
        after = set(before[i] or ()).union(*(written for written, _ in uses[i]))
        for j in successors[i]:
            known = before[j]
            if known is None or not after <= known:
                before[j] = after | (known or set())
                waiting.append(j)
    found = []
    for block, known, of_block in zip(blocks, before, uses, strict=True):
        if known is None:
            continue
        is_set = set(known)
        for line, (written, read) in zip(block.lines, of_block, strict=True):
            found += [line.strip()] if read - is_set else []
            is_set |= written
    return tuple(found)


def _loops(blocks: list[_Block]) -> tuple[Loop, ...]:
    successors = _successors(blocks)
    predecessors: list[set[int]] = [set() for _ in blocks]
    for i, following in enumerate(successors):
        for j in following:
            predecessors[j].add(i)
    dominators = _dominators(predecessors)
    bodies: dict[int, set[int]] = {}
    for i, following in enumerate(successors):
        for head in following:
            if head in dominators[i]:
                bodies.setdefault(head, {head}).update(_natural_loop(head, i, predecessors))
    loops = []
    for head, body in bodies.items():
        inner = set().union(*(b for h, b in bodies.items() if h != head and b < body))
        loops.append(Loop(tuple(n for i in sorted(body - inner) for n in blocks[i].instructions)))
    return tuple(loops)


def _dominators(predecessors: list[set[int]]) -> list[set[int]]:
    every = set(range(len(predecessors)))
    dominators = [{0}, *(set(every) for _ in predecessors[1:])]
    reachable = [True, *(bool(p) for p in predecessors[1:])]
    changed = True
    while changed:
        changed = False
        for i in range(1, len(predecessors)):
            before = [dominators[p] for p in predecessors[i] if reachable[p]]
            new = {i} | (set.intersection(*before) if before else set())
            if new != dominators[i]:
                dominators[i], changed = new, True
    return dominators


def _natural_loop(head: int, tail: int, predecessors: list[set[int]]) -> set[int]:
    body, waiting = {head}, [tail]
    while waiting:
        i = waiting.pop()
        if i not in body:
            body.add(i)
            waiting.extend(predecessors[i])
    return body


def most_common(loop: Loop, n: int = 12) -> list[tuple[str, int]]:
    """The mnemonics of a loop by how often they stand in it, for looking."""
    return Counter(name.split(".")[0] for name in loop.instructions).most_common(n)
