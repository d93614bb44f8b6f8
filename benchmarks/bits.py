"""Which bits the kernels give: `python -m benchmarks.bits --output FILE`, later `--compare FILE`.

Every case (bits_attention.py, bits_loss.py, bits_patch_embed.py) is a call of an op on seeded inputs. Its outputs and
gradients are hashed together, for every ISA of this machine and for 1 and 2 threads; hashes that depend on the number
of threads are an error. The record has a line per case, with a hash per ISA. A change of the code that is not meant to
change numbers leaves a record as it is, on the same machine with the same torch.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import gpt4v_fast as gf

from . import bits_attention, bits_loss, bits_patch_embed
from .bits_inputs import BitsCase, Tensors

THREADS = (1, 2)
DIGITS = 10  # of a hash: 40 bits

Hashes = dict[str, list[str]]  # of a case: one per ISA


def cases(ops: Iterable[str] | None = None, names: Iterable[str] = (), quick: bool = False) -> list[BitsCase]:
    """The cases of these ops whose ids contain one of `names`."""
    modules = (bits_attention, bits_loss, bits_patch_embed)
    every = [case for module in modules for case in module.cases()]
    wanted = set(ops or (case.op for case in every))
    names = list(names)
    return [
        case
        for case in every
        if case.op in wanted and case.quick >= quick and (not names or any(name in case.id for name in names))
    ]


def digest(tensors: Tensors) -> str:
    """A hash of names, dtypes, shapes and bits."""
    whole = hashlib.sha256()
    for name, tensor in tensors.items():
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        whole.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:DIGITS]


def measure(
    chosen: Sequence[BitsCase],
    isas: Sequence[str],
    on_case: Callable[[BitsCase], None] = lambda case: None,
    on_tensors: Callable[[BitsCase, str, Tensors], None] = lambda case, isa, tensors: None,
) -> Hashes:
    """Every case's hashes, in the order of `isas`.

    Raises:
        RuntimeError: a case depends on the number of threads, or fails; the message names it.
    """
    found: Hashes = {}
    threads_before = torch.get_num_threads()
    try:
        for case in chosen:
            on_case(case)
            found[case.id] = [_measure_one(case, isa, on_tensors) for isa in isas]
    finally:
        torch.set_num_threads(threads_before)
    return found


def _measure_one(case: BitsCase, isa: str, on_tensors: Callable[[BitsCase, str, Tensors], None]) -> str:
    by_threads = {}
    for threads in THREADS:
        torch.set_num_threads(threads)
        try:
            with gf.strict(), gf.force(isa=isa):
                tensors = case.run()
        except Exception as error:
            raise RuntimeError(f"{case.id} on {isa}, {threads} threads: {error}") from error
        by_threads[threads] = digest(tensors)
        if threads == THREADS[0]:
            on_tensors(case, isa, tensors)
    if len(set(by_threads.values())) > 1:
        raise RuntimeError(f"{case.id} on {isa}: the bits depend on the number of threads: {by_threads}")
    return by_threads[THREADS[0]]


def differences(hashes: Hashes, isas: Sequence[str], earlier: dict[str, Any]) -> list[str]:
    """A line for each case whose hash differs from the earlier record's on an ISA that both have, or that the record
    lacks. Cases of the record that were not run are not looked for."""
    shared = [isa for isa in isas if isa in earlier["isas"]]
    lines = []
    for case_id, ours in hashes.items():
        if case_id not in earlier["hashes"]:
            lines.append(f"{case_id}: not in the record")
            continue
        theirs = dict(zip(earlier["isas"], earlier["hashes"][case_id].split(), strict=True))
        now = dict(zip(isas, ours, strict=True))
        different = [isa for isa in shared if theirs[isa] != now[isa]]
        if different:
            lines.append(f"{case_id}: differs on {', '.join(different)}")
    return lines


def write(path: Path, hashes: Hashes, isas: Sequence[str]) -> None:
    """A compact record: a line for what it was made with, and one per case."""
    head = {"commit": _commit(), "torch": torch.__version__, "cpu": _cpu(), "isas": list(isas)}
    fields = [f'"{name}": {json.dumps(value)}' for name, value in head.items()]
    lines = [f"{json.dumps(name)}: {json.dumps(' '.join(row))}" for name, row in hashes.items()]
    path.write_text("{" + ",\n".join(fields) + ',\n"hashes": {\n' + ",\n".join(lines) + "\n}}\n")


def read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def _commit() -> str:
    here = Path(__file__).resolve().parent
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bits", description=(__doc__ or "").split("\n\n")[0])
    available = gf.backends.available_isas()
    ops = sorted({case.op for case in cases()})
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the record here")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="compare with this record; 1 if a case differs")
    parser.add_argument("--isa", action="append", choices=available, help="only this one (may be repeated)")
    parser.add_argument("--op", action="append", choices=ops, help="only this one (may be repeated)")
    parser.add_argument("--case", action="append", default=[], metavar="TEXT", help="only cases whose id contains this")
    parser.add_argument("--quick", action="store_true", help="only a few small cases of each op")
    parser.add_argument("--tensors", action="store_true", help="print the hash of every tensor of every case")
    parser.add_argument("--list", action="store_true", help="print the cases' ids and run none")
    args = parser.parse_args(arguments)
    chosen, isas = cases(args.op, args.case, args.quick), args.isa or available
    for text in args.case:  # comparing no case would pass
        if not any(text in case.id for case in chosen):
            close = difflib.get_close_matches(text, [case.id for case in cases(args.op)], n=5, cutoff=0.3)
            parser.error(f"--case: expected a part of an id that --list shows, got {text!r}; close: {', '.join(close)}")
    if args.list:
        print("\n".join(case.id for case in chosen))
        return 0
    with _Bar(len(chosen)) as bar:
        hashes = measure(chosen, isas, bar.step, _print_tensors if args.tensors else lambda *_: None)
    if args.output:
        write(args.output, hashes, isas)
    print(f"{len(hashes)} cases on {', '.join(isas)}; the same bits on {' and '.join(map(str, THREADS))} threads")
    if args.compare is None:
        return 0
    lines = differences(hashes, isas, read(args.compare))
    print("\n".join([*lines, f"{len(lines)} of {len(hashes)} cases differ from {args.compare}"]))
    return 1 if lines else 0


def _print_tensors(case: BitsCase, isa: str, tensors: Tensors) -> None:
    parts = "  ".join(f"{name} {digest({name: tensor})}" for name, tensor in tensors.items())
    print(f"{case.id} [{isa}]  {parts}")


class _Bar:
    """A tqdm bar where there is tqdm and a terminal."""

    def __init__(self, total: int) -> None:
        self.bar: Any = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, unit="case", leave=False, dynamic_ncols=True)

    def step(self, case: BitsCase) -> None:
        if self.bar is not None:
            self.bar.set_description(case.id)
            self.bar.update()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


if __name__ == "__main__":
    sys.exit(main())
