"""Runs of benchmarks: what is timed and what is not, the record and its continuation, what is printed.

No test looks at how long a kernel takes: probes are stand-ins, or only the form of the record is checked.
"""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmark_cases import broken, make_case, right, run_fake, unavailable, wrong

import gpt4v_fast as gf
from gpt4v_fast import doctor
from gpt4v_fast._native import _C
from gpt4v_fast.benchmarks import command, memory, peaks, plots, record, registry, report, runner
from gpt4v_fast.cli import main

ROOT = Path(__file__).resolve().parents[2]


class TestRunner:
    def test_only_right_results_are_timed(self, monkeypatch):
        result = run_fake(monkeypatch, gpt4v_fast=right, bad=wrong, absent=unavailable, broken=broken, good=right)
        rows = {row["name"]: row for row in result["contenders"]}
        assert {name: row["status"] for name, row in rows.items()} == {
            "gpt4v_fast": "timed",
            "bad": "refused",
            "absent": "unavailable",
            "broken": "failed",
            "good": "timed",
        }
        assert rows["bad"]["median_ms"] is None
        assert rows["absent"]["reason"] == "it is not installed"
        assert rows["broken"]["reason"] == "not on this processor"
        assert result["best_peer"] == "good" and result["ratio"] > 0
        text = report.case_text(result)
        assert "refused: its result is wrong" in text and "cannot run: it is not installed" in text

    def test_a_contender_over_the_limit_is_not_timed(self, monkeypatch):
        monkeypatch.setattr(command, "QUICK", replace(command.QUICK, slowest_s=-1.0))
        result = run_fake(monkeypatch, gpt4v_fast=right, peer=right)
        assert [row["status"] for row in result["contenders"]] == ["over budget"] * 2
        assert result["verdict"] == "no comparison"

    def test_copies_are_taken_in_turn(self):
        used = []

        def make(case, inputs):
            return lambda: used.append(inputs["x"].data_ptr())

        case = replace(make_case(gpt4v_fast=make), copies=3)
        inputs = case.make_inputs()
        call = runner.in_turn(case, case.contenders[0], inputs)
        for _ in range(6):
            call()
        assert used[0] == inputs["x"].data_ptr()
        assert len(set(used)) == 3 and used[:3] == used[3:]

    @pytest.mark.parametrize(("ours", "code"), [(right, 0), (wrong, 1), (broken, 1)])
    def test_the_exit_code_tells_of_our_own_failures(self, monkeypatch, capsys, ours, code):
        monkeypatch.setattr(registry, "cases", lambda **filters: [make_case(gpt4v_fast=ours, peer=right)])
        assert main(["bench", "--quick", "--json"]) == code
        assert json.loads(capsys.readouterr().out)["complete"] is True

    def test_an_interruption_keeps_what_was_measured(self, monkeypatch, capsys):
        def interrupt(case, inputs):
            raise KeyboardInterrupt

        monkeypatch.setattr(
            registry, "cases", lambda **f: [make_case(gpt4v_fast=right, peer=right), make_case(gpt4v_fast=interrupt)]
        )
        assert main(["bench", "--quick", "--json"]) == 130
        made = json.loads(capsys.readouterr().out)
        assert made["complete"] is False and len(made["results"]) == 1

    def test_threads_are_put_back(self, monkeypatch):
        before = torch.get_num_threads()
        seen = []

        def make(case, inputs):
            seen.append(torch.get_num_threads())
            return right(case, inputs)

        runner.run_cases([make_case(gpt4v_fast=make)], threads=before + 1, settings=command.QUICK, read_bytes=2**20)
        assert set(seen) == {before + 1} and torch.get_num_threads() == before


class TestRecord:
    @pytest.fixture(autouse=True)
    def steady(self, monkeypatch):
        """So that every sample counts, on a busy machine too."""
        monkeypatch.setattr(peaks.Peaks, "probe", lambda self, bound: lambda: 100.0)

    def fakes(self, monkeypatch, *cases):
        monkeypatch.setattr(registry, "cases", lambda **filters: list(cases))

    def test_it_is_written_after_every_case(self, monkeypatch, tmp_path):
        path, seen = tmp_path / "record.json", []

        def look(case, inputs):
            seen.append(len(json.loads(path.read_text())["results"]) if path.exists() else 0)
            return right(case, inputs)

        names = ("one", "two", "three")
        self.fakes(monkeypatch, *(replace(make_case(gpt4v_fast=look), name=name) for name in names))
        assert main(["bench", "--quick", "--json", str(path)]) == 0
        assert list(dict.fromkeys(seen)) == [0, 1, 2]
        assert [result["case"] for result in json.loads(path.read_text())["results"]] == list(names)
        assert list(tmp_path.iterdir()) == [path]  # and nothing is left beside it

    def test_a_stopped_run_is_continued(self, monkeypatch, tmp_path):
        path, ran, stop = tmp_path / "record.json", [], [True]

        def make(case, inputs):
            if case.name == "two" and stop:
                raise KeyboardInterrupt
            ran.append(case.name)
            return right(case, inputs)

        self.fakes(monkeypatch, *(replace(make_case(gpt4v_fast=make, peer=right), name=n) for n in ("one", "two")))
        assert main(["bench", "--quick", "--resume", str(path)]) == 130  # there is nothing yet: it starts
        first = json.loads(path.read_text())
        assert [result["case"] for result in first["results"]] == ["one"] and first["complete"] is False
        stop.clear()
        ran.clear()
        assert main(["bench", "--quick", "--resume", str(path)]) == 0
        second = json.loads(path.read_text())
        assert set(ran) == {"two"} and second["complete"] is True and second["date"] == first["date"]
        assert second["results"][0] == first["results"][0] and second["results"][1]["case"] == "two"
        assert set(second["peaks_after"]) == set(peaks.UNITS)

    def test_a_continued_run_tries_again_where_samples_were_missing(self, monkeypatch, tmp_path):
        path, ran = tmp_path / "record.json", []

        def make(case, inputs):
            ran.append(case.name)
            return right(case, inputs)

        self.fakes(monkeypatch, *(replace(make_case(gpt4v_fast=make, peer=right), name=n) for n in ("one", "two")))
        assert main(["bench", "--quick", "--json", str(path)]) == 0
        for status, reason, again in (
            ("noisy", "it was", {"two"}),
            ("timed", "only 1", {"two"}),
            ("timed", None, set()),
        ):
            made = record.read(path)
            for result in made["results"]:
                for row in result["contenders"]:
                    missing = result["case"] == "two" and row["ours"]
                    row |= {"status": status, "reason": reason} if missing else {"status": "timed", "reason": None}
            record.write(made, path)
            ran.clear()
            assert main(["bench", "--quick", "--resume", str(path)]) == 0
            assert set(ran) == again
            assert sorted(result["case"] for result in json.loads(path.read_text())["results"]) == ["one", "two"]

    @pytest.mark.parametrize("name", record.CONTINUED)
    def test_other_conditions_are_refused(self, name):
        made = record.new("", 1, command.QUICK, {})
        assert record.continued(made, made)["results"] == []
        with pytest.raises(ValueError, match=f"the record to continue: expected {name} .*, got other"):
            record.continued(made, {**made, name: "other"})

    @pytest.mark.parametrize("text", ["{}", "[1]", "no json", '{"schema": 2, "results": []}'])
    def test_what_is_no_record_is_refused(self, tmp_path, text):
        path = tmp_path / "record.json"
        path.write_text(text)
        with pytest.raises(ValueError, match="expected a record of"):
            record.read(path)

    @pytest.mark.parametrize(
        ("text", "written"),
        [
            ("gpt4v-fast bench --json /home/someone/x/out.json", "gpt4v-fast bench --json out.json"),
            ("failed in '/tmp/a b/c.so': no", "failed in 'a b/c.so': no"),
            ("40 GB/s, F.linear().float()/2, a/b/c, 1/2", "40 GB/s, F.linear().float()/2, a/b/c, 1/2"),
        ],
    )
    def test_it_has_no_paths_of_the_machine(self, text, written):
        assert json.loads(record.text({"reason": [text]})) == {"reason": [written]}


class TestReport:
    def test_a_peer_that_ran_nowhere_is_told(self, monkeypatch):
        made = record.new("", 1, command.QUICK, {"fma": 1.0, "dot_bf16": 2.0, "read": 3.0})
        made["results"] = [run_fake(monkeypatch, gpt4v_fast=right, absent=unavailable, bad=wrong)]
        text = report.summary_text(made)
        assert "  absent: cannot run: it is not installed" in text and "  bad: " not in text

    def test_memory_stands_in_the_row(self, monkeypatch):
        result = run_fake(monkeypatch, gpt4v_fast=right, peer=right)
        result["contenders"][0]["extra_bytes"] = 3 * 2**20
        result["contenders"][1]["memory_reason"] = "it was not told"
        lines = report.case_text(result).splitlines()
        assert "3.0 MiB extra" in lines[1] and "it was not told" in lines[2]

    @pytest.mark.parametrize(
        ("ratio", "words"),
        [
            (2.5, "2.50x faster than peer"),
            (0.5, "slower than peer: 2.00x its time"),
            (1.01, "as fast as peer"),
            (None, "no comparison"),
        ],
    )
    def test_slower_is_said_in_words(self, ratio, words):
        assert record.verdict(ratio, "peer") == words

    def test_slower_cases_are_listed_at_the_end(self, monkeypatch):
        result = {**run_fake(monkeypatch, gpt4v_fast=right, peer=right), "ratio": 0.5, "verdict": "slower than peer"}
        made = record.new("", 1, command.QUICK, {"fma": 1.0, "dot_bf16": 2.0, "read": 3.0})
        made["results"] = [result]
        assert "1 slower" in report.summary_text(made)
        assert "slower: attention fake fp32 forward: slower than peer" in report.summary_text(made)

    def test_few_samples_make_the_verdict_unsure(self, monkeypatch):
        probes = iter([100.0] * 5 + [50.0, 100.0] * 9)  # the first four samples count, two of each
        machine = peaks.Peaks(1, 0.001, 2**20)
        monkeypatch.setattr(machine, "probe", lambda bound: lambda: next(probes))
        result = runner.run_case(make_case(gpt4v_fast=right, peer=right), machine, command.QUICK, runner.Progress(1))
        assert result["contenders"][0]["reason"] == "only 2 of 3 samples counted"
        assert result["sure"] is False and "(unsure: too few samples counted)" in report.case_text(result)
        assert run_fake(monkeypatch, gpt4v_fast=right, peer=right)["sure"] is True

    @pytest.mark.parametrize(("load", "warned"), [([0.2, 0, 0], False), ([1.5, 0, 0], True), (None, False)])
    def test_a_busy_machine_is_told(self, load, warned):
        made = record.new("", 1, command.QUICK, {"fma": 1.0, "dot_bf16": 2.0, "read": 3.0})
        made |= {"cores": 2, "load": {"before": load, "after": None}}
        assert ("do not publish" in report.summary_text(made)) is warned

    def test_without_matplotlib_the_page_says_why_it_has_no_plot(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert plots.html_images("attention", []) == [plots.MISSING]

    def points(self, values, proportional=True, extra=None):
        """Results of a curve: our time at each x."""
        return [
            {
                "op": "attention",
                "dtype": "bf16",
                "direction": "forward",
                "point": {"curve": "by mask", "x_name": "share", "x": x, "proportional": proportional},
                "contenders": [
                    {"name": n, "ours": n == "gpt4v_fast", "status": "timed", "median_ms": ms, "extra_bytes": extra}
                    for n in ("gpt4v_fast", "SDPA")
                ],
            }
            for x, ms in values
        ]

    def test_a_curve_says_where_time_does_not_follow_the_blocks(self):
        (line,) = report.curve_lines(self.points([(1.0, 10.0), (0.5, 5.5), (0.25, 3.0), (0.1, 0.8)]))
        assert line == (
            "attention by mask, bf16 forward: time follows the blocks that are left within 15% at 1 of 3 points; "
            "not at 10% (-20%), 25% (+20%)"
        )

    @pytest.mark.parametrize(("bytes_at_2", "growth"), [(20, "1.00"), (40, "2.00")])
    def test_a_curve_says_how_memory_grows(self, bytes_at_2, growth):
        points = self.points([(1.0, 1.0), (2.0, 2.0)], proportional=False)
        for point, extra in zip(points, (10, bytes_at_2), strict=True):
            point["contenders"][0]["extra_bytes"] = extra * 2**20
        (line,) = report.curve_lines(points)
        assert f"it grows at most {growth} times as much as share" in line
        assert "10.0 MiB extra memory at 1 to" in line

    def test_the_losses_memory_stands_beside_the_logits(self):
        def result(extra, N):
            rows = [{"ours": True, "extra_bytes": extra}, {"ours": False, "extra_bytes": 1}]
            return {"op": "linear_cross_entropy", "shape": {"N": N, "V": 2**18}, "contenders": rows}

        lines = report.memory_lines([result(2 * 2**20, 16), result(3 * 2**20, 48), result(None, 1)])
        assert lines == ["linear_cross_entropy: at most 3.0 MiB extra memory; logits in fp32 are at least 8 times it"]
        assert report.memory_lines([result(None, 1)]) == []

    def test_curves_are_drawn(self):
        images = plots.html_images("attention", self.points([(0.5, 1.0), (1.0, 2.0)], extra=2**20))
        assert len(images) == 1 and 'alt="attention by mask, bf16 forward"' in images[0]

    def test_an_install_has_no_commit(self, monkeypatch, tmp_path):
        monkeypatch.setattr(gf, "__file__", str(tmp_path / "gpt4v_fast" / "__init__.py"))
        assert record.commit() is None


RECORD = {
    "schema": int,
    "command": str,
    "date": str,
    "finished": str,
    "cpu": str,
    "cores": int,
    "gpus": list,
    "isa": str,
    "threads": int,
    "versions": dict,
    "environment": dict,
    "load": dict,
    "settings": dict,
    "peaks": dict,
    "complete": bool,
    "results": list,
}
RESULT = {
    "op": str,
    "case": str,
    "dtype": str,
    "direction": str,
    "shape": dict,
    "flops": float,
    "bytes": float,
    "bound": str,
    "unit": str,
    "peak": dict,
    "contenders": list,
    "sure": bool,
    "verdict": str,
}
TIMED = ("median_ms", "p20_ms", "p80_ms", "rate", "share_of_peak", "error")


@pytest.mark.timeout(900)  # compiled contenders, twice where no earlier run left torch's cache of compiled code
def test_quick_bench_from_the_command_line_to_the_record_and_the_page(tmp_path, capsys):
    record_path, page_path = tmp_path / "record.json", tmp_path / "report.html"
    assert main(["bench", "--quick", "--threads", "1", "--json", str(record_path), "--html", str(page_path)]) == 0
    made = record.read(record_path)
    assert {name: type(made[name]) for name in RECORD} == RECORD
    assert made["schema"] == record.SCHEMA and made["isa"] == _C.isa() and made["threads"] == 1
    assert made["commit"] is None or re.fullmatch(r"[0-9a-f]{12}(-dirty)?", made["commit"])
    assert {"torch", "python", "compiler", "gpt4v_fast"} <= set(made["versions"])
    assert len(made["results"]) == len(registry.cases(part="quick"))
    for result in made["results"]:
        assert {name: type(result[name]) for name in RESULT} == RESULT
        for row in result["contenders"]:
            assert row["status"] in ("timed", "noisy") or (row["status"] in report.NOT_RUN and not row["ours"]), row
            if row["status"] == "timed":
                assert all(math.isfinite(row[name]) and row[name] >= 0 for name in TIMED)
                assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
                measured = result["op"] == "linear_cross_entropy" and result["direction"] == "forward+backward"
                assert (row["extra_bytes"] is not None) is (measured and memory.why_not() is None)
    printed = capsys.readouterr().out
    assert "quick_causal" in printed and "a look, not a measurement" in printed
    page = page_path.read_text()
    assert all(result["case"] in page for result in made["results"])
    assert "data:image/png;base64," in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)  # self-contained


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--threads", "-1"], "--threads: expected at least 1, got -1"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--threads", "99999"], "--threads: expected at most"),
        (["--budget", "0"], "--budget: expected seconds above 0, got 0"),
        (["--budget", "nan"], "--budget: expected seconds above 0, got nan"),
        (["--case", "nothing"], "case: expected a part of a name that --list shows, got 'nothing'"),
        (["--case", "quick_casual"], "got 'quick_casual'; close: quick_causal"),
        (["--case", "quick_causal", "--case", "quick_liner"], "got 'quick_liner'; close: quick_linear"),
        (["--case", ""], "got ''"),
        (["--json", "no/such/folder/x.json"], "expected a path in an existing folder"),
        (["--resume", "no/such/folder/x.json"], "expected a path in an existing folder"),
        (["--resume", __file__], "expected a record of a benchmark, got"),
        (["--resume", "x.json", "--json"], "--resume: expected no --json beside it"),
    ],
)
def test_bad_options_end_in_one_line(arguments, message, capsys):
    assert main(["bench", "--quick", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_threads_of_the_environment_are_limited_too(monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4 * doctor.usable_cores() + 1)
    assert main(["bench", "--quick", "--list"]) == 2
    assert "OMP_NUM_THREADS: expected at most" in capsys.readouterr().err


def test_a_case_without_the_asked_dtype_says_which_it_has(capsys):
    assert main(["bench", "--quick", "--case", "quick_decode", "--direction", "backward"]) == 2
    error = capsys.readouterr().err
    assert "case quick_decode: expected a dtype and direction that it has (fp32 forward" in error


def test_the_modules_run_from_the_source_tree():
    listing = [sys.executable, "-m", "benchmarks.loss", "--quick", "--list"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    listed = done.stdout.split()
    assert "linear_cross_entropy/quick_linear/bf16/forward" in listed
    assert all(line.split("/")[0] in ("cross_entropy", "linear_cross_entropy") for line in listed)
