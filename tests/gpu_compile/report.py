"""Prints what the compiler makes of the launch tables as the Markdown tables of docs/notes/2026-11-gpu-machine-code.md.

    PYTHONPATH=tests python -m gpu_compile.report

One column per fact: registers of a thread, dynamic shared memory of a program, and of the unmasked and the masked main
loop the instructions that are not matrix instructions, times lanes, per element of the tile of scores.
"""

from __future__ import annotations

import torch
from gpu_compile.readback import Facts
from gpu_compile.stand_in import CHIPS
from gpu_compile.worker import AttentionLaunch, CrossEntropyLaunch, LinearCrossEntropyLaunch, compiled

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


def linear_cross_entropy_rows(arch: str) -> list[str]:
    """Of each kernel, per element of its tile: instructions of a tile besides its product, and those of 64 steps along
    the product that are not matrix instructions."""
    facts = compiled(LinearCrossEntropyLaunch(arch, "bfloat16", 2304, chunked=True)).result()
    config, lanes = configs.linear_cross_entropy(arch, torch.bfloat16, 2304, False), CHIPS[arch].target.warp_size
    rows = []
    for name in ("forward", "gradient", "grad_hidden", "grad_weight"):
        tile, found = getattr(config, name), facts[f"_linear_cross_entropy_{name}_kernel"]
        sizes = (tile.block_m, tile.block_v, tile.block_e)
        along = {"grad_hidden": 1, "grad_weight": 0}.get(name, 2)  # which of them the product's loop takes at a time
        elements = sizes[0] * sizes[1] * sizes[2] // sizes[along]
        product = found.main_loops[0]
        if name == "forward":
            (loop,) = [x for x in found.loops if x.count(r"MUFU\.EX2|v_exp_f32") and x is not product]
            per_tile = len(loop.instructions) - loop.matrix
        else:
            per_tile = len(found.instructions) - sum(len(loop.instructions) for loop in found.main_loops)
        per_step = product.non_matrix_per_element(elements, found.num_warps, lanes) * 64 / sizes[along]
        shape = f"{' x '.join(map(str, sizes))}, {tile.num_warps} warps, {tile.num_stages} stages"
        per_tile *= found.num_warps * lanes / elements
        rows.append(
            f"| {arch} | {name} | {shape} | {found.registers} | {found.spill_bytes} "
            f"| {found.shared_bytes / 1024:.0f} | {per_tile:.1f} | {per_step:.1f} |"
        )
    return rows


def main() -> None:
    for arch in ARCHS:
        compiled(CrossEntropyLaunch(arch, "bfloat16", 50257))
        compiled(LinearCrossEntropyLaunch(arch, "bfloat16", 2304, chunked=True))
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
    print()
    print("| chip | kernel | tokens x classes x depth | registers | spilled bytes | shared KB | per tile | per 64 |")
    print("|---|---|---|---|---|---|---|---|")
    for arch in ARCHS:
        print("\n".join(linear_cross_entropy_rows(arch)), flush=True)


if __name__ == "__main__":
    main()
