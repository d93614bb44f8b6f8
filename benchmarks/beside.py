"""Busy processes beside a measurement: `--beside N`, for times on a machine that is shared with other programs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

# It ends by itself where its parent is gone, also after a SIGKILL; Ctrl-C reaches it too and is its parent's to answer.
BUSY = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
print(flush=True)
while os.getppid() == int(sys.argv[1]):
    sum(range(100_000))
"""


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[list[int]]:
    """The ids of that many processes, each of which computes on one core at normal priority until the end."""
    command = [sys.executable, "-I", "-S", "-c", BUSY, str(os.getpid())]
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
            stack.callback(_stop, process)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()  # it runs
        yield [process.pid for process in processes]


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
