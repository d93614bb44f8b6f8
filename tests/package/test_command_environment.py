"""Threads of the commands that share a machine wait asleep, unless the user has said how they wait."""

import os
import subprocess
import sys

import pytest

from gpt4v_fast._command_environment import prepare

MODULE = ["python", "-m", "gpt4v_fast.cli"]


@pytest.mark.parametrize(
    ("argv", "started_as", "environment", "policy"),
    [
        (["/usr/bin/gpt4v-fast", "ask", "x.png", "What?"], ["python", "/usr/bin/gpt4v-fast"], {}, "passive"),
        (["gpt4v-fast", "demo"], [], {}, "passive"),
        (["-m", "evaluate"], MODULE, {}, "passive"),
        (["gpt4v-fast", "ask"], [], {"OMP_WAIT_POLICY": "active"}, "active"),
        (["gpt4v-fast", "ask"], [], {"GOMP_SPINCOUNT": "100"}, None),
        (["gpt4v-fast", "bench"], [], {}, None),
        (["gpt4v-fast"], [], {}, None),
        (["train.py", "demo"], ["python", "train.py"], {}, None),
        (["-m", "ask"], ["python", "-m", "mine"], {}, None),
        ([""], ["python"], {}, None),
        ([], [], {}, None),
    ],
)
def test_which_commands_wait_asleep(argv, started_as, environment, policy):
    prepare(argv, started_as, environment)
    assert environment.get("OMP_WAIT_POLICY") == policy


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP runtime, which tells its settings")
@pytest.mark.parametrize(("arguments", "asleep"), [(["ask", "none.png", "What?"], True), (["bench", "--list"], False)])
def test_openmp_hears_of_it(arguments, asleep):
    environment = {**os.environ, "OMP_DISPLAY_ENV": "verbose"}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "gpt4v_fast.cli", *arguments]
    said = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240).stderr
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("this OpenMP runtime does not tell its settings")
    assert ("GOMP_SPINCOUNT = '0'" in said) is asleep
