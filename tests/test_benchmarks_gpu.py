"""The one command for a machine with a GPU: its parts, what they leave, and a dry run on the CPU."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from graph_cases import recorder
from torch.utils._python_dispatch import TorchDispatchMode

from roberta_fast import cli
from roberta_fast.benchmarks import gpu, gpu_stages, latency, measure, parts, peers, plots, report, shapes

__all__ = ["recorder"]
ROOT = Path(__file__).parent.parent


def settings(out, **changes):
    values = {"venv": out / "none", "results": out / "results", "device": "cpu", "tiny": True, "quick": False, "commit": None}
    return gpu.Settings(out=out, **{**values, **changes})


def left_by_tests(out, **changes):
    outcome = {"red": {}, "passed": 3, "skipped": 0, "sources": gpu.digest()}
    (out / "tests.json").write_text(json.dumps({**outcome, **changes}))


class TestGpu:
    def test_red_tests_stop_their_operation_and_every_encoder(self, tmp_path):
        here = settings(tmp_path)
        stages = gpu.all_stages(here)
        left_by_tests(tmp_path, red={"attention": "test_forward: 1 exceeds 0"})
        assert gpu.red_reason(here, stages["attention"], False) == "attention is red, test_forward: 1 exceeds 0"
        assert gpu.red_reason(here, stages["tiny-eval"], False).startswith("attention is red")
        assert gpu.red_reason(here, stages["pack"], False) is None and gpu.red_reason(here, stages["limits"], False) is None

    def test_tests_of_other_sources_do_not_count(self, tmp_path):
        here = settings(tmp_path)
        stage = gpu.all_stages(here)["pack"]
        assert "have not run" in gpu.red_reason(here, stage, False)
        left_by_tests(tmp_path, sources="other")
        assert "have not run" in gpu.red_reason(here, stage, False) and gpu.red_reason(here, stage, True) is None

    def test_no_gpu_test_is_no_green_gate(self, tmp_path):
        here = settings(tmp_path, device="cuda")
        left_by_tests(tmp_path, passed=0)
        assert gpu.red_reason(here, gpu.all_stages(here)["pack"], False) == "no test ran"

    def test_junit_is_read(self, tmp_path):
        path = tmp_path / "tests.xml"
        cases = '<testcase name="a"/><testcase name="b"><skipped/></testcase>'
        path.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
        assert gpu.read_junit(path) == (None, 1, 1)
        broken = '<testcase name="c"><failure message="1 exceeds 0&#10;more"/></testcase>'
        path.write_text(f"<testsuites><testsuite>{cases}{broken}</testsuite></testsuites>")
        assert gpu.read_junit(path) == ("c: 1 exceeds 0", 1, 1)

    def test_a_stage_out_of_time_is_stopped(self, tmp_path):
        stage = gpu.Stage(gpu.merge, limit=1, name="sleeper")
        start = time.monotonic()
        assert gpu.call(settings(tmp_path), stage, sys.executable, "-c", "import time; time.sleep(60)") == gpu.OUT_OF_TIME
        assert time.monotonic() - start < 10

    def test_an_install_falls_back_where_cuda_does_not_build(self, tmp_path, monkeypatch):
        builds = []

        def call(settings, stage, *command, **environment):
            if "pip" in command:
                builds.append(environment.get("ROBERTA_FAST_BUILD"))
            return int("pip" in command and len(builds) < 2)

        monkeypatch.setattr(gpu, "call", call)
        (tmp_path / "venv/bin").mkdir(parents=True)
        (tmp_path / "venv/bin/python").touch()
        (tmp_path / "venv/lib/python3/site-packages").mkdir(parents=True)
        here = settings(tmp_path, device="cuda", venv=tmp_path / "venv")
        assert gpu.install(here, gpu.all_stages(here)["install"]) == 0 and builds == [None, "cpu"]

    def test_files_without_gpu_tests_are_not_imported(self):
        """What they need may not be installed there; one that does not import would stop all."""
        names = {path.name for path in gpu.other_gpu_tests()}
        assert {"test_graphs_gpu.py", "test_fp8.py", "test_packing.py"} <= names and "test_page.py" not in names

    def test_parts_are_all_stages(self, tmp_path):
        stages = gpu.all_stages(settings(tmp_path, tiny=False))
        assert {stage.part for stage in stages.values()} == set(gpu.PARTS)
        for kind in [kind for kinds in gpu.KINDS.values() for kind in kinds]:
            for model in ("roberta-base", "roberta-large", "minilm"):
                assert f"{model}-{kind}" in stages
                assert kind in gpu_stages.ENCODER_ARGUMENTS
        for kind in gpu.HOST:
            assert {stages[f"{model}-{kind}"].part for model in ("roberta-base", "roberta-large", "minilm")} == {"inference"}

    def test_no_stage_begins_when_the_time_is_over_and_what_is_there_is_gathered(self, tmp_path):
        left_by_tests(tmp_path)
        done = self.dry_run(tmp_path, "--part", "inference", "--minutes", "0")
        assert done.returncode == 0 and "[tiny-eval] not measured: the time is over" in done.stdout, done.stdout
        assert "[merge] done" in done.stdout and "tiny-train" not in done.stdout

    def test_dry_run_in_short(self, tmp_path):
        left_by_tests(tmp_path)
        done = self.dry_run(tmp_path, "--stages", "limits,merge")
        assert done.returncode == 0, done.stdout
        (results,) = (tmp_path / "results").glob("*.json")
        assert [run["operation"] for run in json.loads(results.read_text())["runs"]] == ["limits"]

    def test_dry_run_of_what_the_host_costs(self, tmp_path):
        left_by_tests(tmp_path)
        done = self.dry_run(tmp_path, "--stages", "tiny-latency,tiny-fill,tiny-parts,merge")
        assert done.returncode == 0, done.stdout
        runs = {run["kind"]: run for run in report.load(tmp_path / "results")}
        assert set(runs) == set(gpu.HOST)
        on_cpu = {peers.BASELINE, "roberta_fast-eager", "roberta_fast-device"}
        for kind, batches in (("latency", ["S=32", "S=128"]), ("fill", [f"{n} of 16" for n in (2, 4, 8, 12, 16)])):
            assert list(runs[kind]["batches"]) == batches
            assert {(row["batch"], row["peer"]) for row in runs[kind]["rows"]} == {(b, p) for b in batches for p in on_cpu}
            assert "`roberta_fast-graphs`, it runs on cuda, not on cpu" in done.stdout
        assert {(facts["batch"], facts["seqlen"]) for facts in runs["fill"]["batches"].values()} == {(2, 16)}
        assert plots.figures(list(runs.values())) == {"cpu-fill.png": [runs["fill"]]}
        text = report.render("<!-- results:cpu -->\n<!-- /results -->\n", list(runs.values()))
        assert "latency of one text" in text and "its kernels one by one" in text and "docs/images/cpu-fill.png" in text

    def test_a_stage_that_does_not_exist_is_named(self, tmp_path):
        done = self.dry_run(tmp_path, "--stages", "limits,attentoin")
        assert done.returncode == 1 and "argument --stages: 'attentoin' is not one of install" in done.stderr

    @pytest.mark.slow
    def test_dry_run_in_full(self, tmp_path):
        done = self.dry_run(tmp_path, "--venv", str(tmp_path / "venv"))
        assert done.returncode == 0 and done.stdout.endswith("all done\n"), done.stdout
        (results,) = (tmp_path / "results").glob("*.json")
        kinds = [(run["kind"], run.get("operation", run.get("mode"))) for run in json.loads(results.read_text())["runs"]]
        modes = ("eval", "train", "train", "mlm", "mlm", "seq2seq", "generate")  # two of them without dropout as well
        wanted = [("operation", name) for name in ("limits", *gpu.OPERATIONS)] + [("encoder", mode) for mode in modes]
        wanted += [("latency", "eval"), ("fill", "eval"), ("parts", None)]
        wanted += [("loss_curve", "mlm")] * 2  # in float32 and in bfloat16
        assert sorted(kinds) == sorted(wanted)

    @staticmethod
    def dry_run(out, *arguments):
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(out), "--device", "cpu", "--tiny"]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=600)


class Operations(TorchDispatchMode):
    """Counts this package's operations."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "roberta_fast":
            self.counts[func.name()] = self.counts.get(func.name(), 0) + 1
        return func(*args, **(kwargs or {}))


class TestWhatTheHostCosts:
    def test_the_parts_are_what_a_layer_runs(self):
        model = shapes.build_model("tiny")
        whole, single = Operations(), Operations()
        fast = peers.PEERS["roberta_fast-eager"].build(model)
        with torch.no_grad(), whole:
            fast.encoder(torch.randn(2, 16, 64))
        with torch.no_grad(), single:
            for call in parts.parts_of(model, 2, 16).values():
                call()
        layers = model.config.num_hidden_layers
        assert single.counts and whole.counts == {name: count * layers for name, count in single.counts.items()}

    def test_the_sum_is_of_all_layers(self):
        run = parts.run("tiny", shapes.build_model("tiny"), (2, 16), 1)
        run["parts"] = {name: {**facts, "median": 0.001} for name, facts in run["parts"].items()}
        run["wholes"] = {"roberta_fast-eager": {**run["wholes"]["roberta_fast-eager"], "median": 0.016}}
        assert report.parts_sum(run) == pytest.approx(2 * 6 * 0.001)
        assert "The sum is 75% in `roberta_fast-eager`" in report.parts_section(run)

    def test_a_percentile_needs_calls_to_have_one(self):
        assert "p99" not in measure.Timing((1.0,) * 99).facts()
        timing = measure.Timing(tuple(float(i) for i in range(1, 201)))
        assert timing.facts()["p99"] == pytest.approx(198, abs=0.1) and timing.facts()["median"] == 100.5

    def test_the_99th_percentile_is_shown(self):
        run = latency.latency("tiny", shapes.build_model("tiny"), 1, [peers.BASELINE, peers.OURS]).run()
        for row in run["rows"]:
            row["seconds"] = {"median": 0.0012, "p20": 0.001, "p80": 0.002, "repeats": 500, "p99": 0.0034}
        assert "|         1.200 |   3.400 |  " in report.section(run)

    def test_variants_of_ours_pass_the_gate(self, capsys):
        names = ["roberta_fast-eager", "roberta_fast-device", "roberta_fast-deterministic"]
        assert names[-1] in gpu_stages.ENCODER_ARGUMENTS["eval"][1].split(",")
        arguments = ["--model", "tiny", "--batch-size", "3", "--longest", "20", "--repeats", "1", "--device", "cpu"]
        assert cli.main(["bench", *arguments, "--peers", ",".join(names)]) == 0
        printed = capsys.readouterr().out
        assert all(f"`{name}`" in printed for name in names)

    def test_memory_is_measured_with_the_graphs_in_it(self, recorder):
        model = peers.PEERS[peers.OURS].build(shapes.build_model("tiny"))
        with torch.no_grad():
            model(**shapes.batch_of("one", [9], model.config).inputs())
        assert len(model.encoder.graphs) == 1
        model.release()
        assert len(model.encoder.graphs) == 0
