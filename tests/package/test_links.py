"""Every relative link of the documents leads to a file, and every file that a document or comment names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", "build", "runs"} & set(path.relative_to(ROOT).parts) and not path.name.startswith(".")
]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
NOTE = re.compile(r"docs/(?:notes/|kernels/)?[\w.-]+\.(?:md|svg)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page(page):
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_documents_that_comments_name_exist():
    sources = [p for folder in ("csrc", "kernels", "gpt4v_fast", "benchmarks", "tests", "docs") for p in
               (ROOT / folder).rglob("*") if p.suffix in {".py", ".h", ".cpp", ".cu", ".md"}]  # fmt: skip
    named = {(source, name) for source in sources for name in NOTE.findall(source.read_text())}
    missing = sorted(f"{source.relative_to(ROOT)}: {name}" for source, name in named if not (ROOT / name).exists())
    assert len(named) > 20 and not missing
