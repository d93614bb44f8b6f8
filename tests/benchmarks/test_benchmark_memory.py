"""Extra memory as the process sees it, measured where it is known."""

import contextlib
import os
from dataclasses import replace
from pathlib import Path

import benchmark_cases
import pytest
import torch
from benchmark_cases import MEBI, make_case, right, run_with_steady_peak

from gpt4v_fast.benchmarks import memory, registry

UNMEASURED = memory.why_not()
pytestmark = pytest.mark.skipif(UNMEASURED is not None, reason=str(UNMEASURED))


@pytest.fixture(scope="module")
def server():
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    try:
        started = memory.Server(1, find="benchmark_cases:find")
        started.measure("memory", "keeps", 60.0)  # starts it, in this environment
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    with contextlib.closing(started):
        yield started


@pytest.mark.parametrize(("contender", "mebibytes"), [("allocates", 64), ("keeps", 32)])
def test_a_known_allocation_is_found(server, contender, mebibytes):
    found = server.measure("memory", contender, 60.0)
    assert found.reason is None and found.seconds > 0
    assert abs(found.extra_bytes / MEBI - mebibytes) < 2


@pytest.mark.parametrize(
    ("contender", "budget_s", "reason", "over_budget"),
    [
        ("sleeps", 0.2, "one call took more than 0.2 s", True),
        ("dies", 60.0, "its process was ended from outside, as happens where memory runs out", False),
        ("broken", 60.0, "its call failed: not on this processor", False),
    ],
)
def test_what_gives_no_measurement_has_a_reason(server, contender, budget_s, reason, over_budget):
    assert server.measure("memory", contender, budget_s) == memory.Measured(reason=reason, over_budget=over_budget)
    assert server.measure("memory", "keeps", 60.0).extra_bytes > 0  # and the server goes on


def test_a_server_that_ended_says_so():
    ended = memory.Server(1, find="no_such_module:find")
    with contextlib.closing(ended):
        assert ended.measure("memory", "keeps", 1.0).reason == "the measuring process ended with status 1"


def test_results_that_share_memory_count_once():
    x = torch.ones(1024)
    assert memory.results_bytes({"a": x, "b": x.view(2, 512), "c": torch.ones(8)}) == 4096 + 32


def test_where_the_system_does_not_tell_the_reason_is_given(monkeypatch):
    def refused():
        raise PermissionError("not allowed")

    monkeypatch.setattr(memory, "reset_peak", refused)
    closed = memory.Server(1)
    assert closed.measure("any", "any", 1.0).reason == "the system does not tell the largest resident set: not allowed"
    closed.close()


def test_a_row_has_the_memory_and_one_call_over_the_budget_is_not_timed(server, monkeypatch):
    case = benchmark_cases.find("memory")
    named = {contender.name: contender for contender in case.contenders}
    # In the process that measures these allocate, die and sleep; here they are right.
    here = [replace(named[name], make=right, ours=name == "keeps") for name in ("keeps", "dies", "sleeps")]
    monkeypatch.setattr(benchmark_cases.command, "QUICK", replace(benchmark_cases.command.QUICK, slowest_s=0.5))

    class Named:
        def measure(self, case_id, contender, budget_s):
            return server.measure("memory", contender, budget_s)

    result = run_with_steady_peak(monkeypatch, replace(case, contenders=tuple(here)), Named())
    keeps, dies, sleeps = result["contenders"]
    assert keeps["status"] == dies["status"] == "timed"
    assert abs(keeps["extra_bytes"] / MEBI - 32) < 2 and keeps["one_call_s"] > 0
    assert dies["extra_bytes"] is None and "ended from outside" in dies["memory_reason"]
    assert (sleeps["status"], sleeps["reason"]) == ("over budget", "one call took more than 0.5 s")


def test_a_share_of_the_budget_ends_a_contender_earlier(monkeypatch):
    case = make_case(gpt4v_fast=right, slow=right)
    case = replace(case, contenders=(case.contenders[0], replace(case.contenders[1], budget_share=-1.0)))
    statuses = [row["status"] for row in run_with_steady_peak(monkeypatch, case)["contenders"]]
    assert statuses == ["timed", "over budget"]


def test_what_would_not_fit_is_skipped_with_the_reason(monkeypatch):
    case = make_case(gpt4v_fast=right, large=right)
    large = replace(case.contenders[1], extra_bytes=lambda case: 3.0 * 2**30)
    monkeypatch.setattr(memory, "available_bytes", lambda: 3 * 2**30)
    rows = run_with_steady_peak(monkeypatch, replace(case, contenders=(case.contenders[0], large)))["contenders"]
    assert rows[0]["status"] == "timed"
    assert (rows[1]["status"], rows[1]["reason"]) == ("skipped", "it takes about 3.0 GiB, 3.0 GiB are free")
    nothing = run_with_steady_peak(monkeypatch, replace(case, resident_bytes=3.0 * 2**30))
    assert [row["status"] for row in nothing["contenders"]] == ["skipped"] * 2
    assert nothing["verdict"] == "no comparison"


def test_free_memory_is_told_in_bytes():
    assert 2**20 < memory.available_bytes() < 2**50


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_the_plain_loss_is_estimated_by_its_logits(direction):
    (case,) = registry.cases(
        ops=["linear_cross_entropy"], names=["n512_v49152_e576"], dtypes=["fp32"], directions=[direction]
    )[:1]
    logits = 512 * 49152 * 4
    estimates = {contender.name: contender.extra_bytes(case) / logits for contender in case.contenders}
    assert estimates["gpt4v_fast"] == 0
    assert estimates["F.cross_entropy(F.linear().float())"] == (2 if direction == "forward" else 3)
