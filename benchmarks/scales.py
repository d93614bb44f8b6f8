"""How far off a result may be that is right: the size of the rounding errors of what it is computed from.

In units of u, the unit roundoff of the tested dtype (half the distance of 1 to the next number). Contenders round in
different places, so every intermediate result counts as rounded to the dtype, and sums as taken in fp32. Independent
errors add as squares: a sum of n terms t, each off by u t, is off by u |t| with |t|^2 = sum t^2, and its own partial
sums by u' sqrt(n (2 s^2 + |t|^2) / 6), s the sum and u' the unit of fp32 (docs/math.md, "How close is close enough").
Where terms cancel, as in the gradient of a query that sees one key, this is much larger than the result.
"""

from __future__ import annotations

import torch

Scales = dict[str, torch.Tensor]


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


class Rounding:
    """Variances, in units of u^2, of results in one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._of_sums = (unit(torch.float32) / unit(dtype)) ** 2

    def sum(self, total: torch.Tensor, squares: torch.Tensor, n: int, inherited: torch.Tensor) -> torch.Tensor:
        """Of a sum of n terms with this sum of squares, whose errors add up to `inherited`."""
        return inherited + self._of_sums * n / 6 * (2 * total.square() + squares)

    def product(self, a: torch.Tensor, b: torch.Tensor, a_variance: torch.Tensor) -> torch.Tensor:
        """Of a @ b, where a has this variance and b none."""
        b_squares = b.square()
        return self.sum(a @ b, a.square() @ b_squares, a.shape[-1], a_variance @ b_squares)

    def softmax(self, scores: torch.Tensor, variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(P, its variance): exp(score - lse) is off by its own rounding, by the score's and by the lse's."""
        p = torch.softmax(scores, dim=-1)
        variance = variance.masked_fill(scores.isinf(), 0.0)
        of_lse = (p.square() * variance).sum(-1, keepdim=True) + torch.logsumexp(scores, -1, keepdim=True).square()
        return p, p.square() * (1 + variance + of_lse)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor,
    dtype: torch.dtype,
    dout: torch.Tensor | None = None,
) -> Scales:
    """Of softmax(D^-0.5 q k^T where allowed) v: "out" and, with dout, "grad q", "grad k" and "grad v".

    q, dout (B, H, S, D), k, v (B, 1, T, D) of one key head; allowed (S, T) or (B, 1, S, T).
    """
    rounding, D = Rounding(dtype), q.shape[-1]
    q = q * D**-0.5
    scores = q @ k.mT
    scores_variance = scores.square() + rounding.product(q, k.mT, torch.zeros_like(q))
    p, p_variance = rounding.softmax(scores.masked_fill(~allowed, -torch.inf), scores_variance)
    scales = {"out": rounding.product(p, v, p_variance).sqrt()}
    if dout is None:
        return scales
    out = p @ v
    dp = dout @ v.mT
    dp_variance = dp.square() + rounding.product(dout, v.mT, torch.zeros_like(dout))
    delta = (dout * out).sum(-1, keepdim=True)
    # Either way to delta: from out, which was rounded, or from p and dp.
    delta_variance = (dout * out).square().sum(-1, keepdim=True) + (p_variance * dp.square()).sum(-1, keepdim=True)
    ds = p * (dp - delta)
    ds_variance = ds.square() + p_variance * (dp - delta).square() + p.square() * (dp_variance + delta_variance)
    scales["grad q"] = D**-0.5 * rounding.product(ds, k, ds_variance).sqrt()
    # Of a key: the sum over the queries of all heads, which become rows of one.
    q, dout, ds, ds_variance, p, p_variance = (
        x.flatten(1, 2)[:, None] for x in (q, dout, ds, ds_variance, p, p_variance)
    )
    scales["grad k"] = rounding.product(ds.mT, q, ds_variance.mT).sqrt()
    scales["grad v"] = rounding.product(p.mT, dout, p_variance.mT).sqrt()
    return scales


def cross_entropy(
    target: torch.Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    gradients: bool,
    *,
    logits: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> Scales:
    """Variances of "out", the loss summed over tokens, and of the gradients of what is given: logits (N, V), or hidden
    and weight, whose product they are."""
    rounding, counted = Rounding(dtype), target != ignore_index
    if hidden is not None and weight is not None:
        logits = hidden @ weight.mT
        variance = logits.square() + rounding.product(hidden, weight.mT, torch.zeros_like(hidden))
    assert logits is not None
    if weight is None:
        variance = torch.zeros_like(logits)
    p, p_variance = rounding.softmax(logits, variance)
    label = torch.where(counted, target, 0)[:, None]
    of_lse = torch.logsumexp(logits, 1).square() + (p.square() * variance).sum(1)
    of_label = logits.square().gather(1, label)[:, 0] + variance.gather(1, label)[:, 0]
    found = {"out": ((of_lse + of_label) * counted).sum()}
    if not gradients:
        return found
    gradient = p.scatter_add(1, label, -torch.ones_like(p[:, :1])) * counted[:, None]
    of_gradient = gradient.square() + p_variance * counted[:, None]
    if hidden is None or weight is None:
        return {**found, "logits": of_gradient}
    found["hidden"] = rounding.product(gradient, weight, of_gradient)
    found["weight"] = rounding.product(gradient.mT, hidden, of_gradient.mT)
    return found


def linear(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of x @ weight^T, where x was rounded."""
    return Rounding(dtype).product(x, weight.mT, x.square()).sqrt()
