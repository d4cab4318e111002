"""``roberta-fast bench``: the encoder against its peers in one run, once all were found to compute the same."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from roberta_fast.benchmarks import measure, report, shapes
from roberta_fast.benchmarks.parity import Gate, Nearness, clear_gradients
from roberta_fast.benchmarks.peers import BASELINE, PEERS, peers_named
from roberta_fast.benchmarks.report import LATENCY

LATENCY_LENGTH = 32
DENSE = {"cpu": [(8, 256)], "cuda": [(256, 128), (64, 512)]}
DTYPES = ("float32", "bfloat16", "float16")


class NotTheSame(Exception):
    """Peers whose results differ from the stock model's; its text says which, where and by how much."""


def run(argv: list[str]) -> int:
    """Runs the command. Returns 0 with the tables printed, 1 with none where a peer's results are wrong; exits with 2 on bad
    arguments."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.report or args.check:
        return report.run(["--check"] if args.check else [])
    try:
        comparisons = _prepare(args)
    except ValueError as error:
        parser.error(str(error))
    if busy := measure.busy():
        print(f"roberta-fast bench: {busy}", file=sys.stderr)
    with measure.threads(args.threads):
        try:
            results = [comparison.run() for comparison in comparisons]
        except NotTheSame as error:
            print(f"No number, for results differ from {BASELINE}'s:\n{error}", file=sys.stderr)
            return 1
    print("\n\n".join(report.section(result) for result in results))
    for path in filter(None, (args.json, args.save and report.RESULTS / f"{report.slug(results[0]['environment'])}.json")):
        report.save(path, results)
    return 0


class Comparison:
    """One table: peers on a model and its batches, in evaluation or with a fine-tuning step.

    model: the stock model on its device, in its dtype. name: what tables call it. title: keeps apart runs that measure the same.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        batches: list[shapes.Batch],
        peers: list[str],
        repeats: int,
        title: str | None = None,
        commit: str | None = None,
    ):
        self.name, self.model, self.batches, self.repeats = name, model, batches, repeats
        self.title, self.commit = title, commit
        self.device, self.dtype = model.device.type, str(model.dtype).removeprefix("torch.")
        self.training, self.busy = model.training, measure.busy()
        self.absent = {p: PEERS[p].reason_against(self.device, self.dtype, self.training) for p in peers}
        self.peers = [p for p in peers if self.absent[p] is None]

    def run(self) -> dict:
        """Checks every peer on every batch, then times. Raises NotTheSame, with nothing timed, where one is wrong."""
        environment = measure.environment(self.device, self.commit)  # of the source as it was loaded
        functions = {BASELINE: PEERS[BASELINE].build(self.model)}
        for name in self.peers:
            if name not in functions:
                functions[name] = PEERS[name].build(self.model)
        nearness = self._gate(functions)
        rows = [row for batch in self.batches for row in self._rows(functions, batch, nearness)]
        return {
            "kind": "encoder",
            "title": self.title,
            "model": self.name,
            "mode": "train" if self.training else "eval",
            "dtype": self.dtype,
            "environment": environment,
            "busy": self.busy,
            "peak_tflops": measure.peak_tflops(self.device, self.dtype),
            "batches": {batch.name: batch.facts() for batch in self.batches},
            "rows": rows,
            "absent": {name: reason for name, reason in self.absent.items() if reason},
        }

    def _gate(self, functions) -> dict[tuple[str, str], Nearness]:
        nearness, wrong = {}, []
        self._set_training(functions, False)
        for batch in self.batches:
            gate = Gate(self.model, functions[BASELINE], batch, self._labels(batch))
            for name in list(functions):
                try:
                    nearness[name, batch.name] = gate.check(functions[name])
                except AssertionError as error:
                    wrong.append(f"{name}, {batch.name} batch: {error}")
                except torch.OutOfMemoryError:
                    self.absent[name] = f"out of memory on the {batch.name} batch"
                    del functions[name]
        if wrong:
            raise NotTheSame("\n".join(wrong))
        self._set_training(functions, self.training)
        return nearness

    def _rows(self, functions, batch, nearness):
        steps = {name: self._step(function, batch) for name, function in functions.items()}
        # A short call is repeated more often for the same certainty.
        repeats = self.repeats * 4 if batch.name == LATENCY else self.repeats
        timings = measure.alternate(steps, repeats, measure.clock_for(self.device), warm_up_seconds=0.2)
        flops = shapes.forward_flops(self.model.config, batch.lengths) * (3 if self.training else 1)
        for name, timing in timings.items():
            yield {
                "batch": batch.name,
                "peer": name,
                "seconds": timing.facts(),
                "tokens_per_s": batch.tokens / timing.median,
                "ratio": timing.times_faster(timings[BASELINE]),
                "tflops": flops / timing.median / 1e12,
                "peak_bytes": None if PEERS[name].compiled else measure.peak_memory(steps[name], self.device),
                "max_abs": nearness[name, batch.name].max_abs,
                "cosine": nearness[name, batch.name].cosine,
            }

    def _step(self, function: Callable, batch: shapes.Batch) -> Callable[[], object]:
        inputs, labels = batch.inputs(), self._labels(batch)
        if labels is None:
            return torch.no_grad()(lambda: function(**inputs)[0])

        def step():
            clear_gradients(self.model.parameters())
            loss = function(**inputs, labels=labels)[0]
            loss.backward()
            return loss

        return step

    def _labels(self, batch):
        rows = torch.arange(batch.input_ids.shape[0], device=batch.input_ids.device)
        return rows % 2 if self.training else None

    @staticmethod
    def _set_training(functions, training):
        for function in functions.values():
            if isinstance(function, nn.Module):
                function.train(training)


def _parser():
    parser = argparse.ArgumentParser(prog="roberta-fast bench", description=__doc__.replace("`", ""))
    add = parser.add_argument
    add("--model", default="roberta-base", help=f"a checkpoint folder, or one of {', '.join(shapes.MODELS)} (random weights)")
    add("--text", type=Path, help="a file of texts, one a line: the ragged batch is made of them, by the model's tokenizer")
    add("--lengths", type=_integers, help="lengths of the ragged batch, e.g. 12,40,92 (default: like English sentences)")
    add("--longest", type=_positive, help="longest length of the ragged batch (default: 92; 256 on cuda)")
    add("--batch-size", type=_positive, help="sequences in the ragged batch (default: 32; 256 on cuda)")
    add("--dense", type=_batch_shapes, help="batches without padding, BxS,... (default: 8x256; 256x128,64x512 on cuda)")
    add("--threads", type=_positive, help="CPU threads (default: torch's)")
    add("--peers", help=f"comma-separated, or all; there are {', '.join(PEERS)}")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--dtype", choices=DTYPES, help="default: float32; bfloat16 on cuda")
    add("--repeats", type=_positive, default=7, help="rounds, each peer once a round (default: 7)")
    add("--train", action="store_true", help="also a fine-tuning step, forward and backward")
    add("--train-only", action="store_true", help="that alone")
    add("--json", type=Path, help="write the results there, in place of earlier ones of the same kind")
    add("--save", action="store_true", help="write them to benchmarks/results, under this machine's name")
    add("--title", help="named so, this run and others that measure the same stay side by side in the results")
    add("--commit", help="of the source, where it is no git checkout")
    add("--report", action="store_true", help="only write the tables of benchmarks/results into the README")
    add("--check", action="store_true", help="only check that the README's tables are those of benchmarks/results")
    return parser


def _prepare(args) -> list[Comparison]:
    """The comparisons that the arguments ask for. Raises ValueError naming the argument that does not fit."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("argument --device: 'cuda' needs a CUDA device and a CUDA build of torch")
    on_gpu = device == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    peers = _argument("--peers", lambda text: peers_named(text, device), args.peers)
    modes = (True,) if args.train_only else (False, True) if args.train else (False,)
    models = [_argument("--model", lambda name, mode=mode: shapes.build_model(name, training=mode), args.model) for mode in modes]
    count, longest = args.batch_size or (256 if on_gpu else 32), args.longest or (256 if on_gpu else 92)
    comparisons = []
    for model in models:
        ragged = _ragged(args, model.config, count, longest)
        batches = [
            ragged,
            *_argument("--dense", lambda s, m=model: _dense(s, m.config), args.dense or _fitting(DENSE[device], model.config)),
        ]
        if not model.training:
            batches.append(shapes.batch_of(LATENCY, [LATENCY_LENGTH], model.config))
        model, batches = model.to(device, dtype), [batch.to(device) for batch in batches]
        comparisons.append(Comparison(args.model, model, batches, peers, args.repeats, args.title, args.commit))
    return comparisons


def _fitting(sizes, config):
    """The default sizes, no longer than the model takes."""
    return list(dict.fromkeys((rows, min(seqlen, shapes.longest_sequence(config))) for rows, seqlen in sizes))


def _dense(sizes, config):
    names = ["dense"] if len(sizes) == 1 else [f"dense S={seqlen}" for _, seqlen in sizes]
    return [shapes.batch_of(name, [seqlen] * rows, config) for name, (rows, seqlen) in zip(names, sizes, strict=True)]


def _ragged(args, config, count, longest):
    if args.text is None:
        lengths = args.lengths or shapes.ragged_lengths(count, longest)
        argument = "--lengths" if args.lengths else "--longest"
        return _argument(argument, lambda values: shapes.batch_of("ragged", values, config), lengths)
    if args.lengths:
        raise ValueError("argument --lengths: the texts of --text have lengths of their own")
    return _argument("--text", lambda path: _text_batch(path, args.model, config, count), args.text)


def _text_batch(path, model, config, count):
    from transformers import AutoTokenizer

    if model in shapes.MODELS:
        raise ValueError(f"{model} has random weights and no tokenizer; give --model a checkpoint folder")
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is no file")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < count:
        raise ValueError(f"{str(path)!r} has {len(lines)} texts, and --batch-size wants {count}")
    spread = [lines[i * len(lines) // count] for i in range(count)]
    return shapes.batch_of_text("ragged", spread, AutoTokenizer.from_pretrained(model), config)


def _argument(name, function, value):
    try:
        return function(value)
    except ValueError as error:
        raise ValueError(f"argument {name}: {error}") from None


def _positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _integers(text):
    return [_positive(part.strip()) for part in text.split(",")]


def _batch_shapes(text):
    sizes = [part.strip().partition("x") for part in text.split(",")]
    if not all(rows.isdigit() and seqlen.isdigit() and int(rows) and int(seqlen) for rows, _, seqlen in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not BxS, e.g. 8x256, or several of them")
    return [(int(rows), int(seqlen)) for rows, _, seqlen in sizes]
