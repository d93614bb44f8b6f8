"""Four processes in a gloo group that run functions for a test; the first two are a group of their own as well.

`call(ranks, function, ...)` runs `function(group, ...)` in the first `ranks` of them and returns what each gave. They
start at the first call and serve the whole session: most of their time goes into importing torch. The functions live in
importable modules (cases), because the processes are spawned. No wait is without an end.
"""

from __future__ import annotations

import atexit
import datetime
import functools
import multiprocessing
import os
import pickle
import shutil
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

RANKS = 4
COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=60)
CALL_TIMEOUT_SECONDS = 200


@functools.cache
def _workers() -> list[Any]:
    """The ends of the pipes to the processes."""
    context = multiprocessing.get_context("spawn")
    folder = tempfile.mkdtemp()
    pipes = [context.Pipe() for _ in range(RANKS)]
    arguments = [(rank, folder, theirs) for rank, (_, theirs) in enumerate(pipes)]
    processes = [context.Process(target=_serve, args=args, daemon=True) for args in arguments]
    for process in processes:
        process.start()

    def stop() -> None:
        for process in processes:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(stop)
    return [ours for ours, _ in pipes]


def call(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(group, *args)` returned in each process; an exception it raised is returned in its place."""
    workers = _workers()[:ranks]
    job = pickle.dumps((ranks, function, args))
    for worker in workers:
        worker.send_bytes(job)
    results = []
    for rank, worker in enumerate(workers):
        if not worker.poll(CALL_TIMEOUT_SECONDS):
            raise TimeoutError(f"process {rank} of {ranks} gave no answer in {CALL_TIMEOUT_SECONDS} s")
        results.append(pickle.loads(worker.recv_bytes()))
    return results


def results_of(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`call`, with the first exception raised here."""
    results = call(ranks, function, *args)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def _serve(rank: int, folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ["TRITON_INTERPRET"] = "1"  # for who forces the backend triton; before anything imports triton
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(os.path.join(folder, "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=COLLECTIVE_TIMEOUT)
    groups = {2: dist.new_group([0, 1], timeout=COLLECTIVE_TIMEOUT), RANKS: dist.group.WORLD}
    while True:
        ranks, function, args = pickle.loads(pipe.recv_bytes())
        try:
            answer = pickle.dumps(function(groups[ranks], *args))
        except (
            ArithmeticError,
            AssertionError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            known = type(error).__module__ == "builtins"  # others may not survive the pipe
            answer = pickle.dumps(error if known else RuntimeError("".join(traceback.format_exception(error))))
        pipe.send_bytes(answer)
