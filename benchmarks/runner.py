"""Runs cases and makes the record: check, then time, then say how the kernels stand against the best peer."""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

import gpt4v_fast as gf

from . import check, gpu, memory, record, timing
from .beside import busy_processes
from .peaks import READ_BYTES, Peaks
from .registry import Case, Chosen, Contender, Inputs, NotInstalled, Outputs, Run, Unavailable

LARGEST_SHARE = 0.85  # of the free memory: what is estimated to take more is not tried


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
    device: str = "cpu",
    beside: int = 0,
    command: str = "",
    earlier: Mapping[str, Any] | None = None,
    on_result: Callable[[Progress, dict[str, Any]], None] = lambda progress, record: None,
) -> dict[str, Any]:
    """Times every case on `threads` threads, or on a GPU, and returns the record that report.py shows.

    A fallback to the slow reference is an error here (strict mode), so that no time is taken of the wrong kernel.

    Args:
        beside: busy processes that run while cases are timed; the peaks of the machine are taken without them.
        earlier: a record of the same machine, commit and settings that was stopped; its cases are kept, but for those
            of which too few samples counted.
        on_result: told after every case what the record is by then.

    Raises:
        ValueError: the earlier record's conditions are others.
    """
    peaks = gpu.GpuPeaks() if device == "cuda" else Peaks(threads, settings.probe_s, read_bytes)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = record.new(command, threads, settings, peaks.measure_all(), device, beside)
        if earlier is not None:
            made = record.continued(made, earlier)
        done = {record.result_id(result) for result in made["results"] if record.settled(result)}
        left = [case for case in cases if case.id not in done]
        with (
            gf.strict(),
            contextlib.closing(Progress(len(left))) as progress,
            contextlib.closing(memory.Server(threads)) as server,
            busy_processes(beside),
        ):
            for case in left:
                progress.start(case.id)
                record.put(made, run_case(case, peaks, settings, progress, server))
                progress.finish()
                on_result(progress, made)
        made["peaks_after"] = peaks.measure_all()
        made["complete"] = True
    except KeyboardInterrupt:  # what was measured until then is kept
        print("interrupted", file=sys.stderr)
    finally:
        torch.set_num_threads(threads_before)
    record.finish(made)
    return made


def run_case(
    case: Case,
    peaks: Peaks | gpu.GpuPeaks,
    settings: timing.Settings,
    progress: Progress,
    server: memory.Server | None = None,
) -> dict[str, Any]:
    """Checks and times one case, and measures its memory where it asks for that and, on a CPU, there is a server."""
    if "torch._dynamo" in sys.modules:
        # Compiled functions of earlier cases would count against the limit behind which it stops compiling.
        torch._dynamo.reset()
    on_gpu = peaks.device == "cuda"
    contenders = case.contenders_on(peaks.device)
    rows = {
        contender.name: _row(case, contender, settings, None if on_gpu else server, peaks.available_bytes())
        for contender in contenders
    }
    runs: dict[str, Run] = {}
    ready = [contender for contender in contenders if rows[contender.name]["status"] == "timed"]
    with peaks.where():
        inputs = case.make_inputs() if ready else {}
    for contender, error, reason in checked(case, inputs, ready, peaks.where):
        row = rows[contender.name]
        row["error"] = error
        if reason:
            # What is not right has no memory to speak of.
            row |= {"status": reason[0], "reason": reason[1], "extra_bytes": None, "memory_reason": None}
            continue
        limit_s = settings.slowest_s * contender.budget_share
        seconds = row["one_call_s"]
        if seconds is None or seconds <= limit_s:
            run = in_turn(case, contender, inputs)
            row["setting"] = getattr(run, "setting", None)
            slow_start = contender.compiled or on_gpu
            seconds = timing.time_calls(run, 2 if slow_start else 1, peaks.clock)  # also warms it up
            if slow_start:
                seconds = timing.time_calls(run, 1, peaks.clock)
            if on_gpu and case.measures_memory:
                row["extra_bytes"] = gpu.extra_bytes(run)
        if seconds > limit_s:
            row |= {"status": "over budget", "reason": f"one call took {seconds:.1f} s, the limit is {limit_s:g} s"}
        else:
            runs[contender.name] = run
    measured = timing.Measurement({}, ())
    if runs:
        measured = timing.measure(
            runs, peaks.probe(case.bound), settings,
            handoff_ns=peaks.handoff_ns, clock=peaks.clock, on_sample=progress.sample,
        )  # fmt: skip
    for name, taken in measured.timings.items():
        rows[name] |= record.timing_fields(taken)
        if not taken.samples_s:
            rows[name] |= {"status": "noisy", "reason": "the peak probes around every sample disagreed"}
        elif len(taken.samples_s) < settings.rounds:
            rows[name]["reason"] = f"only {len(taken.samples_s)} of {settings.rounds} samples counted"
    return record.result(case, measured, list(rows.values()))


def _row(
    case: Case,
    contender: Contender,
    settings: timing.Settings,
    server: memory.Server | None,
    available: int | None,
) -> dict[str, Any]:
    """A contender's row before anything is checked or timed: its memory, and why it can't be timed, if it can't."""
    row = {**record.ROW, "name": contender.name, "ours": contender.ours}
    needed = case.resident_bytes + contender.extra_bytes(case)
    if available is not None and needed > LARGEST_SHARE * available:
        why = f"it takes about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free"
        return row | {"status": "skipped", "reason": why}
    if not case.measures_memory or server is None:
        return row
    found = server.measure(case.id, contender.name, settings.slowest_s)
    if found.over_budget:
        return row | {"status": "over budget", "reason": found.reason}
    return row | {"extra_bytes": found.extra_bytes, "one_call_s": found.seconds, "memory_reason": found.reason}


def checked(
    case: Case,
    inputs: Inputs,
    contenders: Sequence[Contender],
    where: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Iterator[tuple[Contender, float | None, tuple[str, str] | None]]:
    """Each of these contenders with its error, in shares of what is allowed, or with (status, reason) why it is not
    timed. The exact answer is made in where()."""
    if not contenders:
        return
    with where():
        check_inputs = case.check_inputs(inputs) if case.check_inputs else inputs
        expected = case.expected(check_inputs)
    for contender in contenders:
        try:
            outputs = contender.make(case, check_inputs)()
            yield contender, check.check(outputs, expected, case.dtype), None
        except NotInstalled as error:
            yield contender, None, ("not installed", str(error))
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

    def run() -> Outputs:
        return next(following)()

    setting = getattr(runs[0], "setting", None)
    return run if setting is None else Chosen(run, setting)
