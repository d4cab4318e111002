"""Builds the C++ extension and maps ``kernels`` and ``benchmarks`` to the packages ``roberta_fast.kernels`` and ``.benchmarks``.

``ROBERTA_FAST_BUILD`` says what is compiled:
    auto (default)  the CPU operators, and csrc/cuda where nvcc and a CUDA build of torch are; nothing without a compiler,
                    which leaves an install that runs on Triton and plain PyTorch
    cpu, cuda       these; a missing tool is an error
    none            nothing; needs neither a compiler nor torch
The extension is compiled against the installed torch, so pip needs ``--no-build-isolation``.
"""

import os
import shlex
import shutil
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

MODES = ("auto", "cuda", "cpu", "none")
# at::parallel_for is OpenMP's on Linux. -Wno-psabi: vectors are passed only to functions that are always inlined.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
CXX_FLAGS = [
    "-O3",
    *OPENMP,
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]
NVCC_FLAGS = ["-O3", "-lineinfo"]
NO_TORCH = (
    "torch cannot be imported here, and the C++ extension is compiled against it. An isolated build does not see the installed "
    "torch: use `pip install --no-build-isolation` with torch, ninja and pybind11 installed, or set ROBERTA_FAST_BUILD=none."
)


class MissingTools(build_ext):
    """Stands in for torch's builder where the build cannot go ahead: reading metadata and making an sdist still work."""

    reason = ""

    def run(self):
        raise PlatformError(self.reason)


def build_mode() -> str:
    """ROBERTA_FAST_BUILD, checked."""
    mode = os.environ.get("ROBERTA_FAST_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"ROBERTA_FAST_BUILD={mode!r} is not one of {', '.join(MODES)}")
    return mode


def missing_for_cpu() -> str | None:
    """What keeps C++ from being compiled, or None."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None and ("CXX" in os.environ or shutil.which("g++") is None):
        return f"a C++ compiler ({compiler!r} is not found; install g++ or set CXX)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers (Debian: python3-dev)"
    return None


def missing_for_cuda(torch, cuda_home: str | None) -> str | None:
    """What keeps CUDA from being compiled, or None."""
    if torch.version.cuda is None:
        return f"a CUDA build of torch ({torch.__version__} is not one)"
    if cuda_home is None or not Path(cuda_home, "bin", "nvcc").is_file():
        return "nvcc (set CUDA_HOME)"
    if not any(Path(folder, "cublasLt.h").is_file() for folder in cuda_includes(torch, cuda_home)):
        return "cublasLt.h (the package nvidia-cublas)"
    return None


def cuda_includes(torch, cuda_home: str) -> list[str]:
    """Folders of CUDA's headers: the toolkit's own, and those of NVIDIA's packages beside torch."""
    packages = Path(torch.__file__).parents[1] / "nvidia"
    return [str(Path(cuda_home, "include")), *map(str, sorted(packages.glob("*/include")))]


def extension_arguments(mode: str) -> dict:
    """``ext_modules`` and ``cmdclass`` for setup()."""
    if mode == "none":
        return {}
    missing = missing_for_cpu()
    if missing and mode == "auto":
        print(f"roberta_fast: building without the C++ extension, for want of {missing}", file=sys.stderr)
        return {}
    placeholder = [Extension("roberta_fast._C", ["csrc/bindings.cpp"])]
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        missing = NO_TORCH
    else:
        no_cuda = missing_for_cuda(torch, cpp_extension.CUDA_HOME)
        if mode == "cuda" and no_cuda:
            missing = missing or no_cuda
    if missing:
        reason = missing if missing is NO_TORCH else f"ROBERTA_FAST_BUILD={mode} needs {missing}"
        return {"ext_modules": placeholder, "cmdclass": {"build_ext": type("build_ext", (MissingTools,), {"reason": reason})}}
    cuda_sources = sorted(glob("csrc/cuda/*.cu")) if mode != "cpu" and no_cuda is None else []
    return {
        "ext_modules": extensions(torch, cpp_extension, cuda_sources),
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
    }


def extensions(torch, cpp_extension, cuda_sources: list[str]) -> list[Extension]:
    """``_C``, which links no torch and guards the second: ``_C_ops``, the operators."""
    import pybind11

    headers = sorted(glob("csrc/**/*.h", recursive=True)) + sorted(glob("csrc/**/*.cuh", recursive=True))
    facts = {
        "ROBERTA_FAST_TORCH_VERSION": torch.__version__,
        "ROBERTA_FAST_CUDA_VERSION": torch.version.cuda if cuda_sources else "",
        "ROBERTA_FAST_FLAGS": " ".join(CXX_FLAGS),
    }
    # As system headers, torch's own are spared our warnings.
    system = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    flags = {"cxx": CXX_FLAGS + system, "nvcc": NVCC_FLAGS}
    cuda = cuda_includes(torch, cpp_extension.CUDA_HOME) if cuda_sources else []
    operators = cpp_extension.CUDAExtension if cuda_sources else cpp_extension.CppExtension
    extensions = [
        Extension(
            "roberta_fast._C",
            ["csrc/bindings.cpp", *sorted(glob("csrc/data/*.cpp"))],
            include_dirs=[pybind11.get_include(), str(Path("csrc").resolve())],
            depends=headers,
            define_macros=[(name, f'"{value}"') for name, value in facts.items()],
            extra_compile_args={"cxx": CXX_FLAGS},
            language="c++",
        ),
        operators(
            "roberta_fast._C_ops",
            sorted(glob("csrc/cpu/*.cpp")) + cuda_sources,
            include_dirs=[str(Path("csrc").resolve()), *cuda],
            depends=headers,
            extra_compile_args=flags,
            extra_link_args=OPENMP,
        ),
    ]
    # CUDA_HOME is guessed by nvcc's folder and may hold a script alone. c10_cuda brings the library that torch runs on anyway.
    linked = extensions[1]
    if cuda_sources and not any(Path(folder, "libcudart.so").exists() for folder in linked.library_dirs):
        linked.libraries.remove("cudart")
    return extensions


setup(
    packages=find_packages(include=["roberta_fast", "roberta_fast.*"]) + ["roberta_fast.kernels", "roberta_fast.benchmarks"],
    package_dir={"roberta_fast.kernels": "kernels", "roberta_fast.benchmarks": "benchmarks"},
    **extension_arguments(build_mode()),
)
