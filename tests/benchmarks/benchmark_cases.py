"""Cases that stand in for the registered ones: adding one, by contenders that are right, wrong or not there, and a case
of known memory for processes that measure (`find`)."""

import os
import signal
import time

import torch

from gpt4v_fast.benchmarks import command, peaks, runner
from gpt4v_fast.benchmarks.registry import Case, Contender, Expected, Unavailable

MEBI = 2**20


def make_case(**contenders):
    """A case of adding one, with contenders by name; the first is ours."""
    x = torch.arange(6.0).view(2, 3)
    return Case(
        op="attention",
        name="fake",
        dtype=torch.float32,
        direction="forward",
        shape={"N": 2},
        flops=6.0,
        bytes=24.0,
        bound="fma",
        make_inputs=lambda: {"x": x},
        expected=lambda inputs: [Expected("out", (), inputs["x"].double() + 1, inputs["x"].double())],
        contenders=tuple(Contender(name, make, ours=i == 0) for i, (name, make) in enumerate(contenders.items())),
        part="quick",
    )


def right(case, inputs):
    return lambda: {"out": inputs["x"] + 1}


def wrong(case, inputs):
    return lambda: {"out": inputs["x"] + 2}


def unavailable(case, inputs):
    raise Unavailable("it is not installed")


def broken(case, inputs):
    raise RuntimeError("not on this processor\nand more")


def run_fake(monkeypatch, **contenders):
    return run_with_steady_peak(monkeypatch, make_case(**contenders))


def run_with_steady_peak(monkeypatch, case, server=None):
    steady = peaks.Peaks(1, 0.001, 2**20)
    monkeypatch.setattr(steady, "probe", lambda bound: lambda: 100.0)
    return runner.run_case(case, steady, command.QUICK, runner.Progress(1), server)


def _allocates(case, inputs):
    """64 MiB that are gone at the end, and a result of 16 MiB; on tiny inputs, as at the warm-up, next to nothing."""

    def run():
        n = inputs["x"].numel() * MEBI // 4
        extra = torch.ones(64 * n)
        return {"out": extra[: 16 * n].clone()}

    return run


def _keeps(case, inputs):
    """32 MiB at its first call, which it keeps."""
    kept = []

    def run():
        kept.append(torch.ones(32 * inputs["x"].numel() * MEBI // 4))
        return {"out": inputs["x"] + 1}

    return run


def _dies(case, inputs):
    return lambda: os.kill(os.getpid(), signal.SIGKILL) if inputs["x"].numel() else None


def _sleeps(case, inputs):
    return lambda: time.sleep(60 * inputs["x"].numel())


def find(case_id):
    """The case of known memory: `memory.Server(find="benchmark_cases:find")`."""
    assert case_id == "memory"
    made = make_case(allocates=_allocates, keeps=_keeps, dies=_dies, sleeps=_sleeps, broken=broken)
    return Case(
        **{
            **vars(made),
            "make_inputs": lambda: {"x": torch.zeros(1)},
            "warm_up_inputs": lambda: {"x": torch.zeros(0)},
            "measures_memory": True,
        }
    )
