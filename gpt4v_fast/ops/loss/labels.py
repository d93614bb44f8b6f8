"""Labels of the losses: their checks, their shift, and what is remembered of a bad one on a GPU.

On a CPU a label that is none raises at once. On a GPU nobody waits for it: its row becomes NaN, the first
such label is kept in a tensor on the device, and `check_labels` raises for it when asked.
"""

from __future__ import annotations

import torch

LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# By device: int64 (found, label, place, V) of the first bad label since the last check.
_first_bad: dict[torch.device, torch.Tensor] = {}


def check_target(target: object, shape: tuple[int, ...], source: str, like: torch.Tensor) -> torch.Tensor:
    """`target` as int64; raises unless it is an integer tensor of this shape on `like`'s device."""
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"target: expected a torch.Tensor of labels, got {type(target).__name__}")
    if target.is_floating_point():
        raise TypeError(f"target: expected integer labels, got {target.dtype}: class probabilities are not supported")
    if target.dtype not in LABEL_DTYPES:
        raise TypeError(f"target: expected an integer dtype, got {target.dtype}")
    if tuple(target.shape) != shape:
        raise ValueError(f"target: expected shape {shape} for {source}, got {tuple(target.shape)}")
    if target.device != like.device:
        raise ValueError(f"target: expected the device {like.device}, got {target.device}")
    # Before anything is compared with it: beside uint8 labels torch takes an ignore_index of -100 for 156.
    return target.to(torch.int64)


def shifted(target: torch.Tensor, shift: int, ignore_index: int) -> torch.Tensor:
    """target (..., T) with position t holding label t + shift; the last `shift` positions are ignored."""
    if shift == 0:
        return target
    # Padded first: a tensor of length T - shift would make torch.export ask whether that is 1.
    return torch.nn.functional.pad(target, (0, shift), value=ignore_index)[..., shift:]


def are_bad(labels: torch.Tensor, V: int, ignore_index: int) -> torch.Tensor:
    """Which labels are outside [0, V) and not ignore_index."""
    return ((labels < 0) | (labels >= V)) & (labels != ignore_index)


def raise_at_once(target: torch.Tensor, backend: str) -> bool:
    """Whether a bad label raises at once: on a CPU, except where Triton's interpreter plays a GPU."""
    return target.device.type == "cpu" and backend != "triton"


def raise_if_bad(target: torch.Tensor, V: int, ignore_index: int, shift: int = 0) -> None:
    """Raises IndexError for the first bad label; `target` is shifted already."""
    bad = are_bad(target, V, ignore_index)
    if not bad.any():
        return
    flat = bad.reshape(-1).to(torch.uint8).argmax()
    place = [int(i) for i in torch.unravel_index(flat, target.shape)]
    if shift:
        place[-1] += shift
    raise _error(int(target.reshape(-1)[flat]), V, ignore_index, f"target[{', '.join(map(str, place))}]")


def remember_bad(target: torch.Tensor, V: int, ignore_index: int, backend: str) -> None:
    """Keeps the first bad label for `check_labels`, without waiting for the device."""
    if target.numel() == 0:
        return
    if target.device not in _first_bad:
        _first_bad[target.device] = torch.zeros(4, dtype=torch.int64, device=target.device)
    state = _first_bad[target.device]
    flat = target.reshape(-1)
    if backend == "triton":
        from gpt4v_fast.kernels.loss import labels as kernels

        if flat.numel() <= kernels.MOST:
            return kernels.remember_bad_label(flat, state, V, ignore_index)
    place = are_bad(flat, V, ignore_index).to(torch.uint8).argmax().reshape(1)  # the first of the largest
    label = flat.gather(0, place)
    found = are_bad(label, V, ignore_index).to(torch.int64)
    new = torch.cat([found, label, place, torch.full_like(place, V)])
    state.copy_(torch.where(state[0] != 0, state, torch.where(found != 0, new, state)))


def check_labels() -> None:
    """Raises IndexError if a loss on a GPU has met a bad label since the last check. Waits for the GPUs.

    Losses on a GPU do not wait to look at labels: a label outside [0, V) that is not ignore_index makes the
    loss and the gradients of its row NaN, and is reported here. On a CPU they raise at once, and there is
    nothing to check.

    Raises:
        IndexError: names the first such label and its place in the flattened target.
    """
    for device, state in _first_bad.items():
        found, label, place, V = state.tolist()
        state.zero_()
        if found:
            raise _error(label, V, None, f"place {place} of the flattened target on {device}")


def _error(label: int, V: int, ignore_index: int | None, place: str) -> IndexError:
    or_ignored = "ignore_index" if ignore_index is None else f"ignore_index = {ignore_index}"
    return IndexError(f"target: expected labels in [0, {V}) or {or_ignored}, got {label} at {place}")
