"""What an sdist and a wheel hold, that they import from anywhere, and what a build says when a tool is missing."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
SOURCES = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "roberta_fast",
    "kernels",
    "csrc",
    "benchmarks",
    "tests",
)
BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, 'build_' + sys.argv[1])(sys.argv[2]))"


def run(command, cwd, **environment):
    """Runs a command; environment: variables to change, None to remove one. Returns the finished process."""
    variables = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)


def build(kind, source, target, **environment):
    """Builds an sdist or a wheel through the PEP 517 hooks, as pip does with --no-build-isolation; returns its path."""
    done = run([sys.executable, "-c", BUILD, kind, str(target)], source, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return target / done.stdout.strip().splitlines()[-1], done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources as a checkout has them, so that builds leave the repository alone."""
    copy = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in SOURCES:
        path = REPOSITORY / name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, copy / name, **({"ignore": ignored} if path.is_dir() else {}))
    return copy


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    """The unpacked sdist, made where torch cannot be imported: only a wheel needs it."""
    target = tmp_path_factory.mktemp("sdist")
    archive, _ = build("sdist", source, target, ROBERTA_FAST_BUILD=None, PYTHONPATH=str(without_torch(target)))
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    return target / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """A wheel without the extension, built from the sdist."""
    path, _ = build("wheel", sdist, tmp_path_factory.mktemp("wheel"), ROBERTA_FAST_BUILD="none")
    return path


def without_torch(folder):
    """A folder that hides torch, to put in front of the path."""
    hidden = folder / "hidden"
    hidden.mkdir(exist_ok=True)
    (hidden / "torch.py").write_text("raise ImportError('hidden by a test')")
    return hidden


def files_below(folder, suffixes):
    return {str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / folder).rglob("*") if p.suffix in suffixes}


def test_sdist_has_all_sources(sdist):
    held = {str(p.relative_to(sdist)) for p in sdist.rglob("*") if p.is_file()}
    assert files_below("csrc", {".cpp", ".h", ".cu", ".cuh"}) <= held
    assert (
        files_below("kernels", {".py"})
        | files_below("benchmarks", {".py"})
        | files_below("roberta_fast", {".py", ".txt", ".html"})
        <= held
    )
    assert {"setup.py", "LICENSE", "README.md", "csrc/cpu/simd.h"} <= held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


def test_wheel_has_the_package_and_nothing_beside_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    assert wheel.name.endswith("-py3-none-any.whl"), "without an extension a wheel fits every platform"
    assert {name.split("/")[0] for name in held} == {"roberta_fast", f"{wheel.name.rsplit('-', 3)[0]}.dist-info"}
    mapped = {f"roberta_fast/{name}" for folder in ("kernels", "benchmarks") for name in files_below(folder, {".py"})}
    assert mapped | files_below("roberta_fast", {".py", ".txt", ".html"}) <= held
    assert any(name.endswith("licenses/LICENSE") for name in held)


def run_from_wheel(wheel, code, tmp_path):
    """Runs code in another directory with the unpacked wheel in front of the path; returns its lines."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    # An editable install beside it would lend its own compiled modules.
    alone = "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'Editable' not in repr(finder)];"
    done = run([sys.executable, "-c", alone + code], tmp_path / "elsewhere", PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_wheel_imports_from_another_directory(wheel, tmp_path):
    """Ours is roberta_fast.kernels; a top-level ``kernels`` would hide Hugging Face's, which transformers imports."""
    code = (
        "import importlib.util, roberta_fast, roberta_fast.kernels; from roberta_fast import dispatch;"
        "spec = importlib.util.find_spec('kernels');"
        "print(roberta_fast.__file__, roberta_fast.kernels.__file__, spec and spec.origin, dispatch.load_cpp(), sep='\\n')"
    )
    package, kernels, top_level, reason = run_from_wheel(wheel, code, tmp_path)
    assert package.startswith(str(tmp_path)) and kernels == str(tmp_path / "site/roberta_fast/kernels/__init__.py")
    assert str(tmp_path) not in top_level and "roberta_fast" not in top_level
    assert reason.startswith("the C++ extension is not built")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_wheel_from_the_sdist_runs_from_another_directory(sdist, tmp_path):
    path, _ = build("wheel", sdist, tmp_path, ROBERTA_FAST_BUILD="cpu")
    assert "none-any" not in path.name
    code = (
        "import torch; from roberta_fast import dispatch; print(dispatch.load_cpp()); import roberta_fast._C as C;"
        "print(C.__file__, C.build_info()['torch'], torch.ops.roberta_fast_cpp.instruction_set(), sep='\\n')"
    )
    reason, extension, built_for, instruction_set = run_from_wheel(path, code, tmp_path)
    assert reason == "None" and extension.startswith(str(tmp_path / "site"))
    assert built_for == torch.__version__ and instruction_set in ("baseline", "avx2", "avx512")


def test_auto_without_a_compiler_builds_a_pure_wheel_and_says_why(sdist, tmp_path):
    path, output = build("wheel", sdist, tmp_path, ROBERTA_FAST_BUILD=None, CXX="/nonexistent/g++")
    assert path.name.endswith("-py3-none-any.whl")
    assert "without the C++ extension, for want of a C++ compiler ('/nonexistent/g++' is not found" in output


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ROBERTA_FAST_BUILD": "gpu"}, "ROBERTA_FAST_BUILD='gpu' is not one of auto, cuda, cpu, none"),
        ({"ROBERTA_FAST_BUILD": "cpu", "CXX": "/nonexistent/g++"}, "ROBERTA_FAST_BUILD=cpu needs a C++ compiler"),
        pytest.param(
            {"ROBERTA_FAST_BUILD": "cuda"},
            "ROBERTA_FAST_BUILD=cuda needs a CUDA build of torch",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build"),
        ),
        ({"ROBERTA_FAST_BUILD": "auto", "PYTHONPATH": "hidden"}, "pip install --no-build-isolation"),
    ],
    ids=["unknown mode", "cpu without a compiler", "cuda without CUDA", "no torch"],
)
def test_a_build_that_cannot_be_says_why(environment, message, sdist, tmp_path):
    if "PYTHONPATH" in environment:
        environment = environment | {"PYTHONPATH": str(without_torch(tmp_path))}
    done = run([sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)], sdist, **environment)
    assert done.returncode != 0 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
