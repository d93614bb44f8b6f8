"""The Triton cross-entropy kernels, under the interpreter, against the fp64 oracle; rows at every alignment."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from closeness import compare
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_interpreter import call, launch, launches

from gpt4v_fast import reference

pytest.importorskip("triton", reason="the Triton kernels need triton")

IGNORED = -100
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    N: int
    V: int
    dtype: torch.dtype = FP32
    weighted: bool = False
    label_smoothing: float = 0.0
    softcap: float | None = None
    gap: int = 0  # elements between rows
    offset: int = 0  # elements before the first row, which stands on a 64-byte boundary at 0

    @property
    def options(self) -> dict[str, object]:
        return {"ignore_index": IGNORED, "label_smoothing": self.label_smoothing, "softcap": self.softcap}

    def logits(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return self.laid_out(2 * torch.randn(self.N, self.V, generator=generator))

    def laid_out(self, values: torch.Tensor) -> torch.Tensor:
        """The values in this case's dtype and layout, NaN wherever the layout has room."""
        stride = self.V + self.gap
        room = torch.full((self.offset + self.N * stride,), float("nan"), dtype=self.dtype)
        rows = room.as_strided((self.N, self.V), (stride, 1), self.offset)
        return rows.copy_(values)

    def targets(self) -> torch.Tensor:
        return torch.randint(0, self.V, (self.N,), generator=torch.Generator().manual_seed(1))

    def weight(self) -> torch.Tensor | None:
        return torch.rand(self.V, generator=torch.Generator().manual_seed(2)) + 0.5 if self.weighted else None


CASES = [
    Case("one", 1, 1),
    Case("two-classes", 3, 2, BF16),
    Case("shorter-than-a-vector", 9, 5, BF16),
    Case("one-block", 2, 64, FP16),
    Case("odd", 5, 203),
    Case("odd-bf16", 8, 257, BF16),
    Case("odd-fp16", 4, 331, FP16),
    Case("vocabulary", 2, 1031, BF16),
    Case("padded-rows", 6, 130, BF16, gap=3, offset=5),
    Case("padded-rows-fp32", 6, 67, FP32, gap=2, offset=3),
    Case("weighted", 4, 150, FP32, weighted=True, offset=1),
    Case("smoothed", 4, 150, BF16, label_smoothing=0.1),
    Case("smoothed-weighted", 4, 90, FP32, weighted=True, label_smoothing=0.3),
    Case("softcap", 4, 150, FP32, softcap=3.0),
    Case("softcap-saturated", 4, 150, FP32, softcap=0.4),
    Case("everything", 5, 203, BF16, weighted=True, label_smoothing=0.2, softcap=5.0, gap=1, offset=2),
    Case("label-is-everything", 3, 50, FP32, label_smoothing=1.0),
]


class _Interpreted(torch.autograd.Function):
    """The launchers as a differentiable function of the logits, the way the op wires them."""

    @staticmethod
    def forward(ctx, case, logits, target, weight):
        # Autograd hands over a tensor of its own; lay it out as the case has it.
        logits = case.laid_out(logits)
        options = dict(case.options, weight=weight)
        nll, lse, _ = call(launch, "loss.cross_entropy", "cross_entropy_forward", logits, target, **options)
        ctx.save_for_backward(logits, target, lse)
        ctx.options = options
        return nll, lse

    @staticmethod
    def backward(ctx, grad_nll, grad_lse):
        arguments = (grad_nll, grad_lse, *ctx.saved_tensors)
        return None, call(launch, "loss.cross_entropy", "cross_entropy_backward", *arguments, **ctx.options), None, None


def _oracle(logits, target, weight, case):
    loss, stats = reference.cross_entropy(
        logits, target, weight=weight, reduction="none", return_stats=True, **case.options
    )
    return loss, stats.lse


def _compare(case: Case) -> None:
    target, weight = case.targets(), case.weight()
    compare(
        lambda logits: _Interpreted.apply(case, logits, target, weight),
        lambda logits: _oracle(logits, target, None if weight is None else weight.to(logits.dtype), case),
        {"logits": case.logits()},
        gradients=("logits",),
        output_names=("nll", "lse"),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_and_gradient(case):
    _compare(case)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    N=st.integers(1, 4),
    V=st.integers(1, 200),
    dtype=st.sampled_from([FP32, BF16, FP16]),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    gap=st.integers(0, 9),
    offset=st.integers(0, 9),
)
def test_any_layout(N, V, dtype, label_smoothing, gap, offset):
    _compare(Case("drawn", N, V, dtype, False, label_smoothing, None, gap, offset))


@pytest.mark.parametrize("case", [c for c in CASES if c.gap or c.V in (5, 257)], ids=lambda case: case.name)
def test_gradient_in_place(case):
    """The same bits as out of place, in the same memory, and not one element beside the rows."""
    logits, target, weight = case.logits(), case.targets(), case.weight()
    target[0] = IGNORED
    options = dict(case.options, weight=weight)
    _, lse, _ = call(launch, "loss.cross_entropy", "cross_entropy_forward", logits, target, **options)
    upstream = torch.randn(2, case.N, generator=torch.Generator().manual_seed(3))
    apart = call(launch, "loss.cross_entropy", "cross_entropy_backward", *upstream, logits, target, lse, **options)
    room, same_memory = call(_backward_in_place, *upstream, logits, target, lse, options)
    assert same_memory
    assert torch.equal(room.as_strided(logits.shape, logits.stride(), case.offset), apart)
    beside = torch.ones_like(room, dtype=torch.bool)
    beside.as_strided(logits.shape, logits.stride(), case.offset).fill_(False)
    assert torch.isnan(room[beside]).all(), "the kernel wrote beside its rows"


def _backward_in_place(grad_nll, grad_lse, logits, target, lse, options):
    arguments = (grad_nll, grad_lse, logits, target, lse)
    out = launch("loss.cross_entropy", "cross_entropy_backward", *arguments, **options, out=logits)
    room = logits.as_strided((logits.untyped_storage().nbytes() // logits.element_size(),), (1,), 0)
    return room, out.data_ptr() == logits.data_ptr()


def test_out_with_other_boundaries_than_the_logits():
    case = Case("shifted", 5, 203, BF16, gap=3, offset=2)
    logits, target = case.logits(), case.targets()
    _, lse, _ = call(launch, "loss.cross_entropy", "cross_entropy_forward", logits, target, **case.options)
    upstream = torch.ones(2, case.N)
    want = call(launch, "loss.cross_entropy", "cross_entropy_backward", *upstream, logits, target, lse, **case.options)
    out = Case("other", 5, 203, BF16, gap=6, offset=7).laid_out(torch.zeros(5, 203))
    options = dict(case.options, out=out)
    got = call(launch, "loss.cross_entropy", "cross_entropy_backward", *upstream, logits, target, lse, **options)
    assert got.stride() == out.stride() and torch.equal(got, want)


def test_columns_apart_in_memory():
    case = Case("columns", 4, 50, BF16)
    logits, target = case.logits(), case.targets()
    apart = logits.t().contiguous().t()
    for tensors in zip(_everything(case, logits, target), _everything(case, apart, target), strict=True):
        assert torch.equal(*tensors)


def _everything(case, logits, target):
    nll, lse, argmax = call(launch, "loss.cross_entropy", "cross_entropy_forward", logits, target, **case.options)
    ones = torch.ones(case.N)
    arguments = (ones, ones, logits, target, lse)
    return nll, lse, argmax, call(launch, "loss.cross_entropy", "cross_entropy_backward", *arguments, **case.options)


def test_ignored_rows_and_labels_that_are_none():
    """Ignored: 0, 0, -1 and zero gradient. Outside [0, V): NaN, NaN, -1 and NaN gradient. Neither row is looked at."""
    case = Case("labels", 8, 77, BF16, label_smoothing=0.1)
    logits, target = case.logits(), case.targets()
    counted = torch.tensor([1, 0, 0, 1, 0, 0, 1, 0], dtype=torch.bool)
    target[~counted] = torch.tensor([IGNORED, 77, IGNORED, -1, 2**40])
    ignored = target == IGNORED
    logits[~counted] = float("inf")
    nll, lse, argmax, gradient = _everything(case, logits, target)
    bad = ~counted & ~ignored
    assert (nll[ignored] == 0).all() and (lse[ignored] == 0).all() and (gradient[ignored] == 0).all()
    assert torch.isnan(nll[bad]).all() and torch.isnan(lse[bad]).all() and torch.isnan(gradient[bad]).all()
    assert (argmax[~counted] == -1).all()
    assert torch.equal(argmax[counted], logits[counted].float().argmax(-1))
    assert torch.isfinite(nll[counted]).all() and torch.isfinite(gradient[counted]).all()


@pytest.mark.parametrize("V", [3, 70, 203], ids=lambda V: f"V{V}")
@pytest.mark.parametrize("softcap", [None, 1.0], ids=["plain", "softcap"])
def test_argmax_is_the_lowest_of_equals(V, softcap):
    """At the edges and in the body of a row, in one block or in two; a saturated softcap makes no new equals."""
    case = Case("ties", 12, V, BF16, offset=3, gap=2, softcap=softcap)
    values = torch.zeros(case.N, V)
    places = torch.randint(0, V, (case.N, 2), generator=torch.Generator().manual_seed(4))
    values.scatter_(1, places, 60.0)
    values[0, :] = 1.0  # all equal
    values[1, 0] = 64.0
    values[2, V - 1] = 64.0
    logits = case.laid_out(values)
    _, _, argmax = call(launch, "loss.cross_entropy", "cross_entropy_forward", logits, case.targets(), **case.options)
    want = torch.where(places.amin(1) < places.amax(1), places.amin(1), places.amax(1))
    want[:3] = torch.tensor([0, 0, V - 1])
    assert torch.equal(argmax, want)


def test_infinite_logits():
    case = Case("infinite", 4, 100)
    logits, target = case.logits(), case.targets()
    logits[0] = -float("inf")  # every class impossible
    logits[1, :99] = -float("inf")  # all but one
    logits[2, 17] = float("inf")
    logits[3, 17] = float("nan")
    target[1], target[2] = 99, 3
    nll, lse, argmax = call(launch, "loss.cross_entropy", "cross_entropy_forward", logits, target, **case.options)
    assert torch.equal(torch.isnan(lse), torch.tensor([False, False, False, True]))
    assert lse[0] == -float("inf") and lse[1] == logits[1, 99] and lse[2] == float("inf")
    assert torch.isnan(nll[0]) and nll[1] == 0 and torch.isnan(nll[2:]).all()
    assert argmax[0] == 0 and argmax[1] == 99 and argmax[2] == 17 and 0 <= argmax[3] < 100


@pytest.mark.parametrize("N, V", [(0, 7), (3, 0)], ids=["no-rows", "no-classes"])
def test_empty(N, V):
    case = Case("empty", N, V)
    target = torch.full((N,), IGNORED)
    nll, lse, argmax, gradient = _everything(case, torch.zeros(N, V), target)
    assert nll.shape == lse.shape == argmax.shape == (N,) and gradient.shape == (N, V)
    assert (nll == 0).all() and (argmax == -1).all()


def test_out_of_another_shape_is_refused():
    case = Case("refused", 3, 9)
    logits, target, ones = case.logits(), case.targets(), torch.ones(3)
    for out in (torch.zeros(3, 8), torch.zeros(3, 9, dtype=BF16), torch.zeros(9, 3).t()):
        with pytest.raises(ValueError, match=r"out: expected torch\.float32 of shape \(3, 9\)"):
            options = dict(case.options, out=out)
            call(launch, "loss.cross_entropy", "cross_entropy_backward", ones, ones, logits, target, ones, **options)


def test_same_bits_twice():
    case = Case("twice", 4, 300, BF16, label_smoothing=0.1)
    first, second = (_everything(case, case.logits(), case.targets()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_through_the_public_function():
    """gf.cross_entropy on CPU tensors with TRITON_INTERPRET=1 and GPT4V_FAST_BACKEND=triton runs these kernels."""
    case = Case("public", 4, 90)
    names, loss, gradient = call(_public_cross_entropy, case.logits(), case.targets())
    assert names == [
        "_remember_bad_label_kernel", "_cross_entropy_forward_kernel", "_cross_entropy_backward_kernel"
    ]  # fmt: skip
    logits = case.logits().double().requires_grad_()
    exact = reference.cross_entropy(logits, case.targets())
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(exact, logits)[0], rtol=0, atol=1e-7)


def _public_cross_entropy(logits, target):
    import gpt4v_fast as gf

    logits.requires_grad_()
    with launches() as names:
        loss = gf.cross_entropy(logits, target)
        (gradient,) = torch.autograd.grad(loss, logits)
    return names, loss.detach(), gradient
