"""Peak extra memory of one call, as the process sees it:

    extra = largest resident set during the call - resident set before it - bytes of its results

A call is measured in a process of its own, where nothing ran before but a warm-up. A server forks one per measurement:
it has imported everything and computed nothing (a process whose OpenMP threads run can't be forked), and an import of
torch for each would take longer than most calls. The kernel keeps the largest resident set (VmHWM) and sets it back on
demand, so that no sample is missed. What malloc keeps of freed blocks would hide an allocation: blocks over a megabyte
go back at once (MALLOC_MMAP_THRESHOLD_), the rest is trimmed before the call.

Warm-up: a call on tiny inputs, which loads code and starts threads, so that buffers a contender keeps from its first
large call count. What is compiled at its first call is called on the real inputs first: compilers take more than calls.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import gpt4v_fast as gf

from .registry import Case, Contender, Outputs, Unavailable

FIND = "gpt4v_fast.benchmarks.registry:find"
SETUP_S = 600.0  # for inputs, warm-up and compilation; only the call itself has the caller's budget
RESET_PEAK = "5"  # clear_refs, proc_pid_clear_refs(5)


@dataclass(frozen=True)
class Measured:
    """A call's extra bytes and seconds; or the reason why there are none. over_budget: it was ended at its budget."""

    extra_bytes: int | None = None
    seconds: float | None = None
    reason: str | None = None
    over_budget: bool = False


def status_bytes(field: str) -> int:
    """A size of /proc/self/status: VmRSS now, VmHWM at most since reset_peak()."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise Unavailable(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text(RESET_PEAK, encoding="ascii")


def why_not() -> str | None:
    """Why memory can't be measured on this system, or None."""
    try:
        status_bytes("VmHWM")
        reset_peak()
    except (OSError, Unavailable) as error:
        return f"the system does not tell the largest resident set: {error}"
    return None


def available_bytes() -> int | None:
    """What a new allocation could take before the system swaps or kills; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def trim() -> None:
    """Hands freed memory back to the system, where the C library can."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)


def results_bytes(outputs: Outputs) -> int:
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in outputs.values()}
    return sum(storages.values())


def measure(run: Callable[[], Outputs]) -> Measured:
    """Of one call, in this process."""
    trim()
    before = status_bytes("VmRSS")
    reset_peak()
    start = time.perf_counter()
    outputs = run()
    seconds = time.perf_counter() - start
    extra = status_bytes("VmHWM") - before - results_bytes(outputs)
    return Measured(max(0, extra), seconds)


def measure_contender(case: Case, contender: Contender, started: Callable[[], None] = lambda: None) -> Measured:
    """Warms up, calls `started` and measures."""
    with gf.strict():
        if case.warm_up_inputs is not None and not contender.compiled:
            contender.make(case, case.warm_up_inputs())()
        run = contender.make(case, case.make_inputs())
        if case.warm_up_inputs is None or contender.compiled:
            run()
        started()
        return measure(run)


class Server:
    """Measures contenders of registered cases, one process each; it starts at the first.

    Args:
        threads: torch's threads in every process.
        find: "module:function" that gives the case of an id.
    """

    def __init__(self, threads: int, find: str = FIND) -> None:
        self.threads, self.find = threads, find
        self._process: subprocess.Popen[str] | None = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None:
            return self._process
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpt4v_fast.benchmarks.memory", self.find, str(self.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=Path(gf.__file__).resolve().parents[1],  # so that it imports the package that runs here
            start_new_session=True,
        )
        return self._process

    def measure(self, case: str, contender: str, budget_s: float) -> Measured:
        """Of the case's contender, which is ended after `budget_s` in its call."""
        if (reason := why_not()) is not None:
            return Measured(reason=reason)
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps([case, contender, budget_s]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return Measured(reason=f"the measuring process ended with status {process.wait()}")
        return Measured(**json.loads(line))

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # its own session: the server and what it forked
            self._process.wait()


def serve(find: str, threads: int) -> None:
    """Answers requests on the standard input, each by a fork, until it ends."""
    module, function = find.split(":")
    find_case = getattr(importlib.import_module(module), function)
    importlib.import_module("torch._inductor.compile_fx")  # seconds, in each process that compiles
    for line in sys.stdin:
        case, contender, budget_s = json.loads(line)
        print(json.dumps(_in_a_fork(find_case, case, contender, threads, budget_s)), flush=True)


def _in_a_fork(
    find_case: Callable[[str], Case], case: str, contender: str, threads: int, budget_s: float
) -> Mapping[str, Any]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(writer, find_case, case, contender, threads)
    os.close(writer)
    try:
        messages = _messages(reader)
        for limit_s, started in ((SETUP_S, False), (budget_s, True)):
            if not select.select([reader], [], [], limit_s)[0]:
                what = "one call" if started else "its preparation"
                return {"reason": f"{what} took more than {limit_s:g} s", "over_budget": True}
            message = next(messages, None)
            if message is None or "started" not in message:
                return message or {"reason": "its process was ended from outside, as happens where memory runs out"}
        return {"reason": "its process said nothing"}
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)  # at the latest now; a process that ended already waits to be read
        os.waitpid(child, 0)


def _messages(descriptor: int) -> Iterator[dict[str, Any]]:
    with os.fdopen(os.dup(descriptor), encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _child(writer: int, find_case: Callable[[str], Case], name: str, contender: str, threads: int) -> None:
    """Measures, says so and ends; never returns."""

    def say(message: Mapping[str, Any]) -> None:
        os.write(writer, (json.dumps(message) + "\n").encode())

    try:
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")  # the first to go
        torch.set_num_threads(threads)
        case = find_case(name)
        chosen = next(c for c in case.contenders if c.name == contender)
        measured = measure_contender(case, chosen, lambda: say({"started": True}))
        say({"extra_bytes": measured.extra_bytes, "seconds": measured.seconds})
    except (RuntimeError, ValueError, TypeError, OSError, MemoryError) as error:
        say({"reason": f"its call failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"})
    finally:
        os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
