"""The benchmarks themselves: what is registered, how samples are taken and dropped, what is refused.

No test looks at how long a kernel takes: clocks and probes are stand-ins, or only the form of the record is checked.
"""

import gc
import math
import sys
from pathlib import Path

import pytest
import torch

import gpt4v_fast as gf
from gpt4v_fast import backends
from gpt4v_fast._native import _C, view
from gpt4v_fast.benchmarks import attention, check, curves, loss, peaks, record, registry, runner, timing
from gpt4v_fast.benchmarks.registry import Expected, Unavailable

ALL = [*registry.cases(), *registry.cases(part="quick")]


class TestRegistry:
    def test_ids_are_unique_and_every_op_has_quick_and_full_cases(self):
        assert len({case.id for case in ALL}) == len(ALL)
        for op in registry.MODULES:
            assert {case.part for case in ALL if case.op == op} >= {"quick", "default"}

    @pytest.mark.parametrize("case", ALL, ids=str)
    def test_a_case_is_complete(self, case):
        assert case.flops > 0 and case.bytes > 0 and case.work > 0
        assert case.bound in peaks.UNITS
        assert case.direction in registry.DIRECTIONS
        if case.bound != "read":
            assert case.bound == ("dot_bf16" if case.dtype == torch.bfloat16 else "fma")
        names = [contender.name for contender in case.contenders]
        assert len(set(names)) == len(names)
        assert [contender.ours for contender in case.contenders].count(True) == 1
        assert len(names) >= 2

    @pytest.mark.parametrize(
        ("op", "name", "direction", "flops"),
        [
            ("attention", "b1_h16_s1024_d64", "forward", 4 * 1024 * 1024 * 64 * 16),
            ("attention", "b1_h16_s1024_d64", "backward", 10 * 1024 * 1024 * 64 * 16),
            ("attention", "b1_h8_s4096_d64_causal", "forward", 4 * (4096 * 4097 // 2) * 64 * 8),
            ("attention", "gqa_h32_kv8_s1024_d128_causal", "forward", 4 * (1024 * 1025 // 2) * 128 * 32),
            ("linear_cross_entropy", "n512_v49152_e576", "forward+backward", 6 * 512 * 49152 * 576),
            ("linear_cross_entropy", "n512_v49152_e576_ignored90", "forward+backward", 6 * 52 * 49152 * 576),
            ("patch_embed", "b8_336px_p14_e1024", "forward", 2 * 8 * 24 * 24 * (3 * 14 * 14) * 1024),
        ],
    )
    def test_flops_follow_the_formulas(self, op, name, direction, flops):
        case = next(c for c in ALL if (c.op, c.name, c.direction) == (op, name, direction))
        assert case.flops == flops

    def test_bytes_of_given_logits(self):
        case = next(c for c in ALL if c.id == "cross_entropy/n1024_v49152/bf16/forward+backward")
        assert case.bytes == 3 * 1024 * 49152 * 2  # read forward; read and written backward

    def test_filters(self):
        found = registry.cases(ops=["attention"], dtypes=["bf16"], directions=["forward"], names=["s577"])
        assert [case.id for case in found] == ["attention/b4_h16_s577_d64/bf16/forward"]

    def test_a_whole_name_leaves_out_the_names_that_begin_with_it(self):
        named = {
            name: {c.name for c in registry.cases(part="all", names=[name])}
            for name in ("n1024_v49152", "n1024_v49152_e576", "n1024_v49152_")
        }
        assert named["n1024_v49152"] == {"n1024_v49152"}
        assert named["n1024_v49152_e576"] == {"n1024_v49152_e576"}
        assert len(named["n1024_v49152_"]) == 9  # three depths, three shares of ignored labels

    @pytest.mark.parametrize(
        ("filters", "message"),
        [
            ({"ops": ["softmax"]}, "op: expected one of attention, .* got 'softmax'"),
            ({"dtypes": ["fp8"]}, "dtype: expected one of fp32, bf16, fp16, got 'fp8'"),
            ({"directions": ["sideways"]}, "direction: expected one of forward, .* got 'sideways'"),
            ({"names": ["nothing"]}, "case: expected a part of a name that --list shows, got 'nothing'"),
        ],
    )
    def test_unknown_filters_are_refused(self, filters, message):
        with pytest.raises(ValueError, match=message):
            registry.cases(**filters)

    @pytest.mark.parametrize("T", [None, 70])
    @pytest.mark.parametrize(
        ("mask", "more"),
        [
            ("none", {}),
            ("causal", {}),
            ("window", {"window": 40}),
            ("window", {"window": 1}),
            ("documents", {}),
            ("documents", {"documents": 7}),
            ("images", {}),
        ],
    )
    def test_pairs_and_blocks_are_those_of_the_dense_mask(self, mask, more, T):
        if T is not None and mask != "none":
            T = None
        shape = attention.Shape("", 2, 1, 131, 8, T=T, mask=mask, **more)
        dense = shape.gf_mask.dense(shape.S, shape.keys).expand(2, 1, -1, -1)
        assert shape.visible == int(dense.sum())
        padded = torch.nn.functional.pad(dense[0, 0], (0, -shape.keys % 16, 0, -shape.S % 12))
        blocks = padded.view(padded.shape[0] // 12, 12, padded.shape[1] // 16, 16).any(3).any(1)
        assert shape.blocks(12, 16) == int(blocks.sum())

    def test_curves_have_a_point_at_which_the_mask_hides_nothing(self):
        points = [case.point for case in registry.cases(part="curves")]
        assert all(point is not None for point in points)
        masked = {point.curve for point in points if point.proportional}
        assert len(masked) == 2
        for curve in masked:
            assert max(point.x for point in points if point.curve == curve) == pytest.approx(1.0)
        assert {point.x for point in points if not point.proportional} == set(curves.LENGTHS)

    def test_the_blocks_of_curves_are_the_kernels(self):
        header = (Path(__file__).parents[2] / "csrc/attention/block.h").read_text()
        assert f"constexpr int kQueries = {curves.QUERIES};" in header
        assert f"constexpr int kKeys = {curves.KEYS};" in header

    def test_the_first_tokens_of_a_long_curve_are_its_check(self):
        (case,) = registry.cases(part="curves", names=["curve_documents64"], dtypes=["fp32"], directions=["forward"])
        small = case.check_inputs(case.make_inputs())
        assert small["q"].shape == (1, 2, curves.CHECK_TOKENS, 64) and small["shape"].S == curves.CHECK_TOKENS
        errors = {c.name: error for c, error, _ in runner.checked(case, case.make_inputs(), case.contenders_on("cpu"))}
        assert set(errors) == {"gpt4v_fast", "SDPA"} and all(error <= 1 for error in errors.values())

    def test_inputs_are_the_same_at_every_call(self):
        for case in registry.cases(part="quick"):
            first, second = case.make_inputs(), case.make_inputs()
            assert all(torch.equal(v, second[k]) for k, v in first.items() if isinstance(v, torch.Tensor))

    def test_the_grid_has_every_size_of_the_loss_once(self):
        grid = [case for case in registry.cases(ops=["linear_cross_entropy"], part="all") if "ignored" not in case.name]
        sizes = {tuple(case.shape[name] for name in "NVE") for case in grid}
        assert {(N, V, E) for N in (256, 8192) for V in (32000, 49152, 128256, 262144) for E in (576, 4096)} <= sizes
        assert len({case.id for case in grid}) == len(grid)
        assert {case.id for case in registry.cases(ops=["linear_cross_entropy"])} < {
            case.id for case in registry.cases(ops=["linear_cross_entropy"], part="all")
        }

    @pytest.mark.parametrize("case", registry.cases(part="quick"), ids=str)
    def test_a_case_is_found_by_its_id(self, case):
        assert registry.find(case.id).id == case.id

    def test_a_contender_that_is_not_installed_says_how_to_get_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cut_cross_entropy.torch_compile", None)
        (case,) = registry.cases(names=["quick_linear"], dtypes=["fp32"], directions=["forward"], part="quick")
        (absent,) = [
            contender for contender in case.contenders_on("cpu") if contender.name.startswith("cut-cross-entropy")
        ]
        with pytest.raises(Unavailable, match=r'not installed \(pip install "gpt4v_fast\[bench-peers\]"\)'):
            absent.make(case, case.make_inputs())

    def test_very_large_weights_are_checked_on_their_first_classes(self, monkeypatch):
        monkeypatch.setattr(loss, "CHECK_WEIGHT", 80)
        small = loss.first_tokens(loss.make_inputs(loss.Shape("small", 200, 50, 8), torch.float32))
        assert small["weight"].shape == (10, 8) and int(small["target"].max()) < 10

    def test_large_losses_are_checked_on_their_first_counted_tokens(self):
        shape = loss.Shape("small", 200, 50, 8, ignored=0.5)
        small = loss.first_tokens(loss.make_inputs(shape, torch.float32))
        assert small["hidden"].shape == (loss.CHECK_TOKENS, 8)
        assert (small["target"] != loss.IGNORE).all()


class Machine:
    """A clock that only runs when something runs, and a probe that reads from a script."""

    def __init__(self, seconds, probes=()):
        self.now, self.order, self.seconds, self.probes = 0.0, [], dict(seconds), iter(probes)

    def run(self, name):
        def call():
            self.order.append(name)
            self.now += self.seconds[name]

        return call

    def measure(self, **settings):
        defaults = {"rounds": 3, "max_rounds": 3, "min_sample_s": 0.0}
        runs = {name: self.run(name) for name in self.seconds}
        return timing.measure(
            runs,
            lambda: next(self.probes, 100.0),
            timing.Settings(**{**defaults, **settings}),
            clock=lambda: self.now,
        )


class TestTiming:
    def test_every_round_runs_each_contender_once_after_different_others(self):
        machine = Machine(dict.fromkeys("abcdefg", 1.0))
        machine.measure(rounds=7, max_rounds=7)
        calibration, order = machine.order[:7], machine.order[7:]
        assert calibration == list("abcdefg")
        assert all(sorted(order[i : i + 7]) == calibration for i in range(0, 49, 7))
        before = {name: {order[i - 1] for i in range(1, 49) if order[i] == name} for name in calibration}
        assert min(len(others) for others in before.values()) >= 3

    def test_times_are_per_call_and_statistics_are_quantiles(self):
        measured = Machine({"a": 0.25}).measure()
        assert measured.timings["a"].samples_s == (0.25, 0.25, 0.25)
        taken = timing.Timing((5.0, 1.0, 2.0, 3.0, 4.0, 6.0), dropped=0, calls_per_sample=1)
        assert taken.median_s == 3.5
        assert taken.quantile_s(0.2) == 2.0 and taken.quantile_s(0.8) == 5.0
        assert timing.Timing((), 4, 1).median_s is None

    def test_the_cores_are_looked_at_once_for_each_sample_that_counts(self):
        apart = iter([25.0, 200.0, 26.0])
        measured = timing.measure(
            {"a": lambda: None}, lambda: 100.0, timing.Settings(rounds=3, max_rounds=3), handoff_ns=lambda: next(apart)
        )
        assert measured.handoffs_ns == (25.0, 200.0, 26.0)
        assert record._spread(measured.handoffs_ns) == {"median": 26.0, "least": 25.0, "most": 200.0}
        assert record._spread((0.0, 0.0)) is None

    def test_short_calls_are_repeated(self):
        machine = Machine({"a": 0.001})
        measured = machine.measure(min_sample_s=0.02)
        assert measured.timings["a"].calls_per_sample >= 20
        assert measured.timings["a"].median_s == pytest.approx(0.001)

    def test_a_sample_between_disagreeing_probes_is_dropped_and_made_up_for(self):
        # Probes: before, after a, after b, ...: the second sample (b's first) sees the machine halve its speed.
        machine = Machine({"a": 1.0, "b": 1.0}, probes=[100, 95, 50, 50, 50, 50])
        seen = []
        runs = {name: machine.run(name) for name in "ab"}
        measured = timing.measure(
            runs,
            lambda: next(machine.probes, 50),
            timing.Settings(rounds=2, max_rounds=6, min_sample_s=0.0),
            clock=lambda: machine.now,
            on_sample=lambda name, counted: seen.append((name, counted)),
        )
        assert seen[:2] == [("a", True), ("b", False)]
        assert measured.timings["b"].dropped == 1
        assert len(measured.timings["b"].samples_s) == 2
        assert len(seen) == 6  # one more round, for both
        assert measured.peak == 50

    def test_retries_are_bounded_and_what_never_counts_has_no_time(self):
        probes = [100, 50] * 50
        measured = Machine({"a": 1.0}, probes).measure(rounds=2, max_rounds=5)
        assert measured.timings["a"] == timing.Timing((), dropped=5, calls_per_sample=1)
        assert measured.peak is None

    @pytest.mark.parametrize(("before", "after", "same"), [(100, 90, True), (90, 100, True), (100, 89, False)])
    def test_agreement_is_within_a_tenth(self, before, after, same):
        assert timing.agree(before, after, 0.10) is same

    def test_the_garbage_collector_is_as_before(self):
        assert gc.isenabled()
        states = []
        timing.measure({"a": lambda: states.append(gc.isenabled())}, lambda: 1.0, timing.Settings(2, 2, 0.1, 0.0))
        assert states[1:] == [False, False] and gc.isenabled()


def truncated(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest number of `bits` significant bits."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2.0**bits).round() * 2.0**-bits, exponent).to(x.dtype)


class TestCheck:
    exact = torch.tensor([[1.0, 2.0], [0.01, -0.02]], dtype=torch.float64)
    expected = (Expected("out", (), exact, exact.abs()),)

    @pytest.mark.parametrize(
        ("change", "wrong"),
        [
            (lambda x: x, False),
            (lambda x: x * (1 + 3e-7), False),
            (lambda x: x * (1 + 6e-7), True),
            (lambda x: x + torch.tensor([[0, 0], [0, 1e-3]]), True),
            (lambda x: torch.where(x > 1, torch.nan, x), True),
            (lambda x: x[:1], True),
        ],
    )
    def test_a_wrong_result_is_refused(self, change, wrong):
        outputs = {"out": change(self.exact.float())}
        if not wrong:
            assert check.check(outputs, self.expected, torch.float32) <= 1
            return
        with pytest.raises(check.WrongResult, match=r"its result is wrong: its error is \S+ times what rounding"):
            check.check(outputs, self.expected, torch.float32)

    def test_a_row_that_cancels_is_judged_by_its_terms(self):
        """1 - 1, each rounded to bf16: zero exactly, and 0.01 is no error there; without such terms it is."""
        zero, got = torch.zeros(1, 1, dtype=torch.float64), {"out": torch.full((1, 1), 0.01, dtype=torch.bfloat16)}
        for scale, accepted in ((1.0, True), (0.0, False), (math.nan, False)):
            part = Expected("out", (), zero, torch.full_like(zero, scale))
            assert (check.largest_error(got, [part], torch.bfloat16) <= 1) is accepted

    def test_a_missing_output_is_wrong(self):
        assert check.largest_error({}, self.expected, torch.float32) == math.inf

    @pytest.mark.parametrize("case", registry.cases(part="quick"), ids=str)
    def test_every_contender_passes_and_wrong_ones_do_not(self, case):
        """Wrong in one output each: half of it; rows in each other's place; of 8, 11, 24 bits only 2, 6, 11."""
        inputs = case.make_inputs()
        for contender, error, reason in runner.checked(case, inputs, case.contenders_on("cpu")):
            assert (error is not None and error <= 1) or (
                reason[0] in ("unavailable", "not installed") and not contender.ours
            ), contender
        expected, right = case.expected(inputs), case.contenders[0].make(case, inputs)()
        bits = {torch.float32: 11, torch.bfloat16: 2, torch.float16: 6}[case.dtype]
        for name in {part.name for part in expected}:
            wrong = [right[name] / 2, truncated(right[name], bits)]
            wrong += [right[name].roll(1, -2)] if right[name].dim() > 1 and right[name].shape[-2] > 1 else []
            for x in wrong:
                assert check.largest_error({**right, name: x}, expected, case.dtype) > 1

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_a_query_that_sees_one_key_may_have_the_gradient_of_its_roundings(self, dtype):
        """Exactly 0: dS = P (dP - delta) of equals. Its terms are what dP and delta are made of."""
        (case,) = registry.cases(part="quick", names=["quick_causal"], dtypes=[dtype], directions=["backward"])
        part = next(part for part in case.expected(case.make_inputs()) if part.name == "grad q")
        assert (part.exact[..., 0, :] == 0).all() and (part.scale[..., 0, :] > 0.01).all()
        assert (part.scale > 0).all() and (part.scale.amax(-1) < 50 * part.exact.abs().max()).all()

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    @pytest.mark.parametrize("mask", [{}, {"window": (None, 1)}, {"causal": True, "window": (40, None)}], ids=str)
    def test_a_wrong_mask_is_refused(self, mask, dtype):
        (case,) = registry.cases(part="quick", names=["quick_causal"], dtypes=[dtype], directions=["forward+backward"])
        inputs = case.make_inputs()

        def call(x: dict) -> torch.Tensor:
            return gf.attention(x["q"], x["k"], x["v"], mask=gf.Mask(**mask))

        outputs = registry.timed(case.direction, call, inputs, ("q", "k", "v"), inputs["upstream"])()
        with pytest.raises(check.WrongResult):
            check.check(outputs, case.expected(inputs), case.dtype)

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    @pytest.mark.parametrize("name", ["quick_linear", "quick_logits"])
    def test_one_wrong_label_is_refused(self, name, dtype):
        (case,) = registry.cases(part="quick", names=[name], dtypes=[dtype], directions=["forward+backward"])
        inputs = case.make_inputs()
        changed = {**inputs, "target": inputs["target"].clone()}
        changed["target"][-1] += 1 if changed["target"][-1] == 0 else -1
        outputs = case.contenders[0].make(case, changed)()
        with pytest.raises(check.WrongResult):
            check.check(outputs, case.expected(inputs), case.dtype)


class TestPeaks:
    @pytest.mark.parametrize("isa", backends.available_isas())
    @pytest.mark.parametrize("threads", [1, 2])
    def test_every_isa_has_its_probes(self, isa, threads):
        with gf.force(isa=isa):
            measured = peaks.Peaks(threads, 0.0005, read_bytes=2**21).measure_all(repeats=1)
        assert set(measured) == set(peaks.UNITS)
        assert all(math.isfinite(value) and value > 0 for value in measured.values())

    @pytest.mark.parametrize("isa", backends.available_isas())
    def test_two_threads_are_some_way_apart_and_one_is_not(self, isa):
        with gf.force(isa=isa):
            apart = peaks.Peaks(2, 0.0005).handoff_ns()
        assert math.isfinite(apart) and apart > 0
        assert peaks.Peaks(1, 0.0005).handoff_ns() == 0

    def test_an_unknown_bound_is_refused(self):
        with pytest.raises(ValueError, match="bound: expected one of fma, dot_bf16, read, got 'luck'"):
            peaks.Peaks(1, 0.001).probe("luck")

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: _C.peak_fma(0, 0.001), "threads: expected at least 1, got 0"),
            (lambda: _C.peak_dot_bf16(1, 0.0), "seconds: expected more than 0"),
            (lambda: _C.peak_fma(1, math.nan), "seconds: expected more than 0"),
            (lambda: _C.peak_read(view(torch.ones(2**18 - 1)), 1, 0.001), "data: expected at least 262144"),
            (lambda: _C.peak_read(view(torch.ones(2**18)), 2, 0.001), "data: expected at least 262144"),
            (lambda: _C.peak_read(view(torch.ones(2**19)[::2]), 1, 0.001), "contiguous"),
            (lambda: _C.peak_read(view(torch.ones(2**18, dtype=torch.float16)), 1, 0.001), "data: unexpected dtype"),
        ],
    )
    def test_bad_arguments_are_refused(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()
