"""What `explain` says is what runs: every op over its features, sizes and modes, with a recorder at the bindings of the
C++ extension and at the launchers of the Triton kernels."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist

import gpt4v_fast as gf
from gpt4v_fast import backends
from gpt4v_fast._native import _C
from gpt4v_fast.ops.loss import labels, rows

pytestmark = pytest.mark.filterwarnings("ignore::gpt4v_fast.FallbackWarning")

FP32, BF16 = torch.float32, torch.bfloat16

# What `explain` calls a kernel -> the functions that run forward, and backward.
RUNS = {
    "_C.attention": ({"attention_forward"}, {"attention_backward"}),
    "_C.attention (varlen)": ({"attention_forward"}, {"attention_backward"}),
    "_C.attention_kvcache (pages read in place)": ({"attention_kvcache"}, set()),
    "_C.attention_kvcache (pages gathered, if there are any)": ({"attention_kvcache"}, set()),
    "_C.cross_entropy": ({"cross_entropy_forward"}, {"cross_entropy_backward"}),
    "_C.linear_cross_entropy": ({"linear_cross_entropy_forward"}, {"linear_cross_entropy_backward"}),
    "_C.linear_cross_entropy_gradients": ({"linear_cross_entropy_gradients"}, set()),
    "_C.patch_embed": ({"patch_embed_forward"}, {"patch_embed_backward"}),
    "kernels.attention": ({"attention.forward.attention_forward"}, {"attention.forward.attention_backward"}),
    "kernels.cross_entropy": (
        {"loss.cross_entropy.cross_entropy_forward"}, {"loss.cross_entropy.cross_entropy_backward"}
    ),
    "kernels.linear_cross_entropy": (
        {"loss.linear_cross_entropy.linear_cross_entropy_forward"},
        {"loss.linear_cross_entropy_backward.linear_cross_entropy_backward"},
    ),
    "kernels.linear_cross_entropy_products": (
        {"loss.linear_cross_entropy_products.linear_cross_entropy_forward"},
        {"loss.linear_cross_entropy_products.linear_cross_entropy_backward"},
    ),
    "kernels.linear_cross_entropy (keeping logits)": (
        {"loss.linear_cross_entropy.linear_cross_entropy_forward_keeping"},
        {"loss.linear_cross_entropy_kept.linear_cross_entropy_backward_of_kept"},
    ),
}  # fmt: skip
NATIVE = sorted({name for passes in RUNS.values() for names in passes for name in names if "." not in name})
LAUNCHERS = sorted({name for passes in RUNS.values() for names in passes for name in names if "." in name})


@dataclass(frozen=True)
class Case:
    name: str
    function: Callable[..., Any]
    args: Callable[[], tuple[Any, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    gradient: bool = True


def qkv(H: int = 2, Hkv: int = 2, S: int = 5, T: int = 7, D: int = 8, dtype: torch.dtype = FP32) -> Any:
    return lambda: tuple(torch.randn(2, h, n, D, dtype=dtype) for h, n in ((H, S), (Hkv, T), (Hkv, T)))


def packed() -> tuple[Any, ...]:
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    return (*(torch.randn(7, 2, 8) for _ in "qkv"), starts, starts)


def cache(block_table: torch.Tensor | None = None, S: int = 1) -> Any:
    def make() -> tuple[Any, ...]:
        shape = (2, 8, 2, 8) if block_table is None else (4, 4, 2, 8)
        return (
            torch.randn(2, S, 4, 8), torch.randn(shape), torch.randn(shape), torch.tensor([5, 6], dtype=torch.int32)
        )  # fmt: skip

    return make


def logits(N: int = 6, V: int = 11, dtype: torch.dtype = FP32) -> Any:
    return lambda: (torch.randn(N, V, dtype=dtype), torch.randint(0, V, (N,)))


def projection(N: int = 6, V: int = 11, E: int = 8, dtype: torch.dtype = FP32) -> Any:
    return lambda: (torch.randn(N, E, dtype=dtype), torch.randn(V, E, dtype=dtype), torch.randint(0, V, (N,)))


def images(dtype: torch.dtype = torch.uint8) -> Any:
    return lambda: (torch.randint(0, 255, (2, 3, 8, 8)).to(dtype), torch.randn(5, 3, 4, 4))


IDS = torch.tensor([[0, 0, 1, 1, 1], [0, -1, -1, 2, 2]], dtype=torch.int32)
TABLE = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
MASKS = {
    "causal": gf.Mask(causal=True),
    "window": gf.Mask(window=(2, 1)),
    "documents": gf.Mask(documents=IDS),
    "images": gf.Mask(causal=True, image_blocks=IDS),
    "lengths": gf.Mask(key_lengths=torch.tensor([3, 5], dtype=torch.int32)),
}
MANY = 59 << 20  # more bytes of logits than forward keeps for backward
CASES = [
    Case("attention", gf.attention, qkv()),
    Case("attention-bf16", gf.attention, qkv(dtype=BF16)),
    Case("attention-gqa", gf.attention, qkv(H=4)),
    Case("attention-wide", gf.attention, qkv(D=272)),
    *(Case(f"attention-{name}", gf.attention, qkv(T=5), {"mask": mask}) for name, mask in MASKS.items()),
    Case("attention-softcap", gf.attention, qkv(), {"softcap": 5.0}),
    Case("attention-bias", gf.attention, qkv(), {"bias": torch.randn(5, 7)}),
    Case("attention-boolean-bias", gf.attention, qkv(), {"bias": torch.ones(5, 7, dtype=torch.bool)}),
    Case("attention-alibi", gf.attention, qkv(), {"alibi_slopes": torch.ones(2)}),
    Case("attention-sinks", gf.attention, qkv(), {"sinks": torch.zeros(2)}),
    Case("attention-dropout", gf.attention, qkv(), {"dropout_p": 0.5}),
    Case("attention-lse", gf.attention, qkv(), {"return_lse": True, "scale": 0.3}),
    Case("varlen", gf.attention_varlen, packed),
    Case("varlen-causal", gf.attention_varlen, packed, {"causal": True, "window": (1, 0), "softcap": 3.0}),
    Case("kvcache", gf.attention_kvcache, cache(), gradient=False),
    Case("kvcache-paged", gf.attention_kvcache, cache(TABLE), {"block_table": TABLE}, gradient=False),
    Case("kvcache-paged-many", gf.attention_kvcache, cache(TABLE, S=9), {"block_table": TABLE}, gradient=False),
    Case("cross-entropy", gf.cross_entropy, logits()),
    Case("cross-entropy-bf16", gf.cross_entropy, logits(dtype=BF16)),
    Case("cross-entropy-none", gf.cross_entropy, logits(), {"reduction": "none", "softcap": 2.0}),
    Case("cross-entropy-stats", gf.cross_entropy, logits(), {"return_stats": True, "z_loss": 0.1}),
    Case("linear", gf.linear_cross_entropy, projection()),
    Case("linear-bf16", gf.linear_cross_entropy, projection(dtype=BF16)),
    Case("linear-none", gf.linear_cross_entropy, projection(), {"reduction": "none"}),
    Case("linear-everything", gf.linear_cross_entropy, projection(), {
        "bias": torch.zeros(11), "softcap": 3.0, "z_loss": 0.1, "label_smoothing": 0.1, "return_stats": True}),
    Case("linear-many", gf.linear_cross_entropy, projection(256, MANY // 1024, 1)),
    Case("linear-many-sum", gf.linear_cross_entropy, projection(256, MANY // 1024, 1), {"reduction": "sum"}),
    Case("linear-many-none", gf.linear_cross_entropy, projection(256, MANY // 1024, 1), {"reduction": "none"}),
    Case("linear-many-ignored", gf.linear_cross_entropy, projection(256, MANY // 1024, 1), {"ignore_index": 0}),
    Case("linear-many-bf16", gf.linear_cross_entropy, projection(256, MANY // 512, 1, BF16)),
    Case("patches", gf.patch_embed, images()),
    Case("patches-fp32", gf.patch_embed, images(FP32), {"mean": 0.5, "std": 0.5}),
    Case("patches-packed", gf.patch_embed_packed, lambda: ([images()()[0][0]], images()()[1])),
]  # fmt: skip


class Recorder:
    """The names of the bindings and launchers that ran, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def wrap(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            return run(*args, **kwargs)

        return recorded


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    for name in NATIVE:
        monkeypatch.setattr(_C, name, found.wrap(name, getattr(_C, name)))
    return found


@contextlib.contextmanager
def mode_of(mode: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if mode == "no-grad":
            stack.enter_context(torch.no_grad())
        if mode == "autocast":
            stack.enter_context(torch.autocast("cpu", dtype=BF16))
        yield


def leaves_of(args: tuple[Any, ...]) -> list[torch.Tensor]:
    return [x.requires_grad_() for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]


def total(result: Any) -> torch.Tensor:
    tensors = [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, torch.Tensor)]
    return sum(x.float().sum() for x in tensors if x.requires_grad)


def check(case: Case, mode: str, found: Recorder, **more: Any) -> None:
    args, options = case.args(), {**case.options, **more}
    leaves = leaves_of(args) if case.gradient else []
    function = case.function
    if mode == "compiled":
        function = torch.compile(lambda *args: case.function(*args, **options), fullgraph=True, backend="aot_eager")
        torch._dynamo.reset()
    with mode_of(mode):
        choice = gf.explain(case.function, *args, **options, compiled=mode == "compiled")
        assert not found.names, "explain ran a kernel"
        result = function(*args) if mode == "compiled" else function(*args, **options)
    forward, backward = RUNS[choice.kernel] if choice.backend != "reference" else (set(), set())
    assert set(found.names) == forward
    if leaves and mode != "no-grad":
        found.names.clear()
        torch.autograd.grad(total(result), leaves)
        assert set(found.names) == backward


@pytest.mark.parametrize("mode", ["grad", "no-grad", "autocast", "compiled"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cpu(case, mode, recorder):
    check(case, mode, recorder)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference(case, recorder):
    with gf.force(backend="reference"):
        assert gf.explain(case.function, *case.args(), **case.options).backend == "reference"
        check(case, "grad", recorder)


@pytest.fixture
def launchers(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """The Triton backends chosen for a CPU's tensors, their launchers replaced by ones that record and give zeros."""
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "triton_interpreted", lambda: True)
    monkeypatch.setattr(backends._settings, "cache", {})
    monkeypatch.setattr(labels, "remember_bad", lambda *args: None)
    for path in LAUNCHERS:
        module, name = path.rsplit(".", 1)
        monkeypatch.setattr(
            importlib.import_module(f"gpt4v_fast.kernels.{module}"), name, recorder.wrap(path, ZEROS[path])
        )
    return recorder


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(rows.empty_rows(len(x), x))[:3]


ZEROS: dict[str, Callable[..., Any]] = {
    "attention.forward.attention_forward": lambda q, k, v, **o: (
        q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3], dtype=FP32)),
    "attention.forward.attention_backward": lambda dout, q, k, v, *rest, **o: tuple(map(torch.zeros_like, (q, k, v))),
    "loss.cross_entropy.cross_entropy_forward": lambda x, *rest, **o: _rows(x),
    "loss.cross_entropy.cross_entropy_backward": lambda a, b, x, *rest, **o: torch.zeros_like(x),
    "loss.linear_cross_entropy.linear_cross_entropy_forward": lambda x, *rest, **o: _rows(x),
    "loss.linear_cross_entropy.linear_cross_entropy_forward_keeping": lambda x, *rest, **o: (*_rows(x), "kept"),
    "loss.linear_cross_entropy_backward.linear_cross_entropy_backward": lambda a, b, h, w, bias, *rest, **o: (
        torch.zeros_like(h), torch.zeros_like(w), bias),
    "loss.linear_cross_entropy_kept.linear_cross_entropy_backward_of_kept": lambda a, b, h, w, *rest, **o: (
        torch.zeros_like(h), torch.zeros_like(w)),
    "loss.linear_cross_entropy_products.linear_cross_entropy_forward": lambda x, *rest, **o: _rows(x),
    "loss.linear_cross_entropy_products.linear_cross_entropy_backward": lambda a, b, h, w, bias, *rest, **o: (
        torch.zeros_like(h), torch.zeros_like(w), bias),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["grad", "no-grad", "autocast"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_triton(case, mode, launchers):
    with gf.force(backend="triton"):
        check(case, mode, launchers)


def test_triton_keeps_logits_of_a_large_bf16_problem(launchers):
    case = Case("", gf.linear_cross_entropy, projection(300, 30_000, 2, BF16))
    with gf.force(backend="triton"):
        choice = gf.explain(case.function, *(x.requires_grad_(x.is_floating_point()) for x in case.args()))
        assert choice.kernel == "kernels.linear_cross_entropy (keeping logits)"
        check(case, "grad", launchers)


@pytest.mark.parametrize("case", [c for c in CASES if "entropy" in c.name or "linear" in c.name], ids=lambda c: c.name)
def test_vocabulary_parallel(case, recorder, tmp_path):
    """A group of one process: the sharded ops run local calls, which explain names."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        check(case, "grad", recorder, process_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def test_a_recorder_that_sees_another_kernel_fails(recorder, monkeypatch):
    monkeypatch.setitem(RUNS, "_C.attention", ({"cross_entropy_forward"}, set()))
    with pytest.raises(AssertionError):
        check(CASES[0], "grad", recorder)
