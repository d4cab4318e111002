"""``roberta-fast bench``: the encoder against its peers in one run, once all were found to compute the same."""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from roberta_fast.benchmarks import measure, report, scaling, shapes
from roberta_fast.benchmarks.comparison import Comparison, NotTheSame
from roberta_fast.benchmarks.peers import BASELINE, PEERS, peers_named
from roberta_fast.benchmarks.report import LATENCY
from roberta_fast.cli import positive
from roberta_fast.families import longest_sequence

LATENCY_LENGTH = 32
DENSE = {"cpu": [(8, 256)], "cuda": [(256, 128), (64, 512)]}
LONGEST = 8192
DTYPES = ("float32", "bfloat16", "float16")


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
    cores, threads = os.cpu_count(), args.threads or 1
    too_many = f"--threads {threads} on {cores} cores: threads wait for each other" if threads > cores else None
    for warning in filter(None, (measure.busy(), too_many)):
        print(f"roberta-fast bench: {warning}", file=sys.stderr)
    results = []
    with measure.threads(args.threads):
        for comparison in comparisons:
            try:
                results.append(comparison.run())
            except NotTheSame as error:
                print(f"No number, for results differ from {BASELINE}'s:\n{error}", file=sys.stderr)
                return 1
            print(report.section(results[-1]), end="\n\n", flush=True)
            own_file = report.RESULTS / f"{report.slug(results[-1]['environment'])}.json"
            for path in filter(None, (args.json, args.save and own_file)):
                report.save(path, results[-1:])
    missing = args.plots is not None and report.draw(results, args.plots)
    return int(missing or (args.save and report.draw()))


def _parser():
    parser = argparse.ArgumentParser(prog="roberta-fast bench", description=__doc__.replace("`", ""))
    add = parser.add_argument
    models = ", ".join(shapes.MODELS)
    add("--model", help=f"a checkpoint folder, or one of {models} (random weights; default: roberta-base)")
    add("--text", type=Path, help="a file of texts, one a line: the ragged batch is made of them, by the model's tokenizer")
    add("--lengths", type=_integers, help="lengths of the ragged batch, e.g. 12,40,92 (default: like English sentences)")
    add("--longest", type=positive, help="longest length of the ragged batch (default: 92; 256 on cuda)")
    add("--batch-size", type=positive, help="sequences in the ragged batch (default: 32; 256 on cuda)")
    add("--dense", type=_batch_shapes, help="batches without padding, BxS,... (default: 8x256; 256x128,64x512 on cuda)")
    add("--threads", type=positive, help="CPU threads (default: torch's)")
    add("--peers", help=f"comma-separated, or all (default: those that are quick to set up); there are {', '.join(PEERS)}")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--dtype", choices=DTYPES, help="default: float32; bfloat16 on cuda")
    add("--repeats", type=positive, default=7, help="rounds, each peer once a round (default: 7)")
    modes = ", ".join(f"{mode} ({what})" for mode, what in shapes.MODES.items())
    add("--modes", type=_modes, default=("eval",), help=f"any of {modes}; default: the first")
    add("--dropout", type=_probability, help="all dropout probabilities of the model (default: as it has them)")
    add("--kernels", action="store_true", help="also what a call spends its time in, by kind of kernel")
    add("--scaling", action="store_true", help=f"instead: time against real tokens, padding, and length to {LONGEST}")
    add("--json", type=_results_file, help="write the results there, in place of earlier ones of the same kind")
    add("--plots", type=_folder, help="draw the plots of this run into that folder")
    add(
        "--save",
        action="store_true",
        help="write them to benchmarks/results, under this machine's name, and draw its plots",
    )
    add("--title", help="named so, this run and others that measure the same stay side by side in the results")
    add("--commit", help="of the source, where it is no git checkout")
    add("--report", action="store_true", help="only write the tables and plots of benchmarks/results for the README")
    add("--check", action="store_true", help="only check that the README's tables and plots are those of benchmarks/results")
    return parser


def _prepare(args) -> list[Comparison]:
    """The comparisons that the arguments ask for. Raises ValueError naming the argument that does not fit."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("argument --device: 'cuda' needs a CUDA device and a CUDA build of torch")
    on_gpu = device == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if on_gpu else "float32"))
    peers = _argument("--peers", lambda text: peers_named(text, device), args.peers)
    if args.scaling:
        return [_scaling(args, device, dtype, peers if args.peers else scaling.peers(device))]
    args.model = "roberta-base" if args.model is None else args.model
    models = {
        mode: _argument("--model", lambda name, m=mode: shapes.build_model(name, mode=m, dropout=args.dropout), args.model)
        for mode in args.modes
    }
    count, longest = args.batch_size or (256 if on_gpu else 32), args.longest or (256 if on_gpu else 92)
    comparisons = []
    for mode, model in models.items():
        config = shapes.encoder_config(model.config)
        sizes = args.dense or _fitting(DENSE[device], config)
        batches = [_ragged(args, config, count, longest), *_argument("--dense", lambda s, c=config: _dense(s, c), sizes)]
        if mode == "eval":
            batches.append(shapes.batch_of(LATENCY, [LATENCY_LENGTH], config))
        model, batches = model.to(device, dtype), [batch.to(device) for batch in batches]
        batches = [replace(batch, decoded=model.config.is_encoder_decoder) for batch in batches]
        rest = args.repeats, args.title, args.commit, args.dropout, args.kernels
        comparisons.append(Comparison(args.model, model, mode, batches, peers, *rest))
    return comparisons


def _scaling(args, device, dtype, peers):
    if args.modes != ("eval",):
        raise ValueError(f"argument --modes: --scaling measures inference, not {','.join(args.modes)}")
    for name, given in {"--text": args.text, "--lengths": args.lengths, "--dense": args.dense}.items():
        if given:
            raise ValueError(f"argument {name}: the batches of --scaling have lengths of their own")
    name = scaling.MODEL if args.model is None else args.model
    model = _argument("--model", shapes.build_model, name)
    longest = args.longest or min(LONGEST, longest_sequence(model.config))
    count = args.batch_size or scaling.SEQUENCES[device]
    curves = _argument("--longest", lambda length: scaling.batches(model.config, count, length), longest)
    curves = {curve: [batch.to(device) for batch in points] for curve, points in curves.items()}
    return scaling.Scaling(name, model.to(device, dtype), curves, peers, args.repeats, args.title, args.commit)


def _fitting(sizes, config):
    """The default sizes, no longer than the model takes."""
    return list(dict.fromkeys((rows, min(seqlen, longest_sequence(config))) for rows, seqlen in sizes))


def _dense(sizes, config):
    names = ["dense"] if len(sizes) == 1 else [f"dense S={seqlen}" for _, seqlen in sizes]
    return [shapes.batch_of(name, [seqlen] * rows, config) for name, (rows, seqlen) in zip(names, sizes, strict=True)]


def _ragged(args, config, count, longest):
    if args.text is None:
        for name in ("longest", "batch_size"):
            if args.lengths and getattr(args, name):
                raise ValueError(f"argument --{name.replace('_', '-')}: --lengths says what the ragged batch is")
        if longest > longest_sequence(config):
            raise ValueError(f"argument --longest: {longest} is above {longest_sequence(config)}, which the model takes")
        lengths = args.lengths or shapes.ragged_lengths(count, longest)
        argument = "--lengths" if args.lengths else "--batch-size"
        return _argument(argument, lambda values: shapes.batch_of("ragged", values, config), lengths)
    if args.lengths:
        raise ValueError("argument --lengths: the texts of --text have lengths of their own")
    return _argument("--text", lambda path: _text_batch(path, args.model, config, count), args.text)


def _text_batch(path, model, config, count):
    from transformers import AutoTokenizer

    if not path.is_file():
        raise ValueError(f"{str(path)!r} is no file")
    if model in shapes.MODELS:
        raise ValueError(f"{model} has random weights and no tokenizer; give --model a checkpoint folder")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is no text in UTF-8: {error.reason} at byte {error.start}") from None
    if len(lines) < count:
        raise ValueError(f"{str(path)!r} has {len(lines)} texts, and --batch-size wants {count}")
    spread = [lines[i * len(lines) // count] for i in range(count)]
    return shapes.batch_of_text("ragged", spread, AutoTokenizer.from_pretrained(model), config)


def _argument(name, function, value):
    try:
        return function(value)
    except ValueError as error:
        raise ValueError(f"argument {name}: {error}") from None


def _modes(text):
    modes = tuple(part.strip() for part in text.split(","))
    unknown = [mode for mode in modes if mode not in shapes.MODES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(shapes.MODES)}")
    return modes


def _probability(text):
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 0 on and below 1")
    return value


def _results_file(text):
    path = Path(text)
    _folder(path.parent)
    if path.exists():
        try:
            report.load_file(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise argparse.ArgumentTypeError(f"{text!r} holds no results to write beside: {error}") from None
    return path


def _folder(text):
    """A folder to write to, which may be yet to be made."""
    found = next(path for path in (Path(text).absolute(), *Path(text).absolute().parents) if path.exists())
    if not (found.is_dir() and os.access(found, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{str(found)!r} is no folder to write to")
    return Path(text)


def _integers(text):
    return [positive(part.strip()) for part in text.split(",")]


def _batch_shapes(text):
    sizes = [part.strip().partition("x") for part in text.split(",")]
    if not all(rows.isdigit() and seqlen.isdigit() and int(rows) and int(seqlen) for rows, _, seqlen in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not BxS, e.g. 8x256, or several of them")
    return [(int(rows), int(seqlen)) for rows, _, seqlen in sizes]
