"""The benchmarks measure what they say, on what they say, and print nothing where a result is wrong."""

import dataclasses
import importlib
import importlib.util
import itertools
import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMaskedLM

import roberta_fast
from roberta_fast import cli
from roberta_fast.benchmarks import comparison, gpu, measure, operations, peers, report, shapes
from roberta_fast.benchmarks.parity import Gate
from roberta_fast.report import stock_clone
from roberta_fast.testing import tiny_config

ROOT = Path(__file__).parent.parent
SMALL = ["--model", "tiny", "--batch-size", "4", "--longest", "20", "--dense", "2x16", "--repeats", "2", "--device", "cpu"]
SMALL += ["--peers", "huggingface-eager,roberta_fast"]
OPERATIONS = (*gpu.OPERATIONS, "int8_linear")  # which is served on CPU alone


@pytest.fixture
def tiny():
    return shapes.build_model("tiny")


def bench(*arguments):
    return cli.main(["bench", *SMALL, *arguments])


class TestShapes:
    @pytest.mark.parametrize("count", [16, 32, 256])
    @pytest.mark.parametrize("longest", [92, 512])
    def test_ragged_lengths_have_the_documented_mix_at_any_size(self, count, longest):
        lengths = shapes.ragged_lengths(count, longest)
        assert len(lengths) == count and max(lengths) == longest and min(lengths) >= 2
        assert 0.39 < sum(lengths) / count / longest < 0.44

    def test_a_seed_changes_the_order_alone(self):
        first, second = shapes.ragged_lengths(32, seed=0), shapes.ragged_lengths(32, seed=1)
        assert first != second and sorted(first) == sorted(second) and first == shapes.ragged_lengths(32, seed=0)

    def test_flops_are_those_that_torch_counts(self, tiny):
        batch = shapes.batch_of("dense", [16] * 3, tiny.config)
        tiny.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            tiny(**batch.inputs())
        pooler = 2 * 3 * tiny.config.hidden_size**2
        assert shapes.forward_flops(tiny.config, batch.lengths) == counter.get_total_flops() - pooler

    def test_padding_never_looks_like_a_token(self, tiny):
        batch = shapes.batch_of("ragged", [3, 17, 9], tiny.config)
        assert torch.equal(batch.input_ids != tiny.config.pad_token_id, batch.attention_mask.bool())
        assert batch.tokens == 29 and batch.facts() == {"batch": 3, "seqlen": 17, "tokens": 29, "fill": 0.5686}

    def test_published_shapes_have_their_published_sizes(self):
        with torch.device("meta"):
            sizes = {name: sum(p.numel() for p in shapes.build_model(name).parameters()) for name in shapes.MODELS}
        assert sizes["roberta-base"] == 124_645_632 and sizes["roberta-large"] == 355_359_744
        assert sizes["minilm"] == 22_713_216


class TestMeasure:
    def test_peers_run_in_turn_after_a_warm_up(self):
        calls = []
        functions = {name: lambda name=name: calls.append(name) for name in "AB"}
        timings = measure.alternate(functions, 3, measure.host_clock)
        assert "".join(calls) == "AABB" + "ABABAB" and len(timings["A"].seconds) == 3

    def test_a_drifting_machine_leaves_the_ratio_alone(self):
        slow, fast = measure.Timing((2.0, 4.0, 8.0)), measure.Timing((1.0, 2.0, 4.0))
        assert fast.times_faster(slow) == 2.0 and slow.times_faster(slow) == 1.0
        assert (slow.median, slow.percentile(20), slow.percentile(80)) == (4.0, pytest.approx(2.8), pytest.approx(6.4))

    def test_the_clock_counts_the_call(self):
        assert 0.02 <= measure.host_clock(lambda: time.sleep(0.02)) < 0.2

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system keeps no mark of the peak")
    def test_peak_memory_sees_what_a_call_allocated_and_freed(self):
        def call():
            for _ in range(3):
                torch.ones(48 << 20, dtype=torch.int8)
            return torch.ones(16 << 20, dtype=torch.int8)

        torch.ones(64 << 20, dtype=torch.int8)  # freed before, hence not counted
        assert 44 << 20 < measure.peak_memory(call, "cpu") < 100 << 20

    def test_the_record_names_machine_versions_and_commit(self):
        facts = measure.environment("cpu")
        assert facts["versions"]["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
        assert facts["machine"] and facts["date"].count("-") == 2
        assert measure.environment("cpu", commit="abc")["commit"] == "abc"


class TestEncoder:
    def test_end_to_end(self, capsys, tmp_path):
        path = tmp_path / "results" / "machine.json"
        assert bench("--modes", "eval,train,mlm", "--kernels", "--json", str(path)) == 0
        runs = json.loads(path.read_text())["runs"]
        assert [run["mode"] for run in runs] == ["eval", "train", "mlm"]
        for run in runs:
            batches = ["ragged", "dense"] + ["latency"] * (run["mode"] == "eval")
            names = ("huggingface-sdpa", "huggingface-eager", "roberta_fast")
            assert {(row["batch"], row["peer"]) for row in run["rows"]} == {(b, n) for b in batches for n in names}
            for row in run["rows"]:
                assert row["tokens_per_s"] == pytest.approx(run["batches"][row["batch"]]["tokens"] / row["seconds"]["median"])
                assert row["cosine"] > 0.99999 and row["ratio"] > 0
                if row["batch"] == "ragged":
                    assert row["kinds"]["products"] > 0 and row["kinds"]["attention"] > 0
                    assert (row["kinds"]["optimizer"] > 0) == (run["mode"] != "eval")
                    assert sum(row["kernels"].values()) <= 1.001 * sum(row["kinds"].values())
        printed = capsys.readouterr().out
        assert "`roberta_fast`" in printed and "fine-tuning step" in printed and report.encoder_section(runs[0]) in printed

    def test_decoders(self, capsys, tmp_path):
        path = tmp_path / "results.json"
        arguments = [
            "--peers",
            "huggingface-eager,onnxruntime,roberta_fast",
            "--dropout",
            "0",
            "--json",
            str(path),
            "--dense",
            "2x8",
            "--repeats",
            "1",
        ]
        assert bench("--modes", "seq2seq,generate", *arguments) == 0
        training, generation = json.loads(path.read_text())["runs"]
        for run in (training, generation):
            assert {row["peer"] for row in run["rows"]} == {"huggingface-sdpa", "huggingface-eager", "roberta_fast"}
            assert list(run["absent"]) == ["onnxruntime"]
        for row in generation["rows"]:
            new = generation["batches"][row["batch"]]["batch"] * shapes.NEW_TOKENS
            assert row["tokens_per_s"] == pytest.approx(new / row["seconds"]["median"])
        printed = capsys.readouterr().out
        assert "encoder-decoder training step, forward, backward and AdamW, dropout 0" in printed and "new tokens/s" in printed
        reason = peers.PEERS["huggingface-compile"].reason_against("cpu", "float32", "generate")
        assert reason == "it is not set up for this: greedy generation"

    def test_every_new_token_is_generated(self):
        model = shapes.build_model("tiny", mode="generate")
        batch = dataclasses.replace(shapes.batch_of("ragged", [3, 7], model.config.encoder), decoded=True)
        contest = comparison.Comparison("tiny", model, "generate", [batch], [peers.OURS], 1)
        made = contest._step(peers.PEERS[peers.OURS].build(model), batch)()
        assert made.shape == (2, 1 + shapes.NEW_TOKENS)

    @pytest.mark.parametrize("mode", [[], ["--modes", "train"], ["--modes", "mlm"]], ids=["eval", "train", "mlm"])
    def test_a_wrong_weight_leaves_no_number(self, capsys, tmp_path, monkeypatch, mode):
        def build(model):
            broken = stock_clone(model)
            weight = next(m for m in broken.modules() if isinstance(m, nn.Linear)).weight
            weight_copy = nn.Parameter(weight.detach().clone())
            with torch.no_grad():
                weight_copy[0, 0] += 0.5
            next(m for m in broken.modules() if isinstance(m, nn.Linear)).weight = weight_copy
            return roberta_fast.accelerate_model(broken)

        self.assert_red(build, capsys, tmp_path, monkeypatch, *mode)

    def test_another_activation_leaves_no_number(self, capsys, tmp_path, monkeypatch):
        def build(model):
            other = stock_clone(model)
            for layer in other.encoder.layer:
                layer.intermediate.intermediate_act_fn = nn.GELU(approximate="tanh")
            return other

        self.assert_red(build, capsys, tmp_path, monkeypatch)

    def test_a_scaled_gradient_leaves_no_number(self, capsys, tmp_path, monkeypatch):
        def build(model):
            return Scaled(stock_clone(model))

        class Scaled(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def forward(self, **batch):
                return (self.model(**batch)[0] * 1.0001,)

        self.assert_red(build, capsys, tmp_path, monkeypatch, "--modes", "train")

    @staticmethod
    def assert_red(build, capsys, tmp_path, monkeypatch, *arguments):
        monkeypatch.setitem(peers.PEERS, "roberta_fast", dataclasses.replace(peers.PEERS["roberta_fast"], build=build))
        path = tmp_path / "results.json"
        assert bench("--json", str(path), *arguments) == 1
        out, err = capsys.readouterr()
        assert out == "" and not path.exists()
        named = {tuple(line.split(" batch: ")[0].split(", ")) for line in err.splitlines() if " batch: " in line}
        assert {("roberta_fast", "ragged"), ("roberta_fast", "dense")} <= named and {name for name, _ in named} == {
            "roberta_fast"
        }

    def test_a_checkpoint_and_its_own_texts(self, capsys, tmp_path, tiny):
        tokenizers = pytest.importorskip("tokenizers")
        from transformers import PreTrainedTokenizerFast

        vocabulary = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "one", "two", "three"])}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>").save_pretrained(tmp_path)
        tiny.save_pretrained(tmp_path)
        text, path = tmp_path / "texts.txt", tmp_path / "out.json"
        text.write_text("one two three\n\ntwo\none one one one one\nthree two\n")
        assert bench("--model", str(tmp_path), "--text", str(text), "--batch-size", "2", "--json", str(path)) == 0
        ragged = json.loads(path.read_text())["runs"][0]["batches"]["ragged"]
        assert ragged == {"batch": 2, "seqlen": 5, "tokens": 8, "fill": 0.8}  # lines 1 and 3 of the four that are not empty

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--model", "robrta"], "argument --model: 'robrta' is neither"),
            (["--peers", "roberta_fast,onnx"], "argument --peers: 'onnx' is not one of"),
            (["--scaling", "--lengths", "3"], "argument --lengths: the batches of --scaling"),
            (["--scaling", "--modes", "eval,train"], "argument --modes: --scaling measures inference, not eval,train"),
            (["--model", "tiny", "--lengths", "3,500"], "argument --lengths: lengths must be from 1 to 128"),
            (["--lengths", "3,x"], "argument --lengths: 'x' is not a whole number"),
            (["--longest", "129"], "argument --longest: 129 is above 128, which the model takes"),
            (["--dense", "2x129"], "argument --dense: lengths must be from 1 to 128"),
            (["--dense", "2*8"], "argument --dense: '2*8' is not BxS"),
            (["--threads", "0"], "argument --threads: '0' is not a whole number from 1 on"),
            (["--text", "no-such-file"], "argument --text: 'no-such-file' is no file"),
            (["--text", __file__], "argument --text: tiny has random weights and no tokenizer"),
            (["--model", ""], "argument --model: '' is neither"),
            (["--json", "."], "argument --json: '.' holds no results to write beside"),
            (["--json", __file__], f"argument --json: {__file__!r} holds no results to write beside"),
            (["--plots", __file__], f"argument --plots: {__file__!r} is no folder to write to"),
            (
                ["--model", "tiny", "--lengths", "3,4", "--batch-size", "2"],
                "argument --batch-size: --lengths says what the ragged batch is",
            ),
            (["--text", "a", "--lengths", "3"], "argument --lengths: the texts of --text have lengths of their own"),
            (["--dtype", "int3"], "argument --dtype: invalid choice: 'int3'"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_bad_arguments_are_named(self, capsys, arguments, message):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["bench", *([] if "--lengths" in arguments else SMALL), *arguments])
        assert exit_.value.code == 2 and message in capsys.readouterr().err

    def test_saved_results_go_by_the_machine(self, tmp_path, monkeypatch):
        monkeypatch.setattr(report, "RESULTS", tmp_path)
        monkeypatch.setattr(report, "IMAGES", tmp_path / "images")
        assert bench("--save", "--peers", "roberta_fast") == 0
        (path,) = tmp_path.glob("*.json")
        (run,) = report.load(tmp_path)
        assert path.stem == report.slug(run["environment"]) and path.stem.endswith("-threads")
        gpu_name = {"device": "cuda", "machine": "NVIDIA H100 80GB HBM3", "threads": 16}
        assert report.slug(gpu_name) == "nvidia-h100-80gb-hbm3"

    def test_an_absent_peer_says_how_to_get_it(self, capsys, monkeypatch):
        absent = dataclasses.replace(peers.PEERS["huggingface-eager"], needs=("no_such.runtime",))
        monkeypatch.setitem(peers.PEERS, "huggingface-eager", absent)
        assert bench() == 0
        printed = capsys.readouterr().out
        expected = "Not measured: `huggingface-eager`, no_such.runtime is not installed: pip install no_such.runtime."
        assert expected in printed and printed.count("huggingface-eager") == 1

    def test_the_unpadded_encoder_computes_the_same(self, tiny):
        def attend(query, key, value, bounds, _, longest, __, dropout_p):
            assert dropout_p == 0
            split = [t.transpose(0, 1)[None] for t in (query, key, value)]
            segments = itertools.pairwise(bounds)
            parts = (nn.functional.scaled_dot_product_attention(*(t[:, :, a:b] for t in split)) for a, b in segments)
            return torch.cat([part[0].transpose(0, 1) for part in parts])

        for mode in ("eval", "train", "mlm"):
            model = shapes.build_model("tiny", mode=mode, dropout=0)
            batch = shapes.batch_of("ragged", [3, 17, 9], model.config)
            gate = Gate(model, peers.PEERS[peers.BASELINE].build(model), batch, batch.labels(mode))
            gate.check(peers.Unpadded(model, attend))

    @pytest.mark.parametrize("model_type", ["roberta", "distilbert"])
    def test_dropout_is_that_of_every_module(self, model_type, tmp_path):
        """By the names that a family's config has for it, and peers without dropout are told of attention's."""
        config = tiny_config(model_type)
        AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
        for mode, p in (("train", 0.0), ("train", 0.3), ("mlm", 0.0)):
            model = shapes.build_model(str(tmp_path), mode=mode, dropout=p)
            assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {p}
            assert shapes.dropout_of(model.config, shapes.ATTENTION_DROPOUT) == p
            assert shapes.dropout_of(model.config, shapes.HIDDEN_DROPOUT) == p

    def test_a_step_leaves_the_parameters_that_peers_share(self, tiny):
        model = shapes.build_model("tiny", mode="train")
        before = [p.detach().clone() for p in model.parameters()]
        contest = comparison.Comparison("tiny", model, "train", [shapes.batch_of("dense", [9, 9], model.config)], [peers.OURS], 1)
        calls = []
        contest.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        contest.optimizer.register_step_post_hook(lambda *_: calls.append(1))
        contest._step(peers.PEERS[peers.OURS].build(model), contest.batches[0])()
        assert calls and contest.optimizer.state[model.classifier.dense.weight]["exp_avg"].abs().max() > 0
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


class TestOperations:
    @pytest.mark.parametrize("name", OPERATIONS)
    def test_every_contender_passes_and_is_measured(self, name):
        module = importlib.import_module(f"roberta_fast.benchmarks.bench_{name}")
        cases = list(module.cases("cpu", shapes.OPERATION_SIZES["tiny"]))
        directions = {case.direction for case in cases}
        assert directions in ({operations.FORWARD, operations.BACKWARD}, {operations.FORWARD}, {operations.STEP})
        for case in cases[:2]:
            for record in operations.measure_case(case, 1):
                assert record.get("rate", 0) > 0, record

    @pytest.mark.parametrize("direction", ["forward", "backward"])
    def test_a_wrong_contender_has_no_number(self, direction):
        module = importlib.import_module("roberta_fast.benchmarks.bench_linear_gelu")
        case = next(c for c in module.cases("cpu", shapes.OPERATION_SIZES["tiny"]) if c.direction == direction)
        tanh = operations.Contender(lambda *x: nn.functional.gelu(nn.functional.linear(*x), approximate="tanh"))
        case = dataclasses.replace(case, contenders={**case.contenders, "torch tanh": tanh})
        records = {record["contender"]: record for record in operations.measure_case(case, 1)}
        assert "rate" in records["torch"] and "red" not in records["torch"]
        assert "rate" not in records["torch tanh"] and "exceeds" in records["torch tanh"]["red"]

    def test_a_contender_is_checked_in_its_own_layout(self):
        module = importlib.import_module("roberta_fast.benchmarks.bench_attention")
        case = next(c for c in module.cases("cpu", shapes.OPERATION_SIZES["tiny"]) if "ragged" in c.size).verify_at
        padded = case.contenders["torch sdpa"]
        leaky = dataclasses.replace(padded, run=nn.functional.scaled_dot_product_attention)  # sees the padding
        contest = operations.Contest(dataclasses.replace(case, contenders={"torch sdpa": padded, "torch leaky": leaky}))
        contest.verify("torch sdpa")
        with pytest.raises(AssertionError, match="exceeds"):
            contest.verify("torch leaky")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "machine.json"
    assert bench("--peers", "roberta_fast", "--json", str(path)) == 0
    return path


class TestReport:
    README = "# Title\n\n<!-- results:cpu -->\nold\n<!-- /results -->\n\nText\n<!-- results:cuda -->\n<!-- /results -->\n"

    def check(self, readme, results):
        return report.run(["--check", "--results", str(results)], readme=readme)

    def test_tables_stand_between_the_markers_and_drift_is_seen(self, tmp_path, results, capsys):
        readme = tmp_path / "README.md"
        readme.write_text(self.README)
        assert self.check(readme, results.parent) == 1 and "does not show" in capsys.readouterr().err
        no_plot = int(importlib.util.find_spec("matplotlib") is None)  # the tables are written all the same
        assert report.run(["--results", str(results.parent)], readme=readme) == no_plot
        text = readme.read_text()
        (run,) = report.load(results.parent)
        assert report.section(run) in text and "old" not in text and text.startswith("# Title\n\n<!-- results:cpu -->\n**tiny")
        assert text.endswith("Text\n<!-- results:cuda -->\n<!-- /results -->\n")
        capsys.readouterr()
        assert self.check(readme, results.parent) == no_plot and str(readme) not in capsys.readouterr().err
        row = run["rows"][0]
        row["tokens_per_s"] *= 1.5
        changed = tmp_path / "changed"
        report.save(changed / "machine.json", [run])
        assert self.check(readme, changed) == 1 and str(readme) in capsys.readouterr().err

    def test_what_is_not_marked_is_refused(self):
        for text in ("no marker", "<!-- results:tpu -->\n<!-- /results -->"):
            with pytest.raises(ValueError, match="markers must be"):
                report.render(text, [])

    def test_a_newer_result_replaces_its_elder_alone(self, tmp_path, results):
        (run,) = report.load(results.parent)
        path = tmp_path / "machine.json"
        newer = {**run, "environment": {**run["environment"], "date": "2999-01-01"}}
        report.save(path, [run, {**run, "mode": "train"}, {**run, "title": "other"}])
        report.save(path, [newer])
        assert [(r["mode"], r["title"], r["environment"]["date"][:4] == "2999") for r in report.load(tmp_path)] == [
            ("train", None, False),
            ("eval", "other", False),
            ("eval", None, True),
        ]

    def test_origin_names_machine_versions_commit_and_date(self, results):
        (run,) = report.load(results.parent)
        env, text = run["environment"], report.section(run)
        for part in (env["machine"], f"torch {torch.__version__}", f"commit {env['commit'] or 'unknown'}", env["date"]):
            assert part in text

    def test_the_readme_shows_the_results(self):
        assert report.run(["--check"]) == 0
