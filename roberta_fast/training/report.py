"""What a run leaves beside the model: metrics, curves, tables, the worst mistakes, and a model card."""

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

INK = "#24292f"
LINES = ("#2f6f9f", "#c2571a", "#3f7d3f", "#8a4f9e", "#b8962e", "#4aa3a2", "#c24b6e", "#6b6b6b")


def write_text(path: str | Path, text: str) -> None:
    """Writes a file under another name first, so that it is there as a whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: str | Path, value: object) -> None:
    """Writes ``value`` as json, readable; numpy's numbers as plain ones."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n")


def _plain(value):
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return str(value)


def text_table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table in plain text: the first column to the left, numbers to the right, floats with four decimals."""
    cells = [[f"{v:.4f}" if isinstance(v, (float, np.floating)) else str(v) for v in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first, *rest = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines) + "\n"


def mean_std(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation over runs of each metric that all of them have."""
    names = [name for name in runs[0] if all(isinstance(run.get(name), (int, float)) for run in runs)]
    values = {name: [run[name] for run in runs] for name in names}
    return {n: {"mean": statistics.fmean(v), "std": statistics.stdev(v) if len(v) > 1 else 0.0} for n, v in values.items()}


def plot_learning_curves(log_history: Sequence[Mapping], path: str | Path) -> bool:
    """Draws losses, learning rate and evaluation metrics of a trainer's ``log_history`` by step; False where there is nothing."""
    series = {}
    for entry in log_history:
        for name, value in entry.items():
            if isinstance(value, (int, float)) and name not in _NOT_DRAWN and not name.startswith(("train_", "total_")):
                series.setdefault(name, []).append((entry["step"], value))
    losses = [name for name in ("loss", "eval_loss") if name in series]
    metrics = [name for name in series if name.startswith("eval_") and name not in ("eval_loss", *_NOT_DRAWN)]
    panels = [panel for panel in (losses, metrics, ["learning_rate"], ["tokens_per_second"]) if panel and panel[0] in series]
    if not panels:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        for name, color in zip(panel, LINES, strict=False):
            steps, values = zip(*series[name], strict=True)
            axis.plot(steps, values, color=color, label=name, marker="o" if len(steps) < 20 else "", markersize=3)
        axis.set_xlabel("step")
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


_NOT_DRAWN = ("epoch", "step", "grad_norm", "mfu") + tuple(
    f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second", "samples")
)


def plot_matrix(matrix: np.ndarray, names: Sequence[str], path: str | Path, title: str = "") -> None:
    """Draws a confusion matrix [true, predicted] of counts; shades follow each row's share."""
    plt = _pyplot()
    size = min(max(3.0, 0.5 * len(names) + 1.5), 16.0)
    figure, axis = plt.subplots(figsize=(size + 0.6, size), layout="constrained")
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for axis_of, label in ((axis.xaxis, "predicted"), (axis.yaxis, "true")):
        axis_of.set_ticks(range(len(names)), [name[:20] for name in names])
        axis_of.set_label_text(label)
    axis.tick_params("x", rotation=45 if max(map(len, names)) > 3 else 0)
    if len(names) <= 20:
        for (row, column), count in np.ndenumerate(matrix):
            color = "white" if share[row, column] > 0.6 else INK
            axis.text(column, row, f"{count:,}", ha="center", va="center", fontsize=8, color=color)
    axis.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import logging

    import matplotlib.pyplot as plt

    # Labels in a script that the font lacks are drawn as boxes; one warning a character says no more.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    return plt


def model_card(
    path: str | Path,
    *,
    name: str,
    base_model: str,
    pipeline_tag: str,
    metrics: Mapping[str, float],
    hyperparameters: Mapping[str, object],
    data: str,
    use: str,
    search: str = "",
) -> None:
    """Writes a model card by ``huggingface_hub.ModelCard``: what the model is, from what, how it was trained, and its metrics.

    metrics: of the evaluation data. hyperparameters: flags that differ from the defaults. use: a Python snippet that loads it.
    search: a table of the trials by which they were found, if they were.
    """
    from huggingface_hub import ModelCard, ModelCardData

    hub_name = base_model if base_model.count("/") == 1 and not Path(base_model).exists() else None
    facts = ModelCardData(library_name="transformers", pipeline_tag=pipeline_tag, base_model=hub_name, tags=["roberta_fast"])
    numbers = "\n".join(f"| {key} | {value:.4f} |" for key, value in metrics.items() if isinstance(value, (int, float)))
    trials = f"\nFound by a search over these trials:\n\n```\n{search}```\n" if search else ""
    flags = "\n".join(f"- `{key}`: {value}" for key, value in hyperparameters.items())
    card = f"""---
{facts.to_yaml()}
---

# {name}

Fine-tuned from `{base_model if hub_name else Path(base_model).name}` for {pipeline_tag} on {data}, with `roberta-fast finetune`.

## Use

```python
{use.strip()}
```

Stock Hugging Face loads it; `roberta_fast.accelerate_model(model)` makes it faster.

## Evaluation

| metric | value |
|---|---:|
{numbers}

## Training

{flags}
{trials}"""
    write_text(path, ModelCard(card).content)
