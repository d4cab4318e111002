"""The measuring stages of ``gpu.py``, each run as a process of its own in the environment that has the package."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch

from roberta_fast.benchmarks import measure, operations, report, shapes

LIMITS_GEMM = 8192
UNPADDED = "huggingface-sdpa,torch-varlen,flash-attn,roberta_fast"
ALL = f"{UNPADDED},huggingface-eager,huggingface-compile"
COMPILED = "huggingface-compile-max-autotune,huggingface-compile-reduce-overhead"
DECODER = ["--peers", ALL, "--batch-size", "64", "--longest", "128", "--dense", "64x128"]
ENCODER_ARGUMENTS = {
    "eval": ["--peers", f"{ALL},roberta_fast-deterministic"],
    "train": ["--peers", ALL],
    "mlm": ["--peers", ALL],
    "train-no-dropout": ["--peers", UNPADDED, "--dropout", "0"],
    "mlm-no-dropout": ["--peers", UNPADDED, "--dropout", "0"],
    "seq2seq": DECODER,
    "generate": DECODER,
    "autotune": ["--peers", f"huggingface-sdpa,{COMPILED},roberta_fast", "--title", "max-autotune"] + ["--dense", "256x128"],
}
# The model one precision up, which the gate compares with, has to fit beside its activations.
TRAINING_BATCHES = {
    "roberta-large": ["--batch-size", "32", "--longest", "256", "--dense", "32x128,8x512"],
    "other": ["--batch-size", "128", "--longest", "256", "--dense", "128x128,32x512"],
}
TINY_ARGUMENTS = ["--batch-size", "4", "--longest", "20", "--dense", "2x16", "--repeats", "2"]


def limits(args) -> None:
    """What this GPU's memory and matrix units give at their best: a large copy, and a large product of random matrices."""
    dtype, n = operations.DTYPES[args.device], 64 if args.sizes == "tiny" else LIMITS_GEMM
    source = torch.randn(n * n, device=args.device, dtype=dtype).repeat(1 if args.sizes == "tiny" else 8)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=args.device, dtype=dtype) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    work = {"copy": (2 * source.nbytes / 1e9, "GB/s"), "matmul": (2 * n**3 / 1e12, "TFLOP/s")}
    records = []
    for name, timing in measure.alternate(calls, 20, measure.clock_for(args.device), warm_up_seconds=0.1).items():
        amount, unit = work[name]
        size = f"{source.nbytes >> 20} MiB" if name == "copy" else f"{n}×{n}×{n}"
        records.append(
            {"operation": "limits", "direction": "forward", "size": f"{name} {size}, {unit}", "contender": "torch"}
            | {"seconds": timing.facts(), "rate": amount / timing.median}
        )
    write(args, "limits", records)
    print(report.section(json.loads(args.out.read_text())["runs"][0]))


def operation(args) -> None:
    """Every case of ``bench_<op>.py``. The results are written after each case, so that a time limit keeps those before it."""
    module = importlib.import_module(f"roberta_fast.benchmarks.bench_{args.name}")
    records = []
    for case in module.cases(args.device, shapes.OPERATION_SIZES[args.sizes]):
        records += operations.measure_case(case, 5 if args.sizes == "tiny" else 30)
        write(args, args.name, records)
    print(report.section(json.loads(args.out.read_text())["runs"][0]))
    for record in records:
        if "red" in record:
            print(f"{record['size']} {record['direction']} {record['contender']}: {record['red']}")
    sys.exit(any("red" in record and record["contender"].startswith("roberta_fast") for record in records))


def encode(args) -> None:
    """An encoder table, by the code of ``roberta-fast bench``."""
    from roberta_fast.benchmarks import encoder  # the only stage that needs transformers

    tiny = [*TINY_ARGUMENTS, "--peers", "huggingface-sdpa,roberta_fast"] if args.sizes == "tiny" else []
    commit = ["--commit", args.commit] if args.commit else []
    mode = "eval" if args.kind == "autotune" else args.kind.partition("-")[0]
    batches = TRAINING_BATCHES.get(args.name, TRAINING_BATCHES["other"]) if mode in ("train", "mlm") else []
    common = ["--model", args.name, "--modes", mode, "--device", args.device, "--kernels", "--json", str(args.out), *commit]
    sys.exit(encoder.run([*batches, *ENCODER_ARGUMENTS[args.kind], *common, *tiny]))


def single_texts(args) -> None:
    """The latency of one text."""
    from roberta_fast.benchmarks import latency

    tiny = args.sizes == "tiny"
    peers = {"peers": latency.FILL_PEERS} if tiny else {}
    save(args, [latency.latency(args.name, model_of(args), 2 if tiny else 500, commit=args.commit, **peers).run()])


def fill(args) -> None:
    """Time against what of a batch is real, for batches of several sizes."""
    from roberta_fast.benchmarks import latency

    model, runs = model_of(args), []
    for size in latency.CAPACITIES.get(args.sizes, latency.CAPACITIES["cuda"]):
        runs.append(latency.fill(args.name, model, size, 2 if args.sizes == "tiny" else 20, commit=args.commit).run())
        save(args, runs)


def kernels(args) -> None:
    """What an encoder runs, one by one, and the whole."""
    from roberta_fast.benchmarks import parts

    model, runs = model_of(args), []
    for size in parts.SIZES.get(args.sizes, parts.SIZES["cuda"]):
        runs.append(parts.run(args.name, model, size, 2 if args.sizes == "tiny" else 30, args.commit))
        save(args, runs)


def model_of(args) -> torch.nn.Module:
    """The stock model for inference, where and in what it is measured."""
    return shapes.build_model(args.name).to(args.device, operations.DTYPES[args.device])


def save(args, runs) -> None:
    """Writes what was measured by now, and prints the last of it."""
    args.out.write_text(json.dumps({"runs": runs}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(report.section(runs[-1]), end="\n\n")


def loss_curve(args) -> None:
    """200 steps on real text, in every precision that the device has."""
    from roberta_fast.benchmarks import loss_curve

    tiny = ["--model", "tiny", "--steps", "25", "--seeds", "2"] if args.sizes == "tiny" else ["--model", "minilm"]
    text = ["--text", args.text] if args.text else []
    commit = ["--commit", args.commit] if args.commit else []
    sys.exit(loss_curve.main(["--device", args.device, "--json", str(args.out), *text, *tiny, *commit]))


def write(args, name, records) -> None:
    """The results file of an operation's stage."""
    run = {"kind": "operation", "operation": name, "dtype": str(operations.DTYPES[args.device]).removeprefix("torch.")}
    run |= {"environment": measure.environment(args.device, args.commit), "records": records}
    args.out.write_text(json.dumps({"runs": [run]}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    stages = parser.add_subparsers(required=True)
    for name, function, positional in (
        ("limits", limits, ()),
        ("operation", operation, ("name",)),
        ("encoder", encode, ("name", "kind")),
        ("latency", single_texts, ("name",)),
        ("fill", fill, ("name",)),
        ("parts", kernels, ("name",)),
        ("loss_curve", loss_curve, ()),
    ):
        stage = stages.add_parser(name)
        stage.set_defaults(function=function)
        for argument in positional:
            stage.add_argument(argument)
        stage.add_argument("--out", type=Path, required=True)
        stage.add_argument("--device", default="cuda")
        stage.add_argument("--sizes", default="cuda", choices=tuple(shapes.OPERATION_SIZES))
        stage.add_argument("--commit")
        stage.add_argument("--text", type=Path)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
