"""Peers with a runtime of their own, which a model is exported to: ONNX Runtime, OpenVINO, CTranslate2, sentence-transformers.

Each is set up as its documentation recommends for the least time on a CPU, on as many threads as torch has, with batches of any
size and length. What is exported lies in a temporary folder for as long as it takes to load it.
"""

import contextlib
import importlib
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from roberta_fast.benchmarks.shapes import Batch
from roberta_fast.families import longest_sequence
from roberta_fast.report import stock_clone

INPUTS = ("input_ids", "attention_mask")


class Unsuited(Exception):
    """This model cannot be brought to this runtime; the text says why."""


class OnnxRuntime:
    """ONNX Runtime on a graph whose attentions, norms and GELUs are fused, as its transformer tools make it.

    https://onnxruntime.ai/docs/performance/transformers-optimization.html; int8 as in
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html: 8-bit weights, activations scaled at run time.
    Raises Unsuited where the optimizer leaves something unfused: a slower graph would not be what its users run.
    """

    def __init__(self, model: nn.Module, *, int8: bool = False):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as folder:
            path = fused_graph(model, Path(folder))
            if int8:
                path = _quantized_graph(path)
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._shrink = onnxruntime.RunOptions()
        self._shrink.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.from_numpy(self._session.run(None, _arrays(input_ids, attention_mask))[0]),)

    def release(self) -> None:
        """Gives back the memory that it keeps between calls."""
        ids = torch.ones(1, 2, dtype=torch.int64)
        self._session.run(None, _arrays(ids, ids), self._shrink)


def fused_graph(model: nn.Module, folder: Path) -> Path:
    """Exports ``model`` to ``folder`` with dynamic batch and length and fuses it; the path of the result."""
    from onnxruntime.transformers import optimizer

    clone = _traceable(model, "eager")  # the form of attention that the optimizer knows
    path, fused_path = folder / "model.onnx", folder / "fused.onnx"
    axes = {name: {0: "batch", 1: "length"} for name in (*INPUTS, "hidden")}
    ids = torch.full((2, 8), min(10, model.config.vocab_size - 1))
    with _quiet(), torch.no_grad():
        # The newer exporter's graph has another form of mask, which the optimizer does not recognize.
        torch.onnx.export(
            clone,
            (ids, torch.ones_like(ids)),
            path,
            input_names=list(INPUTS),
            output_names=["hidden"],
            dynamic_axes=axes,
            dynamo=False,
        )
        fused = optimizer.optimize_model(
            str(path),
            model_type="bert",
            num_heads=model.config.num_attention_heads,
            hidden_size=model.config.hidden_size,
            opt_level=0,  # the session does the rest
        )
    layers, found = model.config.num_hidden_layers, fused.get_fused_operator_statistics()
    for operator, wanted in {"Attention": layers, "BiasGelu": layers, "SkipLayerNormalization": 2 * layers}.items():
        if found[operator] != wanted:
            raise Unsuited(f"its optimizer made {found[operator]} {operator} nodes of this graph instead of {wanted}")
    fused.save_model_to_file(str(fused_path))
    return fused_path


def _quantized_graph(path):
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantized = path.with_name("int8.onnx")
    with _quiet():
        quantize_dynamic(
            path,
            quantized,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=not _has_vnni(),  # without VNNI, sums of products of the full 8-bit range saturate
            extra_options={"DefaultTensorType": TensorProto.FLOAT},  # of the fused nodes, which shape inference does not know
        )
    return quantized


def _has_vnni():
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True


class OpenVino:
    """OpenVINO on a graph that is converted from the model, for the least latency of one call.

    https://docs.openvino.ai/2026/openvino-workflow/running-inference/optimize-inference.html; int8 by NNCF's post-training
    quantization for transformers, https://docs.openvino.ai/2026/openvino-workflow/model-optimization.html.
    calibration: the batch whose sequences NNCF sees; None for float32.
    """

    def __init__(self, model: nn.Module, calibration: Batch | None = None):
        import openvino

        ids = torch.full((2, 8), min(10, model.config.vocab_size - 1))
        with _quiet(), torch.no_grad():
            # Traced with torch's own attention, which becomes OpenVINO's fused one.
            graph = openvino.convert_model(_traceable(model, "sdpa"), example_input=(ids, torch.ones_like(ids)))
            if calibration is not None:
                graph = _calibrated(graph, calibration)
            settings = {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the CPU has it
            }
            self._compiled = openvino.compile_model(graph, "CPU", settings)
        self._request = self._compiled.create_infer_request()

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        inputs = [input_ids.numpy(), attention_mask.numpy()]
        return (torch.from_numpy(self._request.infer(inputs, share_inputs=True, share_outputs=True)[0]),)

    def release(self) -> None:
        """Gives back the memory that it keeps between calls."""
        self._request = None
        self._compiled.release_memory()
        self._request = self._compiled.create_infer_request()


def _calibrated(graph, batch):
    import nncf

    nncf.set_log_level(logging.ERROR)
    pairs = zip(batch.input_ids, batch.lengths, strict=True)
    samples = [[ids[:n].numpy()[None], torch.ones(1, n, dtype=torch.int64).numpy()] for ids, n in pairs]
    return nncf.quantize(graph, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER)


def _with_openmp_of_its_own(name):
    """Imports a module whose libraries look for symbols among their own dependencies first.

    Otherwise CTranslate2's thread and PyTorch's share one OpenMP runtime, which counts more threads than cores and lets all of
    them sleep between operations: Hugging Face's model then took 1.6 times as long for a short text.
    """
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | getattr(os, "RTLD_DEEPBIND", 0))
    try:
        return importlib.import_module(name)
    finally:
        sys.setdlopenflags(flags)


class CTranslate2:
    """CTranslate2 on a model that its converter wrote; it skips padding itself.

    https://opennmt.net/CTranslate2/performance.html: one worker with all threads, for one batch at a time.
    Raises Unsuited for model types that it does not convert.
    """

    def __init__(self, model: nn.Module, *, compute_type: str):
        ctranslate2 = _with_openmp_of_its_own("ctranslate2")
        self._storage_view, kind = ctranslate2.StorageView, model.config.model_type
        if kind not in ("bert", "roberta", "xlm-roberta", "camembert", "distilbert"):
            raise Unsuited(f"it does not convert models of type {kind}")
        with tempfile.TemporaryDirectory() as folder:
            source, converted = Path(folder, "source"), Path(folder, "converted")
            with _quiet():
                _save_with_tokenizer(model, source)
                ctranslate2.converters.TransformersConverter(str(source)).convert(str(converted))
                self._encoder = ctranslate2.Encoder(
                    str(converted),
                    device="cpu",
                    compute_type=compute_type,
                    inter_threads=1,
                    intra_threads=torch.get_num_threads(),
                )

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        ids = self._storage_view.from_array(input_ids.int().numpy())
        lengths = self._storage_view.from_array(attention_mask.sum(1, dtype=torch.int32).numpy())
        return (torch.from_numpy(np.asarray(self._encoder.forward_batch(ids, lengths).last_hidden_state)),)


class SentenceTransformers:
    """A SentenceTransformer's forward pass with mean pooling; its token embeddings are the hidden states."""

    def __init__(self, model: nn.Module):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        arguments = {"attn_implementation": "sdpa", "dtype": model.dtype}
        with tempfile.TemporaryDirectory() as folder, _quiet():
            _save_with_tokenizer(model, folder)
            encoder = Transformer(folder, model_kwargs=arguments)
            pooling = Pooling(model.config.hidden_size, pooling_mode="mean")
            self._model = SentenceTransformer(modules=[encoder, pooling], device=model.device.type).eval()

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        return (self._model({"input_ids": input_ids, "attention_mask": attention_mask})["token_embeddings"],)


class _Traceable(nn.Module):
    """The model as a function of two tensors, whose result is one."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


def _traceable(model, attention):
    clone = stock_clone(model)
    clone.set_attn_implementation(attention)
    return _Traceable(clone).eval()


def _arrays(input_ids, attention_mask):
    return {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}


def _save_with_tokenizer(model, folder):
    """Saves the model with a tokenizer of made-up words, which converters want and token ids do not need."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"word{i}": i for i in range(model.config.vocab_size)}
    special = {"pad_token": "word0", "unk_token": "word0", "bos_token": "word0", "eos_token": "word0"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="word0")), **special)
    tokenizer.model_max_length = longest_sequence(model.config)
    clone = stock_clone(model)
    clone.config.position_embedding_type = "absolute"  # CTranslate2 wants it said; configs of transformers 5 do not
    clone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _quiet():
    """Keeps what exporters report of themselves off the terminal."""
    from transformers.utils import logging as bars

    before, had_bars = logging.root.manager.disable, bars.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    bars.disable_progress_bar()
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if had_bars:
            bars.enable_progress_bar()
