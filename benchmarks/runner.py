"""Runs cases and makes the record: check, then time, then say how the kernels stand against the best peer."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import gpt4v_fast as gf

from . import check, registry, report, timing
from .peaks import READ_BYTES, UNITS, Peaks
from .registry import Case, Contender, Inputs, Run, Unavailable

QUICK = timing.Settings(rounds=3, max_rounds=3, min_sample_s=0.001, probe_s=0.002)
QUICK_READ_BYTES = 8 * 2**20
PUBLISHED_ROUNDS = 7


class Progress:
    """A bar over the cases on the terminal's error stream; without a terminal or tqdm, a line per case."""

    def __init__(self, cases: int) -> None:
        self.cases, self.done = cases, 0
        self.bar = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=cases, unit="case", file=sys.stderr, leave=False, dynamic_ncols=True)

    def start(self, text: str) -> None:
        if self.bar is None:
            print(f"[{self.done + 1}/{self.cases}] {text}", file=sys.stderr, flush=True)
        else:
            self.bar.set_description(text)

    def sample(self, name: str, counted: bool) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(f"{name}: {'counted' if counted else 'dropped, the peak moved'}")

    def finish(self) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update()

    def write(self, text: str) -> None:
        """A text for the standard output, without tearing the bar."""
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text, file=sys.stdout)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def run_cases(
    cases: Sequence[Case],
    *,
    threads: int,
    settings: timing.Settings,
    read_bytes: int = READ_BYTES,
    command: str = "",
    on_result: Callable[[Progress, dict[str, Any]], None] = lambda progress, result: None,
) -> dict[str, Any]:
    """Times every case on `threads` threads and returns the record that report.py shows.

    A fallback to the slow reference is an error here (strict mode), so that no time is taken of the wrong kernel.
    """
    peaks = Peaks(threads, settings.probe_s, read_bytes)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        record = report.new_record(command, threads, settings, peaks.measure_all())
        with gf.strict(), contextlib.closing(Progress(len(cases))) as progress:
            for case in cases:
                progress.start(case.id)
                result = run_case(case, peaks, settings, progress)
                record["results"].append(result)
                progress.finish()
                on_result(progress, result)
        record["complete"] = True
    except KeyboardInterrupt:  # what was measured until then is kept
        print("interrupted", file=sys.stderr)
    finally:
        torch.set_num_threads(threads_before)
    report.finish_record(record)
    return record


def run_case(case: Case, peaks: Peaks, settings: timing.Settings, progress: Progress) -> dict[str, Any]:
    """Checks and times one case."""
    inputs = case.make_inputs()
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    for contender, error, reason in checked(case, inputs):
        status = reason[0] if reason else "timed"
        rows[contender.name] = {
            "name": contender.name,
            "ours": contender.ours,
            "status": status,
            "reason": reason[1] if reason else None,
            "error": error,
        }
        if reason:
            continue
        run = in_turn(case, contender, inputs)
        seconds = timing.time_calls(run, 1, time.perf_counter)  # also warms it up
        if seconds > settings.slowest_s:
            why = f"one call took {seconds:.0f} s, the limit is {settings.slowest_s:.0f} s"
            rows[contender.name] |= {"status": "too slow", "reason": why}
        else:
            runs[contender.name] = run
    measured = timing.Measurement({}, ())
    if runs:
        measured = timing.measure(runs, peaks.probe(case.bound), settings, on_sample=progress.sample)
    for name, taken in measured.timings.items():
        rows[name] |= report.timing_fields(taken, case.work, measured.peak)
        if not taken.samples_s:
            rows[name] |= {"status": "noisy", "reason": "the peak probes around every sample disagreed"}
        elif len(taken.samples_s) < settings.rounds:
            rows[name]["reason"] = f"only {len(taken.samples_s)} of {settings.rounds} samples counted"
    return report.result(case, UNITS[case.bound], measured, list(rows.values()))


def checked(case: Case, inputs: Inputs) -> Iterator[tuple[Contender, float | None, tuple[str, str] | None]]:
    """Each contender with its error, in shares of what is allowed, or with (status, reason) why it is not timed."""
    check_inputs = case.check_inputs(inputs) if case.check_inputs else inputs
    expected = case.expected(check_inputs)
    for contender in case.contenders:
        try:
            outputs = contender.make(case, check_inputs)()
            yield contender, check.check(outputs, expected, case.dtype), None
        except Unavailable as error:
            yield contender, None, ("unavailable", str(error))
        except check.WrongResult as error:
            yield contender, None, ("refused", str(error))
        except RuntimeError as error:  # an unsupported combination in a peer, or our FallbackError
            yield contender, None, ("failed", str(error).splitlines()[0])


def in_turn(case: Case, contender: Contender, inputs: Inputs) -> Run:
    """The contender's call, each time on the next of the case's copies of the inputs."""
    runs = [contender.make(case, inputs)]
    for _ in range(case.copies - 1):
        clones = {k: v.clone() if isinstance(v, torch.Tensor) else copy.copy(v) for k, v in inputs.items()}
        runs.append(contender.make(case, clones))
    if len(runs) == 1:
        return runs[0]
    following = itertools.cycle(runs)
    return lambda: next(following)()


def add_arguments(parser: argparse.ArgumentParser, ops: Sequence[str] | None = None) -> None:
    """The options of `gpt4v-fast bench` and of the modules."""
    if ops is None:
        parser.add_argument("--op", action="append", choices=list(registry.MODULES), help="only this op (repeatable)")
    parser.add_argument("--dtype", action="append", choices=list(registry.DTYPES), help="only this dtype (repeatable)")
    parser.add_argument(
        "--direction", action="append", choices=registry.DIRECTIONS, help="only this direction (repeatable)"
    )
    parser.add_argument(
        "--case", action="append", metavar="NAME", help="only cases with this in their name (repeatable)"
    )
    parser.add_argument("--rounds", type=int, help="samples of each contender that must count (default 7)")
    parser.add_argument("--threads", type=int, help="threads of every contender (default: torch's)")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds: a look, not a measurement")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="PATH",
        help="write the record; without PATH to the standard output",
    )
    parser.add_argument("--html", metavar="PATH", help="write a report with a plot, one self-contained file")


def run_arguments(args: argparse.Namespace, command: str, ops: Sequence[str] | None = None) -> int:
    """Runs what parsed options ask for. Returns 1 where one of our own kernels failed or was wrong, 130 after an
    interruption.

    Raises:
        ValueError: a filter that fits no case, or a count below 1.
    """
    for name in ("rounds", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name}: expected at least 1, got {getattr(args, name)}")
    for path in (args.json, args.html):
        if path not in (None, "-") and not Path(path).resolve().parent.is_dir():
            raise ValueError(f"{path}: expected a path in an existing folder, got one in a folder that is not there")
    cases = registry.cases(
        ops=args.op if ops is None else ops,
        dtypes=args.dtype,
        names=args.case,
        directions=args.direction,
        quick=args.quick,
    )
    if args.list:
        print("\n".join(case.id for case in cases))
        return 0
    settings = QUICK if args.quick else timing.Settings()
    if args.rounds is not None:
        settings = dataclasses.replace(settings, rounds=args.rounds, max_rounds=3 * args.rounds)
    quiet = args.json == "-"
    record = run_cases(
        cases,
        threads=args.threads or torch.get_num_threads(),
        settings=settings,
        read_bytes=QUICK_READ_BYTES if args.quick else READ_BYTES,
        command=command,
        on_result=lambda progress, result: None if quiet else progress.write(report.case_text(result)),
    )
    _deliver(record, args)
    if not record["complete"]:
        return 130
    return 1 if any(_ours_went_wrong(result) for result in record["results"]) else 0


def _deliver(record: Mapping[str, Any], args: argparse.Namespace) -> None:
    text = json.dumps(record, indent=1)
    if args.json == "-":
        print(text)
    else:
        print(report.summary_text(record))
        if record["settings"]["rounds"] < PUBLISHED_ROUNDS:
            print(f"Fewer than {PUBLISHED_ROUNDS} rounds: a look, not a measurement.")
    if args.json not in (None, "-"):
        Path(args.json).write_text(text + "\n", encoding="utf-8")
        print(f"record: {args.json}")
    if args.html is not None:
        Path(args.html).write_text(report.html_report(record), encoding="utf-8")
        print(f"report: {args.html}", file=sys.stderr if args.json == "-" else sys.stdout)


def _ours_went_wrong(result: Mapping[str, Any]) -> bool:
    return any(row["ours"] and row["status"] in ("refused", "failed") for row in result["contenders"])


def main(argv: Sequence[str] | None = None, ops: Sequence[str] | None = None) -> int:
    """The command line of `python -m benchmarks.attention` and its siblings."""
    parser = argparse.ArgumentParser(description="Side by side with the peers, as a share of the machine's peak.")
    add_arguments(parser, ops)
    args = parser.parse_args(argv)
    try:
        return run_arguments(args, " ".join(["python -m benchmarks", *(argv or sys.argv[1:])]), ops)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
