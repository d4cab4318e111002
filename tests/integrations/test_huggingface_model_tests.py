"""Hugging Face's own tests of its models fail for patched models exactly where they fail for stock ones.

They come from the source distribution of the installed transformers, fetched once into ``build/``.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import transformers

from roberta_fast import supported_model_types

HERE = Path(__file__).parent
CACHE = HERE.parent.parent / "build" / f"transformers-{transformers.__version__}-tests"
# The tests import two modules of mixins that the distribution leaves out.
LEFT_OUT = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}
# It asks a hub for a checkpoint, again and again where there is none to be reached.
NEEDS_A_HUB = "not test_bc_torch_dtype"
CORE = (
    "test_attention_outputs or test_batching_equivalence or test_can_capture or test_can_set_attention or test_capture_outputs"
    " or test_config_attn or test_determinism or sdpa_inference_09 or sdpa_inference_13 or sdpa_inference_24"
    " or test_feed_forward_chunking or test_hidden_states_output or test_inputs_embeds or test_retain_grad"
    " or test_sdpa_can_dispatch_non or test_torch_save_load or test_training_gradient_checkpointing_use_reentrant"
)


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--retries=1", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"transformers' tests cannot be fetched: {result.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def suite():
    """A folder with the package ``transformers_tests`` and what else it imports."""
    if not CACHE.exists():
        new = CACHE.with_suffix(f".{os.getpid()}")
        version = f"transformers=={transformers.__version__}"
        pip("download", "--no-deps", "--no-build-isolation", "--no-binary=transformers", "--dest", new, version)
        pip("install", "--no-deps", "--target", new, "parameterized==0.9.0")
        with tarfile.open(next(new.glob("*.tar.gz"))) as archive:
            archive.extractall(new, [m for m in archive if m.name.split("/")[1:2] == ["tests"]], filter="data")
        shutil.move(next(new.glob("transformers-*/tests")), new / "transformers_tests")
        for path, mixin in LEFT_OUT.items():
            stub = new / "transformers_tests" / path
            stub.parent.mkdir()
            stub.write_text(f"class {mixin}:\n    pass\n")
        new.rename(CACHE)
    return CACHE


def outcomes(suite, tmp_path, model_type, select):
    """``{variant: {test: outcome}}`` of the tests that ``select`` picks, where an outcome is passed, failed or skipped."""
    report = tmp_path / "report.xml"
    options = ["-c", os.devnull, "--rootdir", HERE, "-p", "no:cacheprovider", "-W", "ignore", "-q", "--junitxml", report]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(suite), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
    }
    classes = [f"{HERE / 'model_testers.py'}::{variant}_{model_type.replace('-', '_')}" for variant in ("Stock", "Patched")]
    command = [Path(sys.executable).parent / "pytest", *options, "-k", select, *classes]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stdout[-4000:] + result.stderr[-2000:]
    found = {"Stock": {}, "Patched": {}}
    for case in ElementTree.parse(report).iter("testcase"):
        variant = case.get("classname").rsplit(".", 1)[-1].split("_", 1)[0]
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[variant][case.get("name")] = outcome
    return found


def assert_same(found, at_least):
    stock, patched = found["Stock"], found["Patched"]
    assert patched == stock, {name: (stock.get(name), patched[name]) for name in patched if patched[name] != stock.get(name)}
    passed = [name for name, outcome in stock.items() if outcome == "passed"]
    assert len(passed) >= at_least, f"only {len(passed)} tests passed: {stock}"


def test_core_tests_on_roberta(suite, tmp_path):
    assert_same(outcomes(suite, tmp_path, "roberta", CORE), at_least=15)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", supported_model_types())
def test_all_tests(suite, tmp_path, model_type):
    assert_same(outcomes(suite, tmp_path, model_type, NEEDS_A_HUB), at_least=50)
