"""The script of the version matrix: its arguments, what it makes of a failure, and its oldest row in part."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import version_matrix
from version_matrix import ROWS, Result, main

ROOT = Path(__file__).parent.parent


def pip_reaches_an_index():
    command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--no-deps", "--ignore-installed"]
    return subprocess.run([*command, ROWS["oldest"].transformers], capture_output=True).returncode == 0


@pytest.fixture
def no_environments(monkeypatch):
    """Rows run nothing and are recorded, as (name, of its own)."""
    made = []
    for name in ("lent_environment", "environment_of_its_own"):
        monkeypatch.setattr(version_matrix, name, lambda folder, row, name=name: made.append((folder.name, name)))
    monkeypatch.setattr(version_matrix, "run", lambda command, **options: '{"python": "3.11"}')
    return made


def test_rows_are_what_the_package_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert ROWS["oldest"].transformers.replace("==", ">=").removesuffix(".0") + ",<6" in project["dependencies"]
    assert ROWS["newest"].transformers in project["dependencies"]
    assert ROWS["oldest"].torch.replace("==", ">=").removesuffix(".0") in project["dependencies"]
    assert ROWS["oldest"].python == "python" + project["requires-python"].removeprefix(">=")


def test_every_row_unless_some_are_named(no_environments, monkeypatch, capsys):
    monkeypatch.setattr(version_matrix, "run_tests", lambda *_: Result(7, 0, 2))
    assert main([]) == 0
    assert no_environments == [(name, "lent_environment") for name in ROWS]
    assert "newest: python 3.11: 7 passed, 0 failed, 2 skipped" in capsys.readouterr().out
    assert main(["newest", "--torch"]) == 0
    assert no_environments[2:] == [("newest", "environment_of_its_own")]


@pytest.mark.parametrize("result", [Result(7, 1, 0), Result(0, 0, 9)], ids=["a failure", "nothing ran"])
def test_a_failure_is_one_of_the_script(result, no_environments, monkeypatch):
    results = [result, Result(7, 0, 0)]
    monkeypatch.setattr(version_matrix, "run_tests", lambda *_: results.pop(0))
    assert main([]) == 1 and not results, "the other rows run all the same"


def test_what_cannot_be_installed_is_named(monkeypatch, capsys):
    row = ROWS["oldest"]._replace(python="python3.0")
    monkeypatch.setitem(ROWS, "oldest", row)
    assert main(["oldest", "--torch"]) == 1
    assert "oldest: python3.0 is not installed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["latest"])
    assert "rows ['latest'] do not exist; there are ['oldest', 'newest']" in capsys.readouterr().err


def test_failing_tests_are_counted(tmp_path, monkeypatch, capsys):
    test = tmp_path / "test_it.py"
    test.write_text("import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip('so')\n")
    monkeypatch.setattr(version_matrix, "TESTS", (test,))
    assert version_matrix.run_tests(Path(sys.executable), tmp_path) == Result(1, 1, 1)
    assert "def test_b(): assert 0" in capsys.readouterr().err
    monkeypatch.setattr(version_matrix, "TESTS", ("no_such_file.py",))
    assert version_matrix.run_tests(Path(sys.executable), tmp_path).passed == 0


@pytest.mark.slow
def test_the_oldest_row_accelerates_a_model(capsys):
    if not pip_reaches_an_index():
        pytest.skip("pip reaches no index that has " + ROWS["oldest"].transformers)
    assert main(["oldest", "--smoke"]) == 0
    oldest = ROWS["oldest"].transformers.replace("==", " ")
    assert f"{oldest}: 1 passed, 0 failed, 0 skipped" in capsys.readouterr().out
