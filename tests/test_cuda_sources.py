"""csrc/cuda compiles for every generation that it serves, also where no GPU is: PyTorch's builds for the CPU ship the headers."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

SOURCES = sorted((Path(__file__).parents[1] / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a", "100")
# What only some of the sources need, and the package of NVIDIA's that brings it.
FROM_PACKAGES = {"cublasLt.h": "nvidia-cublas"}
# CMake writes it into builds for CUDA; it only says that c10 is a shared library.
GENERATED = "c10/cuda/impl/cuda_cmake_macros.h"


def nvcc():
    """The path of nvcc, or a skip."""
    home = cpp_extension.CUDA_HOME
    found = (home and shutil.which("nvcc", path=str(Path(home, "bin")))) or shutil.which("nvcc")
    if not found:
        pytest.skip("there is no nvcc")
    return Path(found).resolve()


def cuda_includes(compiler):
    """Folders of CUDA's headers: the toolkit's, and those of NVIDIA's packages beside torch."""
    toolkit = [compiler.parents[1] / "include"]
    return toolkit + sorted((Path(torch.__file__).parents[1] / "nvidia").glob("*/include"))


def test_there_are_sources():
    assert {"linear.cu", "pack.cu"} <= {source.name for source in SOURCES}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles(source, tmp_path):
    """For all architectures in one run, warnings being errors but in headers that are not ours; registers are not spilled."""
    compiler = nvcc()
    folders, text = cuda_includes(compiler), source.read_text(encoding="utf-8")
    for header, package in FROM_PACKAGES.items():
        if f"<{header}>" in text and not any((folder / header).is_file() for folder in folders):
            pytest.skip(f"there is no {header} (the package {package})")
    (tmp_path / GENERATED).parent.mkdir(parents=True)
    (tmp_path / GENERATED).touch()
    system = [flag for path in (*cpp_extension.include_paths(), *folders[1:], tmp_path) for flag in ("-isystem", str(path))]
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [compiler, "-c", "-std=c++20", "-O3", "--threads=2", "-Werror=all-warnings", "-Xptxas=-v", *code]
    command += [*system, f"-I{source.parents[1]}", source, "-o", tmp_path / "out.o"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill stores" in line and " 0 bytes spill stores" not in line]
    assert not spills, "\n".join(spills)
