"""Compiles every Triton kernel for NVIDIA's architectures without a GPU, and holds the result to its budget.

``python tests/ahead_of_time.py 90 [--all] [--only NAME]`` runs each of the ``CASES`` in ``ahead_of_time_cases.py``: a call of a
launcher on meta tensors, in a process where a launch compiles for the given compute capability instead of running. So what is
checked is what the launchers ask for: their tiles, flags and alignment; and a launcher that reads a value on the host fails.
Prints one line per kernel: registers and spilled bytes a thread, shared memory a block. Exits with 1 where one is over its
budget: spills above the case's allowance, shared memory above the chip's limit, a persistent kernel whose programs do not all
fit at once, a matrix product without the generation's own tensor core instructions, or on Hopper with ones that wait for each
other; an atomic addition, whose order would differ from run to run.

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
from dataclasses import dataclass
from types import SimpleNamespace

import triton
from ahead_of_time_cases import ATTENTION_SPILL, CASES, COUNT, Case
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from roberta_fast import kernels
from roberta_fast.kernels import tuning

# A block's; a multiprocessor has one more, and so much goes with a block.
SHARED_LIMIT_KIB = {80: 163, 90: 227, 100: 227, 120: 99}
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel and what it takes of the chip."""

    kernel: str
    registers: int
    spill_bytes: int
    shared_kib: float
    instructions: str  # the tensor cores' instructions that it uses
    has_dot: bool
    serialized: bool  # Hopper's products wait for one another
    threads: int
    programs: int  # that are to share a multiprocessor
    atomics: bool  # it adds to global memory that others add to


def compile_only(capability: int) -> list[tuple[triton.compiler.CompiledKernel, int]]:
    """From now on a launch compiles for ``capability`` and is listed in the result, in place of running, with the number of
    programs that share a multiprocessor as the launcher has it: one but of a persistent kernel, which starts no others."""
    target = GPUTarget("cuda", capability, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    )
    chip = tuning.Chip(tuning.generation_of(capability), MULTIPROCESSORS[capability])
    tuning.chip_of = lambda tensor: chip
    run, compiled = JITFunction.run, []

    def compile_instead(kernel, *args, grid, warmup, **options):
        programs = -(-grid[0] // chip.multiprocessors) if kernel.__name__.endswith("_persistent_kernel") else 1
        compiled.append((run(kernel, *args, grid=grid, warmup=True, **options), programs))
        return compiled[-1][0]

    JITFunction.run = compile_instead
    return compiled


def inspect(compiled: triton.compiler.CompiledKernel, programs: int) -> Compiled:
    """Reads the resources and the instructions off the compiled binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("cuobjdump", "--dump-sass", file.name)
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))
    instructions = sorted(set(re.findall(r"\b(?:[HQI]G?MMA|UTC\w*MMA)\b", sass)))
    return Compiled(
        kernel=compiled.metadata.name,
        registers=registers,
        spill_bytes=stack,
        shared_kib=compiled.metadata.shared / 1024,
        instructions=" ".join(instructions),
        has_dot="tt.dot" in compiled.asm["ttir"],
        serialized="GMMA" in " ".join(instructions)
        and "wgmma.mma_async instructions are serialized" in _assembler_notes(compiled),
        threads=32 * compiled.metadata.num_warps,
        programs=programs,
        atomics=bool(re.search(r"\b(?:ATOM|ATOMG|RED|REDG)\.", sass)),
    )


def _assembler_notes(compiled: triton.compiler.CompiledKernel) -> str:
    """What ptxas says of a Hopper kernel; Triton, which has run it already, does not pass that on."""
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        file.write(compiled.asm["ptx"].encode())
        file.flush()
        return _tool("ptxas", "-v", "-arch=sm_90a", file.name, "-o", "/dev/null")


def _tool(name: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    run = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def faults(capability: int, name: str, case: Case, compiled: Compiled) -> list[str]:
    """What is over budget, in words."""
    wanted = {80: "HMMA", 90: "GMMA", 100: "UTC", 120: "MMA"}[capability]
    limit = SHARED_LIMIT_KIB[capability]
    found = []
    allowed = case.spill_bytes
    if allowed is None:
        allowed = ATTENTION_SPILL if compiled.kernel.startswith("attention") else 0
    if compiled.spill_bytes > allowed:
        found.append(f"spills {compiled.spill_bytes} bytes, {allowed} allowed")
    if compiled.shared_kib > limit:
        found.append(f"takes {compiled.shared_kib:.0f} KiB of shared memory, the chip has {limit}")
    registers = -(-compiled.registers // 8) * 8 * compiled.threads * compiled.programs
    if registers > tuning.REGISTERS or compiled.programs * (compiled.shared_kib + 1) > limit + 1:
        found.append(f"does not fit a multiprocessor {compiled.programs} times")
    if case.tensor_cores and compiled.has_dot and wanted not in compiled.instructions:
        found.append(f"uses {compiled.instructions or 'no tensor core instruction'} where {wanted} was expected")
    if case.tensor_cores and compiled.serialized:
        found.append("runs its matrix products one by one (a ptxas note)")
    if compiled.atomics:
        found.append("adds to memory by atomics")
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
    print(f"{'case':42} {'kernel':34} {'registers':>9} {'spill B':>7} {'shared KiB':>10}  tensor cores")
    for name, case in CASES.items():
        chosen = arguments.only in name and (case.default or arguments.all or arguments.only)
        if not chosen or arguments.capability < case.since:
            continue
        launched.clear()
        case.launch()
        for compiled in (inspected(*launch) for launch in dict.fromkeys(launched)):
            seen.add(compiled.kernel)
            row = f"{name:42} {compiled.kernel:34} {compiled.registers:9} {compiled.spill_bytes:7} {compiled.shared_kib:10.1f}"
            print(f"{row}  {compiled.instructions}", flush=True)
            for fault in faults(arguments.capability, name, case, compiled):
                print(f"FAULT {name} {compiled.kernel}: {fault}")
                faulty = True
    missing = set() if arguments.only else kernel_names() - seen
    if arguments.capability < 90:
        missing = {name for name in missing if not name.startswith("fp8")}
    if tuning.gemm_tile(tuning.chip_of(COUNT), None, 1) is None:
        missing = {name for name in missing if not name.endswith("_persistent_kernel")}
    if missing:
        print(f"FAULT no case launches {', '.join(sorted(missing))}")
    return int(faulty or bool(missing))


if __name__ == "__main__":
    sys.exit(main())
