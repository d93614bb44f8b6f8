"""The README's programs run, one after the other, as a reader would paste them."""

import re
import shlex
from pathlib import Path

import torch

from gpt4v_fast.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


def test_every_python_block_of_the_readme_runs():
    """What stands there as before and after are the same numbers."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 4
    names, pairs = {}, []
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
        if "after" in names:
            pairs.append((names.pop("after").detach(), names.pop("before").detach()))
    assert len(pairs) == 3
    for after, before in pairs:
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert names["hidden"].grad is not None and names["head"].grad is not None


def test_the_readme_asks_about_an_image_that_is_there(capsys, monkeypatch):
    """The command is run as it stands, from the source tree, and answered rightly: the digit is a three."""
    monkeypatch.chdir(ROOT)
    command = re.search(r"^(?:\.venv/bin/)?gpt4v-fast (ask .*)$", README.read_text(), re.MULTILINE)[1]
    assert main(shlex.split(command, comments=True)) == 0
    assert capsys.readouterr().out.strip() == "It is 3."
