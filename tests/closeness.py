"""The one assertion: a fast result is right when it is about as close to the exact one as PyTorch's own is.

The rule and its constants stand in gpt4v_fast/closeness.py. Here the spread is measured: the root mean square
of how far the oracle itself moves when each of its steps is rounded at random to what a kernel holds
(random_rounding.py), the largest in the row.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from random_rounding import RandomRounding

from gpt4v_fast.closeness import judge, native_error, row_largest, units

SAMPLES = (4, 16)  # the spread of 4 runs; where that does not do, of 16 more

Spread = Callable[[int], torch.Tensor]


def assert_close(
    fast: torch.Tensor,
    exact: torch.Tensor,
    native: torch.Tensor,
    *,
    name: str = "output",
    spread: Spread | None = None,
) -> None:
    """Raises AssertionError unless `fast` is as good as the rule asks.

    Args:
        fast, exact, native: tensors of one shape; exact is fp64; fast has the tested dtype.
        spread: from the number of samples to exact's spread, row by row (keepdim); called only where the rule without
            it is not met. None: no spread.
    """
    assert fast.shape == exact.shape == native.shape, (
        f"{name}: shapes differ: fast {tuple(fast.shape)}, exact {tuple(exact.shape)}, native {tuple(native.shape)}"
    )
    if fast.numel() == 0:
        return
    for samples in (0, *SAMPLES) if spread is not None else (0,):
        of_row = spread(samples) if spread is not None and samples else None
        judged = judge(fast, exact, fast.dtype, native=native, spread=of_row)
        if not judged.wrong.any():
            return
    shares = torch.where(judged.wrong, judged.shares, 0.0)
    place = tuple(int(i) for i in torch.unravel_index(shares.argmax(), shares.shape))
    own = 2 * native_error(native, exact.double())[place]
    raise AssertionError(
        f"{name}: {int(judged.wrong.sum())} of {fast.numel()} elements are too far off; the worst is at {place}: "
        f"fast {fast[place]:.9g}, exact {exact[place]:.9g}, native {native[place]:.9g}, "
        f"error {judged.error[place]:.3g} > 2 * {own / 2:.3g} + {judged.allowed[place] - own:.3g} "
        f"(a unit of the row's scale is {units(exact.double(), fast.dtype).expand_as(exact)[place]:.3g})"
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
    output_names: Sequence[str] = (),
    operands: int = 24,
    backward_operands: int = 24,
) -> None:
    """Runs `fast`, the fp64 oracle and native PyTorch on the same tensors; compares outputs and gradients.

    Args:
        fast, oracle: called with `tensors` as keyword arguments; return a tensor or a tuple of tensors.
        gradients: the names of the tensors whose gradients are compared, under the same random upstream gradients.
        native: plain PyTorch; None: the oracle in the tested dtype.
        native_dtype: the dtype native computes in; None: that of the tensors.
        operands, backward_operands: bits of the operands of the kernel's matrix products (random_rounding.BITS).
    """

    def run_oracle(mode: RandomRounding | None = None) -> list[torch.Tensor]:
        return _run(oracle, tensors, gradients, torch.float64, upstream_seed, mode)

    exact = run_oracle()
    got = _run(fast, tensors, gradients, None, upstream_seed)
    plain = _run(native or oracle, tensors, gradients, native_dtype, upstream_seed)
    assert len(got) == len(exact), f"{len(got)} outputs and gradients, expected {len(exact)}"
    names = [f"output {i}" for i in range(len(exact) - len(gradients))]
    names[: len(output_names)] = output_names
    names += [f"gradient of {name}" for name in gradients]
    spreads = Spreads(run_oracle, exact, operands, backward_operands)
    for i, triple in enumerate(zip(got, exact, plain, strict=True)):
        assert_close(*triple, name=names[i], spread=spreads.of(i))


# Tests of several ISAs have the same oracle; what the exact results are tells which.
_known: collections.OrderedDict[Any, list[torch.Tensor]] = collections.OrderedDict()


class Spreads:
    """The spreads of an oracle's results: root mean square over `samples` runs, the largest in each row.

    Args:
        run: the oracle's results, under random rounding where a mode is given.
        exact: those without.
        operands, backward_operands: as for `compare`.
    """

    def __init__(
        self,
        run: Callable[[RandomRounding], list[torch.Tensor]],
        exact: list[torch.Tensor],
        operands: int = 24,
        backward_operands: int = 24,
    ) -> None:
        self._run, self._exact, self._bits = run, exact, (operands, backward_operands)

    def of(self, i: int) -> Spread:
        return lambda samples: self._all(samples)[i]

    def _all(self, samples: int) -> list[torch.Tensor]:
        digest = hashlib.blake2b()
        for x in self._exact:
            digest.update(x.detach().contiguous().numpy().tobytes())
        key = (samples, self._bits, digest.digest())
        if key not in _known:
            _known[key] = self._measure(samples)
            if len(_known) > 1000:
                _known.popitem(last=False)
        return _known[key]

    def _measure(self, samples: int) -> list[torch.Tensor]:
        squares = [torch.zeros_like(x) for x in self._exact]
        for sample in range(samples):
            with RandomRounding(1000 * samples + sample, *self._bits) as mode:
                moved = self._run(mode)
            for total, x, want in zip(squares, moved, self._exact, strict=True):
                total += torch.where(want.isinf(), 0.0, x.detach() - want).square()
        return [row_largest((total / samples).sqrt()) for total in squares]


def spread_of(run: Callable[[], torch.Tensor], exact: torch.Tensor, operands: int = 24) -> Spread:
    """The spread of one result: `run` gives it again, here under random rounding."""
    return Spreads(lambda mode: [run()], [exact], operands).of(0)


def _run(
    function: Callable[..., Any],
    tensors: Mapping[str, torch.Tensor],
    gradients: Sequence[str],
    dtype: torch.dtype | None,
    upstream_seed: int,
    mode: RandomRounding | None = None,
) -> list[torch.Tensor]:
    """Outputs, then gradients."""
    arguments = {}
    for name, tensor in tensors.items():
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        arguments[name] = tensor.detach().requires_grad_(name in gradients)
    outputs = function(**arguments)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    outputs = [x for x in outputs if x.is_floating_point()]
    if not gradients:
        return outputs
    generator = torch.Generator().manual_seed(upstream_seed)
    upstream, used = [], []
    for output in outputs:
        # Rounded to bf16, so that every dtype gets the same upstream gradient.
        random = torch.randn(output.shape, generator=generator, dtype=torch.float64).bfloat16()
        if output.requires_grad:
            used.append(output)
            finite = torch.isfinite(output.detach())
            upstream.append((random.to(output.device) * finite).to(output.dtype))
    if mode is not None:
        mode.backward()
    inputs = [arguments[name] for name in gradients]
    grads = torch.autograd.grad(used, inputs, upstream, allow_unused=True, materialize_grads=True)
    return [*outputs, *grads]
