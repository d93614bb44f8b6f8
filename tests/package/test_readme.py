"""The README's programs run, one after the other, as a reader would paste them."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def test_every_python_block_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 4
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["out"].shape == (2, 8, 300, 64) and names["q"].grad is not None
    assert names["tokens"].shape == (256 + 96, 384)
    assert names["cu_seqlens"].tolist() == [0, 256, 352]
