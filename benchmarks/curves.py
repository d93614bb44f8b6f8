"""Curves of attention, `gpt4v-fast bench --curves`: time and memory over the length, time over the share of blocks that
a mask leaves.

Our kernels skip a block of 48 queries and 64 keys in which nobody sees anybody (csrc/attention/block.h); how
many are left is counted here from the mask alone. Time should follow it.
"""

from __future__ import annotations

import dataclasses

from . import attention
from .attention import Shape
from .registry import Case, Point

QUERIES, KEYS = 48, 64  # of a block
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
MASKED_LENGTH = 4096
WINDOWS = (64, 128, 256, 512, 1024, 2048, 4095)  # the last hides nothing
DOCUMENTS = (64, 32, 16, 8, 4, 2, 1)
CHECK_TOKENS = 1024  # of longer ones that many are checked: what is exact takes S x S numbers


def cases() -> list[Case]:
    return [*_by_length(), *_by_mask()]


def _by_length() -> list[Case]:
    found = []
    for mask, dtype, S in (
        (mask, dtype, S) for mask in ("none", "causal") for dtype in ("fp32", "bf16") for S in LENGTHS
    ):
        shape = Shape(f"curve_s{S}_{mask}", 1, 2, S, 64, mask=mask, part="curves")
        for direction in ("forward", "forward+backward") if mask == "causal" else ("forward",):
            point = Point(f"by length, {mask}", "S", float(S))
            found.append(dataclasses.replace(_case(shape, dtype, direction, point), measures_memory=True))
    return found


def _by_mask() -> list[Case]:
    masked = Shape("", 1, 2, MASKED_LENGTH, 64, part="curves")
    shapes = [
        *(dataclasses.replace(masked, name=f"curve_window{w}", mask="window", window=w) for w in WINDOWS),
        *(dataclasses.replace(masked, name=f"curve_documents{n}", mask="documents", documents=n) for n in DOCUMENTS),
    ]
    causal = dataclasses.replace(masked, mask="causal").blocks(QUERIES, KEYS)
    found = []
    for shape in shapes:
        share = shape.blocks(QUERIES, KEYS) / causal
        curve = f"by {shape.mask}, S {MASKED_LENGTH}"
        point = Point(curve, "share of the causal blocks that is left", share, proportional=True)
        found += [
            _case(shape, dtype, direction, point) for dtype in ("fp32", "bf16") for direction in ("forward", "backward")
        ]
    return found


def _case(shape: Shape, dtype: str, direction: str, point: Point) -> Case:
    """With ours and SDPA."""
    case = attention.case(shape, dtype, direction)
    return dataclasses.replace(
        case,
        contenders=case.contenders[:2],
        check_inputs=(lambda inputs: attention.prefix(inputs, CHECK_TOKENS)) if shape.S > CHECK_TOKENS else None,
        point=point,
    )
