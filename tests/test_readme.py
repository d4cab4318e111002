"""What the README says is so: its tree, its commands and its snippets."""

import re
import subprocess
from pathlib import Path

import pytest
from transformers import RobertaForSequenceClassification

import roberta_fast
from roberta_fast.cli import COMMANDS
from roberta_fast.testing import tiny_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def tracked_files():
    git = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if git.returncode:
        pytest.skip("not a git checkout")
    return [line for line in git.stdout.splitlines() if (ROOT / line).exists()]


def tree_entries():
    """Paths in the README's tree, with whether they stand for all that lies below."""
    tree = next(block for block in blocks("") if block.startswith("README.md"))
    folder, entries = "", []
    for line in tree.splitlines():
        indented, names = line.startswith("  "), line.strip().split("   ")[0].split()
        assert line.strip().split("   ", 1)[1:], f"{line!r} says nothing about its file"
        for name in names:
            if not indented:
                folder = name if name.endswith("/") else ""
            entries.append(folder + name if indented else name)
    return entries


def test_the_tree_is_true():
    files, entries = tracked_files(), tree_entries()
    for entry in entries:
        assert (ROOT / entry).exists() or list(ROOT.glob(entry)), f"{entry} is in the tree, but not in the repository"
    for file in files:
        covered = any(
            Path(file).match(entry) or (entry.endswith("/") and file.startswith(entry) and not _listed_inside(entry, entries))
            for entry in entries
        )
        assert covered or Path(file).name.startswith((".", "__init__")) or file.startswith("."), f"{file} is missing in the tree"


def _listed_inside(folder, entries):
    return any(entry != folder and entry.startswith(folder) for entry in entries)


def test_every_make_target_exists():
    targets = {line.split()[1] for block in blocks("") for line in block.splitlines() if line.startswith("make ")}
    targets |= set(re.findall(r"`make ([a-z-]+)`", README))
    assert {"demo", "test"} <= targets
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_every_command_answers():
    for name in COMMANDS:
        subprocess.run(["roberta-fast", name, "--help"], check=True, capture_output=True)


def test_the_snippets_run(tmp_path, monkeypatch, capsys):
    """With a small model under the name that the snippet loads."""
    RobertaForSequenceClassification(tiny_config()).save_pretrained(tmp_path / "roberta-base")
    monkeypatch.chdir(tmp_path)
    scope = {}
    try:
        for snippet in blocks("python"):
            exec(compile(snippet, "README.md", "exec"), scope)
    finally:
        roberta_fast.unpatch_transformers()
    assert "no fallback" in capsys.readouterr().out


def test_ci_calls_the_readme_test_command():
    assert "make test" in (ROOT / ".ci/run").read_text().splitlines()


def test_no_file_is_too_long():
    for file in tracked_files():
        if file.endswith((".py", ".cpp", ".h", ".cu")):
            assert len((ROOT / file).read_text().splitlines()) <= 400, f"{file} has more than 400 lines"
