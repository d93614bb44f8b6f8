"""Loss cases of bits.py: cross-entropy of given logits, and of a projection to the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import distributed

import gpt4v_fast as gf

from .bits_inputs import DTYPES, BitsCase, Draw, Tensors, with_gradients

LOSS_OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ignored": {"ignored": True},
    "all ignored": {"ignored": True, "high": 0},
    "ignored, none": {"ignored": True, "reduction": "none"},
    "other ignore_index": {"ignore_index": 1},
    "class weight": {"class_weight": True},
    "class weight, sum": {"class_weight": True, "reduction": "sum", "ignored": True},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing, class weight": {"label_smoothing": 0.2, "class_weight": True, "ignored": True},
    "z_loss": {"z_loss": 1e-3},
    "z_loss, none": {"z_loss": 1e-3, "reduction": "none", "ignored": True},
    "z_loss, sum": {"z_loss": 1e-3, "reduction": "sum", "label_smoothing": 0.1},
    "softcap": {"softcap": 2.0},
    "stats": {"return_stats": True},
    "stats, none": {"return_stats": True, "reduction": "none", "z_loss": 1e-3, "ignored": True},
    "everything": {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0, "class_weight": True, "ignored": True},
    "everything, stats": {
        "label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0, "class_weight": True, "ignored": True,
        "return_stats": True, "reduction": "sum",
    },
    "twice": {"times": 2},
    "forward only": {"forward_only": True, "return_stats": True},
}  # fmt: skip


@cache
def _lone_group() -> Any:
    """A process group of this process alone: the ways of a split vocabulary, without a second process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    return distributed.group.WORLD


def _loss_outputs(result: Any, with_stats: bool) -> Tensors:
    if not with_stats:
        return {"loss": result}
    loss, stats = result
    return {"loss": loss, "lse": stats.lse, "argmax": stats.argmax, "correct": stats.correct, "z_loss": stats.z_loss}


def _labels(draw: Draw, options: dict[str, Any], V: int, *shape: int) -> torch.Tensor:
    labels = draw.whole(0, V, *shape)
    if options.pop("ignored", False):
        kept = options.pop("high", 2)
        labels[draw.whole(0, 3, *shape) >= kept] = options.get("ignore_index", -100)
    return labels


def _loss(draw: Draw, options: dict[str, Any], leaves: Tensors, call: Callable[..., Any]) -> Tensors:
    times, forward_only = options.pop("times", 1), options.pop("forward_only", False)

    def outputs(**tensors: torch.Tensor) -> Tensors:
        return _loss_outputs(call(**tensors, **options), options.get("return_stats", False))

    if forward_only:
        with torch.no_grad():
            return outputs(**leaves)
    return with_gradients(draw, leaves, outputs, times)


def _cross_entropy(option: str, N: int, V: int, layout: str, draw: Draw) -> Tensors:
    options = dict(LOSS_OPTIONS[option])
    target = _labels(draw, options, V, N)
    if options.pop("class_weight", False):
        options["weight"] = draw.normal(V, dtype=torch.float32).abs()
    logits = draw.normal(V, N, size=2.0).t() if layout == "columns" else draw.normal(N, V, size=2.0)
    if layout == "padded rows":
        logits = draw.normal(N, V + 5, size=2.0)[:, 3 : V + 3]
    if layout == "in place":
        options["inplace_backward"] = True
    if layout == "sharded":
        options["process_group"] = _lone_group()

    def call(logits: torch.Tensor, **more: Any) -> Any:
        return gf.cross_entropy(logits * 1.0 if layout == "in place" else logits, target, **more)

    return _loss(draw, options, {"logits": logits}, call)


def _linear(option: str, sizes: tuple[int, int, int], more: str, draw: Draw) -> Tensors:
    N, V, E = sizes
    options = dict(LOSS_OPTIONS[option])
    target = _labels(draw, options, V, N)
    if options.pop("class_weight", False):
        options["class_weight"] = draw.normal(V, dtype=torch.float32).abs()
    tensors = {"hidden": draw.normal(N, E), "weight": draw.normal(V, E, size=E**-0.5)}
    if more == "shift":
        tensors["hidden"], target = tensors["hidden"].view(2, N // 2, E), target.view(2, N // 2)
        options["shift"] = 1
    if more == "strided":
        tensors["hidden"] = draw.normal(E, N).t()
        tensors["weight"] = draw.normal(V, E + 3, size=E**-0.5)[:, 1 : E + 1]
    if more == "bias":
        tensors["bias"] = draw.normal(V)
    if more == "sharded":
        options["process_group"] = _lone_group()
    fixed = {"weight": tensors.pop("weight")} if more == "hidden alone" else {}
    if more == "weight alone":
        fixed = {"hidden": tensors.pop("hidden")}

    def call(**all_of_them: Any) -> Any:
        hidden, weight = ((fixed | all_of_them).pop(name) for name in ("hidden", "weight"))
        rest = {name: value for name, value in all_of_them.items() if name not in ("hidden", "weight")}
        with torch.autocast("cpu", torch.bfloat16, enabled=more == "autocast"):
            return gf.linear_cross_entropy(hidden, weight, target, **rest)

    return _loss(draw, options, tensors, call)


CROSS_ENTROPY_SIZES = ((1, 1), (1, 2), (3, 17), (130, 64), (2, 40001), (40, 4096))  # N, V
LAYOUTS = ("columns", "padded rows", "in place", "sharded")

LINEAR_SIZES = ((1, 1, 1), (3, 5, 7), (70, 33, 16), (17, 4099, 40), (200, 512, 136), (2, 20000, 64))  # N, V, E
LINEAR_MORE = ("shift", "strided", "bias", "hidden alone", "weight alone", "autocast", "sharded")
# More logits than a call may keep between its passes (56 MiB): gradients are computed with the loss, where they can.
LARGE_SIZES = {"fp32": (512, 32000, 24), "bf16": (960, 32100, 16), "fp16": (960, 32100, 16)}
LARGE = {
    "fp32": (
        ("mean", ""), ("none", ""), ("everything", "bias"), ("everything, stats", "hidden alone"),
        ("sum", "weight alone"), ("twice", ""), ("z_loss, sum", "shift"),
    ),
    "bf16": (("mean", ""), ("everything", "bias"), ("z_loss, none", "")),
    "fp16": (("everything, stats", ""), ("none", "")),
}  # fmt: skip


def cases() -> Iterator[BitsCase]:
    for dtype in DTYPES:
        yield from _given_logits(dtype)
        yield from _projections(dtype)


def _given_logits(dtype: str) -> Iterator[BitsCase]:
    def case(option: str, N: int, V: int, layout: str = "rows") -> BitsCase:
        make = partial(_cross_entropy, option, N, V, layout)
        return BitsCase("cross_entropy", f"{layout}, N {N}, V {V}, {option}", dtype, make, (N, V) == (3, 17))

    yield from (case(option, 13, 1003) for option in LOSS_OPTIONS)
    yield from (case("everything, stats", 13, 1003, layout) for layout in LAYOUTS)
    yield from (case("mean", 37, 517, layout) for layout in LAYOUTS)
    yield from (case(option, N, V) for N, V in CROSS_ENTROPY_SIZES for option in ("mean", "everything, stats"))


def _projections(dtype: str) -> Iterator[BitsCase]:
    def case(option: str, sizes: tuple[int, int, int], more: str = "") -> BitsCase:
        N, V, E = sizes
        name = ", ".join(filter(None, (f"N {N}, V {V}, E {E}", option, more)))
        return BitsCase("linear_cross_entropy", name, dtype, partial(_linear, option, sizes, more), sizes == (3, 5, 7))

    yield from (case(option, (26, 1003, 72)) for option in LOSS_OPTIONS)
    for more in LINEAR_MORE:
        if more != "autocast" or dtype == "fp32":
            yield from (case(option, (26, 1003, 72), more) for option in ("mean", "everything, stats"))
    yield from (case(option, sizes) for sizes in LINEAR_SIZES for option in ("mean", "everything, stats"))
    yield from (case(option, LARGE_SIZES[dtype], more) for option, more in LARGE[dtype])
