"""The losses by Triton kernels (kernels/loss/)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gpt4v_fast import backends
from gpt4v_fast.kernels.loss import plans
from gpt4v_fast.ops import library
from gpt4v_fast.ops.loss import rows

if TYPE_CHECKING:
    from gpt4v_fast.ops.loss.cross_entropy import CrossEntropyCall
    from gpt4v_fast.ops.loss.linear_cross_entropy import LinearCrossEntropyCall


def _options(call: Any) -> dict[str, Any]:
    return {
        "ignore_index": call.ignore_index,
        "label_smoothing": call.label_smoothing,
        "softcap": call.softcap or None,
    }


def _rows(nll: torch.Tensor, lse: torch.Tensor, argmax: torch.Tensor) -> rows.Rows:
    return rows.Rows(nll, lse, argmax, torch.zeros_like(lse))


class CrossEntropy(backends.Backend):
    backend, kernel = "triton", "kernels.cross_entropy"

    def forward(self, call: CrossEntropyCall) -> rows.Rows:
        from gpt4v_fast.kernels.loss import cross_entropy as kernel

        target = call.target.reshape(-1)
        return _rows(*kernel.cross_entropy_forward(call.logits, target, weight=call.class_weight, **_options(call)))

    def backward_rows(
        self, call: CrossEntropyCall, saved: Any, slopes: tuple[torch.Tensor, torch.Tensor], wanted: Any,
        out: torch.Tensor | None = None, shard: bool = False,
    ) -> dict[str, torch.Tensor | None]:  # fmt: skip
        from gpt4v_fast.kernels.loss import cross_entropy as kernel

        tensors = (call.logits, call.target.reshape(-1), saved.lse)
        gradient = kernel.cross_entropy_backward(*slopes, *tensors, weight=call.class_weight, **_options(call), out=out)
        return {"logits": gradient}


class Linear(backends.Backend):
    """Fused: logits live in registers, and backward computes them again."""

    backend, kernel = "triton", "kernels.linear_cross_entropy"

    def forward(self, call: LinearCrossEntropyCall, kept: torch.Tensor | None = None) -> Any:
        launch, _ = self._launchers()
        tensors = (call.hidden, call.weight, call.bias, call.target)
        return _rows(*launch(*tensors, class_weight=call.class_weight, **_options(call)))

    def backward(
        self, call: LinearCrossEntropyCall, saved: Any, upstream: Any, wanted: Any
    ) -> dict[str, torch.Tensor | None]:
        return self.backward_rows(call, saved, rows.slopes(call, saved, upstream), wanted)

    def backward_rows(
        self, call: LinearCrossEntropyCall, saved: Any, slopes: tuple[torch.Tensor, torch.Tensor], wanted: Any,
        shard: bool = False,
    ) -> dict[str, torch.Tensor | None]:  # fmt: skip
        _, launch = self._launchers()
        tensors = (call.hidden, call.weight, call.bias, call.labels.reshape(-1), saved.lse)
        of = {f"of_{name}": getattr(wanted, name) for name in ("hidden", "weight", "bias")}
        found = launch(*slopes, *tensors, **of, class_weight=call.class_weight, **_options(call))
        inputs = {"hidden": call.hidden, "weight": call.weight, "bias": call.bias}
        pairs = zip(inputs.items(), found, strict=True)
        return {name: None if g is None or x is None else g.to(x.dtype) for (name, x), g in pairs}

    def _launchers(self) -> tuple[Any, Any]:
        from gpt4v_fast.kernels.loss import linear_cross_entropy as fused
        from gpt4v_fast.kernels.loss import linear_cross_entropy_backward as fused_backward

        return fused.linear_cross_entropy_forward, fused_backward.linear_cross_entropy_backward


class LinearByProducts(Linear):
    """Logits that are few enough to be written: torch's products of all tokens, and the kernels of given logits."""

    kernel = "kernels.linear_cross_entropy_products"

    def refuses(self, traits: backends.Traits) -> str | None:
        if "few logits" in traits.features:
            return None
        return f"the fp32 logits need more than {plans.PRODUCT_BYTES >> 20} MiB"

    def _launchers(self) -> tuple[Any, Any]:
        from gpt4v_fast.kernels.loss import linear_cross_entropy_products as products

        return products.linear_cross_entropy_forward, products.linear_cross_entropy_backward


class LinearKeepingLogits(Linear):
    """Fused, with logits kept in the memory of weight's gradient until the backward pass, which uses them up; a further
    one, through a retained graph, computes them again. Whether the sizes allow it is for the launcher to say.

    An op may not give out as a result what it got as an argument, so this serves plain eager calls alone."""

    kernel = "kernels.linear_cross_entropy (keeping logits)"

    def refuses(self, traits: backends.Traits) -> str | None:
        if "ahead" not in traits.features or "gradient of weight" not in traits.features:
            return "no plain eager call that wants a gradient of weight"
        if traits.dtype != torch.bfloat16:
            return "it takes bf16 alone"
        refused = sorted(traits.features & {"bias", "softcap"})
        return f"it does not take {', '.join(refused)}" if refused else None

    def forward(self, call: LinearCrossEntropyCall, kept: torch.Tensor | None = None) -> Any:
        from gpt4v_fast.kernels.loss.linear_cross_entropy import linear_cross_entropy_forward_keeping

        nll, lse, argmax, left = linear_cross_entropy_forward_keeping(
            call.hidden, call.weight, None, call.target, class_weight=call.class_weight,
            ignore_index=call.ignore_index, label_smoothing=call.label_smoothing,
        )  # fmt: skip
        return library.Left(_rows(nll, lse, argmax), left)

    def backward(
        self, call: LinearCrossEntropyCall, saved: Any, upstream: Any, wanted: Any
    ) -> dict[str, torch.Tensor | None]:
        if saved.left is None or not wanted.weight:
            return super().backward(call, saved, upstream, wanted)
        from gpt4v_fast.kernels.loss.linear_cross_entropy_kept import linear_cross_entropy_backward_of_kept

        slopes = rows.slopes(call, saved, upstream)
        grad_hidden, grad_weight = linear_cross_entropy_backward_of_kept(
            *slopes, call.hidden, call.weight, call.labels.reshape(-1), saved.lse, saved.left, of_hidden=wanted.hidden,
            class_weight=call.class_weight, ignore_index=call.ignore_index, label_smoothing=call.label_smoothing,
        )  # fmt: skip
        return {"hidden": grad_hidden, "weight": grad_weight}
