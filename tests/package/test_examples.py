"""The examples run as a user runs them: in a new process, offline, from another folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


OPS = (
    "attention", "attention_varlen", "attention_kvcache", "cross_entropy", "linear_cross_entropy", "patch_embed",
    "patch_embed_packed",
)  # fmt: skip

SAYS = {
    "attention": "mask: 4 KiB of ids, 1024 KiB of booleans",
    "attention_varlen": "rows: 1040 packed, 2800",
    "cross_entropy": "right predictions: 50 of 412",
    "linear_cross_entropy": "logits that are never written: 125 MiB",
    "patch_embed_packed": "images begin at [0, 196, 316, 356]",
}


def run(name: str, folder: Path, *arguments: str) -> list[str]:
    """The lines that an example prints."""
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    result = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()


def test_base_model(tmp_path):
    assert re.fullmatch(r"\(1, \d+, 128\)", run("01_base_model.py", tmp_path)[-1])


def test_generate_text(tmp_path):
    lines = run("02_generate_text.py", tmp_path)
    assert [line[:9] for line in lines] == [f"{i} 这是一个例子。" for i in range(1, 6)]
    assert any(len(line) > 9 for line in lines)


def test_caption_image(tmp_path):
    assert run("03_caption_image.py", tmp_path) == ["A handwritten seven, an odd digit."]


def test_translate_and_finetune(tmp_path):
    lines = run("04_translate_and_finetune.py", tmp_path)
    assert lines[:3] == ["two cats => 两只猫", "seven => 七", "three books => 三本书"]
    before, after = (float(re.fullmatch(r"held-out loss \w+: +([\d.]+)", line)[1]) for line in lines[3:])
    assert after < before


def test_auto_classes(tmp_path):
    text = run("05_auto_classes.py", tmp_path)[-1]
    assert text.startswith("人工智能")
    assert len(text) > 4


def test_every_example_is_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert set(OPS) <= names
    source = Path(__file__).read_text()
    assert all(f'run("{name}.py"' in source for name in names - set(OPS))


@pytest.mark.parametrize("op", OPS)
def test_op(op, tmp_path):
    """An op's program agrees with the plain PyTorch beside it, and says so."""
    printed = "\n".join(run(f"{op}.py", tmp_path))
    differences = [float(x) for x in re.findall(r"largest difference[^:]*: (\S+)", printed)]
    losses = [(float(a), float(b)) for a, b in re.findall(r"^loss: (\S+), PyTorch (\S+)$", printed, re.MULTILINE)]
    assert len(differences) + len(losses) == 1
    assert all(difference < 1e-4 for difference in differences)
    assert all(abs(ours - pytorch) < 1e-3 for ours, pytorch in losses)
    assert SAYS.get(op, "") in printed
