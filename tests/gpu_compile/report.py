"""Prints what the compiler makes of the launch tables as the Markdown tables of docs/tuning.md.

    PYTHONPATH=tests python -m gpu_compile.report

One column per fact: registers of a thread, dynamic shared memory of a program, and of the unmasked and the masked main
loop the instructions that are not matrix instructions, times lanes, per element of the tile of scores.
"""

from __future__ import annotations

import torch
from gpu_compile.readback import Facts
from gpu_compile.stand_in import CHIPS
from gpu_compile.worker import AttentionLaunch, CrossEntropyLaunch, compiled

from gpt4v_fast.kernels import configs
from gpt4v_fast.kernels.configs import Tile

ARCHS = [arch for arch in CHIPS if arch != "sm_89"]  # which has sm_86's entries and instructions
HEAD_SIZES = (64, 128, 256)


def per_score(facts: Facts, tile: Tile, walks_over_keys: bool) -> tuple[float, float]:
    """(unmasked, masked) instructions per score. Matrix work tells the loops apart where their tiles differ."""
    lanes = CHIPS[facts.arch].target.warp_size
    masked_size = tile.block_m * tile.masked if walks_over_keys else tile.masked * tile.block_n
    if masked_size == tile.block_m * tile.block_n:
        unmasked, masked = facts.main_loops[0], facts.main_loops[-1]  # the mask costs instructions
    else:
        masked, unmasked = sorted(facts.main_loops, key=lambda loop: loop.count(r"MUFU\.EX2|v_exp_f32"))[:2]
    return (
        unmasked.non_matrix_per_element(tile.block_m * tile.block_n, facts.num_warps, lanes),
        masked.non_matrix_per_element(masked_size, facts.num_warps, lanes),
    )


def attention_rows(arch: str, head_dim: int) -> list[str]:
    """Table rows of the three attention kernels in bf16, causal."""
    facts = compiled(AttentionLaunch(arch, "bfloat16", head_dim)).result()
    config = configs.attention(arch, torch.bfloat16, head_dim)
    rows = []
    for kernel, tile in (
        ("forward", config.forward),
        ("backward_dq", config.backward_dq),
        ("backward_dkdv", config.backward_dkdv),
    ):
        found = facts[f"_attention_{kernel}_kernel"]
        unmasked, masked = per_score(found, tile, kernel != "backward_dkdv")
        shape = (
            f"{tile.block_m} x {tile.block_n}, {tile.num_warps} warps, {tile.num_stages} stages, masked {tile.masked}"
        )
        rows.append(
            f"| {arch} | {head_dim} | {kernel} | {shape} | {found.registers} | {found.spill_bytes} "
            f"| {found.shared_bytes / 1024:.0f} | {unmasked:.1f} | {masked:.1f} |"
        )
    return rows


def cross_entropy_row(arch: str) -> str:
    """Instructions per logit of the loops over a row, and how wide their accesses are."""
    block = configs.CROSS_ENTROPY[16].block
    lanes = CHIPS[arch].target.warp_size
    cells = []
    for facts in compiled(CrossEntropyLaunch(arch, "bfloat16", 50257)).result().values():
        loop = next(x for x in facts.loops if x.count(r"LDG\.\S*128|global_load_dwordx4|buffer_load_dwordx4"))
        cells.append(f"{facts.registers} | {len(loop.instructions) * facts.num_warps * lanes / block:.1f}")
    return f"| {arch} | {' | '.join(cells)} |"


def main() -> None:
    for arch in ARCHS:
        compiled(CrossEntropyLaunch(arch, "bfloat16", 50257))
        for head_dim in HEAD_SIZES:
            compiled(AttentionLaunch(arch, "bfloat16", head_dim))
    print("| chip | head | kernel | tile | registers | spilled bytes | shared KB | per score | masked |")
    print("|---|---|---|---|---|---|---|---|---|")
    for arch in ARCHS:
        for head_dim in HEAD_SIZES:
            print("\n".join(attention_rows(arch, head_dim)), flush=True)
    print()
    print("| chip | forward registers | per logit | backward registers | per logit |")
    print("|---|---|---|---|---|")
    for arch in ARCHS:
        print(cross_entropy_row(arch), flush=True)


if __name__ == "__main__":
    main()
