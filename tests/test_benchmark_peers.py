"""Peers with a runtime of their own compute what the stock model does; curves and plots show what was measured."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from roberta_fast import cli
from roberta_fast.benchmarks import comparison, parity, peers, plots, report, scaling, shapes
from roberta_fast.benchmarks.exported_peers import Unsuited
from roberta_fast.report import stock_clone

ROOT = Path(__file__).parent.parent
RUNTIMES = [name for name, peer in peers.PEERS.items() if peer.needs and "cpu" in peer.devices]
# The int8 peers are made from the same graphs as the others.
CASES = [(name, "roberta") for name in RUNTIMES] + [(name, "bert") for name in RUNTIMES if not peers.PEERS[name].precision]
INT8 = "roberta_fast-in-8-bits"
SMALL = ["--model", "tiny", "--batch-size", "3", "--longest", "20", "--repeats", "1", "--device", "cpu"]


def bench(*arguments):
    return cli.main(["bench", *SMALL, *arguments])


def model_of(family):
    """A small model in which every part counts: with the usual small random weights the layers hardly change their input."""
    shape = shapes.ModelShape(family, 2, 64, 4, 256, 1000, positions=64)
    torch.manual_seed(0)
    from transformers import AutoModel

    return AutoModel.from_config(shape.config(initializer_range=0.1)).eval()


def gate_for(model):
    batch = shapes.batch_of("ragged", [3, 17, 9, 30], model.config)
    return parity.Gate(model, peers.PEERS[peers.BASELINE].build(model), batch), batch


def build(name, model, batch):
    peer = peers.PEERS[name]
    if reason := peer.reason_against("cpu", "float32"):
        pytest.skip(reason)
    return peer.build(model, batch) if peer.calibrated else peer.build(model)


class TestPeers:
    @pytest.mark.parametrize(("name", "family"), CASES)
    def test_it_computes_what_the_stock_model_does(self, name, family):
        model = model_of(family)
        gate, batch = gate_for(model)
        function = build(name, model, batch)
        if peers.PEERS[name].precision:
            assert gate.eight_bit_floor <= gate.measure(function).cosine < 1 - 1e-6, "not in 8 bits"
        else:
            gate.check(function, parity.PEER_SLACK)
        if hasattr(function, "release"):
            function.release()
            gate.measure(function)

    def test_a_graph_that_is_not_fused_is_not_measured(self, monkeypatch):
        model = model_of("roberta")
        pytest.importorskip("onnx")
        optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
        from onnxruntime.transformers.fusion_options import FusionOptions

        def without_attention(*arguments, original=optimizer.optimize_model, **options):
            unfused = FusionOptions("bert")
            unfused.enable_attention = False
            return original(*arguments, optimization_options=unfused, **options)

        monkeypatch.setattr(optimizer, "optimize_model", without_attention)
        with pytest.raises(Unsuited, match="made 0 Attention nodes of this graph instead of 2"):
            peers.PEERS["onnxruntime"].build(model)

    def test_a_model_that_a_peer_does_not_serve_has_a_line(self, capsys, monkeypatch):
        def refuse(model):
            raise Unsuited("it does not convert this")

        monkeypatch.setitem(peers.PEERS, "huggingface-eager", dataclasses.replace(peers.PEERS["huggingface-eager"], build=refuse))
        assert bench("--peers", "huggingface-eager,roberta_fast") == 0
        out = capsys.readouterr().out
        assert "Not measured: `huggingface-eager`, it does not convert this." in out.splitlines()

    def test_each_absent_package_is_named_with_the_command_that_installs_it(self, monkeypatch):
        monkeypatch.setattr(peers, "_missing", lambda module: True)
        reason = peers.PEERS["openvino-int8"].reason_against("cpu", "float32")
        assert reason == "openvino and nncf are not installed: pip install openvino nncf"
        reason = peers.PEERS["sentence-transformers"].reason_against("cpu", "float32")
        assert reason == "sentence_transformers is not installed: pip install sentence-transformers"


def without_attention(model):
    output = model.encoder.layer[1].attention.output.dense
    output.weight = nn.Parameter(torch.zeros_like(output.weight))


def swapped(model):
    layers = model.encoder.layer
    layers[0], layers[1] = layers[1], layers[0]


def padding_seen(model):
    model.register_forward_pre_hook(lambda _, __, inputs: ((), {"input_ids": inputs["input_ids"]}), with_kwargs=True)


class TestEightBits:
    @pytest.mark.parametrize("change", [without_attention, swapped, padding_seen], ids=lambda f: f.__name__)
    def test_a_wrong_model_is_below_the_floor(self, change):
        model = model_of("roberta")
        gate, _ = gate_for(model)
        wrong = parity.eight_bit_clone(model)
        assert gate.measure(wrong).cosine > gate.eight_bit_floor
        change(wrong)
        assert gate.measure(wrong).cosine < gate.eight_bit_floor

    @staticmethod
    def add_peer(monkeypatch, name, change=lambda model: None):
        def build(model):
            clone = parity.eight_bit_clone(model)
            change(clone)
            return clone

        monkeypatch.setitem(peers.PEERS, name, peers.Peer(build, precision="int8"))

    def test_ours_leaves_no_number(self, monkeypatch, capsys):
        self.add_peer(monkeypatch, INT8, lambda model: nn.init.zeros_(model.embeddings.position_embeddings.weight))
        assert bench("--peers", INT8) == 1
        out, err = capsys.readouterr()
        assert out == "" and f"{INT8}, ragged batch: cosine" in err

    def test_another_peer_is_marked(self, monkeypatch, capsys, tmp_path):
        self.add_peer(monkeypatch, "wrong", lambda model: nn.init.zeros_(model.embeddings.position_embeddings.weight))
        self.add_peer(monkeypatch, "right")
        path = tmp_path / "out.json"
        assert bench("--peers", "wrong,right,roberta_fast", "--json", str(path)) == 0
        (run,) = report.load(tmp_path)
        marked = {row["peer"] for row in run["rows"] if row["below_floor"]}
        assert marked == {"wrong"} and {row["precision"] for row in run["rows"]} == {"float32", "int8"}
        out = capsys.readouterr().out
        assert "`wrong` ✗" in out and "`right` ✗" not in out and f"a cosine of {run['floors']['ragged']:.5f}" in out

    def test_what_is_no_number_passes_no_gate(self):
        model = model_of("roberta")
        gate, _ = gate_for(model)
        broken = stock_clone(model)
        broken.register_forward_hook(lambda _, __, output: (output[0] * math.nan,))
        near = gate.measure(broken)
        assert math.isnan(near.cosine) and math.isnan(near.max_abs)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A table and curves, measured."""
    folder = tmp_path_factory.mktemp("results")
    assert bench("--peers", "roberta_fast", "--json", str(folder / "a.json")) == 0
    assert bench("--scaling", "--peers", "roberta_fast", "--json", str(folder / "a.json")) == 0
    return report.load(folder)


class TestScaling:
    def test_each_curve_varies_one_thing(self):
        config = shapes.MODELS["roberta-long"].config()
        curves = {name: [b.facts() for b in points] for name, points in scaling.batches(config, 4, 8192).items()}
        size = {(p["batch"], p["seqlen"]) for p in curves["tokens"]}
        assert size == {(4, 256)} and [p["tokens"] for p in curves["tokens"]] == [128, 256, 512, 768, 1024]
        assert {p["tokens"] for p in curves["padded"]} == {256} and [p["seqlen"] for p in curves["padded"]] == [64, 128, 256]
        assert [p["seqlen"] for p in curves["length"]] == [64 << i for i in range(8)]
        assert all(p["fill"] == 1 and p["batch"] == 1 for p in curves["length"])

    def test_a_length_that_the_model_does_not_take_is_named(self, capsys):
        with pytest.raises(SystemExit):
            bench("--scaling", "--longest", "129")
        assert "argument --longest: lengths must be from 1 to 128" in capsys.readouterr().err

    def test_every_point_is_measured(self, runs, capsys):
        run = runs[1]
        assert run["kind"] == "scaling" and list(run["curves"]) == list(scaling.CURVES)
        points = [point for curve in run["curves"].values() for point in curve]
        assert {(row["batch"], row["peer"]) for row in run["rows"]} == {
            (point, peer) for point in points for peer in (peers.BASELINE, "roberta_fast")
        }
        section = report.section(run)
        assert all(f"{curve}, ms" in section for curve in scaling.CURVES)

    def test_the_default_peers_are_in_full_precision_or_ours(self):
        names = scaling.peers("cpu")
        assert {peers.BASELINE, "onnxruntime", "openvino", "ctranslate2", "roberta_fast"} <= set(names)
        assert not {"openvino-int8", "huggingface-eager"} & set(names)


def test_a_slower_kernel_fails_the_comparison_with_a_saved_run(tmp_path):
    """By the commands of the Makefile, on two cases; the saved times are changed to what they would have been."""

    def bench_ops(**variables):
        wanted = "-k 'pack and forward and 384' --benchmark-storage=file://" + str(tmp_path)
        settings = [f"{name}={value}" for name, value in {"ARGS": wanted, **variables}.items()]
        recipe = subprocess.run(
            ["make", "--no-print-directory", "--dry-run", "bench-ops", *settings],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        command = recipe.stdout[recipe.stdout.index(".venv/bin/pytest") :].replace(".venv/bin", str(Path(sys.executable).parent))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # it measures alone
        return subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    assert bench_ops().returncode == 0
    (saved,) = tmp_path.rglob("0001*.json")
    run = json.loads(saved.read_text())
    assert "busy" in run, "whether other work made its times noisy"
    for factor, status in ((100, 0), (1e-4, 1)):  # of the first factor, the second leaves a hundredth
        for benchmark in run["benchmarks"]:
            benchmark["stats"]["median"] *= factor if "roberta_fast" in benchmark["name"] else 1e-3  # only ours are compared
        saved.write_text(json.dumps(run))
        done = bench_ops(COMPARE="0001")
        assert min(done.returncode, 1) == status, done.stdout
    said = done.stdout + done.stderr
    assert "test_pack[forward" in said and "Field 'median' has failed" in said and "Traceback" not in said
    assert "kernels named above are slower" in said.splitlines()[-1]
    missing = bench_ops(COMPARE="0777")
    assert missing.returncode and "no saved run is called '0777'; there are: 0001_" in missing.stderr + missing.stdout


class TestPlots:
    def test_figures_are_drawn_from_saved_results_alone(self, runs, tmp_path):
        pytest.importorskip("matplotlib")
        saved = json.loads(json.dumps(runs))
        plots.draw(saved, tmp_path)
        names = ["cpu-peers.png", "cpu-scaling.png"]
        assert sorted(path.name for path in tmp_path.iterdir()) == names
        assert all(path.stat().st_size < 100_000 for path in tmp_path.iterdir()) and not plots.stale(saved, tmp_path)
        before = (tmp_path / names[1]).read_bytes()
        saved[0]["rows"][0]["tokens_per_s"] *= 2
        assert plots.stale(saved, tmp_path) == names[:1]
        plots.draw(saved, tmp_path)
        assert not plots.stale(saved, tmp_path) and (tmp_path / names[1]).read_bytes() == before

    def test_the_readme_shows_them_and_misses_them(self, runs, tmp_path, capsys):
        results, readme = tmp_path / "results", tmp_path / "README.md"
        report.save(results / "machine.json", runs)
        text = "<!-- results:cpu -->\n<!-- /results -->\n"
        readme.write_text(report.render(text, runs))
        assert "](docs/images/cpu-peers.png)" in readme.read_text()
        assert report.run(["--check", "--results", str(results)], readme=readme) == 1
        missing = {Path(line.split(" does not show")[0]).name for line in capsys.readouterr().err.splitlines()}
        assert missing == {"cpu-peers.png", "cpu-scaling.png"}

    def test_without_matplotlib_a_line_says_what_to_install(self, runs, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert report.draw(runs, tmp_path / "images") == 1
        assert "matplotlib is not installed: pip install matplotlib" in capsys.readouterr().err

    def test_a_run_draws_its_own(self, tmp_path):
        pytest.importorskip("matplotlib")
        before = {path: path.read_bytes() for path in report.IMAGES.iterdir()}
        assert bench("--peers", "roberta_fast", "--plots", str(tmp_path / "mine")) == 0
        assert [path.name for path in (tmp_path / "mine").iterdir()] == ["cpu-peers.png"]
        assert before == {path: path.read_bytes() for path in report.IMAGES.iterdir()}, "the README's stay"


class TestWhatARunSays:
    def test_each_stage_has_a_line_where_there_is_no_terminal(self, capsys):
        assert bench("--peers", "roberta_fast", "--threads", "999") == 0
        out, err = capsys.readouterr()
        lines = [line.removeprefix("roberta-fast bench: ") for line in err.splitlines()]
        assert lines.index("set up roberta_fast") < lines.index("check results on ragged") < lines.index("time ragged")
        assert any(line.startswith("--threads 999 on ") for line in lines)
        assert "Called once, of which no spread is known: ragged, dense." in out and "tiny with random weights" in out

    def test_a_table_is_kept_where_a_later_one_fails(self, tmp_path, monkeypatch):
        kept, run = tmp_path / "runs.json", comparison.Comparison.run

        def interrupted(self):
            if self.training:
                raise KeyboardInterrupt
            return run(self)

        monkeypatch.setattr(comparison.Comparison, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench("--peers", "roberta_fast", "--modes", "eval,train", "--json", str(kept))
        assert [found["mode"] for found in json.loads(kept.read_text())["runs"]] == ["eval"]

    def test_times_that_spread_far_are_marked(self, runs):
        run = json.loads(json.dumps(runs[0]))
        run["model"] = "/home/somebody/models/organisation/name"
        for row in run["rows"]:
            row["seconds"] |= {"median": 1.0, "p20": 1.0, "p80": 1.0, "repeats": 3}
        assert " ~" not in report.section(run) and "**organisation/name, inference" in report.section(run)
        row = run["rows"][-1]
        row["seconds"]["p80"] = 1.0 + 1.1 * report.FAR
        marked = [line for line in report.section(run).splitlines() if " ~ |" in line]
        assert len(marked) == 1 and f"`{row['peer']}`" in marked[0]
        assert "~ marks those that do by more than 25%" in report.section(run)
