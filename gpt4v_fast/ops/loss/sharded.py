"""The losses' torch ops over a vocabulary that is split over processes: the same for both losses.

A ShardedCall holds this process's part of the weight (or of the logits), and makes the local calls, each of which any
backend serves; vocab_parallel.py plans and merges them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from gpt4v_fast import backends
from gpt4v_fast.ops import library
from gpt4v_fast.ops.loss import labels, rows, vocab_parallel


class ShardedCall(backends.Call):
    """What the sharded calls of both losses share. Each has its fields, `differs` (what else must be the same on every
    process), `labels`, `logit_at(columns)`, and the call on its shard: `local(target, class_weight, label_smoothing)`.
    """

    __slots__ = ()
    MAIN = "target"

    @property
    def shards(self) -> vocab_parallel.Shards:
        call: Any = self
        return vocab_parallel.Shards(tuple(call.sizes), call.rank, call.group)

    @property
    def explained(self) -> Any:
        """The call whose kernel serves this one."""
        call: Any = self
        return call.local(call.labels.reshape(-1), call.class_weight, call.label_smoothing)

    def run_rows(self, part: vocab_parallel.LocalCall) -> Any:
        local = self.of(part)
        return backends.pick(local).forward(local)

    def of(self, part: vocab_parallel.LocalCall) -> Any:
        call: Any = self
        return call.local(part.rows, part.class_weight, part.label_smoothing)


class ShardedOutputs(NamedTuple):
    """rows.LossOutputs, and what the backward pass needs of the whole vocabulary's class weights."""

    loss: torch.Tensor
    lse: torch.Tensor
    argmax: torch.Tensor
    penalty: torch.Tensor
    lse_low: torch.Tensor
    tokens: torch.Tensor
    total: torch.Tensor
    label_weight: torch.Tensor  # (N,) fp32
    weight_sum: torch.Tensor  # fp64 scalar


def define(name: str, call_type: Any, of: tuple[str, ...], function: str) -> Callable[[Any], Any]:
    return library.define(
        name,
        call_type,
        ShardedOutputs,
        run=_run,
        fake=_fake,
        gradient=library.Gradient(
            run=lambda call, saved, upstream, wanted: _backward(call, saved, upstream, wanted, of),
            of=of,
            saves=("lse", "lse_low", "tokens", "total", "label_weight", "weight_sum"),
            constants=("argmax", "penalty", "lse_low", "tokens", "total", "label_weight", "weight_sum"),
            function=function,
        ),
    )


def _run(call: Any) -> ShardedOutputs:
    backend = backends.pick(call.explained).backend
    target = call.labels
    raises = labels.raise_at_once(target, backend)
    merged = vocab_parallel.forward(
        call, raises, lambda bad: labels.remember_bad(bad, call.shards.V, call.ignore_index, backend)
    )
    found = rows.Rows(merged.nll, merged.lse, merged.argmax, merged.lse_low)
    outputs = rows.reduce_rows(call, found, target, merged.label_weight)
    return ShardedOutputs(*outputs, merged.label_weight, merged.weight_sum)


def _fake(call: Any) -> ShardedOutputs:
    like = call[0]
    label_weight = like.new_empty(call.target.numel(), dtype=torch.float32)
    return ShardedOutputs(*rows.empty_outputs(call, like), label_weight, like.new_empty((), dtype=torch.float64))


def _backward(call: Any, saved: Any, upstream: Any, wanted: Any, of: tuple[str, ...]) -> dict[str, torch.Tensor | None]:
    slopes = rows.slopes(call, saved, upstream)
    found = []
    for part, its_slopes in vocab_parallel.backward_calls(call, slopes, saved.label_weight, saved.weight_sum):
        local = call.of(part)
        backend: Any = backends.pick(local, again=True)
        found.append(backend.backward_rows(local, saved, its_slopes, wanted, shard=True))
    gradients: dict[str, torch.Tensor | None] = {}
    for field in of:
        x = getattr(call, field)
        if x is not None and getattr(wanted, field):
            gradients[field] = vocab_parallel.add_up([each[field] for each in found], x)
    hidden = gradients.get("hidden")
    if hidden is not None and call.reduce_grad_hidden:
        gradients["hidden"] = vocab_parallel.all_reduce_sum(hidden, call.shards)
    return gradients
