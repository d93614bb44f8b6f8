"""How an op is registered with torch: schema, implementation, fake kernel, autograd, so torch.compile sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "gpt4v_fast"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define_op(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers `gpt4v_fast::<schema>` and returns the callable op.

    Args:
        schema: the op's name and signature in torch's schema language.
        implementation: runs on real tensors of any device; it asks `backends.pick` which kernel serves the call.
        fake: returns empty outputs of the right shape, dtype and device for meta tensors.
        setup_context, backward: as for `torch.library.register_autograd`; an op without them is not differentiable.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name)


def autocast(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """The floating tensors in autocast's dtype where autocast is on for their device, else as they are."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)
