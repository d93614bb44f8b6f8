"""What the tests of both losses share: labels, memory poisoning, and calls of a function at several thread counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gpt4v_fast import backends

IGNORED = -100
ISAS = backends.available_isas()
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def make_labels(N: int, V: int, ignored: float = 0.0, ignore_index: int = IGNORED, seed: int = 1) -> torch.Tensor:
    """N labels, of which about the fraction `ignored` (exactly none or all for 0 and 1) is ignore_index."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (N,), generator=generator)
    return torch.where(torch.rand(N, generator=generator) < ignored, ignore_index, labels)


def class_weights(V: int) -> torch.Tensor:
    return torch.rand(V, generator=torch.Generator().manual_seed(2)) + 0.5


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN here, so an element that a kernel leaves out is seen."""
    on, warning = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(on, warn_only=warning)


def at_thread_counts(function: Callable[[], Any], counts: tuple[int, ...] = (1, 2, 3, 7)) -> list[Any]:
    """What `function` returns with each number of threads, and once more with the last."""
    before = torch.get_num_threads()
    results = []
    try:
        for count in (*counts, counts[-1]):
            torch.set_num_threads(count)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    return results


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
