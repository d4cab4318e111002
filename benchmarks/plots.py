"""Draws saved results for the README.

A plot carries a digest of the numbers that it shows, so that drift is seen without drawing.

``figures`` says which plots there are: by device type, ``peers`` of its encoder tables, ``scaling`` of what time follows,
``fill`` of the same in batches of fixed size, and ``losses`` of training.
"""

import hashlib
import io
import json
import statistics
import struct
from collections.abc import Sequence
from pathlib import Path

from roberta_fast.benchmarks import shapes

OURS = "roberta_fast"
COLOURS = {
    "huggingface": "#8c8c8c",
    "sentence": "#b0a89a",
    "torch": "#5b7a99",
    "onnxruntime": "#3b8ea5",
    "openvino": "#6a4c93",
    "ctranslate2": "#4f9d69",
    OURS: "#d1495b",
}
AXES = {
    "tokens": ("real tokens in a batch of {batch}×{seqlen}", lambda facts: facts["tokens"]),
    "padded": ("padded size, {tokens} tokens of it real", lambda facts: facts["batch"] * facts["seqlen"]),
    "length": ("length of one text, tokens", lambda facts: facts["seqlen"]),
}
SOURCE = "Source"  # the key of a PNG's text that holds the digest
DPI = 100
WINDOW = 25  # steps of training whose losses are averaged


def figures(runs: list[dict]) -> dict[str, list[dict]]:
    """{file name: the runs that it shows}."""
    found = {}
    for run in runs:
        plot = {"encoder": "peers", "scaling": "scaling", "fill": "fill", "loss_curve": "losses"}.get(run["kind"])
        if plot:
            found.setdefault(f"{run['environment']['device']}-{plot}.png", []).append(run)
    return dict(sorted(found.items()))


def caption(name: str) -> str:
    """What is said instead of a figure."""
    return _FIGURES[_kind(name)][0]


def _kind(name):
    return name.removesuffix(".png").partition("-")[2]


def windows(curve: Sequence[float]) -> list[float]:
    """The mean of every 25 values."""
    return [statistics.mean(curve[i : i + WINDOW]) for i in range(0, len(curve), WINDOW)]


def stale(runs: list[dict], folder: Path) -> list[str]:
    """Names of the figures of ``runs`` that are absent from ``folder`` or show other numbers."""
    return [name for name, shown in figures(runs).items() if _source(folder / name) != digest(shown)]


def draw(runs: list[dict], folder: Path) -> None:
    """Draws those that are stale. Raises ModuleNotFoundError where matplotlib is absent."""
    names = stale(runs, folder)
    for name in names:
        shown = figures(runs)[name]
        figure = _FIGURES[_kind(name)][1](shown)
        folder.mkdir(parents=True, exist_ok=True)
        _save(figure, folder / name, digest(shown))


def _save(figure, path, source):
    """As a PNG with a palette, a third of the size."""
    from PIL import Image, PngImagePlugin

    drawn, text = io.BytesIO(), PngImagePlugin.PngInfo()
    figure.savefig(drawn, dpi=DPI)
    text.add_text(SOURCE, source)
    Image.open(drawn).convert("RGB").quantize(128).save(path, optimize=True, pnginfo=text)


def digest(runs: list[dict]) -> str:
    """A hash of all that the runs say."""
    return hashlib.sha256(json.dumps(runs, sort_keys=True).encode()).hexdigest()


def _source(path):
    """The digest in a PNG's text chunks (PNG specification, 11.3.4.3); None where there is none."""
    if not path.exists():
        return None
    data, position = path.read_bytes(), 8
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        key, _, text = data[position + 8 : position + 8 + length].partition(b"\0")
        if kind == b"tEXt" and key == SOURCE.encode():
            return text.decode("latin-1")
        position += 12 + length
    return None


def _figure(rows, columns, width, height):
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 10}):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        return figure, figure.subplots(rows, columns, squeeze=False).flatten()


def _peers(runs):
    """A panel of bars for each run: real tokens a second on its first batch, with the 20th to 80th percentile."""
    columns = min(2, len(runs))
    count = -(-len(runs) // columns)
    from matplotlib.ticker import MaxNLocator

    names = max(len({row["peer"] for row in run["rows"]}) for run in runs)
    figure, panels = _figure(count, columns, 6.5 * columns, count * (1.2 + 0.28 * names))
    for panel in panels[len(runs) :]:
        panel.remove()
    for panel, run in zip(panels, runs, strict=False):
        batch = next(iter(run["batches"]))
        rows = [row for row in run["rows"] if row["batch"] == batch]
        for place, row in enumerate(rows):
            speed, seconds = row["tokens_per_s"], row["seconds"]
            low, high = (speed * seconds["median"] / seconds[percentile] for percentile in ("p80", "p20"))
            panel.barh(place, speed, color=_colour(row["peer"]), alpha=1.0 if _is_ours(row["peer"]) else 0.75)
            panel.errorbar(speed, place, xerr=[[max(0, speed - low)], [max(0, high - speed)]], color="black", capsize=2, lw=0.8)
            mark = "  below its cosine" if row.get("below_floor") else ""
            panel.text(max(speed, high), place, f"  {row['ratio']:.2f}×{mark}", va="center")
        panel.set_yticks(range(len(rows)), [row["peer"] for row in rows])
        _embolden(panel.get_yticklabels())
        panel.invert_yaxis()
        panel.set_xlim(0, 1.25 * max(row["tokens_per_s"] for row in rows))
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.set_xlabel("real tokens a second, and times Hugging Face's")
        panel.set_title(f"{run['model']}, {shapes.MODES[run['mode']]}, {batch} batch", fontsize=11)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(_where(runs[0]), fontsize=8, color="#555555")
    return figure


def _scaling(runs):
    """A row of panels for each run, one a curve."""
    figure, panels = _figure(len(runs), len(AXES), 12.5, 4.1 * len(runs))
    return _curves(figure, panels, [(run, curve) for run in runs for curve in AXES])


def _fill(runs):
    """A panel for each run, in which a line is a peer, at most three beside each other."""
    columns = min(3, len(runs))
    figure, panels = _figure(-(-len(runs) // columns), columns, 1 + 4.5 * columns, 4.1 * -(-len(runs) // columns))
    for panel in panels[len(runs) :]:
        panel.remove()
    for panel, run in zip(panels, runs, strict=False):
        panel.set_title(run["model"], fontsize=11)
    return _curves(figure, panels[: len(runs)], [(run, "tokens") for run in runs])


def _curves(figure, panels, places):
    """Draws the curves of (run, name of a curve) into the panels, a line a peer."""
    for panel, (run, curve) in zip(panels, places, strict=True):
        points = run["curves"][curve]
        label, value = AXES[curve]
        for peer in dict.fromkeys(row["peer"] for row in run["rows"]):
            rows = {row["batch"]: row for row in run["rows"] if row["peer"] == peer}
            x = [value(run["batches"][point]) for point in points]
            times = {key: [rows[p]["seconds"][key] * 1e3 for p in points] for key in ("median", "p20", "p80")}
            style = {"color": _colour(peer), "lw": 2.6 if _is_ours(peer) else 1.4, "zorder": 3 if _is_ours(peer) else 2}
            panel.plot(x, times["median"], _dashes(peer), marker="o", ms=4, label=peer, **style)
            panel.fill_between(x, times["p20"], times["p80"], color=style["color"], alpha=0.15, lw=0)
        panel.set_xlabel(label.format(**run["batches"][points[0]]))
        panel.set_ylabel("time of a forward pass, ms")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        _scale(panel, logarithmic=curve == "length")
    legend = figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    _embolden(legend.get_texts())
    models, run = dict.fromkeys(run["model"] for run, _ in places), places[0][0]
    figure.supxlabel(f"{', '.join(models)}, {run['dtype']}. {_where(run)}", fontsize=8, color="#555555")
    return figure


def _scale(panel, logarithmic):
    from matplotlib.ticker import NullFormatter

    if not logarithmic:
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        return
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter("{x:,.0f}")
        axis.set_minor_formatter(NullFormatter())


def _losses(runs):
    """A panel for each run, in which a line is a model's loss, averaged over windows of steps."""
    figure, panels = _figure(1, len(runs), 5.5 * len(runs), 3.8)
    for panel, run in zip(panels, runs, strict=True):
        for name, curves in run["curves"].items():
            style = {"color": _colour(name), "lw": 2.2 if _is_ours(name) else 1.4} | ({} if _is_ours(name) else {"ls": "--"})
            for i, curve in enumerate(curves):
                means = windows(curve)
                steps = [(place + 0.5) * WINDOW for place in range(len(means))]
                panel.plot(steps, means, label=name if i == 0 else None, **style)
        panel.set_title(f"{run['model']}, masked LM, {run['dtype']}", fontsize=11)
        panel.set_xlabel("optimizer step")
        panel.set_ylabel(f"loss, mean of {WINDOW} steps")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        _embolden(panel.legend(frameon=False).get_texts())
    figure.supxlabel(_where(runs[0]), fontsize=8, color="#555555")
    return figure


_FIGURES = {
    "peers": ("Real tokens a second, by peer", _peers),
    "scaling": ("Time against real tokens, padded size, and length", _scaling),
    "fill": ("Time against the real tokens of batches of fixed size", _fill),
    "losses": ("The loss of training steps, stock models and ours", _losses),
}


def _colour(peer):
    return next((colour for prefix, colour in COLOURS.items() if peer.startswith(prefix)), "#999999")


def _dashes(peer):
    """Tells variants of one peer apart."""
    styles = {"-int8": "--", "-device": "--", "-eager": ":"}
    return next((style for ending, style in styles.items() if peer.endswith(ending)), "-")


def _is_ours(peer):
    return peer.startswith(OURS)


def _embolden(labels):
    for label in labels:
        if _is_ours(label.get_text()):
            label.set_fontweight("bold")


def _where(run):
    env = run["environment"]
    threads = f", {env['threads']} thread{'s' * (env['threads'] > 1)}" if env["device"] == "cpu" else ""
    return f"{env['machine']}{threads}, {env['date']}"
