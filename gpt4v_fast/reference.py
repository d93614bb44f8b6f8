"""The oracle of every op under the op's own name: plain PyTorch, every argument, in the dtype of its inputs.

Give it float64 tensors and it is the exact answer that tests compare with; give it the tested dtype and it is what
PyTorch itself would compute. Everything is differentiable by autograd. Nothing here is fast, and nothing picks it
silently (see backends.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from gpt4v_fast.masks import Mask, MaskTensors, dense_mask

_NO_IDS = MaskTensors(None, None, None, None, None)
_UINT32 = 0xFFFFFFFF


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(mask(softcap(scale * q k^T) + bias + alibi), sinks) v; arguments as `gpt4v_fast.attention`."""
    S, T = q.shape[2], k.shape[2]
    mask = mask if mask is not None else Mask()
    ids = mask.resolve(q.shape[0], S, T, q.device)
    return attention_core(
        q,
        k,
        v,
        ids=ids,
        causal=mask.causal,
        offset=mask.offset(S, T),
        window=mask.window or (None, None),
        scale=scale,
        softcap=softcap,
        bias=bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
    )


def attention_core(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    ids: MaskTensors = _NO_IDS,
    causal: bool = False,
    offset: int | torch.Tensor = 0,
    window: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    sequence: int = 0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` after the mask is taken apart; `offset` may differ by batch entry; `sequence` is the index of the
    first batch entry in the dropout generator's counter."""
    B, H, S, D = q.shape
    Hkv, T = k.shape[1], k.shape[2]
    scale = D**-0.5 if scale is None else scale
    if ids.key_lengths is not None:
        # Past its length a cache holds anything, NaN too, and 0 * NaN would reach the sums.
        past = torch.arange(T, device=q.device) >= ids.key_lengths[:, None]
        k, v = (x.masked_fill(past[:, None, :, None], 0.0) for x in (k, v))
    k = k.repeat_interleave(H // Hkv, dim=1)
    v = v.repeat_interleave(H // Hkv, dim=1)

    scores = (q @ k.transpose(-1, -2)) * scale  # (B, H, S, T)
    if softcap:
        scores = cap(scores, softcap)
    if bias is not None and bias.dtype != torch.bool:
        scores = scores + bias.to(scores.dtype)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(scores.dtype).expand(B, H)[:, :, None, None]
        step = offset.view(-1, 1, 1, 1) if isinstance(offset, torch.Tensor) else offset
        i = torch.arange(S, device=q.device)[:, None]
        j = torch.arange(T, device=q.device)[None, :]
        scores = scores - slopes * (j - i - step).abs().to(scores.dtype)
    allowed = dense_mask(S, T, q.device, causal=causal, offset=offset, window=window, ids=ids)
    if bias is not None and bias.dtype == torch.bool:
        allowed = allowed & bias
    scores = scores.masked_fill(~allowed, -math.inf)

    logits = scores
    if sinks is not None:
        extra = sinks.to(scores.dtype).view(1, H, 1, 1).expand(B, H, S, 1)
        logits = torch.cat([scores, extra], dim=-1)
    lse = torch.logsumexp(logits, dim=-1) if logits.shape[-1] else scores.new_full((B, H, S), -math.inf)
    seen = lse != -math.inf  # a NaN row counts as seen, so that it stays NaN
    # A row that sees nothing: subtracting 0 instead of -inf leaves exp(-inf) = 0, with zero gradients.
    probabilities = torch.exp(scores - torch.where(seen, lse, torch.zeros_like(lse))[..., None])
    if dropout_p:
        keep = dropout_keep(dropout_seed, dropout_p, B, H, S, T, q.device, sequence)
        probabilities = probabilities * keep / (1.0 - dropout_p)
    out = probabilities @ v
    return (out, lse) if return_lse else out


def cap(x: torch.Tensor, softcap: float) -> torch.Tensor:
    """softcap * tanh(x / softcap), with a derivative that is right to the last digits for every x.

    Where tanh rounds to 1, autograd's 1 - tanh^2 is 0, in fp64 from |x| = 19 softcap on; but 1 - tanh(y) is
    2 e / (1 + e) with e = exp(-2 y), whose derivative has nothing that cancels.
    """
    y = x / softcap
    e = torch.exp(-2.0 * y.abs())
    return softcap * torch.where(y.abs() < 0.5, torch.tanh(y), torch.sign(y) * (1.0 - 2.0 * e / (1.0 + e)))


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    align: str = "bottom_right",
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` sequence by sequence; arguments as `gpt4v_fast.attention_varlen`. lse is (H, Nq)."""
    outs, lses = [], []
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        rows = slice(starts_q[b], starts_q[b + 1])
        keys = slice(starts_k[b], starts_k[b + 1])
        S, T = rows.stop - rows.start, keys.stop - keys.start
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b : b + 1]
        out, lse = attention_core(
            q[rows].transpose(0, 1)[None],
            k[keys].transpose(0, 1)[None],
            v[keys].transpose(0, 1)[None],
            causal=causal,
            offset=T - S if align == "bottom_right" else 0,
            window=window or (None, None),
            scale=scale,
            softcap=softcap,
            alibi_slopes=slopes,
            sinks=sinks,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            sequence=b,
            return_lse=True,
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    Nq, H = q.shape[:2]
    covered = starts_q[-1] - starts_q[0] if starts_q else 0
    if not outs or covered != Nq:
        outs.append(q.new_zeros(Nq - covered, H, v.shape[-1]))
        lses.append(q.new_full((H, Nq - covered), -math.inf))
    out, lse = torch.cat(outs), torch.cat(lses, dim=1)
    return (out, lse) if return_lse else out


def attention_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = False,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Append, rotate, attend; arguments as `gpt4v_fast.attention_kvcache`. The caches are written in place."""
    S = q.shape[1]
    lengths = cache_lengths.to(torch.int64)
    total = lengths if k is None else lengths + k.shape[1]
    if rotary_cos is not None and rotary_sin is not None:
        q = rotate(q, rotary_cos, rotary_sin, total - S, rotary_interleaved)
        if k is not None:
            k = rotate(k, rotary_cos, rotary_sin, lengths, rotary_interleaved)
    if k is not None and v is not None:
        append_to_cache(k_cache, k, lengths, block_table)
        append_to_cache(v_cache, v, lengths, block_table)
    if block_table is not None:
        k_cache, v_cache = gather_pages(k_cache, block_table), gather_pages(v_cache, block_table)
    out = attention_core(
        q.transpose(1, 2),
        k_cache.transpose(1, 2).to(q.dtype),
        v_cache.transpose(1, 2).to(q.dtype),
        ids=MaskTensors(None, None, None, None, total),
        causal=causal,
        offset=total - S,
        window=window or (None, None),
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        return_lse=True,
    )
    return (out[0].transpose(1, 2), out[1]) if return_lse else out[0].transpose(1, 2)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, first: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """Rotary embedding of x (B, S, H, D) at positions first[b] + s.

    cos, sin: (positions, R / 2); the first R of D are rotated: x1 cos - x2 sin, x2 cos + x1 sin, where x1 and x2 are
    the halves of the R (GPT-NeoX, Llama) or, interleaved, its even and odd dimensions (GPT-J). Positions past the table
    are refused by the public function; here a negative one counts as 0.
    """
    half = cos.shape[-1]
    positions = (first[:, None] + torch.arange(x.shape[1], device=x.device)).clamp(min=0)  # (B, S)
    cos, sin = (table[positions][:, :, None].to(x.dtype) for table in (cos, sin))
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        x1, x2 = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).flatten(-2)
    else:
        x1, x2 = turned[..., :half], turned[..., half:]
        turned = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
    return torch.cat([turned, rest], dim=-1)


def append_to_cache(
    cache: torch.Tensor, new: torch.Tensor, lengths: torch.Tensor, block_table: torch.Tensor | None
) -> None:
    """Writes new (B, S, Hkv, D) behind the first lengths[b] tokens of each entry's cache, dense or paged."""
    B, S = new.shape[:2]
    positions = lengths[:, None] + torch.arange(S, device=new.device)  # (B, S)
    if block_table is None:
        cache[torch.arange(B, device=new.device)[:, None], positions] = new.to(cache.dtype)
        return
    page = cache.shape[1]
    pages = block_table.to(torch.int64).gather(1, positions // page)
    cache[pages, positions % page] = new.to(cache.dtype)


def gather_pages(cache: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """The dense cache (B, pages per entry * page, Hkv, D) of a paged one; unused entries may be anything."""
    B, entries = block_table.shape
    if cache.shape[0] == 0:
        return cache.new_zeros(B, entries * cache.shape[1], *cache.shape[2:])
    gathered = cache[block_table.to(torch.int64).clamp(0, cache.shape[0] - 1)]  # (B, entries, page, Hkv, D)
    return gathered.reshape(B, entries * cache.shape[1], *cache.shape[2:])


def dropout_keep(
    seed: int, p: float, B: int, H: int, S: int, T: int, device: torch.device, sequence: int = 0
) -> torch.Tensor:
    """Which probabilities survive dropout: (B, H, S, T) booleans from Philox4x32-10 (Salmon et al. 2011).

    key = (seed mod 2^32, seed div 2^32), counter = (j div 4, i, (sequence + b) H + h, 0); key j takes word j mod 4 and
    is kept when it is at least floor(p 2^32). The bits depend on the position alone, not on tiles or threads.
    """
    counter = torch.meshgrid(
        torch.arange(sequence * H, (sequence + B) * H, device=device),
        torch.arange(S, device=device),
        torch.arange((T + 3) // 4, device=device),
        indexing="ij",
    )
    rows, i, groups = counter
    words = philox4x32((groups, i, rows, torch.zeros_like(rows)), seed)
    bits = torch.stack(words, dim=-1).reshape(B, H, S, -1)[..., :T]
    return bits >= math.floor(p * 2**32)


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words."""
    x0, x1, x2, x3 = counter
    key0, key1 = seed & _UINT32, (seed >> 32) & _UINT32
    for _ in range(10):
        high0, low0 = _multiply_32(0xD2511F53, x0)
        high1, low1 = _multiply_32(0xCD9E8D57, x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _UINT32, (key1 + 0xBB67AE85) & _UINT32
    return x0, x1, x2, x3


def _multiply_32(a: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The high and low words of a 32 x 32-bit product, in int64 arithmetic that does not overflow."""
    low = (a & 0xFFFF) * x  # below 2^48
    high = (a >> 16) * x + (low >> 16)  # below 2^49
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def patch_embed(
    pixels: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    mean: float | Sequence[float] | torch.Tensor | None = None,
    std: float | Sequence[float] | torch.Tensor | None = None,
    rescale: float | None = None,
    pos_embed: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """patches((pixels * rescale - mean) / std) weight^T + bias + pos_embed; arguments as `gpt4v_fast.patch_embed`."""
    if rescale is None:
        rescale = 1.0 if pixels.is_floating_point() else 1 / 255
    dtype = torch.promote_types(torch.promote_types(weight.dtype, torch.float32), pixels.dtype)
    per_channel = (-1, *[1] * (pixels.dim() - 2))
    mean, std = (
        torch.as_tensor(default if value is None else value, dtype=dtype, device=pixels.device).reshape(per_channel)
        for value, default in ((mean, 0.0), (std, 1.0))
    )
    normalised = (pixels.to(dtype) * rescale - mean) / std
    return patch_tokens(normalised, weight, bias, pos_embed).to(weight.dtype if out_dtype is None else out_dtype)


def patch_tokens(
    normalised: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pos_embed: torch.Tensor | None
) -> torch.Tensor:
    """The unfolded patches of (B, C, [frames,] H, W) times weight (E, C, [Pt,] P, P), plus bias and pos_embed."""
    if normalised.dim() == 4:
        normalised, weight = normalised.unsqueeze(2), weight.unsqueeze(2)
    tokens = unfold_patches(normalised.to(weight.dtype), weight.shape[2:]) @ weight.flatten(1).T
    for term in (bias, pos_embed):
        tokens = tokens if term is None else tokens + term
    return tokens


def unfold_patches(pixels: torch.Tensor, patch: Sequence[int]) -> torch.Tensor:
    """(B, C, frames, H, W) as (B, N, C Pt Ph Pw): the non-overlapping patches, row by row."""
    B, C, *sizes = pixels.shape
    grid = [size // side for size, side in zip(sizes, patch, strict=True)]
    split = [number for pair in zip(grid, patch, strict=True) for number in pair]
    patches = pixels.reshape(B, C, *split).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return patches.reshape(B, math.prod(grid), C * math.prod(patch))


def patch_embed_packed(
    images: Sequence[torch.Tensor],
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    mean: float | Sequence[float] | torch.Tensor | None = None,
    std: float | Sequence[float] | torch.Tensor | None = None,
    rescale: float | None = None,
    pos_embed: torch.Tensor | None = None,
    pos_grid: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`patch_embed` image by image, joined; arguments and results as `gpt4v_fast.patch_embed_packed`."""
    tokens, positions = [weight.new_empty(0, weight.shape[0])], [torch.empty(0, 2, dtype=torch.int64)]
    for image in images:
        rows, columns = image.shape[1] // weight.shape[2], image.shape[2] // weight.shape[3]
        pos = pos_embed
        if pos is not None:
            side = math.isqrt(pos.shape[-2]) if pos_grid is None else pos_grid
            pos = resize_positions(pos.reshape(-1, pos.shape[-1]), side, rows, columns)
        part = patch_embed(image[None], weight, bias=bias, mean=mean, std=std, rescale=rescale, pos_embed=pos)
        tokens.append(part[0])
        positions.append(torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2))
    lengths = torch.tensor([len(t) for t in tokens], dtype=torch.int32, device=weight.device)
    joined = torch.cat(tokens).to(weight.dtype if out_dtype is None else out_dtype)
    return joined, lengths.cumsum(0, dtype=torch.int32), torch.cat(positions).to(weight.device)


def resize_positions(pos_embed: torch.Tensor, side: int, rows: int, columns: int) -> torch.Tensor:
    """A position table (side * side, E) for another grid, (rows * columns, E), bicubically as in transformers' ViT."""
    if (rows, columns) == (side, side):
        return pos_embed
    if rows == 0 or columns == 0:
        return pos_embed[:0]
    grid = pos_embed.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(rows * columns, -1)


class LossStats(NamedTuple):
    """What a loss knows of each token besides itself: lse, argmax and correct have the target's shape."""

    lse: torch.Tensor  # log sum exp of the (capped) logits; 0 where ignored
    argmax: torch.Tensor  # int64, the lowest index of the largest logit; -1 where ignored
    correct: torch.Tensor  # bool: argmax is the label; False where ignored
    z_loss: torch.Tensor  # the part of the loss that z_loss added, reduced as the loss is


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, LossStats]:
    """F.cross_entropy of the capped logits, plus z_loss * lse^2; arguments as `gpt4v_fast.cross_entropy`."""
    rows, labels = logits.reshape(target.numel(), logits.shape[-1]), target.reshape(-1)
    nll, lse, argmax = cross_entropy_core(rows, labels, weight, ignore_index, label_smoothing, softcap)
    counted = labels != ignore_index
    penalty = z_loss * lse.square()
    if reduction == "none":
        loss, penalty = (nll + penalty).reshape(target.shape), penalty.reshape(target.shape)
    else:
        penalty = penalty.sum() if reduction == "sum" else penalty.sum() / counted.sum()
        loss = penalty + torch.nn.functional.cross_entropy(
            cap(rows, softcap) if softcap else rows,
            labels,
            None if weight is None else weight.to(rows.dtype),
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    if not return_stats:
        return loss
    correct = counted & (argmax == labels)
    lse, argmax, correct = (x.reshape(target.shape) for x in (lse, argmax, correct))
    return loss, LossStats(lse, argmax, correct, penalty.detach())


def cross_entropy_core(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(nll, lse, argmax) of each row of logits (N, V): 0, 0, -1 where ignored; NaN, NaN, -1 where bad."""
    counted = target != ignore_index
    bad = counted & ((target < 0) | (target >= logits.shape[1]))
    z = cap(logits, softcap) if softcap else logits
    nll = torch.nn.functional.cross_entropy(
        z,
        torch.where(counted & ~bad, target, -1),
        None if class_weight is None else class_weight.to(z.dtype),
        ignore_index=-1,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    factor = torch.ones_like(nll).masked_fill(bad, math.nan)  # a product, so that the gradient is NaN too
    lse = torch.where(counted, torch.logsumexp(z, dim=1), 0.0)
    return nll * factor, lse * factor, torch.where(counted & ~bad, logits.argmax(dim=1), -1)


def cross_entropy_core_backward(
    grad_nll: torch.Tensor,
    grad_lse: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of the logits for those of `cross_entropy_core`'s nll and lse; formula in csrc/kernels/loss.h.

    lse (N,) is that of more classes than these, where these are a shard of the vocabulary.
    """
    V = logits.shape[1]
    counted = (target != ignore_index)[:, None]
    bad = counted & ((target < 0) | (target >= V))[:, None]
    label = torch.where(counted & ~bad, target[:, None], 0)  # (N, 1)
    z = cap(logits, softcap) if softcap else logits
    weights = logits.new_ones(V) if class_weight is None else class_weight.to(logits.dtype)
    of_label = grad_nll[:, None] * (1.0 - label_smoothing) * weights[label]
    of_all = grad_nll[:, None] * (label_smoothing / V)
    p = torch.softmax(z, dim=1) if lse is None else torch.exp(z - lse[:, None]).to(z.dtype)
    gradient = (of_label + of_all * weights.sum() + grad_lse[:, None]) * p - of_all * weights
    gradient = gradient.scatter_add(1, label, -of_label)
    if softcap:
        e = torch.exp(-2.0 * (logits / softcap).abs())
        gradient = gradient * (4.0 * e / (1.0 + e).square())  # 1 - tanh^2, see cap
    return torch.where(counted, gradient, 0.0).masked_fill(bad, math.nan)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    shift: int = 0,
    ignore_index: int = -100,
    **options: Any,
) -> torch.Tensor | tuple[torch.Tensor, LossStats]:
    """`cross_entropy` of hidden @ weight^T + bias; arguments as `gpt4v_fast.linear_cross_entropy`."""
    logits = torch.nn.functional.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype))
    if shift:
        last = target.new_full((*target.shape[:-1], min(shift, target.shape[-1])), ignore_index)
        target = torch.cat([target[..., shift:], last], dim=-1)
    return cross_entropy(logits, target, weight=class_weight, ignore_index=ignore_index, **options)
