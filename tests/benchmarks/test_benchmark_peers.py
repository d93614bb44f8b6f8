"""The peers that are no dependencies: absent they say so, present they are right and share memory with the inputs."""

import gc
import importlib.util
import sys

import pytest
import torch

from gpt4v_fast.benchmarks import attention, check, engines, registry
from gpt4v_fast.benchmarks.registry import Unavailable

MODULES = {"OpenVINO": ["openvino"], "ONNX Runtime": ["onnxruntime", "onnx"]}
QUICK = registry.cases(ops=["attention"], part="quick", directions=["forward"])


def contender(case, name):
    return next(c for c in case.contenders if c.name == name)


@pytest.mark.parametrize("name", MODULES)
def test_an_engine_that_is_not_installed_says_how_to_get_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, MODULES[name][0], None)
    message = rf'{MODULES[name][0]} is not installed \(pip install "gpt4v_fast\[bench-peers\]"\)'
    with pytest.raises(Unavailable, match=message):
        contender(QUICK[0], name).make(QUICK[0], QUICK[0].make_inputs())


@pytest.mark.parametrize("name", ["FlexAttention, compiled", *MODULES])
def test_what_has_no_gradients_says_so(name):
    (case, *_) = registry.cases(ops=["attention"], part="quick", directions=["backward"])
    with pytest.raises(Unavailable, match="has no gradients on a CPU"):
        contender(case, name).make(case, case.make_inputs())


SHAPES = [
    attention.Shape("causal", 2, 2, 33, 24, mask="causal"),
    attention.Shape("grouped", 1, 4, 33, 24, Hkv=2),
    attention.Shape("window", 1, 2, 300, 16, mask="window"),
    attention.Shape("documents", 2, 2, 48, 16, mask="documents"),
    attention.Shape("images", 1, 2, 48, 16, mask="images"),
    attention.Shape("decode", 2, 4, 1, 32, Hkv=2, T=50),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*(("OpenVINO", dtype) for dtype in registry.DTYPES), ("ONNX Runtime", "fp32"), ("ONNX Runtime", "fp16")],
)
def test_every_setting_of_an_engine_is_right(name, dtype, shape, monkeypatch):
    for module in MODULES[name]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: it is a peer of the benchmarks, no dependency")
    tried = []

    def every(key, candidates):
        tried.extend(candidates)
        runs = {setting: make() for setting, make in candidates.items()}
        gc.collect()  # what a run does not keep is gone
        torch.full((2**16,), torch.nan)
        for setting, run in runs.items():
            assert check.largest_error(run(), expected, case.dtype) <= 1, setting
        return runs[tried[0]]

    monkeypatch.setattr(engines, "fastest", every)
    case = attention.case(shape, dtype, "forward")
    inputs = case.make_inputs()
    expected = case.expected(inputs)
    run = contender(case, name).make(case, inputs)
    assert len(tried) >= 1 + (name == "OpenVINO")
    assert bool(run()["out"].any())
    inputs["v"].zero_()  # the first setting takes v as it lies, on the same memory: the next call sees it
    assert not bool(run()["out"].any())


def test_no_bf16_kernel():
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnx") is None:
        pytest.skip("onnxruntime and onnx are not installed: they are peers of the benchmarks, no dependencies")
    (case,) = registry.cases(part="quick", names=["quick_causal"], dtypes=["bf16"], directions=["forward"])
    with pytest.raises(Unavailable, match="take fp32 and fp16, not bf16"):
        contender(case, "ONNX Runtime").make(case, case.make_inputs())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_the_masks_of_flex_attention_are_ours(shape):
    from gpt4v_fast.benchmarks.attention_peers import _mask_rule

    rule, dense = _mask_rule(shape), shape.gf_mask.dense(shape.S, shape.keys)
    if rule is None:
        assert bool(dense.all())
        return
    i, j = torch.arange(shape.S)[:, None], torch.arange(shape.keys)[None]
    for b in range(shape.B):
        assert torch.equal(rule(b, 0, i, j), dense if dense.dim() == 2 else dense[b, 0])


class TestFastest:
    def make(self, monkeypatch, seconds):
        made = []
        monkeypatch.setattr(registry, "_fastest", {})
        monkeypatch.setattr(registry, "_seconds", lambda run: seconds[run()["name"]])

        def candidate(name):
            def make():
                made.append(name)
                if seconds[name] is None:
                    raise RuntimeError(f"{name} is not for this")
                return lambda: {"name": name}

            return make

        return made, {name: candidate(name) for name in seconds}

    def test_the_fastest_is_chosen_once_and_named(self, monkeypatch):
        made, candidates = self.make(monkeypatch, {"slow": 2.0, "broken": None, "quick": 1.0})
        assert registry.fastest("key", candidates).setting == "quick"
        assert made == ["slow", "broken", "quick"]
        again = registry.fastest("key", candidates)
        assert made[3:] == ["quick"] and again() == {"name": "quick"}

    def test_where_none_works_the_first_reason_is_told(self, monkeypatch):
        _, candidates = self.make(monkeypatch, {"one": None, "two": None})
        with pytest.raises(RuntimeError, match="one is not for this"):
            registry.fastest("key", candidates)
