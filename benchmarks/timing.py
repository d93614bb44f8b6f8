"""Times that can be compared: interleaved rounds in one process, each sample between two probes of the machine.

Every round runs each contender once, in an order of its own, so that slow minutes of a shared machine hit all of them
and what one leaves behind (memory, caches) meets each of the others at times. A sample counts only if the peak probe
just before and just after it agree; rounds are added, up to a bound, until every contender has enough samples that
count.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Settings:
    """rounds: samples that each contender needs; max_rounds: when to give up; tolerance: how far the probes around a
    sample may differ, as a share of the larger; min_sample_s: short calls are repeated to last this long; slowest_s:
    a contender whose single call takes longer is not timed."""

    rounds: int = 7
    max_rounds: int = 21
    tolerance: float = 0.10
    min_sample_s: float = 0.02
    probe_s: float = 0.01
    slowest_s: float = 10.0


@dataclass(frozen=True)
class Timing:
    """Seconds per call of the samples that counted, and how many did not."""

    samples_s: tuple[float, ...]
    dropped: int
    calls_per_sample: int

    def quantile_s(self, share: float) -> float | None:
        return float(np.quantile(self.samples_s, share)) if self.samples_s else None

    @property
    def median_s(self) -> float | None:
        return self.quantile_s(0.5)


@dataclass(frozen=True)
class Measurement:
    """All timings of a case, the probes around the samples that counted, and after each of them how far apart the
    threads' cores were (peaks.py)."""

    timings: dict[str, Timing]
    probes: tuple[float, ...]
    handoffs_ns: tuple[float, ...] = ()

    @property
    def peak(self) -> float | None:
        return float(np.median(self.probes)) if self.probes else None


def agree(before: float, after: float, tolerance: float) -> bool:
    return abs(before - after) <= tolerance * max(before, after)


def shuffled(names: Sequence[str], turn: int) -> list[str]:
    """The order of a round: another in each, the same in every run."""
    return [names[i] for i in np.random.default_rng(turn).permutation(len(names))]


def calls_per_sample(run: Callable[[], object], min_sample_s: float, clock: Callable[[], float]) -> int:
    """How many calls last at least `min_sample_s`, found by doubling."""
    calls = 1
    while True:
        elapsed = time_calls(run, calls, clock)
        if elapsed >= min_sample_s or calls >= 2**20:
            return calls
        needed = calls * min_sample_s / max(elapsed, 1e-9)
        calls = min(max(2 * calls, math.ceil(min(needed, 10.0 * calls))), 2**20)


def time_calls(run: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        run()
    return clock() - start


def measure(
    runs: Mapping[str, Callable[[], object]],
    probe: Callable[[], float],
    settings: Settings,
    *,
    handoff_ns: Callable[[], float] = lambda: 0.0,
    clock: Callable[[], float] = time.perf_counter,
    on_sample: Callable[[str, bool], None] = lambda name, counted: None,
) -> Measurement:
    """Times every run against the others.

    Args:
        runs: contenders by name; each has been called before (its caches are warm).
        probe: measures the machine's peak; its value's unit does not matter here.
        handoff_ns: measures how far apart the threads' cores are.
        on_sample: told after each sample whose it was and whether it counted.
    """
    names = list(runs)
    calls = {name: calls_per_sample(runs[name], settings.min_sample_s, clock) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    dropped = dict.fromkeys(names, 0)
    probes: list[float] = []
    handoffs: list[float] = []
    before = probe()
    for turn in range(max(settings.rounds, settings.max_rounds)):
        if turn >= settings.rounds and all(len(samples[name]) >= settings.rounds for name in names):
            break
        for name in shuffled(names, turn):
            with _no_garbage_collection():
                elapsed = time_calls(runs[name], calls[name], clock)
            after = probe()
            counted = agree(before, after, settings.tolerance)
            if counted:
                samples[name].append(elapsed / calls[name])
                probes += [before, after]
                handoffs.append(handoff_ns())
            else:
                dropped[name] += 1
            before = after
            on_sample(name, counted)
    timings = {name: Timing(tuple(samples[name]), dropped[name], calls[name]) for name in names}
    return Measurement(timings, tuple(probes), tuple(handoffs))


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
