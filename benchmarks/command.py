"""The command line of the benchmarks: options, the record's file, what is printed."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gpt4v_fast.doctor import usable_cores

from . import record, registry, report, timing
from .peaks import READ_BYTES
from .runner import Progress, run_cases

QUICK = timing.Settings(rounds=3, max_rounds=3, min_sample_s=0.001, probe_s=0.002)
QUICK_READ_BYTES = 8 * 2**20
PUBLISHED_ROUNDS = 7
THREADS_PER_CORE = 4  # more than that only starves the machine


def add_arguments(parser: argparse.ArgumentParser, ops: Sequence[str] | None = None) -> None:
    """The options of `gpt4v-fast bench` and of the modules."""
    if ops is None:
        parser.add_argument("--op", action="append", choices=list(registry.MODULES), help="only this op (repeatable)")
    parser.add_argument("--dtype", action="append", choices=list(registry.DTYPES), help="only this dtype (repeatable)")
    parser.add_argument(
        "--direction", action="append", choices=registry.DIRECTIONS, help="only this direction (repeatable)"
    )
    parser.add_argument(
        "--case", action="append", metavar="NAME", help="only this case, or those with this in their name (repeatable)"
    )
    parser.add_argument("--rounds", type=int, help="samples of each contender that must count (default 7)")
    parser.add_argument("--threads", type=int, help="threads of every contender (default: torch's)")
    parser.add_argument(
        "--beside", type=int, default=0, metavar="N", help="busy processes beside every measurement (default 0)"
    )
    parser.add_argument(
        "--device",
        choices=registry.DEVICES,
        default="cpu",
        help="cuda: the GPU's own cases, or those of --quick or --all",
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--quick", action="store_true", help="small shapes and few rounds: a look, not a measurement")
    part.add_argument("--all", action="store_true", help="the whole grid of sizes, which takes hours; see --resume")
    part.add_argument("--curves", action="store_true", help="attention by length and by share of masked blocks")
    parser.add_argument(
        "--budget", type=float, metavar="S", help="seconds a single call may take and still be timed (default 10)"
    )
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="PATH",
        help="write the record, after every case; without PATH to the standard output at the end",
    )
    parser.add_argument(
        "--resume", metavar="PATH", help="as --json PATH, keeping what is there but for cases with too few samples"
    )
    parser.add_argument("--html", metavar="PATH", help="write a report with a plot, one self-contained file")


def run_arguments(args: argparse.Namespace, command: str, ops: Sequence[str] | None = None) -> int:
    """Runs what parsed options ask for. Returns 1 where one of our own kernels failed or was wrong, 130 after an
    interruption.

    Raises:
        ValueError: a filter that fits no case, a count below 1, or a record to continue of other conditions.
    """
    _check_counts(args)
    if args.resume is not None and args.json is not None:
        raise ValueError("--resume: expected no --json beside it, since it writes the record where it found it")
    for path in (args.json, args.resume, args.html):
        if path not in (None, "-") and not Path(path).resolve().parent.is_dir():
            raise ValueError(f"{path}: expected a path in an existing folder, got one in a folder that is not there")
    cases = registry.cases(
        ops=args.op if ops is None else ops,
        dtypes=args.dtype,
        names=args.case,
        directions=args.direction,
        part=next((part for part in ("quick", "all", "curves") if getattr(args, part)), _usual_part(args.device)),
    )
    if args.list:
        print("\n".join(case.id for case in cases))
        return 0
    path = args.resume or args.json
    file = None if path in (None, "-") else Path(path)
    if args.beside and file is not None:
        _keep_quiet_numbers(file)

    def on_result(progress: Progress, made: dict[str, Any]) -> None:
        if file is not None:
            record.write(made, file)
        if path != "-":
            progress.write(report.case_text(made["results"][-1]))

    made = run_cases(
        cases,
        threads=args.threads or torch.get_num_threads(),
        settings=_settings(args),
        read_bytes=QUICK_READ_BYTES if args.quick else READ_BYTES,
        device=args.device,
        beside=args.beside,
        command=command,
        earlier=record.read(file) if args.resume and file is not None and file.exists() else None,
        on_result=on_result,
    )
    _deliver(made, file, args)
    if not made["complete"]:
        return 130
    return 1 if any(_ours_went_wrong(result) for result in made["results"]) else 0


def _check_counts(args: argparse.Namespace) -> None:
    for name in ("rounds", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if args.budget is not None and not 0 < args.budget < math.inf:
        raise ValueError(f"--budget: expected seconds above 0, got {args.budget:g}")
    if args.beside < 0:
        raise ValueError(f"--beside: expected at least 0, got {args.beside}")
    cores = usable_cores()
    most, allowed = THREADS_PER_CORE * cores, f"{THREADS_PER_CORE} for each of the {cores} cores this process may use"
    for name in ("threads", "beside"):
        if getattr(args, name) is not None and getattr(args, name) > most:
            raise ValueError(f"--{name}: expected at most {most} ({allowed}), got {getattr(args, name)}")
    if args.threads is None and torch.get_num_threads() > most:
        raise ValueError(f"OMP_NUM_THREADS: expected at most {most} ({allowed}), got {torch.get_num_threads()}")


def _keep_quiet_numbers(file: Path) -> None:
    """Raises where a run beside busy processes would replace a record of a run without."""
    try:
        quiet = record.beside(record.read(file)) == 0
    except ValueError:
        return
    if quiet:
        raise ValueError(f"{file}: expected a path of its own for a run with --beside, got the record of one without")


def _usual_part(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected cpu, since torch sees no GPU here, got cuda")
    return "gpu" if device == "cuda" else "default"


def _settings(args: argparse.Namespace) -> timing.Settings:
    settings = QUICK if args.quick else timing.Settings()
    if args.rounds is not None:
        settings = dataclasses.replace(settings, rounds=args.rounds, max_rounds=3 * args.rounds)
    if args.beside:  # the probes meet the busy processes in one moment and not in the next: every sample counts
        settings = dataclasses.replace(settings, tolerance=1.0)
    if args.budget is not None:
        settings = dataclasses.replace(settings, slowest_s=args.budget)
    return settings


def _deliver(made: Mapping[str, Any], file: Path | None, args: argparse.Namespace) -> None:
    if args.json == "-":
        print(record.text(made))
    else:
        print(report.summary_text(made))
        if made["settings"]["rounds"] < PUBLISHED_ROUNDS:
            print(f"Fewer than {PUBLISHED_ROUNDS} rounds: a look, not a measurement.")
    if file is not None:
        record.write(made, file)
        print(f"record: {file}")
    if args.html is not None:
        Path(args.html).write_text(report.html_report(made), encoding="utf-8")
        print(f"report: {args.html}", file=sys.stderr if args.json == "-" else sys.stdout)


def _ours_went_wrong(result: Mapping[str, Any]) -> bool:
    return any(row["ours"] and row["status"] in ("refused", "failed") for row in result["contenders"])


def main(module: str, ops: Sequence[str], argv: Sequence[str] | None = None) -> int:
    """The command line of `python -m benchmarks.attention` and its siblings."""
    parser = argparse.ArgumentParser(description="Side by side with the peers, as a share of the machine's peak.")
    add_arguments(parser, ops)
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    try:
        return run_arguments(args, shlex.join(["python", "-m", f"benchmarks.{module}", *argv]), ops)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
