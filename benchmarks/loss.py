"""Both losses beside F.cross_entropy and F.linear_cross_entropy: `python -m benchmarks.loss --help`."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch

from gpt4v_fast import reference

from . import loss_peers, scales
from .loss_peers import IGNORE
from .registry import DTYPES, Case, Expected, Inputs, compute_bound, expanded

BOTH = ("forward", "forward+backward")
TRAINING = ("forward+backward",)
# Where the exact answer of all tokens would take more multiply-adds than this, the first CHECK_TOKENS are checked, and
# of a weight with more elements than CHECK_WEIGHT its first rows.
CHECK_LIMIT = 2e10
CHECK_TOKENS = 64
GPU_CHECK_TOKENS = 1024  # so many that their logits take the way of the real problem
CHECK_WEIGHT = 10**8
CHUNK = 128  # tokens whose fp64 logits exist at a time, where a product makes them
GIVEN_CHUNK = 16  # and where they are given: few enough to stay in the cache


@dataclass(frozen=True)
class Shape:
    """N tokens, V classes, E features (0: the logits are given), and the share of labels that are ignored."""

    name: str
    N: int
    V: int
    E: int = 0
    ignored: float = 0.0
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    directions: tuple[str, ...] = BOTH
    part: str = "default"

    @property
    def op(self) -> str:
        return "linear_cross_entropy" if self.E else "cross_entropy"

    @property
    def counted(self) -> int:
        return self.N - int(self.N * self.ignored)

    @property
    def sizes(self) -> dict[str, int]:
        return {"N": self.N, "V": self.V, **({"E": self.E} if self.E else {}), "counted": self.counted}


def _grid() -> list[Shape]:
    """Every size and share of ignored labels of the issue that the usual record leaves out."""
    sizes = itertools.product(
        (256, 1024, 4096, 8192), (32000, 49152, 128256, 262144), (576, 2048, 4096), (0.0, 0.5, 0.9)
    )
    return [
        Shape(f"n{N}_v{V}_e{E}" + (f"_ignored{100 * ignored:.0f}" if ignored else ""), N, V, E, ignored, part="all")
        for N, V, E, ignored in sizes
    ]


DEFAULT = (
    Shape("n512_v49152_e576", 512, 49152, 576),
    Shape("n512_v49152_e576_ignored50", 512, 49152, 576, 0.5, ("bf16",), TRAINING),
    Shape("n512_v49152_e576_ignored90", 512, 49152, 576, 0.9, ("bf16",), TRAINING),
    Shape("n256_v32000_e2048", 256, 32000, 2048, directions=TRAINING),
    Shape("n256_v32000_e4096", 256, 32000, 4096, dtypes=("bf16",), directions=TRAINING),
    Shape("n256_v128256_e576", 256, 128256, 576, dtypes=("bf16",)),
    Shape("n256_v262144_e576", 256, 262144, 576, dtypes=("bf16",), directions=TRAINING),
    Shape("n2048_v49152_e576", 2048, 49152, 576, directions=TRAINING),
    Shape("n8192_v32000_e576", 8192, 32000, 576, dtypes=("bf16",), directions=TRAINING),
    Shape("n1024_v49152", 1024, 49152),
    Shape("n1024_v50257", 1024, 50257),
    Shape("n256_v262144", 256, 262144),
    # On a GPU: the heads of Llama 3 8B, Gemma 2B (the size of cut-cross-entropy's paper), Llama 2 7B and SmolLM2-135M.
    Shape("gpu_n8192_v128256_e4096", 8192, 128256, 4096, dtypes=("bf16",), part="gpu"),
    Shape("gpu_n8192_v128256_e4096_ignored90", 8192, 128256, 4096, 0.9, ("bf16",), TRAINING, "gpu"),
    Shape("gpu_n8192_v256000_e2304", 8192, 256000, 2304, dtypes=("bf16",), part="gpu"),
    Shape("gpu_n4096_v32000_e4096", 4096, 32000, 4096, dtypes=("bf16",), part="gpu"),
    Shape("gpu_n2048_v49152_e576", 2048, 49152, 576, part="gpu"),
    Shape("gpu_n256_v32000_e2048", 256, 32000, 2048, dtypes=("bf16",), part="gpu"),
    Shape("gpu_n8192_v128256", 8192, 128256, part="gpu"),
    Shape("gpu_n8192_v50257", 8192, 50257, dtypes=("bf16",), part="gpu"),
    Shape("quick_linear", 48, 515, 64, 0.25, part="quick"),
    Shape("quick_logits", 48, 515, ignored=0.25, part="quick"),
)


def cases() -> list[Case]:
    default = expanded(DEFAULT, _case)
    known = {case.id for case in default}
    return default + [case for case in expanded(_grid(), _case) if case.id not in known]


def _case(shape: Shape, dtype_name: str, direction: str) -> Case:
    dtype = DTYPES[dtype_name]
    forward = direction == "forward"
    if shape.E:
        # logits = h W^T; backward: dh = dlogits W and dW = dlogits^T h. Only tokens that count need a product.
        flops = (2.0 if forward else 6.0) * shape.counted * shape.V * shape.E
        elements = (1 if forward else 2) * (shape.N + shape.V) * shape.E
        bound = compute_bound(dtype)
    else:
        flops = (4.0 if forward else 8.0) * shape.counted * shape.V
        # Read once forward; read and written once more for the gradient, whose ignored rows are only written.
        elements = shape.counted * shape.V * (1 if forward else 2) + (0 if forward else shape.N * shape.V)
        bound = "read"
    big = shape.E > 0 and float(shape.N) * shape.V * shape.E > CHECK_LIMIT
    inputs_bytes = float((shape.N + shape.V) * shape.E if shape.E else shape.N * shape.V) * dtype.itemsize
    return Case(
        op=shape.op,
        name=shape.name,
        dtype=dtype,
        direction=direction,
        shape=shape.sizes,
        flops=flops,
        bytes=float(elements * dtype.itemsize),
        bound=bound,
        make_inputs=lambda: make_inputs(shape, dtype),
        expected=lambda inputs: expected(inputs, direction),
        contenders=loss_peers.linear_contenders(direction) if shape.E else loss_peers.LOGITS_CONTENDERS,
        leaves=_leaves(shape.E > 0),
        check_inputs=first_tokens if big else None,
        part=shape.part,
        warm_up_inputs=lambda: make_inputs(replace(shape, N=8, V=64), dtype),
        measures_memory=shape.E > 0 and not forward,
        resident_bytes=inputs_bytes * (1 if forward else 2),
    )


def _leaves(linear: bool) -> tuple[str, ...]:
    return ("hidden", "weight") if linear else ("logits",)


def make_inputs(shape: Shape, dtype: torch.dtype) -> Inputs:
    """Logits of a spread of about 2, as a trained model's; the ignored labels come first, as a prompt does."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * scale).to(dtype)

    target = torch.randint(shape.V, (shape.N,), generator=generator)
    target[: shape.N - shape.counted] = IGNORE
    inputs: Inputs = {"target": target, "upstream": torch.ones(())}
    if shape.E:
        inputs["hidden"] = random(shape.N, shape.E)
        inputs["weight"] = random(shape.V, shape.E, scale=2.0 * shape.E**-0.5)
    else:
        inputs["logits"] = random(shape.N, shape.V, scale=2.0)
    return inputs


def first_tokens(inputs: Inputs) -> Inputs:
    """The same problem for a few tokens that count and, where the weight is very large, fewer classes."""
    tokens = GPU_CHECK_TOKENS if inputs["target"].is_cuda else CHECK_TOKENS
    rows = (inputs["target"] != IGNORE).nonzero()[:tokens, 0]
    small = dict(inputs)
    for name in ("hidden", "logits", "target"):
        if name in inputs:
            small[name] = inputs[name][rows].contiguous()
    if "weight" in inputs and inputs["weight"].numel() > CHECK_WEIGHT:
        classes = max(1, CHECK_WEIGHT // inputs["weight"].shape[1])
        small["weight"] = inputs["weight"][:classes].contiguous()
        small["target"] = small["target"] % classes
    return small


def expected(inputs: Inputs, direction: str) -> list[Expected]:
    """The oracle's mean loss and gradients in fp64, summed over chunks of tokens to bound the memory."""
    names = _leaves("weight" in inputs)
    exact = {name: inputs[name].double() for name in names}
    target, dtype = inputs["target"], inputs[names[0]].dtype
    count = int((target != IGNORE).sum())
    total, variance = (torch.zeros((), dtype=torch.float64) for _ in range(2))
    gradients, variances = ({name: torch.zeros_like(value) for name, value in exact.items()} for _ in range(2))
    chunk = CHUNK if "weight" in exact else GIVEN_CHUNK
    for start in range(0, len(target), chunk):
        rows = slice(start, start + chunk)
        part = {name: value if name == "weight" else value[rows] for name, value in exact.items()}
        part = {name: value.detach().requires_grad_(direction != "forward") for name, value in part.items()}
        function: Any = reference.linear_cross_entropy if "weight" in part else reference.cross_entropy
        loss = function(*part.values(), target[rows], ignore_index=IGNORE, reduction="sum") / count
        total += loss.detach()
        with torch.no_grad():
            floats = {name: value.float() for name, value in part.items()}  # enough for a scale, and twice as fast
            found = scales.cross_entropy(target[rows], IGNORE, dtype, direction != "forward", **floats)
        variance += found["out"]
        if direction == "forward":
            continue
        for name, value in zip(names, torch.autograd.grad(loss, list(part.values())), strict=True):
            if name == "weight":
                gradients[name] += value
                variances[name] += found[name]
            else:
                gradients[name][rows], variances[name][rows] = value, found[name]
    variance = scales.Rounding(dtype).sum(total * count, total.square() * count, count, variance)
    results = [Expected("out", (), total, variance.sqrt() / count)]
    if direction != "forward":
        results += [Expected(f"grad {name}", (), gradients[name], variances[name].sqrt() / count) for name in names]
    return results


if __name__ == "__main__":
    from .command import main

    sys.exit(main("loss", ["cross_entropy", "linear_cross_entropy"]))
