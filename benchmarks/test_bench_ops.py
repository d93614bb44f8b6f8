"""The same cases under pytest-benchmark: `pytest benchmarks/ --benchmark-only`, not part of `make test`.

For looking at one kernel while working on it; numbers to publish come from `gpt4v-fast bench`, which interleaves the
contenders and probes the machine.
"""

import pytest

import gpt4v_fast as gf
from gpt4v_fast.benchmarks import registry, report, runner

CASES = [case for case in registry.cases(part="quick") if case.direction != "backward"]


@pytest.mark.parametrize(
    ("case", "contender"),
    [
        pytest.param(case, contender, id=f"{case.id}/{contender.name}")
        for case in CASES
        for contender in case.contenders_on("cpu")
    ],
)
def test_bench(benchmark, case, contender):
    benchmark.group = case.id
    with gf.strict():
        for checked, error, reason in runner.checked(case, case.make_inputs(), case.contenders_on("cpu")):
            if checked.name == contender.name:
                if reason is not None and reason[0] in report.NOT_RUN:
                    pytest.skip(reason[1])
                assert reason is None, reason
                benchmark.extra_info["error"] = error
        benchmark(runner.in_turn(case, contender, case.make_inputs()))
