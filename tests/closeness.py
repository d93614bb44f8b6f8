"""The one assertion: a fast result is right when it is about as close to the exact one as PyTorch's own is.

    |fast - exact| <= 2 |native - exact| + floor,    element by element

exact is the fp64 oracle, native is plain PyTorch in the tested dtype, and floor is a few units in the last place of the
row's scale (the largest magnitude in the row of exact). NaN never passes; infinities must stand where exact has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# Half an ulp of rounding is unavoidable; sums of a thousand fp32 products in another order move a few more.
FLOOR_ULPS = {torch.float32: 16.0, torch.bfloat16: 1.0, torch.float16: 1.0}


def assert_close(
    fast: torch.Tensor,
    exact: torch.Tensor,
    native: torch.Tensor,
    *,
    name: str = "output",
    floor_ulps: float | None = None,
    row_dims: int = 1,
) -> None:
    """Raises AssertionError unless `fast` is as good as the rule asks.

    Args:
        fast, exact, native: tensors of one shape; exact is fp64; fast has the tested dtype.
        floor_ulps: units in the last place of the row's scale; None: by fast's dtype.
        row_dims: how many trailing dimensions form a row.
    """
    assert fast.shape == exact.shape == native.shape, (
        f"{name}: shapes differ: fast {tuple(fast.shape)}, exact {tuple(exact.shape)}, native {tuple(native.shape)}"
    )
    if fast.numel() == 0:
        return
    got, want, plain = fast.detach().double(), exact.detach().double(), native.detach().double()
    infinite = torch.isinf(want)
    same_infinities = torch.where(infinite, got == want, torch.isfinite(got))
    finite = want.masked_fill(infinite, 0.0)
    dims = tuple(range(-min(row_dims, want.dim()), 0))
    scale = finite.abs().amax(dim=dims, keepdim=True) if dims else finite.abs()
    ulps = FLOOR_ULPS[fast.dtype] if floor_ulps is None else floor_ulps
    info = torch.finfo(fast.dtype)
    # Below the normal numbers: the step of fast's dtype, and fp32 numbers that were flushed to zero, in a sum each.
    floor = ulps * info.eps * scale + info.eps * info.tiny + 256 * torch.finfo(torch.float32).tiny
    native_error = torch.where(infinite | ~torch.isfinite(plain), 0.0, (plain - want).abs().nan_to_num())
    error = torch.where(infinite, 0.0, (got - want).abs())
    bad = ~((error <= 2 * native_error + floor) & same_infinities)  # a NaN compares false, and so is bad
    if bad.any():
        excess = torch.where(bad, (error / (2 * native_error + floor)).nan_to_num(nan=torch.inf), 0.0)
        worst = int(excess.argmax())
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), want.shape))
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} elements are too far off; the worst is at {place}: "
            f"fast {got[place]:.9g}, exact {want[place]:.9g}, native {plain[place]:.9g}, "
            f"error {error[place]:.3g} > 2 * {native_error[place]:.3g} + {floor.expand_as(want)[place]:.3g}"
        )


def compare(
    fast: Callable[..., Any],
    oracle: Callable[..., Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    gradients: Sequence[str] = (),
    native: Callable[..., Any] | None = None,
    native_dtype: torch.dtype | None = None,
    upstream_seed: int = 0,
    floor_ulps: float | None = None,
    row_dims: int = 1,
    gradient_row_dims: int = 1,
    output_names: Sequence[str] = (),
) -> None:
    """Runs `fast`, the fp64 oracle and native PyTorch on the same tensors; compares outputs and gradients.

    Args:
        fast, oracle: called with `tensors` as keyword arguments; return a tensor or a tuple of tensors.
        gradients: the names of the tensors whose gradients are compared, under the same random upstream gradients.
        native: plain PyTorch; None: the oracle in the tested dtype.
        native_dtype: the dtype native computes in; None: that of the tensors.
        row_dims, gradient_row_dims: `row_dims` for the outputs and for the gradients.
    """
    exact_outputs, exact_gradients = _run(oracle, tensors, gradients, torch.float64, upstream_seed)
    fast_outputs, fast_gradients = _run(fast, tensors, gradients, None, upstream_seed)
    plain_outputs, plain_gradients = _run(native or oracle, tensors, gradients, native_dtype, upstream_seed)
    assert len(fast_outputs) == len(exact_outputs), f"{len(fast_outputs)} outputs, expected {len(exact_outputs)}"
    for i, triple in enumerate(zip(fast_outputs, exact_outputs, plain_outputs, strict=True)):
        name = output_names[i] if i < len(output_names) else f"output {i}"
        assert_close(*triple, name=name, floor_ulps=floor_ulps, row_dims=row_dims)
    for name, *triple in zip(gradients, fast_gradients, exact_gradients, plain_gradients, strict=True):
        assert_close(*triple, name=f"gradient of {name}", floor_ulps=floor_ulps, row_dims=gradient_row_dims)


def _run(
    function: Callable[..., Any],
    tensors: Mapping[str, torch.Tensor],
    gradients: Sequence[str],
    dtype: torch.dtype | None,
    upstream_seed: int,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    arguments = {}
    for name, tensor in tensors.items():
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        arguments[name] = tensor.detach().requires_grad_(name in gradients)
    outputs = function(**arguments)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    outputs = [x for x in outputs if x.is_floating_point()]
    if not gradients:
        return outputs, []
    generator = torch.Generator().manual_seed(upstream_seed)
    upstream, used = [], []
    for output in outputs:
        # Rounded to bf16, so that every dtype gets the same upstream gradient.
        random = torch.randn(output.shape, generator=generator, dtype=torch.float64).bfloat16()
        if output.requires_grad:
            used.append(output)
            finite = torch.isfinite(output.detach())
            upstream.append((random.to(output.device) * finite).to(output.dtype))
    inputs = [arguments[name] for name in gradients]
    grads = torch.autograd.grad(used, inputs, upstream, allow_unused=True, materialize_grads=True)
    return outputs, list(grads)
