"""Busy processes beside a run: they stop with it, and its numbers do not pass for those of a quiet machine."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from benchmark_cases import make_case, right

from gpt4v_fast.benchmarks import command, peaks, performance, record, registry, report
from gpt4v_fast.benchmarks.beside import busy_processes
from gpt4v_fast.cli import main


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(pid):
    deadline = time.monotonic() + 30
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_they_stop_at_the_end_and_after_an_error(error):
    try:
        with busy_processes(2) as pids:
            assert len(set(pids)) == 2 and all(map(is_running, pids))
            assert all(os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0) for pid in pids)
            if error is not None:
                raise error
    except (KeyboardInterrupt, RuntimeError):
        pass
    assert not any(map(is_running, pids))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_they_end_by_themselves_where_their_parent_is_killed(end):
    code = (
        "import time; from gpt4v_fast.benchmarks.beside import busy_processes\n"
        "with busy_processes(1) as pids: print(*pids, flush=True); time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert is_running(pid)
    parent.send_signal(end)
    parent.wait()
    parent.stdout.close()
    assert wait_until_gone(pid)


@pytest.fixture
def fake(monkeypatch):
    """A registry of one made-up case."""
    monkeypatch.setattr(peaks.Peaks, "probe", lambda self, bound: lambda: 100.0)
    monkeypatch.setattr(registry, "cases", lambda **filters: [make_case(gpt4v_fast=right, peer=right)])


def test_the_record_and_the_report_tell_of_them(fake, tmp_path, capsys):
    path = tmp_path / "record.json"
    assert main(["bench", "--quick", "--beside", "1", "--json", str(path)]) == 0
    assert "1 busy processes ran beside it" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["beside"] == 1 and found["settings"]["tolerance"] == 1.0
    assert "1 busy processes" in report.html_report(record.read(path))
    assert main(["bench", "--quick"]) == 0
    assert "busy processes" not in capsys.readouterr().out


def test_numbers_of_a_quiet_machine_are_kept(fake, tmp_path, capsys):
    quiet, shared = tmp_path / "quiet.json", tmp_path / "shared.json"
    assert main(["bench", "--quick", "--json", str(quiet)]) == 0
    assert main(["bench", "--quick", "--beside", "1", "--json", str(shared)]) == 0
    assert main(["bench", "--quick", "--beside", "1", "--json", str(shared)]) == 0
    capsys.readouterr()
    for option in ("--json", "--resume"):
        before = quiet.read_text()
        assert main(["bench", "--quick", "--beside", "1", option, str(quiet)]) == 2
        assert "got the record of one without" in capsys.readouterr().err and quiet.read_text() == before
    with pytest.raises(ValueError, match="the record to merge: expected beside 0, got 1"):
        record.merged(record.read(quiet), record.read(shared))
    record.main(["compare", str(quiet), str(shared)])
    assert "busy processes beside the runs: 0 -> 1" in capsys.readouterr().out


def test_the_page_leaves_them_out(tmp_path):
    settings = replace(command.QUICK, tolerance=1.0)
    for name, beside in (("zen5-loss", 0), ("zen5-loss-beside", 2)):
        made = record.new("", 1, settings, {"fma": 1.0, "dot_bf16": 2.0, "read": 3.0}, beside=beside)
        record.write(made, tmp_path / f"{name}.json")
    assert list(performance.records(tmp_path)) == ["zen5-loss"]


@pytest.mark.parametrize(("count", "message"), [("-1", "expected at least 0"), ("99999", "expected at most")])
def test_the_number_has_limits(count, message, capsys):
    assert main(["bench", "--quick", "--beside", count]) == 2
    assert f"--beside: {message}" in capsys.readouterr().err
