"""Does a fast model learn as the stock one does? Masked-language-model training on real text, both on the same batches.

``python benchmarks/loss_curve.py --text FILE --save`` trains from equal parameters, in equal order, with dropout: the stock model
several times, each with other dropout, which shows how far loss curves lie apart by chance, and the accelerated one once. It
follows if it is no farther from the stock curves than one more of them might be. Exits with 1 where it does not.
"""

import argparse
import copy
import math
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, PreTrainedTokenizerBase

import roberta_fast
from roberta_fast.benchmarks import measure, report, shapes
from roberta_fast.benchmarks.plots import WINDOW, windows
from roberta_fast.cli import positive
from roberta_fast.training.bpe import byte_level_bpe

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SENTENCES = Path(roberta_fast.__file__).with_name("sentences.txt")
# The root of the quantile of F(8, 16) that chance alone exceeds once in a thousand times: eight windows, three stock curves.
LIMIT = 2.5


def train(model: nn.Module, batches: Sequence[dict], precision: str, seed: int, learning_rate: float) -> list[float]:
    """The loss at each step of fused AdamW, a step a batch.

    precision: float32, or that of autocast around float32 parameters; float16 with a gradient scaler. seed: of dropout.
    """
    device, half = model.device.type, precision != "float32"
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=precision == "float16")
    losses = []
    torch.manual_seed(seed)
    for batch in batches:
        with torch.autocast(device, PRECISIONS[precision] if half else None, enabled=half):
            loss = model(**batch).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach().float())
    return torch.stack(losses).tolist()


def distance(stock: Sequence[Sequence[float]], fast: Sequence[float]) -> float:
    """How far a curve is from the mean of k stock ones, in units of what is expected of one more stock curve.

    The root mean square, over windows of 25 steps, of (fast - mean) / (s √(1 + 1/k)), all of them means over the window; s is the
    stock curves' standard deviation, pooled over the windows.
    """
    columns = list(zip(*(windows(curve) for curve in stock), strict=True))
    deviation = math.sqrt(statistics.mean(statistics.variance(column) for column in columns))
    away = [ours - statistics.mean(column) for ours, column in zip(windows(fast), columns, strict=True)]
    return math.sqrt(statistics.mean(d * d for d in away)) / (deviation * math.sqrt(1 + 1 / len(stock)))


def compare(model: nn.Module, batches: Sequence[dict], precision: str, seeds: int, learning_rate: float) -> dict:
    """What a result records of the curves: those of stock and fast copies of ``model``, and whether the fast one follows."""
    stock = [train(copy.deepcopy(model), batches, precision, seed, learning_rate) for seed in range(seeds)]
    fast = roberta_fast.accelerate_model(copy.deepcopy(model), on_unsupported="error")
    curve = train(fast, batches, precision, 0, learning_rate)
    away = distance(stock, curve)
    curves = {"stock": stock, "roberta_fast": [curve]}
    rounded = {name: [[round(loss, 4) for loss in curve] for curve in found] for name, found in curves.items()}
    return {"dtype": precision, "curves": rounded, "distance": away, "limit": LIMIT, "follows": away <= LIMIT}


def masked_batches(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, steps: int, batch_size: int, longest: int, device: str
) -> list[dict]:
    """Batches of texts in a fixed order, from the start again where they run out, 15% of their tokens chosen to be predicted."""
    chosen = [texts[i % len(texts)] for i in range(steps * batch_size)]
    encoded = tokenizer(chosen, truncation=True, max_length=longest, return_special_tokens_mask=True)
    rows = [{name: values[i] for name, values in encoded.items()} for i in range(len(chosen))]
    collate = DataCollatorForLanguageModeling(tokenizer, seed=0)

    def masked(rows):
        batch = collate(rows)
        return batch if (batch["labels"] != -100).any() else masked(rows)  # the mean of no loss is no number

    batches = (masked(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size))
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


def lines_of(path: Path) -> list[str]:
    """The lines of at least four words, in an order that is always the same."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if len(line.split()) >= 4]
    random.Random(0).shuffle(lines)
    return lines


def main(argv: list[str] | None = None) -> int:
    """Trains, prints the tables, and returns 1 where a curve does not follow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, default=SENTENCES, help="a file of texts, one a line (default: a few sentences, over and over)")
    add("--model", default="mini", help=f"a checkpoint folder, or one of {', '.join(shapes.MODELS)} (random weights)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precisions", help=f"any of {','.join(PRECISIONS)} (default: the first two; all on cuda)")
    add("--steps", type=positive, default=200, help="whole windows of 25 (default: 200)")
    add("--batch-size", type=positive, default=8)
    add("--longest", type=positive, default=64, help="tokens of a text (default: 64)")
    add("--seeds", type=positive, default=3, help="stock models, at least two (default: 3)")
    add("--learning-rate", type=float, default=5e-4)
    add("--json", type=Path, help="write the results there, in place of earlier ones of the same kind")
    add("--save", action="store_true", help="write them to benchmarks/results, under this machine's name, and draw the plots")
    add("--commit", help="of the source, where it is no git checkout")
    args = parser.parse_args(argv)
    precisions = args.precisions.split(",") if args.precisions else list(PRECISIONS)[: 3 if args.device == "cuda" else 2]
    if unknown := [name for name in precisions if name not in PRECISIONS]:
        parser.error(f"argument --precisions: {unknown[0]!r} is not one of {', '.join(PRECISIONS)}")
    if args.steps % WINDOW or args.seeds < 2:
        parser.error(f"argument --steps: a multiple of {WINDOW}" if args.steps % WINDOW else "argument --seeds: at least 2")
    environment, busy = measure.environment(args.device, args.commit), measure.busy()  # of the source as it was loaded
    model = shapes.build_model(args.model, mode="mlm").to(args.device)
    texts = lines_of(args.text)[: args.steps * args.batch_size]
    learned = args.model in shapes.MODELS
    tokenizer = byte_level_bpe(texts, model.config.vocab_size) if learned else AutoTokenizer.from_pretrained(args.model)
    batches = masked_batches(texts, tokenizer, args.steps, args.batch_size, args.longest, args.device)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    facts = {"kind": "loss_curve", "model": args.model, "mode": "mlm", "environment": environment, "busy": busy}
    facts |= {"text": args.text.name, "steps": args.steps, "batch": args.batch_size, "longest": args.longest, "tokens": tokens}
    facts |= {"learning_rate": args.learning_rate, "dropout": shapes.dropout_of(model.config, shapes.HIDDEN_DROPOUT)}
    results = [{**facts, **compare(model, batches, p, args.seeds, args.learning_rate)} for p in precisions]
    print("\n\n".join(map(report.section, results)))
    for path in filter(None, (args.json, args.save and report.RESULTS / f"{report.slug(environment)}.json")):
        report.save(path, results)
    if args.save:
        report.draw()
    return int(not all(result["follows"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
