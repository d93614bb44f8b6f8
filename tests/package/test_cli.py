"""The command line: help, JSON, and bad input that ends in one line and exit code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gpt4v_fast as gf
from gpt4v_fast import backends, demo, doctor
from gpt4v_fast.cli import main

COMMANDS = ("doctor", "bench", "demo", "ask", "evaluate")
OPS = (
    "attention",
    "attention_varlen",
    "attention_kvcache",
    "cross_entropy",
    "linear_cross_entropy",
    "patch_embed",
    "patch_embed_packed",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: gpt4v-fast {command}") and "--json" in text


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["dance"], ["doctor", "--loud"], ["ask", "only-one-argument"]])
def test_unknown_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"gpt4v-fast {gf.__version__} (torch {torch.__version__}, Python 3.")


PIPED = [sys.executable, "-c", "import sys; from gpt4v_fast.cli import main; sys.exit(main(sys.argv[1:]))"]


@pytest.mark.skipif(sys.platform == "win32", reason="a pipe of POSIX")
@pytest.mark.parametrize(
    "arguments", [["doctor"], ["--help"], ["--version"], ["bench", "--quick", "--list"]], ids=" ".join
)
def test_a_reader_that_leaves_is_no_error(arguments):
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([*PIPED, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, timeout=240)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_chinese_where_the_output_lacks_it(flags, encoding, tmp_path):
    from PIL import Image

    Image.new("L", (8, 8)).save(tmp_path / "digit.png")
    code = (
        "import sys; from gpt4v_fast import demo; from gpt4v_fast.cli import main; "
        "demo.ask = lambda *args: '是7。'; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "ask", str(tmp_path / "digit.png"), "几？", *flags]
    settings = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, env=settings, timeout=240)
    assert done.returncode == 0, done.stderr
    said = done.stdout.decode(encoding)
    assert json.loads(said)["answer"] == "是7。" if flags else said == "\\u662f7\\u3002\n"


class TestDoctor:
    def test_json_tells_the_machine_and_every_kernel(self, capsys):
        assert main(["doctor", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["gpt4v_fast"] == gf.__version__
        assert found["cpu"] and found["cores"] >= 1
        assert found["isas"]["available"] == backends.available_isas()
        assert set(found["isas"]["available"]) <= set(found["isas"]["built"])
        assert found["versions"]["torch"] == torch.__version__
        on_cpu = {(k["op"], k["dtype"]): k for k in found["kernels"] if k["device"] == "cpu"}
        assert set(on_cpu) == {(op, dtype) for op in OPS for dtype in ("fp32", "bf16", "fp16")}
        assert all(k["backend"] == "cpu" and not k["fallback"] for k in on_cpu.values())

    def test_what_it_says_is_what_explain_says(self):
        x = torch.zeros(1, 2, 4, 16)
        choice = gf.explain(gf.attention, x, x, x, mask=gf.Mask(causal=True))
        said = next(k for k in doctor.kernels() if (k["op"], k["dtype"], k["device"]) == ("attention", "fp32", "cpu"))
        assert (said["kernel"], said["on"], said["reason"]) == (choice.kernel, choice.on, choice.reason)

    def test_text_names_every_op(self, capsys):
        assert main(["doctor"]) == 0
        text = capsys.readouterr().out
        assert all(f"\n{op} " in text for op in OPS)

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which libraries a process maps")
    def test_a_fresh_process_has_one_openmp_runtime(self):
        command = [sys.executable, "-m", "gpt4v_fast.cli", "doctor", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["openmp"]) == 1

    @pytest.mark.parametrize(
        ("path", "is_openmp"),
        [
            ("/x/torch/lib/libgomp.so.1", True),
            ("/x/torch/lib/libgomp-a34b3233.so.1", True),
            ("/x/libiomp5.so", True),
            ("/x/libomp.so.5", True),
            ("/x/libomp.dylib", True),
            ("/x/libcompose.so", False),
            ("/x/libgomp_notes.txt", False),
        ],
    )
    def test_openmp_runtimes_are_known_by_name(self, path, is_openmp):
        assert bool(doctor.OPENMP.search(path)) is is_openmp

    def test_a_forced_choice_is_told(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with gf.force(isa="scalar", backend="reference"):
            found = doctor.report()
        assert found["isa"] == "scalar" and found["environment"]["TRITON_INTERPRET"] == "1"
        assert all(kernel["backend"] == "reference" for kernel in found["kernels"])
        assert any("TRITON_INTERPRET=1" in hint for hint in found["hints"])
        if backends.available_isas() != ["scalar"]:
            assert any("unset GPT4V_FAST_ISA" in hint for hint in found["hints"])

    @pytest.mark.parametrize(
        ("change", "hint"),
        [
            ({"openmp": ["/a/libgomp.so.1", "/b/libgomp.so.1"]}, "2 OpenMP runtimes"),
            ({"cores": 2, "threads": 8}, "set OMP_NUM_THREADS=2"),
            ({"versions": {"transformers": None, "triton": "3"}}, 'pip install "gpt4v_fast[model]"'),
            ({"versions": {"transformers": "5", "triton": None}, "gpus": ["H100"]}, 'pip install "gpt4v_fast[gpu]"'),
            ({"isas": {"built": ["scalar"], "available": ["scalar"]}, "isa": "scalar"}, "portable CPU kernels"),
            ({"isas": {"built": ["avx2"], "available": ["avx2"]}, "isa": "avx2"}, "no bf16 products"),
            ({"environment": {"GPT4V_FAST_BACKEND": "triton"}}, "GPT4V_FAST_BACKEND=triton forces"),
            (
                {"kernels": [{"op": "attention", "dtype": "fp32", "device": "cuda", "fallback": True}]},
                "slow reference: attention (fp32, cuda)",
            ),
        ],
    )
    def test_hints(self, change, hint):
        fine = {
            "isa": "avx512_bf16",
            "isas": {"built": ["scalar", "avx512_bf16"], "available": ["scalar", "avx512_bf16"]},
            "versions": {"transformers": "5", "triton": "3"},
            "openmp": ["/a/libgomp.so.1"],
            "environment": {},
            "gpus": [],
            "cuda_object": True,
            "cores": 2,
            "threads": 2,
            "kernels": [],
        }
        assert doctor.hints(fine) == []
        said = doctor.hints({**fine, **change})
        assert len(said) == 1 and hint in said[0]


class TestAsk:
    @pytest.fixture
    def image(self, tmp_path):
        from PIL import Image

        path = tmp_path / "digit.png"
        Image.new("RGB", (8, 8), "white").save(path)
        return str(path)

    @pytest.fixture
    def asked(self, monkeypatch):
        calls = []
        monkeypatch.setattr(demo, "ask", lambda *args: calls.append(args) or "7")
        return calls

    def test_the_answer_is_printed(self, image, asked, capsys):
        assert main(["ask", image, "Which digit is this?"]) == 0
        assert capsys.readouterr().out == "7\n"
        images, question, checkpoint, most = asked[0]
        assert [i.size for i in images] == [(8, 8)]
        assert (question, checkpoint, most) == ("Which digit is this?", None, 32)

    def test_two_images_and_json(self, image, asked, capsys):
        arguments = ["ask", image, image, "两个数字的和？", "--checkpoint", "runs/x", "--max-new-tokens", "5", "--json"]
        assert main(arguments) == 0
        assert json.loads(capsys.readouterr().out) == {
            "images": [image, image],
            "question": "两个数字的和？",
            "checkpoint": "runs/x",
            "answer": "7",
        }
        assert len(asked[0][0]) == 2 and asked[0][1:] == ("两个数字的和？", "runs/x", 5)

    def test_an_unreadable_image(self, tmp_path, asked, capsys):
        path = tmp_path / "text.png"
        path.write_text("not an image")
        assert main(["ask", str(path), "What?"]) == 2
        self.one_line(capsys, "text.png")
        assert not asked

    def test_a_missing_image(self, tmp_path, asked, capsys):
        assert main(["ask", str(tmp_path / "none.png"), "What?"]) == 2
        self.one_line(capsys, "none.png")

    def test_a_directory(self, tmp_path, asked, capsys):
        assert main(["ask", str(tmp_path), "What?"]) == 2
        self.one_line(capsys, "an image must be a file, got the directory")

    @pytest.mark.parametrize("way", ["-", "/dev/stdin"])
    def test_an_image_from_a_pipe(self, image, asked, monkeypatch, way):
        with open(image, "rb") as picture:
            data = picture.read()
        read, write = os.pipe()
        os.write(write, data)
        os.close(write)
        keep = os.dup(0)
        os.dup2(read, 0)
        try:
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=os.fdopen(read, "rb")))
            assert main(["ask", way, "Which digit is this?"]) == 0
        finally:
            os.dup2(keep, 0)
            os.close(keep)
        assert [i.size for i in asked[0][0]] == [(8, 8)]

    def test_three_images(self, image, capsys):
        assert main(["ask", image, image, image, "What is the sum?"]) == 2
        self.one_line(capsys, "at most 2 images, got 3")

    def test_a_missing_checkpoint(self, image, tmp_path, capsys):
        assert main(["ask", image, "What?", "--checkpoint", str(tmp_path / "nowhere")]) == 2
        self.one_line(capsys, "nowhere")

    def test_traceback_is_there_when_asked_for(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            main(["ask", str(tmp_path / "none.png"), "What?", "--traceback"])

    @pytest.mark.parametrize("count", ["0", "-3", "many"])
    def test_counts_are_checked(self, image, count, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["ask", image, "What?", "--max-new-tokens", count])
        assert stop.value.code == 2
        assert "expected a whole number of at least 1" in capsys.readouterr().err

    @staticmethod
    def one_line(capsys, name):
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("gpt4v-fast ask: error: ") and name in output.err
        assert output.err.count("\n") == 1 and "Traceback" not in output.err


SCORES = {
    "accuracy": {"digit": 0.5},
    "tasks": {"digit": {"en": {"accuracy": 0.5, "macro_f1": 0.25}}},
    "confusion": [[0]],
    "questions": 4,
    "items": [{"answer": "7"}],
}


class TestEvaluate:
    @pytest.fixture
    def asked(self, monkeypatch):
        calls = []
        monkeypatch.setattr(demo, "evaluate", lambda *a, **k: calls.append((a, k)) or dict(SCORES))
        return calls

    def test_text(self, asked, capsys):
        assert main(["evaluate", "--limit", "3"]) == 0
        assert asked == [((None,), {"limit": 3, "progress": True})]
        text = capsys.readouterr().out
        assert "4 questions" in text and "accuracy 0.5" in text and "macro_f1 0.25" in text

    def test_json(self, asked, capsys):
        assert main(["evaluate", "--checkpoint", "runs/x", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {k: v for k, v in SCORES.items() if k != "items"}

    @pytest.mark.parametrize(("name", "extra"), [("sklearn.metrics", "demo"), ("transformers", "model")])
    def test_a_missing_package_is_named_with_its_extra(self, monkeypatch, capsys, name, extra):
        def fail(*args, **kwargs):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

        monkeypatch.setattr(demo, "evaluate", fail)
        assert main(["evaluate"]) == 2
        assert f'{name} is not installed: pip install "gpt4v_fast[{extra}]"' in capsys.readouterr().err

    def test_a_bug_keeps_its_traceback(self, monkeypatch):
        def fail(*args, **kwargs):
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(demo, "evaluate", fail)
        with pytest.raises(ZeroDivisionError):
            main(["evaluate"])


def test_demo_gets_its_options(monkeypatch):
    seen = []
    monkeypatch.setattr(demo, "run_demo", lambda args: seen.append(args) or 1)
    assert main(["demo", "--out", "runs/x", "--steps", "3", "--seed", "5", "--json"]) == 1
    assert (seen[0].out, seen[0].steps, seen[0].seed, seen[0].json) == ("runs/x", 3, 5, True)


@pytest.mark.parametrize("place", ["file", "under_a_file", "checkpoint_is_a_file"])
def test_demo_checks_its_folder_before_training(place, tmp_path, monkeypatch, capsys):
    from gpt4v_fast.demo import run

    monkeypatch.setattr(run, "make_model", lambda *args, **kwargs: pytest.fail("the folder was not checked first"))
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "checkpoint").touch()
    out = {"file": "file", "under_a_file": "file/run", "checkpoint_is_a_file": "full"}[place]
    assert main(["demo", "--out", str(tmp_path / out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("gpt4v-fast demo: error: --out must") and said.count("\n") == 1


def test_make_help_lists_every_target():
    folder = Path(__file__).resolve().parents[2]
    said = subprocess.run(["make", "help"], cwd=folder, capture_output=True, text=True, check=True).stdout
    targets = {"demo", "test", "test-slow", "test-gpu", "test-sanitize", "bench", "build", "wheel", "lint", "clean"}
    assert all(f"make {target} " in said for target in targets)
