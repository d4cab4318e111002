"""Compiles every Triton kernel for NVIDIA's architectures without a GPU, and holds the result to its budget.

``python tests/ahead_of_time.py 90 [--all] [--only NAME]`` runs each case of ``CASES``: a call of a launcher on meta tensors, in a
process where a launch compiles for the given compute capability instead of running. So what is checked is what the launchers
ask for: their tiles, flags and alignment; and a launcher that reads a value on the host fails. Prints one line per kernel:
registers and spilled bytes a thread, shared memory a block. Exits with 1 where one is over its budget: spills above the
case's allowance, shared memory above the chip's limit, a matrix product on Hopper without the warp-group instructions.

It must run in a process of its own: where ``TRITON_INTERPRET`` is set, kernels cannot be compiled.
"""

import argparse
import functools
import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from roberta_fast import kernels
from roberta_fast.kernels import tuning

SHARED_LIMIT_KIB = {80: 163, 90: 227, 100: 227, 120: 99}
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}


@dataclass(frozen=True)
class Case:
    """A launcher call whose kernels are to be compiled.

    launch: calls the launcher on meta tensors. default: part of the short run; others need ``--all``.
    tensor_cores: its matrix products must use them (not so in float32).
    spill_bytes: most bytes a thread may spill in any of its kernels.
    """

    launch: Callable[[], object]
    default: bool = False
    tensor_cores: bool = True
    spill_bytes: int = 0


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without data: 16-byte aligned, as allocations on the device are."""
    return torch.empty(shape, dtype=dtype, device="meta")


# Entries are "<op>/<variant>": Case(...). The default ones must launch every kernel of kernels/, which is checked.
CASES: dict[str, Case] = {}


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel and what it takes of the chip."""

    kernel: str
    registers: int
    spill_bytes: int
    shared_kib: float
    instructions: str  # the tensor core instruction that it uses, if any
    has_dot: bool


def compile_only(capability: int) -> list[triton.compiler.CompiledKernel]:
    """From now on a launch compiles for ``capability`` and is listed in the result, in place of running."""
    target = GPUTarget("cuda", capability, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    )
    chip = tuning.Chip(tuning.generation_of(capability), MULTIPROCESSORS[capability])
    tuning.chip_of = lambda tensor: chip
    run, compiled = JITFunction.run, []

    def compile_instead(kernel, *args, grid, warmup, **options):
        compiled.append(run(kernel, *args, grid=grid, warmup=True, **options))
        return compiled[-1]

    JITFunction.run = compile_instead
    return compiled


def inspect(compiled: triton.compiler.CompiledKernel) -> Compiled:
    """Reads the resources and the instructions off the compiled binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("cuobjdump", "--dump-sass", file.name)
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))
    found = re.search(r"\b(HGMMA|UTC\w*MMA|HMMA|QGMMA|IGMMA|IMMA)\b", sass)
    return Compiled(
        kernel=compiled.metadata.name,
        registers=registers,
        spill_bytes=stack,
        shared_kib=compiled.metadata.shared / 1024,
        instructions=found.group(1) if found else "",
        has_dot="tt.dot" in compiled.asm["ttir"],
    )


def _tool(name: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def faults(capability: int, case: Case, compiled: Compiled) -> list[str]:
    """What is over budget, in words."""
    wanted = {80: "HMMA", 90: "HGMMA", 100: "UTC", 120: "MMA"}[capability]
    limit = SHARED_LIMIT_KIB[capability]
    found = []
    if compiled.spill_bytes > case.spill_bytes:
        found.append(f"spills {compiled.spill_bytes} bytes, {case.spill_bytes} allowed")
    if compiled.shared_kib > limit:
        found.append(f"takes {compiled.shared_kib:.0f} KiB of shared memory, the chip has {limit}")
    if case.tensor_cores and compiled.has_dot and wanted not in compiled.instructions:
        found.append(f"uses {compiled.instructions or 'no tensor core instruction'} where {wanted} was expected")
    return found


def kernel_names() -> set[str]:
    """Names of all kernels, as opposed to device functions, in the package."""
    modules = [importlib.import_module(m.name) for m in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}.")]
    functions = [f for m in modules for f in vars(m).values() if isinstance(f, JITFunction)]
    return {f.__name__ for f in functions if f.__name__.endswith("_kernel")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("capability", type=int, choices=sorted(SHARED_LIMIT_KIB))
    parser.add_argument("--all", action="store_true", help="every case, not only the default ones")
    parser.add_argument("--only", default="", metavar="NAME", help="cases whose name contains this")
    arguments = parser.parse_args()

    launched = compile_only(arguments.capability)
    inspected = functools.cache(inspect)
    seen, faulty = set(), False
    print(f"{'case':32} {'kernel':34} {'registers':>9} {'spill B':>7} {'shared KiB':>10}  tensor cores")
    for name, case in CASES.items():
        if arguments.only not in name or not (case.default or arguments.all or arguments.only):
            continue
        launched.clear()
        case.launch()
        for compiled in map(inspected, dict.fromkeys(launched)):
            seen.add(compiled.kernel)
            row = f"{name:32} {compiled.kernel:34} {compiled.registers:9} {compiled.spill_bytes:7} {compiled.shared_kib:10.1f}"
            print(f"{row}  {compiled.instructions}", flush=True)
            for fault in faults(arguments.capability, case, compiled):
                print(f"FAULT {name} {compiled.kernel}: {fault}")
                faulty = True
    missing = set() if arguments.only else kernel_names() - seen
    if missing:
        print(f"FAULT no case launches {', '.join(sorted(missing))}")
    return int(faulty or bool(missing))


if __name__ == "__main__":
    sys.exit(main())
