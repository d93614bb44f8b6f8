"""What a report says of peers that did not run, and of comparisons by one sample."""

import pytest
from benchmark_cases import make_case, right, run_fake, unavailable

from gpt4v_fast.benchmarks import command, peaks, plots, record, registry, report, runner


def not_installed(case, inputs):
    registry.import_peers("a_peer_that_nobody_has")


def test_a_peer_that_is_not_installed_is_told_from_one_that_cannot_run(monkeypatch):
    result = run_fake(monkeypatch, gpt4v_fast=right, missing=not_installed, unfit=unavailable, peer=right)
    assert [row["status"] for row in result["contenders"]] == ["timed", "not installed", "unavailable", "timed"]
    text = report.case_text(result)
    assert "not installed: a_peer_that_nobody_has is not installed (pip" in text and "cannot run: " in text
    made = record.new("", 1, command.QUICK, {"fma": 1.0, "dot_bf16": 2.0, "read": 3.0})
    made["results"] = [result]
    summary = report.summary_text(made)
    assert "  missing: not installed: " in summary and "  unfit: cannot run: " in summary


@pytest.mark.parametrize("order", [("missing", "gpt4v_fast", "peer"), ("gpt4v_fast", "missing", "peer")])
def test_no_peer_has_our_colour_and_one_that_did_not_run_has_none(monkeypatch, order):
    make = {"missing": not_installed, "gpt4v_fast": right, "peer": right}
    result = run_fake(monkeypatch, **{name: make[name] for name in order})
    for row in result["contenders"]:
        row["ours"] = row["name"] == "gpt4v_fast"
    colours = plots._colours([result])
    assert set(colours) == {"gpt4v_fast", "peer"}
    assert colours["gpt4v_fast"] == plots.OURS != colours["peer"]


def test_more_peers_than_colours_still_leave_ours_alone():
    rows = [{"name": str(i), "ours": i == 5, "median_ms": 1.0, "extra_bytes": None} for i in range(25)]
    colours = plots._colours([{"contenders": rows}])
    assert [name for name, colour in colours.items() if colour == plots.OURS] == ["5"]


def test_one_sample_is_no_win(monkeypatch):
    machine = peaks.Peaks(1, 0.001, 2**20)
    monkeypatch.setattr(machine, "probe", lambda bound: lambda: 100.0)
    settings = command.timing.Settings(rounds=1, max_rounds=1, min_sample_s=0.001, probe_s=0.002)
    result = runner.run_case(make_case(gpt4v_fast=right, peer=right), machine, settings, runner.Progress(1))
    assert result["ratio"] is None and result["sure"] is False
    assert report.counts([result]) == (0, 0, 0) and not report.is_beaten(result)
    text = report.case_text(result)
    assert "=> no comparison: one sample" in text and text.count("one sample\n") == 2
