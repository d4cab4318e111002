"""Runs a part of the tests under the oldest and the newest versions that are supported: ``python tests/version_matrix.py``.

Each row gets an environment of its own, with its transformers and what that needs. The rest is lent by the environment that runs
this script, as another torch is a download of several GB: with ``--torch`` a row gets its own Python and torch as well, and the
package is built there.
"""

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TESTS = ("test_encoder.py", "test_accelerate.py", "integrations/test_families.py", "integrations/test_saving.py")
BUILD_TOOLS = ("setuptools>=77", "wheel", "ninja", "pybind11", "numpy<2.4", "triton==3.6.0")
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".hypothesis")

SMOKE = """
import torch, roberta_fast
from roberta_fast.testing import MASKS, random_inputs, randomize, tiny_config
from transformers import AutoModel
model = randomize(AutoModel.from_config(tiny_config())).eval()
inputs = random_inputs(MASKS["right padding"], model.config)
roberta_fast.accelerate_model(model)
assert roberta_fast.check_parity(model, inputs).max_abs_difference < 1e-4
assert roberta_fast.explain(model).stock_calls == {}
"""
VERSIONS = """
import json, platform
from importlib.metadata import version
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in ("torch", "triton", "transformers")}}))
"""


class Row(NamedTuple):
    """Versions that are tested together: a Python, and what pip is asked for."""

    python: str
    torch: str
    transformers: str


ROWS = {
    "oldest": Row("python3.11", "torch==2.11.0", "transformers==5.17.0"),
    "newest": Row("python3.12", "torch==2.13.0", "transformers>=5.17,<6"),
}


class Result(NamedTuple):
    """How many tests passed, failed (errors included) and were skipped."""

    passed: int
    failed: int
    skipped: int


def lent_environment(folder: Path, row: Row) -> Path:
    """An environment with the row's transformers, in front of all that the running one has; returns its Python."""
    run([sys.executable, "-m", "venv", "--without-pip", folder])
    python = folder / "bin/python"
    own = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    lent = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    # addsitedir, other than a bare path, follows the .pth files there, by which an editable install is found.
    Path(own, "lent.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in lent))
    # An upgrade, as the lent transformers would do for a range.
    run([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--upgrade", row.transformers])
    return python


def environment_of_its_own(folder: Path, row: Row) -> Path:
    """An environment with all of the row's versions, and the package built in it; returns its Python."""
    if shutil.which(row.python) is None:
        raise FileNotFoundError(f"{row.python} is not installed")
    run([row.python, "-m", "venv", folder / "venv"])
    python = folder / "venv/bin/python"
    run([python, "-m", "pip", "install", "-q", *BUILD_TOOLS, row.torch])
    shutil.copytree(ROOT, folder / "source", ignore=NOT_COPIED)
    run([python, "-m", "pip", "install", "-q", "--no-build-isolation", f"{folder / 'source'}[dev]", row.torch, row.transformers])
    return python


def run(command: list, **options) -> str:
    """What a command prints. Raises CalledProcessError, with what it said, where it fails."""
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, **options).stdout


def run_tests(python: Path, folder: Path) -> Result:
    """Runs ``TESTS`` with a Python, and prints what fails."""
    report = folder / "report.xml"
    # -P: with the repository on the path, its kernels/ would hide the package that transformers imports.
    command = [python, "-P", "-m", "pytest", *(ROOT / "tests" / name for name in TESTS), f"--junitxml={report}"]
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-10_000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
    if not report.exists():
        return Result(0, 1, 0)
    suites = list(ET.parse(report).getroot().iter("testsuite"))
    tests, failed, errors, skipped = (sum(int(s.get(key)) for s in suites) for key in ("tests", "failures", "errors", "skipped"))
    return Result(tests - failed - errors - skipped, failed + errors, skipped)


def run_smoke(python: Path, folder: Path) -> Result:
    """Imports the package, accelerates a model and compares it with the stock one."""
    run([python, "-P", "-c", SMOKE], cwd=folder)
    return Result(1, 0, 0)


def main(arguments: list[str] | None = None) -> int:
    """Runs the rows and prints a line for each; returns 1 where a test failed, or none passed."""
    parser = argparse.ArgumentParser(description="Runs a part of the tests under the oldest and newest supported versions.")
    parser.add_argument("rows", nargs="*", help=f"which rows, of {', '.join(ROWS)}; all if none is named")
    parser.add_argument("--torch", action="store_true", help="fetch each row's own Python packages, torch too: several GB")
    parser.add_argument("--smoke", action="store_true", help="instead of the tests: import, accelerate a model, compare")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.rows) - set(ROWS)):
        parser.error(f"rows {unknown} do not exist; there are {list(ROWS)}")
    bad = False
    for name in options.rows or ROWS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                python = (environment_of_its_own if options.torch else lent_environment)(Path(folder) / name, ROWS[name])
                versions = json.loads(run([python, "-c", VERSIONS], cwd=folder))
                result = (run_smoke if options.smoke else run_tests)(python, Path(folder))
            except (FileNotFoundError, subprocess.CalledProcessError) as error:
                print(f"{name}: {error}\n{getattr(error, 'stderr', None) or ''}", flush=True)
                bad = True
                continue
        told = ", ".join(f"{package} {version}" for package, version in versions.items())
        counts = ", ".join(f"{count} {outcome}" for outcome, count in result._asdict().items())
        print(f"{name}: {told}: {counts}", flush=True)
        bad = bad or result.failed > 0 or result.passed == 0
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
