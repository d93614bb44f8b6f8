"""What the compiler makes of the launch tables, read back without a GPU: see stand_in.py, readback.py and worker.py."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

from gpu_compile.stand_in import CHIPS
from gpu_compile.worker import (
    AttentionLaunch,
    CrossEntropyLaunch,
    LinearCrossEntropyLaunch,
    compiled,
    kept_memory,
    linear_cross_entropy_memory,
    relaunched,
)

from gpt4v_fast.kernels import configs
from gpt4v_fast.kernels.loss import plans

MATRIX = {
    "sm_80": r"HMMA\.",
    "sm_86": r"HMMA\.",
    "sm_89": r"HMMA\.",
    "sm_90": r"HGMMA\.",
    "sm_100": r"UTC\w*MMA",
    "sm_120": r"HMMA\.",
    "gfx942": r"v_mfma_",
}
LOCAL_MEMORY = r"LDL|STL|scratch_"

CHIPS_QUICK = ("sm_80", "sm_90", "gfx942")
QUICK = [AttentionLaunch(arch, "bfloat16", 64) for arch in CHIPS_QUICK]
QUICK += [AttentionLaunch(arch, "bfloat16", 128, passes=("forward",)) for arch in CHIPS_QUICK]

# Every entry of the tables is compiled, for every chip that has one of its own (sm_89 has sm_86's instructions, memory
# and entries). An option is compiled on one chip of each instruction set; sizes that share an entry take turns.
_CHIPS = [arch for arch in CHIPS if arch != "sm_89"]
_INSTRUCTIONS = ("sm_80", "sm_90", "sm_100", "gfx942")
_HEAD_SIZES = sorted({head_dim for _, _, head_dim in configs.ATTENTION})
FULL = [AttentionLaunch(arch, dtype, D) for arch in _CHIPS for dtype in ("bfloat16", "float32") for D in _HEAD_SIZES]
FULL += [AttentionLaunch(arch, "bfloat16", 128, causal=False) for arch in CHIPS_QUICK]
FULL += [AttentionLaunch(arch, "float16", 128) for arch in CHIPS_QUICK]
FULL += [
    AttentionLaunch(arch, "float32", *heads, group=4)
    for arch, heads in zip(_CHIPS, [(136, 256), (192, 128)] * 3, strict=True)
]
FULL += [AttentionLaunch(arch, "bfloat16", D, group=4) for arch, D in zip(_CHIPS, (72, 80) * 3, strict=True)]
for arch in _INSTRUCTIONS:
    FULL += [
        AttentionLaunch(arch, "float32", 256, softcap=30.0, causal=False),
        AttentionLaunch(arch, "bfloat16", 64, softcap=30.0, causal=False),
        AttentionLaunch(arch, "bfloat16", 64, group=4),
        AttentionLaunch(arch, "bfloat16", 128, group=4),
        AttentionLaunch(arch, "bfloat16", 192, 128),
    ]
# Values narrower than keys, rows of whole 16 bytes and others.
NARROW = [
    AttentionLaunch("sm_90", "bfloat16", *heads, causal, passes=("forward",))
    for heads in ((35, 21), (21, 11), (35, 11), (71, 11), (71, 21), (40, 16), (80, 64), (96, 8), (128, 64))
    for causal in (True, False)
]

LOSSES = [CrossEntropyLaunch(arch, "bfloat16", 50257) for arch in CHIPS_QUICK]
ALL_LOSSES = [
    CrossEntropyLaunch(arch, dtype, V, weighted, smoothing, softcap)
    for arch in _CHIPS
    for dtype in ("bfloat16", "float32")
    for V, weighted, smoothing, softcap in (
        (50257, False, 0.0, None),
        (32000, True, 0.1, None),
        (1000, False, 0.0, 30.0),
    )
]

LINEAR_QUICK = [LinearCrossEntropyLaunch("sm_90", "bfloat16", chunked=True)]
LINEAR_QUICK += [LinearCrossEntropyLaunch(arch, "bfloat16", passes=("forward",)) for arch in ("sm_80", "gfx942")]
# sm_90 alone has entries for depths of whole 256 features and for few tokens.
LINEAR_KEPT = [
    LinearCrossEntropyLaunch(arch, "bfloat16", E, kept=True, **options)
    for chips, E, options in (
        (_CHIPS, 576, {}),
        (_INSTRUCTIONS, 576, {"weighted": True, "label_smoothing": 0.1}),
        (_INSTRUCTIONS, 2304, {"ragged": True}),
        (["sm_90"], 2304, {}),
        (["sm_90"], 576, {"few": True}),
        (["sm_90"], 2304, {"few": True}),
    )
    for arch in chips
]
_EVERY_OPTION = {"bias": True, "weighted": True, "label_smoothing": 0.1, "softcap": 30.0, "chunked": True}
LINEAR_ALL = [
    LinearCrossEntropyLaunch(arch, dtype, E, **options)
    for chips, dtype, E, options in (
        (_CHIPS, "bfloat16", 576, {}),
        (["sm_90"], "bfloat16", 2304, {"chunked": True}),
        (_CHIPS, "bfloat16", 2304, _EVERY_OPTION),
        (_CHIPS, "bfloat16", 577, _EVERY_OPTION),
        (_CHIPS[::2], "bfloat16", 720, {"softcap": 30.0}),
        (_CHIPS[1::2], "bfloat16", 580, {"bias": True}),
        (CHIPS_QUICK, "float16", 576, {"bias": True, "chunked": True, "few": True}),
        (_INSTRUCTIONS, "float16", 2304, {"chunked": True, "ragged": True}),
        (_CHIPS, "float32", 576, {"chunked": True}),
        (CHIPS_QUICK, "float32", 576, _EVERY_OPTION),
        (_CHIPS, "float32", 577, _EVERY_OPTION),
    )
    for arch in chips
]


@pytest.fixture(scope="module", autouse=True)
def _start_compiling(request):
    """All launches of the selected tests at once, so that the workers are busy while tests look at results."""
    for item in request.session.items:
        launch = getattr(item, "callspec", None) and item.callspec.params.get("launch")
        if launch is not None:
            compiled(launch)


def _with_slow(quick, full):
    slow = [x for x in dict.fromkeys(full) if x not in quick]
    return [*quick, *(pytest.param(x, marks=pytest.mark.slow) for x in slow)]


def _facts(launch):
    return compiled(launch).result(timeout=280)


@pytest.mark.parametrize("launch", _with_slow(QUICK, FULL), ids=str)
def test_attention(launch):
    kernels = _facts(launch)
    chip = CHIPS[launch.arch]
    widest = max(launch.D, launch.Dv or 0)
    chunk = configs.attention(launch.arch, getattr(torch, launch.dtype), widest).backward_dkdv.chunk
    backward = 2 if widest <= chunk else 3  # dk and dv are two launches where heads are taken in chunks
    assert len(kernels) == sum({"forward": 1, "backward": backward}[p] for p in launch.passes)
    for name, facts in kernels.items():
        about = f"{name} for {launch}: {facts.registers} registers, {facts.num_warps} warps"
        assert facts.spill_bytes == 0, f"{about}: {facts.spill_bytes} bytes of stack a thread"
        assert not facts.unset_reads, f"{about}: reads what nothing has set: {facts.unset_reads[0]}"
        assert facts.shared_bytes <= chip.shared_bytes, f"{about}: {facts.shared_bytes} bytes of shared memory"
        assert facts.registers <= chip.registers, about
        # Chunked kernels mask every block; their loop over chunks may be unrolled.
        least = 2 if widest <= chunk else 1
        assert len(facts.main_loops) >= least, f"{about}: expected {least} loops or more with matrix instructions"
        for loop in facts.main_loops:
            assert loop.count(LOCAL_MEMORY) == 0, about
            assert loop.count(matrix_instruction(launch, name)) == loop.matrix, f"{about}: other matrix instructions"


def matrix_instruction(launch, kernel: str) -> str:
    """The matrix instruction that a kernel must use, and no other."""
    if launch.dtype == "float32" and launch.arch != "gfx942":
        return r"HMMA|HGMMA|UTC\w*MMA"  # tf32, by whichever unit takes its tiles
    if (
        isinstance(launch, AttentionLaunch)
        and launch.D > 128
        and "dkdv" in kernel
        and launch.arch in ("sm_90", "sm_100")
    ):
        return r"HMMA\."  # see the table in configs.py: two accumulators of 64 rows by 256 do not fit a warp group
    return MATRIX[launch.arch]


@pytest.mark.parametrize("launch", [x for x in QUICK if x.arch != "gfx942"], ids=str)
def test_keys_and_values_come_by_128_bit_asynchronous_copies(launch):
    facts = _facts(launch)["_attention_forward_kernel"]
    for loop in facts.main_loops:
        copies = [n for n in loop.instructions if n.startswith(("LDGSTS", "UTMALDG"))]
        assert copies and all(".128" in n or n.startswith("UTMALDG") for n in copies)
        assert loop.count("LDG\\.") == 0, "keys or values pass through registers"


@pytest.mark.parametrize("launch", [x for x in QUICK if "backward" in x.passes], ids=str)
def test_every_element_is_exponentiated_once(launch):
    """No work is done twice because warps share a tile: at most 1.07 exponentials per score of the unmasked loop."""
    tiles = configs.attention(launch.arch, torch.bfloat16, launch.D)
    lanes = 64 if launch.arch == "gfx942" else 32
    for name, tile in (
        ("_attention_forward_kernel", tiles.forward),
        ("_attention_backward_dq_kernel", tiles.backward_dq),
        ("_attention_backward_dkdv_kernel", tiles.backward_dkdv),
    ):
        facts = _facts(launch)[name]
        per_element = max(
            loop.count(r"MUFU\.EX2|v_exp_f32") * facts.num_warps * lanes / (tile.block_m * tile.block_n)
            for loop in facts.main_loops
        )
        assert 0.99 <= per_element <= 1.07, f"{name}: {per_element:.2f} exponentials per score"


@pytest.mark.parametrize("launch", _with_slow(LOSSES, ALL_LOSSES), ids=str)
def test_cross_entropy(launch):
    """No spills, and every access to logits inside a row is 128 bits wide, for an odd vocabulary too."""
    kernels = _facts(launch)
    assert list(kernels) == ["_cross_entropy_forward_kernel", "_cross_entropy_backward_kernel"]
    for name, facts in kernels.items():
        about = f"{name} for {launch}: {facts.registers} registers"
        assert facts.spill_bytes == 0, f"{about}: {facts.spill_bytes} bytes of stack a thread"
        assert not facts.unset_reads, f"{about}: reads what nothing has set: {facts.unset_reads[0]}"
        assert facts.shared_bytes <= CHIPS[launch.arch].shared_bytes, about
        wide = r"LDG\.\S*128|global_load_dwordx4|buffer_load_dwordx4"
        streaming = [loop for loop in facts.loops if loop.count(wide)]
        assert streaming, f"{about}: no loop over the row with 128-bit loads"
        if not launch.weighted:  # weights stand at another alignment
            for loop in streaming:
                loads = [n for n in loop.instructions if re.match(r"LDG|global_load|buffer_load", n)]
                stores = [n for n in loop.instructions if re.match(r"STG|global_store|buffer_store", n)]
                narrow = [n for n in loads + stores if not re.search(r"\.128|dwordx4", n)]
                assert not narrow, f"{about}: narrow accesses in the loop over a row: {narrow}"


LINEAR_KERNELS = {
    "forward": ("_rows", "_forward", "_merge"),
    "backward": ("_gradient", "_grad_hidden", "_grad_weight", "_grad_bias"),
}
KEPT_KERNELS = ("_kept_gradient", "_kept_copy", "_kept_grad_hidden")
_WITHOUT_PRODUCT = ("_rows", "_merge", "_grad_bias", "_kept_gradient", "_kept_copy")
# On memory that other programs see. Inside a program sm_100 allocates its tensor memory with some on shared memory.
ATOMICS = r"ATOMG|ATOM\.|RED\.|CCTL|(global|buffer|flat)_atomic"
STORES = r"STG|ST\.|global_store|buffer_store|flat_store"
EXPONENTIALS = r"MUFU\.EX2|v_exp_f32"


@pytest.mark.parametrize("launch", _with_slow([*LINEAR_QUICK, LINEAR_KEPT[0]], [*LINEAR_ALL, *LINEAR_KEPT]), ids=str)
def test_linear_cross_entropy(launch):
    """No spills, matrix instructions in every product, and no atomic anywhere, so that nobody spins on a lock."""
    kernels = _facts(launch)
    wanted = [name for part in launch.passes for name in LINEAR_KERNELS[part]]
    wanted += KEPT_KERNELS if launch.kept else []
    wanted = [f"_linear_cross_entropy{name}_kernel" for name in wanted if launch.bias or name != "_grad_bias"]
    assert {name.removesuffix(" again") for name in kernels} == set(wanted)  # again: a chunk that is ragged
    for name, facts in kernels.items():
        about = f"{name} for {launch}: {facts.registers} registers, {facts.num_warps} warps"
        assert facts.spill_bytes == 0, f"{about}: {facts.spill_bytes} bytes of stack a thread"
        assert not facts.unset_reads, f"{about}: reads what nothing has set: {facts.unset_reads[0]}"
        assert facts.count(LOCAL_MEMORY) == 0, about
        assert facts.shared_bytes <= CHIPS[launch.arch].shared_bytes, f"{about}: {facts.shared_bytes} bytes shared"
        assert facts.count(ATOMICS) == 0, f"{about}: atomics"
        if not name.startswith(tuple(f"_linear_cross_entropy{x}_kernel" for x in _WITHOUT_PRODUCT)):
            assert facts.main_loops, f"{about}: no loop with matrix instructions"
            for loop in facts.main_loops:
                assert loop.count(matrix_instruction(launch, name)) == loop.matrix, (
                    f"{about}: other matrix instructions"
                )


@pytest.mark.parametrize("launch", _with_slow(LINEAR_QUICK, LINEAR_ALL), ids=str)
def test_logits_are_never_stored(launch):
    """Forward has one store for each of a token's four or five statistics, and none of them in a loop."""
    facts = _facts(launch)["_linear_cross_entropy_forward_kernel"]
    looping = [loop for loop in facts.loops if loop.matrix or loop.count(EXPONENTIALS)]
    assert sum(loop.count(EXPONENTIALS) for loop in looping) > 0
    assert all(loop.count(STORES) == 0 for loop in looping)
    assert facts.count(STORES) == (5 if launch.label_smoothing else 4)


@pytest.mark.parametrize(
    "arch, N, V, E, bias",
    [("sm_90", 8192, 128_256, 4096, False), pytest.param("sm_80", 65_536, 32_000, 576, True, marks=pytest.mark.slow)],
)
def test_linear_cross_entropy_needs_no_memory_and_no_wait(arch, N, V, E, bias):
    """The launchers at full size, on tensors nobody touches: 64 MiB beside gradients and 64 bytes a token."""
    forward, backward = linear_cross_entropy_memory(arch, N, V, E, bias).result(timeout=280)
    gradients = 2 * E * (N + V) + (4 * V if bias else 0)
    assert forward <= (16 << 20) + 64 * N
    assert gradients < backward <= gradients + (64 << 20) + 64 * N


@pytest.mark.parametrize("arch, N, V, E", [("sm_90", 8192, 128_256, 4096), ("sm_90", 4096, 50_257, 4096)])
def test_kept_logits_need_no_memory_and_no_wait(arch, N, V, E):
    """Forward and backward together; what is kept between them is the memory of a gradient."""
    peak = kept_memory(arch, N, V, E).result(timeout=280)
    gradients = 2 * E * (N + V)
    assert gradients < peak <= gradients + (64 << 20) + 64 * N


def test_launches_that_skip_triton_tell_the_driver_the_same():
    """Relaunch hands the compiled kernel exactly the arguments that Triton's own launch hands it, in the same order."""
    direct, usual = relaunched("sm_90").result(timeout=280)
    assert len(direct) == len(usual) > 20
    for one, other in zip(direct, usual, strict=True):
        assert one == other


def test_a_kernel_for_another_chip_is_noticed():
    """The stand-in must not pass off what was compiled for one target as compiled for the next."""
    facts = {arch: _facts(AttentionLaunch(arch, "bfloat16", 64))["_attention_forward_kernel"] for arch in CHIPS_QUICK}
    assert {f.arch for f in facts.values()} == set(CHIPS_QUICK)
    assert facts["sm_80"].count("HGMMA") == 0 and facts["sm_90"].count("HGMMA") > 0


@pytest.mark.parametrize("arch", ["sm_75", *CHIPS, "sm_103", "sm_121", "gfx90a", "gfx950", "gfx1100", "interpreter"])
def test_every_device_has_an_entry(arch):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in (1, 16, 33, 64, 80, 128, 129, 256):
            config = configs.attention(arch, dtype, head_dim)
            assert config == configs.attention(arch, dtype, head_dim)
            assert config.forward.block_n % config.forward.masked == 0
            assert config.backward_dq.block_n % config.backward_dq.masked == 0
            assert config.backward_dkdv.block_m % config.backward_dkdv.masked == 0
        for E, rich in ((64, False), (64, True), (33, False), (72, True)):
            config = configs.linear_cross_entropy(arch, dtype, E, rich)
            assert config.gradient.block_m % config.grad_weight.block_m == 0
            (sweep,) = plans.sweeps(5, 7, E, dtype.itemsize, True, True, True, config)
            few = config.of_hidden(5, E)
            assert config.grad_hidden.block_m % few.block_m == 0 and config.grad_hidden.block_v % few.block_v == 0
            for tile in (config.gradient, config.grad_hidden, config.grad_weight, few):
                assert sweep.tokens % tile.block_m == 0 and sweep.classes % tile.block_v == 0
        for vocabulary in (1, 1000, 50257):
            config = configs.cross_entropy(arch, dtype, vocabulary)
            assert config.num_warps >= 1 and config.block & (config.block - 1) == 0


@pytest.mark.parametrize("table", ["ATTENTION", "LINEAR_LOGITS", "LINEAR_PRODUCTS"])
def test_every_entry_of_the_tables_is_compiled(table, monkeypatch):
    """By the launches above: look-ups of all of them leave no entry out."""
    seen = set()

    class Recorder(dict):
        def get(self, key, default=None):
            seen.update({key} & self.keys())
            return super().get(key, default)

        def __getitem__(self, key):
            seen.add(key)
            return super().__getitem__(key)

    entries = getattr(configs, table)
    monkeypatch.setattr(configs, table, Recorder(entries))
    for launch in (*QUICK, *FULL):
        configs.attention(launch.arch, getattr(torch, launch.dtype), max(launch.D, launch.Dv or 0))
    for launch in (*LINEAR_QUICK, *LINEAR_ALL, *LINEAR_KEPT):
        rich = bool(launch.bias or launch.weighted or launch.label_smoothing or launch.softcap)
        configs.linear_cross_entropy(launch.arch, getattr(torch, launch.dtype), launch.E, rich)
    assert seen == set(entries)


@pytest.mark.parametrize("launch", _with_slow(NARROW[:1], NARROW), ids=str)
def test_nothing_unset_is_read_for_narrow_values(launch):
    """ptxas 12.8 (Triton 3.6) read registers there that it had not set, until their blocks became as wide as keys'."""
    for name, facts in _facts(launch).items():
        assert not facts.unset_reads, f"{name} for {launch}: {facts.unset_reads[0]}"


_SASS = """
        /*0000*/                   ULDC.64 UR4, c[0x0][0x208] ;
        /*0010*/                   UIADD3 UR14, UP0, UR14, 0x20, URZ ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
        /*0030*/                   ULOP3.LUT UP1, UR8, UR4, 0x1, URZ, 0xc0, !UPT ;
        /*0038*/                   UISETP.NE.AND UP0, UPT, UR8, URZ, UPT ;
        /*0040*/                   UMOV UR10, UR5 ;
        /*0050*/                   UMOV UR11, 0x40000040 ;
.L_x_0:
        /*0060*/                   HGMMA.64x32x16.F32.BF16 R88, R24, gdesc[UR8].tnspB, R88 ;
        /*0070*/                   UIADD3 UR6, UP0, UR8, 0x20, URZ ;
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0090*/               @P1 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
"""


def test_reads_of_what_nothing_has_set_are_found():
    """UR8 is set on one way to its use, half of a descriptor's operands are registers, UR14 is never set."""
    from gpu_compile import readback

    found = readback._unset_reads(readback._blocks(_SASS, readback._sass_line))
    assert [line[2:6] for line in found] == ["0010", "0080"]
    whole = _SASS.replace("ULOP3.LUT UP1, UR8, UR4, 0x1, URZ, 0xc0, !UPT", "ULDC.64 UR8, c[0x0][0x210]").replace(
        "UR14, 0x20", "UR5, 0x20"
    )
    assert readback._unset_reads(readback._blocks(whole, readback._sass_line)) == ()
