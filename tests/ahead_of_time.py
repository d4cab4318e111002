"""Compiles every Triton kernel for NVIDIA's architectures without a GPU, and holds the result to its budget.

``python tests/ahead_of_time.py 90 [--all] [--only NAME]`` runs each case of ``CASES``: a call of a launcher on meta tensors, in a
process where a launch compiles for the given compute capability instead of running. So what is checked is what the launchers
ask for: their tiles, flags and alignment; and a launcher that reads a value on the host fails. Prints one line per kernel:
registers and spilled bytes a thread, shared memory a block. Exits with 1 where one is over its budget: spills above the
case's allowance, shared memory above the chip's limit, a matrix product without the generation's own tensor core instructions, or
on Hopper with ones that wait for each other; an atomic addition, whose order would differ from run to run.

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
from roberta_fast.kernels import add_layer_norm, attention, cross_entropy, feed_forward, linear, linear_gelu, pack, tuning

SHARED_LIMIT_KIB = {80: 163, 90: 227, 100: 227, 120: 99}
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148, 120: 170}


@dataclass(frozen=True)
class Case:
    """A launcher call whose kernels are to be compiled.

    launch: calls the launcher on meta tensors. default: part of the short run; others need ``--all``.
    tensor_cores: its matrix products must use them (not so in float32).
    spill_bytes: most bytes a thread may spill in any of its kernels; None: ``ATTENTION_SPILL`` in attention, and 0 elsewhere.
    """

    launch: Callable[[], object]
    default: bool = False
    tensor_cores: bool = True
    spill_bytes: int | None = None


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without data: 16-byte aligned, as allocations on the device are."""
    return torch.empty(shape, dtype=dtype, device="meta")


COUNT, SEED = meta(1, dtype=torch.int32), meta(1, dtype=torch.int64)


def both_linear(dtype: torch.dtype, inner: int = 768, outer: int = 768, precision: str = "ieee") -> None:
    """Forward with all that it can add, and backward, with float32 products in ``precision``."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    x, weight, bias, dy = (meta(*shape, dtype=dtype) for shape in ((8192, inner), (outer, inner), (outer,), (8192, outer)))
    linear.linear_fwd(x, weight, bias, dy, COUNT)
    linear.linear_bwd(dy, x, weight, True, COUNT)
    torch.backends.cuda.matmul.fp32_precision = before


def both_linear_gelu(dtype: torch.dtype, approximate: str = "none", save: bool = True, inner: int = 768) -> None:
    """Forward, and of the backward pass the element-wise half: its GEMMs are ``linear``'s."""
    x, weight, bias, dy = (meta(*shape, dtype=dtype) for shape in ((8192, inner), (3072, inner), (3072,), (8192, 3072)))
    linear_gelu.linear_gelu_fwd(x, weight, bias, approximate, save, COUNT)
    linear_gelu.linear_gelu_bwd(dy, dy, x, weight, True, approximate, None)


def feed_forward_backward(
    dtype: torch.dtype, approximate: str = "none", recompute: bool = False, hidden: int = 768, precision: str = "ieee"
) -> None:
    """All gradients, the products of which the host knows the number of rows; the others are ``linear``'s."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    inner = 4 * hidden
    x, u, weight1, weight2 = (meta(*s, dtype=dtype) for s in ((8192, hidden), (8192, inner), (inner, hidden), (hidden, inner)))
    activated = None if recompute else u
    feed_forward.feed_forward_bwd(x, u, activated, x, weight1, weight2, [True] * 5, approximate, COUNT)
    torch.backends.cuda.matmul.fp32_precision = before


def both_add_layer_norm(x: torch.dtype, residual: torch.dtype | None, dropout_p: float, hidden: int = 768) -> None:
    """Forward and backward with float32 weights."""
    z = None if residual is None else meta(8192, hidden, dtype=residual)
    x, dy = meta(8192, hidden, dtype=x), meta(8192, hidden, dtype=residual or x)
    weight, statistics = meta(hidden, dtype=torch.float32), meta(8192, dtype=torch.float32)
    seed = SEED if dropout_p else None
    add_layer_norm.add_layer_norm_fwd(x, z, weight, weight, 1e-5, dropout_p, seed, COUNT)
    add_layer_norm.add_layer_norm_bwd(dy, x, z, weight, statistics, statistics, dropout_p, seed, COUNT)


def all_of_pack(dtype: torch.dtype, mask: torch.dtype = torch.int64) -> None:
    """Indices of a mask, rows in, rows out."""
    indices, _, count, *_ = pack.pack_indices(meta(32, 512, dtype=mask), 8192)
    rows = pack.pack(meta(32, 512, 768, dtype=dtype), indices, count)
    pack.unpack(rows, indices, 32, 512, count)


def both_attention(
    dtype: torch.dtype, head_dim: int = 64, longest: int = 512, dropout_p: float = 0.0, causal: bool = False,
    query_only: bool = False, deterministic: bool = False, precision: str = "ieee",
) -> None:  # fmt: skip
    """Forward and backward of a fused projection's views, segments of at most ``longest`` rows, begun in an order."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    qkv, out = meta(8192, 3, 12, head_dim, dtype=dtype), meta(8192, 12, head_dim, dtype=dtype)
    bounds, order = (meta(size, dtype=torch.int32) for size in (33, 32))
    skip, seed = order if query_only else None, SEED if dropout_p else None
    rest = bounds, bounds, longest, longest, 0.125, causal, skip, dropout_p, seed, deterministic, order
    attention.attention_fwd(*qkv.unbind(1), *rest)
    attention.attention_bwd(out, *qkv.unbind(1), out, meta(12, 8192, dtype=torch.float32), *rest)
    torch.backends.cuda.matmul.fp32_precision = before


def losses(dtype: torch.dtype, classes: int = 50265, with_gradient: bool = True) -> None:
    """A chunk of logits, its rows aligned as the operation aligns them."""
    logits = meta(1024, -(-classes // 64) * 64, dtype=dtype)[:, :classes]
    cross_entropy.cross_entropy_fwd(logits, meta(1024, dtype=torch.int64), -100, 0.0, with_gradient)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Attention holds two or three tiles at once, its gradients with dropout a mask beside them: a few values that a loop does not
# change may leave the registers. All other kernels keep theirs.
ATTENTION_SPILL = 128

# Entries are "<op>/<variant>": Case(...). The default ones must launch every kernel of kernels/, which is checked.
CASES: dict[str, Case] = {
    "linear/bfloat16": Case(lambda: both_linear(BF16), default=True),
    "linear/float16": Case(lambda: both_linear(FP16)),
    "linear/bfloat16, odd": Case(lambda: both_linear(BF16, 1023, 777)),
    "linear/bfloat16, wide": Case(lambda: both_linear(BF16, 1024, 4096)),
    "linear/float32": Case(lambda: both_linear(FP32), tensor_cores=False),
    "linear/float32, odd": Case(lambda: both_linear(FP32, 1023, 777), tensor_cores=False),
    "linear/tf32": Case(lambda: both_linear(FP32, precision="tf32"), tensor_cores=False),
    "linear_gelu/bfloat16": Case(lambda: both_linear_gelu(BF16), default=True),
    "linear_gelu/bfloat16, inference": Case(lambda: both_linear_gelu(BF16, save=False)),
    "linear_gelu/bfloat16, odd": Case(lambda: both_linear_gelu(BF16, inner=1023)),
    "linear_gelu/bfloat16, tanh": Case(lambda: both_linear_gelu(BF16, "tanh")),
    "linear_gelu/float16": Case(lambda: both_linear_gelu(FP16)),
    "linear_gelu/float16, inference": Case(lambda: both_linear_gelu(FP16, save=False)),
    "linear_gelu/float32": Case(lambda: both_linear_gelu(FP32), tensor_cores=False),
    "linear_gelu/float32, tanh": Case(lambda: both_linear_gelu(FP32, "tanh", save=False), tensor_cores=False),
    "feed_forward/bfloat16": Case(lambda: feed_forward_backward(BF16), default=True),
    "feed_forward/bfloat16, recomputed": Case(lambda: feed_forward_backward(BF16, recompute=True), default=True),
    "feed_forward/bfloat16, tanh": Case(lambda: feed_forward_backward(BF16, "tanh")),
    "feed_forward/bfloat16, odd": Case(lambda: feed_forward_backward(BF16, recompute=True, hidden=777)),
    "feed_forward/float16": Case(lambda: feed_forward_backward(FP16)),
    "feed_forward/float16, tanh": Case(lambda: feed_forward_backward(FP16, "tanh")),
    "feed_forward/float16, recomputed": Case(lambda: feed_forward_backward(FP16, recompute=True)),
    "feed_forward/float32": Case(lambda: feed_forward_backward(FP32, recompute=True), tensor_cores=False),
    "feed_forward/tf32": Case(lambda: feed_forward_backward(FP32, recompute=True, precision="tf32"), tensor_cores=False),
    "add_layer_norm/bfloat16, dropout": Case(lambda: both_add_layer_norm(BF16, BF16, 0.1), default=True),
    "add_layer_norm/bfloat16": Case(lambda: both_add_layer_norm(BF16, BF16, 0.0, 1024)),
    "add_layer_norm/MiniLM, no residual": Case(lambda: both_add_layer_norm(BF16, None, 0.0, 384)),
    "add_layer_norm/float32 residual": Case(lambda: both_add_layer_norm(BF16, FP32, 0.1)),
    "add_layer_norm/float32, widest": Case(lambda: both_add_layer_norm(FP32, FP32, 0.1, 4096)),
    "attention/bfloat16": Case(lambda: both_attention(BF16)),
    "attention/bfloat16, dropout": Case(lambda: both_attention(BF16, dropout_p=0.1), default=True),
    "attention/bfloat16, dropout, S=128": Case(lambda: both_attention(BF16, longest=128, dropout_p=0.1), default=True),
    "attention/bfloat16, S=128": Case(lambda: both_attention(BF16, longest=128)),
    "attention/bfloat16, S=64": Case(lambda: both_attention(BF16, longest=64)),
    "attention/bfloat16, dropout, S=64": Case(lambda: both_attention(BF16, longest=64, dropout_p=0.1), default=True),
    "attention/bfloat16, causal, S=128": Case(lambda: both_attention(BF16, longest=128, causal=True)),
    "attention/bfloat16, causal, dropout, S=64": Case(lambda: both_attention(BF16, longest=64, dropout_p=0.1, causal=True)),
    "attention/float16, S=128": Case(lambda: both_attention(FP16, longest=128)),
    "attention/bfloat16, S=32": Case(lambda: both_attention(BF16, longest=32), tensor_cores=False),
    "attention/bfloat16, query only": Case(lambda: both_attention(BF16, query_only=True)),
    "attention/bfloat16, query only, S=128": Case(lambda: both_attention(BF16, 64, 128, 0.1, query_only=True)),
    "attention/bfloat16, causal": Case(lambda: both_attention(BF16, causal=True)),
    "attention/bfloat16, causal, dropout": Case(lambda: both_attention(BF16, dropout_p=0.1, causal=True)),
    "attention/bfloat16, deterministic": Case(lambda: both_attention(BF16, longest=32, deterministic=True)),
    "attention/float16": Case(lambda: both_attention(FP16)),
    "attention/float16, dropout": Case(lambda: both_attention(FP16, dropout_p=0.1)),
    "attention/float32": Case(lambda: both_attention(FP32), tensor_cores=False),
    "attention/float32, D=128, dropout": Case(lambda: both_attention(FP32, 128, dropout_p=0.1), False, False, spill_bytes=320),
    "attention/tf32": Case(lambda: both_attention(FP32, precision="tf32"), tensor_cores=False),
    **{f"attention/D={d}": Case(lambda d=d: both_attention(BF16, d)) for d in (16, 24, 32, 48, 80)},
    **{f"attention/D={d}, dropout": Case(lambda d=d: both_attention(BF16, d, dropout_p=0.1)) for d in (16, 24, 32, 48, 80)},
    "attention/D=128": Case(lambda: both_attention(BF16, 128)),
    "attention/D=128, dropout": Case(lambda: both_attention(BF16, 128, dropout_p=0.1)),
    **{f"attention/D={d}, S=128": Case(lambda d=d: both_attention(BF16, d, 128, 0.1)) for d in (32, 128)},
    **{f"attention/D={d}, S=64": Case(lambda d=d: both_attention(BF16, d, 64)) for d in (24, 32, 128)},
    "cross_entropy/bfloat16": Case(lambda: losses(BF16), default=True),
    "cross_entropy/bfloat16, loss alone": Case(lambda: losses(BF16, with_gradient=False)),
    "cross_entropy/float32, small vocabulary": Case(lambda: losses(FP32, 1000)),
    "pack/bfloat16": Case(lambda: all_of_pack(BF16), default=True),
    "pack/float32, bool mask": Case(lambda: all_of_pack(FP32, torch.bool)),
}


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
    atomics: bool  # it adds to global memory that others add to


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
    instructions = sorted(set(re.findall(r"\b(?:[HQI]G?MMA|UTC\w*MMA)\b", sass)))
    return Compiled(
        kernel=compiled.metadata.name,
        registers=registers,
        spill_bytes=stack,
        shared_kib=compiled.metadata.shared / 1024,
        instructions=" ".join(instructions),
        has_dot="tt.dot" in compiled.asm["ttir"],
        atomics=bool(re.search(r"\b(?:ATOM|ATOMG|RED|REDG)\.", sass)),
        serialized="HGMMA" in instructions and "wgmma.mma_async instructions are serialized" in _assembler_notes(compiled),
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
    wanted = {80: "HMMA", 90: "HGMMA", 100: "UTC", 120: "MMA"}[capability]
    limit = SHARED_LIMIT_KIB[capability]
    found = []
    allowed = case.spill_bytes
    if allowed is None:
        allowed = ATTENTION_SPILL if name.startswith("attention/") else 0
    if compiled.spill_bytes > allowed:
        found.append(f"spills {compiled.spill_bytes} bytes, {allowed} allowed")
    if compiled.shared_kib > limit:
        found.append(f"takes {compiled.shared_kib:.0f} KiB of shared memory, the chip has {limit}")
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
        if arguments.only not in name or not (case.default or arguments.all or arguments.only):
            continue
        launched.clear()
        case.launch()
        for compiled in map(inspected, dict.fromkeys(launched)):
            seen.add(compiled.kernel)
            row = f"{name:42} {compiled.kernel:34} {compiled.registers:9} {compiled.spill_bytes:7} {compiled.shared_kib:10.1f}"
            print(f"{row}  {compiled.instructions}", flush=True)
            for fault in faults(arguments.capability, name, case, compiled):
                print(f"FAULT {name} {compiled.kernel}: {fault}")
                faulty = True
    missing = set() if arguments.only else kernel_names() - seen
    if missing:
        print(f"FAULT no case launches {', '.join(sorted(missing))}")
    return int(faulty or bool(missing))


if __name__ == "__main__":
    sys.exit(main())
