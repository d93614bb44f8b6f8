"""The bits tool: it names many cases of every op, gives the same hashes again, and sees one changed bit."""

import pytest
import torch

import gpt4v_fast as gf
from gpt4v_fast.benchmarks import bits, bits_inputs

OPS = (
    "attention", "attention_varlen", "attention_kvcache", "cross_entropy", "linear_cross_entropy", "patch_embed",
    "patch_embed_packed",
)  # fmt: skip


def main(capsys, *arguments):
    """The exit code and what was printed."""
    code = bits.main(["--isa", "scalar", *map(str, arguments)])
    return code, capsys.readouterr().out


def test_every_op_has_many_cases_of_its_own_names():
    ids = [case.id for case in bits.cases()]
    assert len(ids) == len(set(ids)) and len(ids) >= 400
    for op in OPS:
        of_op = bits.cases([op])
        assert {case.dtype for case in of_op} == set(bits_inputs.DTYPES)
        assert len(of_op) >= 20 and any(case.quick for case in of_op)


@pytest.mark.parametrize("op", OPS)
def test_two_runs_give_the_same_hashes(op):
    chosen = bits.cases([op], quick=True)[:2]
    isas = gf.backends.available_isas()[-1:]
    first, second = bits.measure(chosen, isas), bits.measure(chosen, isas)
    assert first == second
    hashes = [row[0] for row in first.values()]
    assert len(set(hashes)) == len(hashes)


def test_one_bit_of_one_gradient_is_seen(tmp_path, monkeypatch, capsys):
    path, op = tmp_path / "bits.json", ("--op", "cross_entropy", "--case", "N 3, V 17, mean/fp32")
    assert main(capsys, *op, "--output", path)[0] == 0
    assert main(capsys, *op, "--compare", path)[0] == 0
    plain = gf.cross_entropy

    class Nudged(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return logits.clone()

        @staticmethod
        def backward(ctx, gradient):
            changed = gradient.clone()
            changed[1, 4] = torch.nextafter(changed[1, 4], torch.tensor(1.0))
            return changed

    monkeypatch.setattr(gf, "cross_entropy", lambda logits, *rest, **more: plain(Nudged.apply(logits), *rest, **more))
    code, printed = main(capsys, *op, "--compare", path)
    assert code == 1
    assert "cross_entropy/rows, N 3, V 17, mean/fp32: differs on scalar" in printed
    assert "1 of 1 cases differ" in printed


def test_a_case_that_the_record_lacks_is_named(tmp_path, capsys):
    path = tmp_path / "bits.json"
    main(capsys, "--case", "one, plain/fp32", "--output", path)
    code, printed = main(capsys, "--case", "one, plain", "--compare", path)
    assert code == 1 and "attention/one, plain/bf16: not in the record" in printed and "2 of 3 cases" in printed


def test_an_unknown_case_is_refused_not_passed(capsys):
    with pytest.raises(SystemExit) as stop:
        main(capsys, "--op", "cross_entropy", "--case", "N 3, V 71, mean/fp32", "--list")
    assert stop.value.code == 2
    assert "N 3, V 17, mean/fp32" in capsys.readouterr().err


def test_bits_that_depend_on_the_threads_are_an_error():
    case = bits.BitsCase("attention", "made up", "fp32", lambda draw: {"x": torch.tensor(torch.get_num_threads())})
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match=r"attention/made up/fp32 on scalar: the bits depend on the number"):
        bits.measure([case], ["scalar"])
    assert torch.get_num_threads() == before


def test_a_failing_case_is_named():
    def fail(draw):
        raise ValueError("not today")

    with pytest.raises(RuntimeError, match=r"attention/made up/fp32 on scalar, 1 threads: not today"):
        bits.measure([bits.BitsCase("attention", "made up", "fp32", fail)], ["scalar"])
