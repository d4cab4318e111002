"""The page on the mathematics and its Chinese version say the same, and every command on it is one that a test runs."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ENGLISH, CHINESE = (DOCS / name for name in ("roberta.md", "roberta.zh.md"))


def parts(page):
    """What does not depend on the language: code and its output, displayed formulas, links other than to the other version."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    formulas = re.findall(r"^\$\$.*?\$\$$", text, re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if link not in ("roberta.md", "roberta.zh.md")]
    headings = [
        line.partition(" ")[0] for line in re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S).splitlines() if line[:1] == "#"
    ]
    return {"code": fenced, "formulas": formulas, "links": links, "headings": headings}


def commands(page):
    bash = [code for language, code in parts(page)["code"] if language == "bash"]
    return [" ".join(line.split()) for code in bash for line in code.replace("\\\n", " ").splitlines()]


def test_both_languages_have_the_same_formulas_files_and_commands():
    english, chinese = parts(ENGLISH), parts(CHINESE)
    assert len(english["formulas"]) > 10 and len(english["code"]) > 20
    assert chinese == english
    tables = [
        [line.count("|") for line in page.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
        for page in (ENGLISH, CHINESE)
    ]
    assert tables[0] == tables[1]


def test_each_links_to_the_other_and_the_readme_to_both():
    assert "](roberta.zh.md)" in ENGLISH.read_text() and "](roberta.md)" in CHINESE.read_text(encoding="utf-8")
    assert all(f"](docs/{page.name})" in (ROOT / "README.md").read_text(encoding="utf-8") for page in (ENGLISH, CHINESE))


def test_the_fine_tuning_commands_are_those_of_the_pages_that_run_them():
    tested = {command for page in DOCS.glob("finetune-*.md") for command in commands(page)}
    asked = [command for command in commands(ENGLISH) if command.startswith("roberta-fast finetune ")]
    assert [command.split()[2] for command in asked] == ["classification", "ner", "qa", "generation", "translation"]
    for command in asked:
        assert command in tested


def test_the_pretraining_commands_run(tmp_path, monkeypatch):
    for package in ("accelerate", "datasets", "matplotlib"):
        pytest.importorskip(package)
    from roberta_fast.cli import main

    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "docs/pretraining.md", "text.txt")
    asked = [command for command in commands(ENGLISH) if command.startswith("roberta-fast pretrain ")]
    assert len(asked) == 2
    for command in asked:
        small = " --use_cpu true --disable_tqdm true --report_to none" if "prepare" not in command else ""
        assert main((command + small).split()[1:]) == 0, command
    assert Path("model/model.safetensors").is_file()
