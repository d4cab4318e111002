"""Renders ``results/*.json`` into tables, on the terminal and between the README's markers, and has its plots drawn.

``python benchmarks/report.py`` or ``roberta-fast bench --report`` writes the README and its plots; with ``--check`` either only
says whether they are up to date. ``<!-- results:NAME -->`` … ``<!-- /results -->`` in the README enclose all tables of the device
type NAME, cpu or cuda, and behind them the plots.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

from roberta_fast.benchmarks import plots, shapes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
MARKED = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)
DEVICES = ("cpu", "cuda")
LATENCY = "latency"
FAR = 0.25  # spread of times above which their row is marked


def run(argv: list[str], readme: Path = ROOT / "README.md") -> int:
    """Writes the README's tables and plots; with ``--merge`` only gathers results.

    Returns 1 where, with ``--check``, something differs, or where plots are to be drawn without matplotlib.
    """
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__.split("\n", 1)[0].replace("`", ""))
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the README or a plot differs")
    parser.add_argument("--merge", type=Path, metavar="DIR", help="only put the results in DIR/*.json into the results' folder")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the results' folder (default: benchmarks/results)")
    args = parser.parse_args(argv)
    if args.merge:
        runs = load(args.merge)
        for run in runs:
            save(args.results / f"{slug(run['environment'])}.json", [run])
        print(f"{len(runs)} results are now in {args.results}")
        return 0
    text, runs, images = readme.read_text(encoding="utf-8"), load(args.results), readme.parent / IMAGES.relative_to(ROOT)
    rendered = render(text, runs)
    if args.check:
        differing = [str(readme)] * (rendered != text) + [str(images / name) for name in plots.stale(runs, images)]
        for path in differing:
            print(f"{path} does not show {args.results}: run `roberta-fast bench --report`", file=sys.stderr)
        return int(bool(differing))
    readme.write_text(rendered, encoding="utf-8")
    return draw(runs, images)


def draw(runs: list[dict] | None = None, images: Path | None = None) -> int:
    """Draws the plots of results, by default of all that are saved, into a folder, by default that of the README's.

    Returns 1, and says what to install, without matplotlib.
    """
    try:
        plots.draw(load(RESULTS) if runs is None else runs, images or IMAGES)
    except ModuleNotFoundError as error:
        print(f"No plot: {error.name.partition('.')[0]} is not installed: pip install matplotlib", file=sys.stderr)
        return 1
    return 0


def save(path: Path, results: list[dict]) -> None:
    """Writes results to ``path``, in place of those there that measured the same thing; others stay."""
    runs = load_file(path) if path.exists() else []
    replaced = {key(result) for result in results}
    runs = [r for r in runs if key(r) not in replaced] + results
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"runs": runs}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_file(path: Path) -> list[dict]:
    """The runs that ``save`` wrote there. Raises OSError, ValueError, KeyError or TypeError where the file holds none."""
    return json.loads(path.read_text(encoding="utf-8"))["runs"]


def slug(env: dict) -> str:
    """The file name that a machine's results go by."""
    name = env["machine"] if env["device"] == "cuda" else f"{env['machine']} {env['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def load(results: Path) -> list[dict]:
    """All runs of all files in the folder, sorted by file name, in each file's order; other JSON files hold none."""
    contents = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json")))
    return [run for content in contents for run in content.get("runs", ())]


def render(text: str, runs: list[dict]) -> str:
    """``text`` with the tables of ``runs`` between its markers. Raises ValueError where no marker or an unknown one is found."""
    names = [match[2] for match in MARKED.finditer(text)]
    if not names or set(names) - set(DEVICES):
        raise ValueError(f"markers must be <!-- results:NAME --> with NAME one of {', '.join(DEVICES)}, got {names}")

    def tables(match):
        # Speed first; curves are for the eye.
        ordered = sorted(runs, key=lambda run: run["kind"] == "loss_curve")
        tabled = [run for run in ordered if run["environment"]["device"] == match[2] and run["kind"] not in ("scaling", "fill")]
        sections = [section(run) for run in tabled]
        images = [name for name in plots.figures(runs) if name.startswith(f"{match[2]}-")]
        sections += [f"![{plots.caption(name)}]({IMAGES.relative_to(ROOT)}/{name})" for name in images]
        return match[1] + "".join(f"{text}\n\n" for text in sections) + match[3]

    return MARKED.sub(tables, text)


def key(run: dict) -> tuple:
    """What a run measured: a newer one with the same key takes its place."""
    fields = ("kind", "title", "model", "mode", "dtype", "operation", "dropout")
    batches = json.dumps(run.get("batches"), sort_keys=True)
    return *(run.get(field) for field in fields), batches, run["environment"]["machine"], run["environment"]["threads"]


def section(run: dict) -> str:
    """A run's caption and table."""
    sections = {"encoder": encoder_section, "scaling": scaling_section, "operation": operation_section}
    sections |= {"loss_curve": loss_curve_section, "latency": latency_section, "fill": scaling_section, "parts": parts_section}
    return sections[run["kind"]](run)


def encoder_section(run: dict) -> str:
    """Peers in rows: each batch's speed and ratio, then latency, memory and nearness."""
    batches = [name for name in run["batches"] if name != LATENCY]
    peak, latency = run.get("peak_tflops"), LATENCY in run["batches"]
    head = ["peer"]
    unit = "new tokens/s" if run["mode"] == "generate" else "real tokens/s"
    for name in batches:
        head += [f"{name}: {unit}", "ratio", *(["MFU"] if peak else [])]
    head += [*(["batch 1: ms"] if latency else []), "peak MiB", "max\\|Δ\\|", "cosine"]
    lines = []
    for peer in dict.fromkeys(row["peer"] for row in run["rows"]):
        rows = {row["batch"]: row for row in run["rows"] if row["peer"] == peer}
        first = rows[batches[0]]
        cells = [f"`{peer}`" + (" ✗" if any(row.get("below_floor") for row in rows.values()) else "")]
        for row in (rows[name] for name in batches):
            mfu = [f"{row['tflops'] / peak:.0%}"] if peak else []
            cells += [f"{row['tokens_per_s']:,.0f}{_mark(row)}", f"{row['ratio']:.2f}", *mfu]
        cells += [f"{rows[LATENCY]['seconds']['median'] * 1e3:.2f}{_mark(rows[LATENCY])}"] if latency else []
        memory = "–" if first["peak_bytes"] is None else f"{first['peak_bytes'] / 2**20:,.0f}"
        lines.append([*cells, memory, f"{first['max_abs']:.1e}", f"{first['cosine']:.7f}"])
    mode = shapes.MODES[run["mode"]]
    if run["mode"] in shapes.TRAINING:
        mode += f", forward, backward and {run['optimizer']}" if "optimizer" in run else ", forward and backward"
    mode += f", dropout {run['dropout']:g}" if "dropout" in run else ""
    described = "; ".join(f"{name} {_batch(facts)}" for name, facts in run["batches"].items() if name != LATENCY)
    compared = {"eval": "hidden states", "generate": "logits of given texts"}.get(run["mode"], "gradients")
    notes = [f"Peak memory, max\\|Δ\\| and cosine ({compared}, against the first row) are those of the {batches[0]} batch."]
    notes += [f"batch 1: one text of {run['batches'][LATENCY]['seqlen']} tokens."] if latency else []
    if floor := run.get("floors", {}).get(batches[0]):
        notes += [f"In 8 bits a cosine of {floor:.5f} is asked for; ✗ marks peers that miss it in a batch."]
    title = f"**{_model(run)}, {mode}, {run['dtype']}**" + (f", {run['title']}" if run.get("title") else "")
    text = f"{title} ({described})  \n{_origin(run['environment'])}\n\n{_table(head, lines)}\n\n{_notes(run, notes)}"
    profiled = [row for row in run["rows"] if "kinds" in row]
    if profiled:
        head = ["peer", *(f"{kind}, ms" for kind in profiled[0]["kinds"])]
        lines = [[f"`{row['peer']}`", *(f"{seconds * 1e3:,.2f}" for seconds in row["kinds"].values())] for row in profiled]
        text += f"\n\nWhat a call on the {batches[0]} batch spends its time in:\n\n{_table(head, lines)}"
    return text


def latency_section(run: dict) -> str:
    """Peers in rows; for each length the median and the 99th percentile, from enough calls to have one."""
    head, lines = ["peer"], []
    for name in run["batches"]:
        head += [f"{name}: p50, ms", "p99, ms", "ratio"]
    for peer in dict.fromkeys(row["peer"] for row in run["rows"]):
        cells = [f"`{peer}`"]
        for row in (row for row in run["rows"] if row["peer"] == peer):
            seconds = row["seconds"]
            tail = f"{seconds['p99'] * 1e3:,.3f}" if "p99" in seconds else "–"
            cells += [f"{seconds['median'] * 1e3:,.3f}", tail, f"{row['ratio']:.2f}"]
        lines.append(cells)
    title = f"**{_model(run)}, latency of one text, {run['dtype']}**"
    return f"{title}  \n{_origin(run['environment'])}\n\n{_table(head, lines)}\n\n{_notes(run, [])}"


def parts_section(run: dict) -> str:
    """What a layer runs, in rows, their sum, and beside it the encoder as a whole."""
    layers, sums = run["layers"], parts_sum(run)
    lines = [[name, f"{t['median'] * 1e6:,.1f}", f"{t['median'] * layers * 1e3:,.3f}"] for name, t in run["parts"].items()]
    lines += [["sum", f"{sums / layers * 1e6:,.1f}", f"{sums * 1e3:,.3f}"]]
    lines += [[f"`{peer}`, the encoder", "", f"{t['median'] * 1e3:,.3f}"] for peer, t in run["wholes"].items()]
    (batch,) = run["batches"].values()
    title = f"**{_model(run)}, its kernels one by one, {run['dtype']}** (dense {_batch(batch)})"
    shares = ", ".join(f"{sums / t['median']:.0%} in `{peer}`" for peer, t in run["wholes"].items())
    note = f"The sum is {shares}. Alone a kernel finds a cold L2 cache, in the encoder the output of the one before."
    table = _table(["kernel", "a layer, µs", f"{layers} layers, ms"], lines)
    return f"{title}  \n{_origin(run['environment'])}\n\n{table}\n\n{note}"


def parts_sum(run: dict) -> float:
    """Seconds of all layers' parts together."""
    return run["layers"] * sum(facts["median"] for facts in run["parts"].values())


def scaling_section(run: dict) -> str:
    """A table for each curve: its batches in rows, the peers' times in columns."""
    peers = list(dict.fromkeys(row["peer"] for row in run["rows"]))
    times = {(row["batch"], row["peer"]): row["seconds"]["median"] * 1e3 for row in run["rows"]}
    tables = []
    for curve, points in run["curves"].items():
        lines = []
        for point in points:
            facts = run["batches"][point]
            sizes = [f"{facts['batch']}×{facts['seqlen']}", f"{facts['tokens']:,}"]
            cells = (times[point, peer] for peer in peers)
            lines.append([*sizes, *(f"{time:,.{1 if time >= 10 else 3}f}" for time in cells)])
        tables.append(f"{curve}, ms\n\n{_table(['padded', 'real tokens', *peers], lines)}")
    name = ", ".join(filter(None, (_model(run), "inference", run["dtype"], run.get("title"))))
    title = f"**{name}: what time follows**"
    return "\n\n".join([f"{title}  \n{_origin(run['environment'])}", *tables, _notes(run, [])])


def _notes(run, notes):
    """What is to be said below a run's table; each absent peer has a line."""
    once = dict.fromkeys(row["batch"] for row in run["rows"] if row["seconds"]["repeats"] == 1)
    spreads, notes = [_spread(row) for row in run["rows"] if row["batch"] not in once], list(notes)
    if spreads:
        notes += [f"Times spread by at most {max(spreads):.0%} of their median (20th to 80th percentile)."]
        if max(spreads) > FAR:
            notes += [f"~ marks those that do by more than {FAR:.0%}; a ratio is the median of the rounds'."]
    notes += [f"Called once, of which no spread is known: {', '.join(once)}."] if once else []
    notes += [f"Noisy, for {run['busy']}."] if run.get("busy") else []
    absent = [f"Not measured: `{peer}`, {reason}." for peer, reason in run["absent"].items()]
    return "  \n".join([" ".join(notes), *absent])


def _model(run):
    """What titles call a run's model: of a checkpoint's folder the last two names, and that a name alone has no checkpoint."""
    name = run["model"]
    return f"{name} with random weights" if name in shapes.MODELS else "/".join(Path(name).parts[-2:])


def _spread(row):
    """How far a row's times lie apart, 20th to 80th percentile, as a share of their median."""
    times = row["seconds"]
    return (times["p80"] - times["p20"]) / times["median"]


def _mark(row):
    return " ~" if _spread(row) > FAR else ""


def operation_section(run: dict) -> str:
    """Sizes in rows, contenders in columns, in the unit that the operation is measured in."""
    contenders = list(dict.fromkeys(record["contender"] for record in run["records"]))
    rows = {}
    for record in run["records"]:
        cell = f"{record['rate']:,.{1 if record['rate'] >= 10 else 3}f}" if "rate" in record else "red"
        rows.setdefault((record["size"], record["direction"]), {})[record["contender"]] = cell
    unit = next((record["unit"] for record in run["records"] if "unit" in record), "")
    lines = [[*size, *(found.get(name, "–") for name in contenders)] for size, found in rows.items()]
    title = f"**{run['operation']}, {run['dtype']}**, {unit}"
    return f"{title}  \n{_origin(run['environment'])}\n\n{_table(['size', 'direction', *contenders], lines)}"


def loss_curve_section(run: dict) -> str:
    """The mean loss of every other window of steps: the stock model's, how far its curves lie apart, and ours."""
    stock, (ours,) = ([plots.windows(curve) for curve in run["curves"][name]] for name in ("stock", "roberta_fast"))
    lines = []
    for i in range((len(ours) - 1) % 2, len(ours), 2):
        losses = [curve[i] for curve in stock]
        steps = f"{i * plots.WINDOW + 1}–{(i + 1) * plots.WINDOW}"
        lines.append([steps, f"{statistics.mean(losses):.3f}", f"{statistics.stdev(losses):.3f}", f"{ours[i]:.3f}"])
    head = ["steps", f"loss, mean of {len(stock)} stock models", "their standard deviation", "`roberta_fast`"]
    title = f"**{run['model']} from random weights, {run['steps']} steps as masked language model, {run['dtype']}**"
    title = title if run["model"] in shapes.MODELS else title.replace(" from random weights", "")
    what = f"{run['batch']} texts of {run['text']} a step, fused AdamW, dropout {run['dropout']}"
    verdict = "Ours follows" if run["follows"] else "Ours does **not** follow"
    note = f"{verdict}: over all windows it is {run['distance']:.2f} times as far away as one more stock model is expected to be,"
    note += f" at most {run['limit']} is allowed."
    return f"{title} ({what})  \n{_origin(run['environment'])}\n\n{_table(head, lines)}\n\n{note}"


def _batch(facts):
    fill = "" if facts["fill"] == 1 else f", {facts['fill']:.0%} real"
    return f"{facts['batch']}×{facts['seqlen']}{fill}"


def _origin(env):
    versions = ", ".join(f"{name} {env['versions'][name]}" for name in ("torch", "transformers", "roberta_fast"))
    source = (env["commit"] or "unknown") + (", edited" if env["dirty"] else "")
    count = f"{env['threads']} thread{'s' * (env['threads'] > 1)}, " if env["device"] == "cpu" else ""
    return f"{env['machine']}, {count}{versions} (commit {source}), {env['date']}"


def _table(head, rows):
    """A Markdown table with aligned columns, so that a terminal shows it as well."""
    widths = [max(len(str(row[i])) for row in (head, *rows)) for i in range(len(head))]

    def line(cells):
        padded = [str(c).rjust(w) if i else str(c).ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
