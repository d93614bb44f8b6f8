"""The C++ extension as such: one OpenMP runtime, ISA choice, errors of the bindings, symbols of the ISA files."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpt4v_fast as gf
from gpt4v_fast import _native, backends
from gpt4v_fast._native import _C
from gpt4v_fast.ops.attention.api import AttentionCall

ROOT = Path(__file__).resolve().parents[2]
ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16")


def build_settings():
    spec = importlib.util.spec_from_file_location("gpt4v_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_python(code, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    return result.returncode, result.stdout.strip(), result.stderr


def test_the_process_maps_a_single_openmp_runtime():
    """In a process of its own: scikit-learn, which other tests import, brings a libgomp for itself."""
    code = """
import re, torch, gpt4v_fast as gf
from pathlib import Path
q = torch.randn(1, 2, 64, 16)
torch.mm(torch.randn(300, 300), torch.randn(300, 300))
gf.attention(q, q, q)
print(*sorted(set(re.findall(r"/\\S*lib(?:gomp|iomp5|omp)[-.]\\S*", Path("/proc/self/maps").read_text()))))
"""
    status, printed, errors = run_python(code)
    assert status == 0, errors
    assert len(printed.split()) == 1, printed


def test_threads_follow_torch():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert _native.threads() == 1
    finally:
        torch.set_num_threads(before)
    assert _native.threads() == before


def test_the_portable_isa_is_always_there_and_the_last_one_is_the_default():
    isas = backends.available_isas()
    assert isas[0] == "scalar" and set(isas) <= set(ISAS)
    if not os.environ.get("GPT4V_FAST_ISA"):
        assert _C.isa() == isas[-1]


@pytest.mark.parametrize("isa", ISAS)
def test_each_isa_can_be_forced_by_the_environment_and_by_the_context(isa):
    code = "import gpt4v_fast; print(gpt4v_fast._native._C.isa())"
    status, printed, errors = run_python(code, GPT4V_FAST_ISA=isa)
    if isa in backends.available_isas():
        assert (status, printed) == (0, isa), errors
        with gf.force(isa=isa):
            assert _C.isa() == isa
    else:
        assert status != 0 and f"got '{isa}'" in errors


def test_an_unknown_isa_or_backend_is_refused():
    with pytest.raises(ValueError, match=r"isa: expected one of scalar.*got 'sse9'"), gf.force(isa="sse9"):
        pass
    with pytest.raises(ValueError, match="backend: expected one of cpu, triton, reference, got 'tpu'"):
        gf.force(backend="tpu").__enter__()
    status, _, errors = run_python("import gpt4v_fast", GPT4V_FAST_BACKEND="tpu")
    assert status != 0 and "GPT4V_FAST_BACKEND: expected one of cpu, triton, reference, got 'tpu'" in errors


def test_force_restores_what_was_before_also_after_an_error():
    before = _C.isa()
    with pytest.raises(KeyError), gf.force(isa="scalar", backend="reference"):
        raise KeyError
    assert _C.isa() == before
    q = torch.randn(1, 1, 2, 4)
    assert gf.explain(gf.attention, q, q, q).backend == "cpu"


def test_the_bindings_refuse_what_would_read_out_of_bounds():
    q, short = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 3, 8)
    lse = torch.zeros(1, 1, 4)
    v = _native.view
    with pytest.raises(ValueError, match=r"v: expected shape \(1, 1, 4, 8\), got \(1, 1, 3, 8\)"):
        _C.attention_forward(AttentionCall(v(q), v(q), v(short)), v(q), v(lse), 1)
    with pytest.raises(ValueError, match="threads: expected at least 1, got 0"):
        _C.attention_forward(AttentionCall(v(q), v(q), v(q)), v(q), v(lse), 0)
    with pytest.raises(ValueError, match="q: expected a CPU tensor"):
        _C.attention_forward(AttentionCall("q", v(q), v(q)), v(q), v(lse), 1)
    with pytest.raises(ValueError, match="call: expected 24 fields"):
        _C.attention_forward((v(q), v(q), v(q)), v(q), v(lse), 1)
    with pytest.raises(ValueError, match="q: expected a field of the call"):
        _C.read_attention_calls(["k", "v"])
    _C.read_attention_calls(AttentionCall._fields)


def test_explain_says_which_kernel_and_strict_refuses_the_reference():
    q = torch.randn(1, 1, 2, 4)
    choice = gf.explain(gf.attention, q, q, q)
    assert choice.backend == "cpu" and _C.isa() in str(choice)
    on_meta = q.to("meta")
    refused = gf.explain(gf.attention, on_meta, on_meta, on_meta).rejected
    assert any(name == "kernels.attention" for name, _ in refused)
    with gf.strict():
        gf.attention(q, q, q)
        with pytest.raises(gf.FallbackError, match=r"strict mode is on: not _C\.attention: the tensors are on meta"):
            backends.pick(backends.call_of(gf.attention, on_meta, on_meta, on_meta))
    with pytest.raises(TypeError, match="function: expected one of attention"):
        gf.explain(print, q)


def test_no_torch_header_and_no_fast_math_in_csrc():
    for path in [*ROOT.glob("csrc/**/*.*"), ROOT / "setup.py"]:
        text = path.read_text()
        assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10)/", text), path
        assert not re.search(r"[\"' ]-ffast-math", text), path


def test_a_compiler_without_amx_leaves_its_isa_out(monkeypatch):
    settings = build_settings()
    found = settings.host_isas()
    monkeypatch.setenv("CXX", "false")
    assert settings.host_isas() == [isa for isa in found if isa != "amx_bf16"]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_an_isa_file_shares_no_inline_function_with_others(isa, tmp_path):
    """A weak symbol outside the ISA's namespace could be kept by the linker in this ISA's copy for everybody."""
    settings = build_settings()
    if isa not in settings.host_isas():
        pytest.skip("this compiler's target has no such ISA")
    target = tmp_path / f"{isa}.o"
    flags = [*settings.COMMON_FLAGS, *settings.ISA_FLAGS[isa], f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, "-c", str(ROOT / "csrc" / "isa" / f"{isa}.cpp"), "-o", str(target)], check=True)
    symbols = subprocess.run(["nm", "-C", str(target)], capture_output=True, text=True, check=True).stdout
    weak = [line for line in symbols.splitlines() if re.search(r" [WVu] ", line)]
    # DW.ref.__gxx_personality_v0 is a pointer, not code, in every file whose scratch is freed when something throws.
    foreign = [line for line in weak if f"gpt4v_fast::{isa}::" not in line and "DW.ref.__gxx_personality" not in line]
    assert not foreign, foreign
    assert f"gpt4v_fast::{isa}::table()" in symbols
