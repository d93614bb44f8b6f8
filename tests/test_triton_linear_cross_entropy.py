"""The GPU way of linear cross-entropy, and labels on a GPU, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from closeness import Spreads, assert_close
from loss_cases import class_weights, interpreted_bad_labels, interpreted_linear_cross_entropy, make_labels
from random_rounding import BITS, RandomRounding
from triton_interpreter import call

from gpt4v_fast import reference

pytest.importorskip("triton", reason="the Triton kernels need triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("chunk_bytes", [4 * 90 * 5, 1 << 20], ids=["chunks-of-5", "one-chunk"])
def test_outputs_and_gradients(chunk_bytes, everything, dtype):
    tensors = {"hidden": torch.randn(2, 6, 16).to(dtype), "weight": torch.randn(90, 16).to(dtype)}
    target = make_labels(12, 90, 0.3).reshape(2, 6)
    options = {"reduction": "none", "shift": 1}
    if everything:
        tensors["bias"] = torch.randn(90)
        options |= {"class_weight": class_weights(90), "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}
    loss, lse, gradients = call(interpreted_linear_cross_entropy, tensors, target, chunk_bytes, options)

    def in_torch(precision: torch.dtype, mode: RandomRounding | None = None) -> list[torch.Tensor]:
        leaves = {name: x.to(precision).requires_grad_() for name, x in tensors.items()}
        want, stats = reference.linear_cross_entropy(target=target, **leaves, return_stats=True, **options)
        if mode is not None:
            mode.backward()
        return [want, stats.lse, *torch.autograd.grad(want.sum(), list(leaves.values()))]

    exact, native = in_torch(torch.float64), in_torch(torch.float32)
    # The gradient of the logits is rounded to 16 bits before its products, as in PyTorch.
    spreads = Spreads(lambda mode: in_torch(torch.float64, mode), exact, backward_operands=BITS[dtype])
    for i, (name, got) in enumerate(zip(("loss", "lse", *tensors), (loss, lse, *gradients), strict=True)):
        assert_close(got, exact[i], native[i], name=name, spread=spreads.of(i))


def test_bad_labels_are_nan_and_remembered():
    loss, gradient, errors = call(interpreted_bad_labels)
    assert torch.equal(loss.isnan(), torch.tensor([[False, False, False], [False, True, True]]))
    assert loss[0, 2] == 0 and (gradient[0, 2] == 0).all()
    assert gradient[1, 1:].isnan().all() and gradient[0].isfinite().all() and gradient[1, 0].isfinite().all()
    first, none, shifted = errors
    assert first == (
        "target: expected labels in [0, 5) or ignore_index, got 55 at place 4 of the flattened target on cpu"
    )
    assert none == ""
    assert "got 7 at place 1 of the flattened target" in shifted
