"""How the GPU's linear loss is cut into chunks and splits: pure functions."""

from __future__ import annotations

import itertools

import pytest
from loss_cases import BF16, FP32

from gpt4v_fast.kernels import configs
from gpt4v_fast.kernels.loss import plans

SIZES = (1, 100, 5000, 8192, 20_000, 300_000), (1, 1000, 50_257, 262_144), (1, 33, 576, 4096, 16_384)
WANTED = [(True, True, True), (True, False, True), (False, True, False), (False, False, True)]


@pytest.mark.parametrize("arch, dtype", [("sm_80", BF16), ("sm_90", BF16), ("sm_90", FP32), ("gfx942", FP32)])
def test_backward_needs_at_most_64_mib(arch, dtype):
    """G, its sums over tokens, and lower halves of sums, for any N, V and E."""
    for N, V, E in itertools.product(*SIZES):
        config = configs.linear_cross_entropy(arch, dtype, E, False)
        for wanted in WANTED:
            for sweep in plans.sweeps(N, V, E, dtype.itemsize, *wanted, config):
                scratch = sweep.tokens * sweep.classes * dtype.itemsize
                scratch += sweep.tokens // config.gradient.block_m * sweep.classes * 4
                scratch += sum(sweep.lower_halves) * E * 2
                assert scratch <= 64 << 20, (N, V, E, sweep)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_every_logit_is_in_one_chunk_of_a_sweep(dtype):
    for N, V, E in ((1, 1, 1), (8192, 50_257, 576), (20_000, 1000, 4096), (9000, 128_256, 4096)):
        config = configs.linear_cross_entropy("sm_90", dtype, E, False)
        for wanted in WANTED:
            sweeps = plans.sweeps(N, V, E, dtype.itemsize, *wanted, config)
            for i, name in enumerate(("of_hidden", "of_weight", "of_bias")):
                assert sum(getattr(sweep, name) for sweep in sweeps) == wanted[i]
            for sweep in sweeps:
                covered = sum(
                    min(sweep.tokens, N - token) * min(sweep.classes, V - first) for token, first in sweep.chunks
                )
                assert covered == N * V and len(set(sweep.chunks)) == len(sweep.chunks)


def test_a_sweep_serves_both_products_where_it_can():
    def sweeps(N: int, E: int, itemsize: int) -> int:
        config = configs.linear_cross_entropy("sm_90", BF16, E, False)
        return len(plans.sweeps(N, 128_256, E, itemsize, True, True, False, config))

    assert sweeps(4096, 4096, 2) == sweeps(8192, 2048, 2) == 1
    assert sweeps(4097, 4096, 2) == 2
    assert sweeps(100_000, 4096, 4) == 1  # fp32 gradients hold their own sums


@pytest.mark.parametrize("N, V", [(1, 1), (8192, 128_256), (100, 262_144), (1_000_000, 32_000)])
def test_vocabulary_splits_cover_the_vocabulary(N, V):
    tile = configs.linear_cross_entropy("sm_90", BF16, 4096, False).forward
    splits, tiles = plans.vocabulary_splits("sm_90", N, V, tile)
    assert (splits - 1) * tiles * tile.block_v < V <= splits * tiles * tile.block_v
    assert splits * N * 16 <= 16 * N + (8 << 20)
