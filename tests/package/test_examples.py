"""The examples run as a user runs them: in a new process, offline, from another folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


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
