"""What the README says is so: its tree, its commands and its snippets."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import RobertaForSequenceClassification

import roberta_fast
from roberta_fast.cli import COMMANDS
from roberta_fast.testing import tiny_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
OPERATIONS = {path.stem for path in (ROOT / "roberta_fast/ops").glob("*.py")}


def blocks(language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def tracked_files():
    git = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if git.returncode:
        pytest.skip("not a git checkout")
    return [line for line in git.stdout.splitlines() if (ROOT / line).exists()]


def tree_entries():
    """{path in the README's tree: what it says of it}."""
    tree = next(block for block in blocks("") if block.startswith("README.md"))
    folder, entries = "", {}
    for line in tree.splitlines():
        indent, names, meaning = re.fullmatch(r"( *)(\S+(?: \S+)*)  +(\S.*)", line).groups()
        if not indent:
            folder = names if names.endswith("/") else ""
        for name in names.split():
            entries[folder + name if indent else name] = meaning
    return entries


def is_covered(file, entries):
    """Whether the tree speaks of ``file``: by name or by its header's, with its whole folder, or as an operation's."""
    path = Path(file)
    if any(Path(entry).parent == path.parent and Path(entry).stem == path.stem for entry in entries):
        return True
    for entry, meaning in entries.items():
        if entry.endswith("/") and file.startswith(entry):
            has_lines_of_its_own = any(other != entry and other.startswith(entry) for other in entries)
            stem = path.stem.removeprefix("bench_").removesuffix("_bwd")
            if not has_lines_of_its_own or ("one file an operation" in meaning and stem in OPERATIONS):
                return True
    return path.name == "__init__.py" or file.startswith(".")


def test_the_tree_is_true():
    entries = tree_entries()
    for entry in entries:
        assert (ROOT / entry).exists(), f"{entry} is in the tree, but not in the repository"
    missing = [file for file in tracked_files() if not is_covered(file, entries)]
    assert not missing, "in the repository, but not in the tree"


def test_every_make_target_exists():
    targets = {line.split()[1] for block in blocks("") for line in block.splitlines() if line.startswith("make ")}
    targets |= set(re.findall(r"`make ([a-z-]+)`", README))
    assert {"demo", "test"} <= targets
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_every_command_answers():
    for name in COMMANDS:
        subprocess.run([Path(sys.executable).parent / "roberta-fast", name, "--help"], check=True, capture_output=True)


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
