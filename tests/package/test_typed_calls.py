"""The types of the public functions' options, which `make types` checks with typed_calls.py, name what they take."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gpt4v_fast as gf
from gpt4v_fast.ops.attention.options import AttentionOptions, KvCacheOptions, VarlenOptions
from gpt4v_fast.ops.loss.options import CrossEntropyOptions, LinearCrossEntropyOptions

OPTIONS: dict[Any, tuple[Any, str]] = {
    gf.attention: (AttentionOptions, "return_lse"),
    gf.attention_varlen: (VarlenOptions, "return_lse"),
    gf.attention_kvcache: (KvCacheOptions, "return_lse"),
    gf.cross_entropy: (CrossEntropyOptions, "return_stats"),
    gf.linear_cross_entropy: (LinearCrossEntropyOptions, "return_stats"),
}


@pytest.mark.parametrize("function", OPTIONS, ids=lambda function: function.__name__)
def test_options_are_the_functions_own(function):
    options, flag = OPTIONS[function]
    parameters = inspect.signature(function).parameters.values()
    keywords = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != flag}
    assert {name: of.__forward_arg__ for name, of in options.__annotations__.items()} == keywords


@pytest.mark.slow
def test_calls_as_users_write_them_are_typed():
    pytest.importorskip("mypy")
    calls = Path(__file__).parent / "typed_calls.py"
    command = [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--follow-imports=silent", str(calls)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(gf.__file__).parents[1])
    assert found.returncode == 0, found.stdout
