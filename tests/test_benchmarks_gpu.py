"""The one command for a machine with a GPU: its parts, what they leave, and a dry run on the CPU."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from roberta_fast.benchmarks import gpu, gpu_stages

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

    def test_parts_are_all_stages(self, tmp_path):
        stages = gpu.all_stages(settings(tmp_path, tiny=False))
        assert {stage.part for stage in stages.values()} == set(gpu.PARTS)
        for kind in [kind for kinds in gpu.KINDS.values() for kind in kinds]:
            for model in ("roberta-base", "roberta-large", "minilm"):
                assert f"{model}-{kind}" in stages
                assert kind in gpu_stages.ENCODER_ARGUMENTS

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
        wanted += [("loss_curve", "mlm")] * 2  # in float32 and in bfloat16
        assert sorted(kinds) == sorted(wanted)

    @staticmethod
    def dry_run(out, *arguments):
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(out), "--device", "cpu", "--tiny"]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=600)
