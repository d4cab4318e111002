"""Real tokens a second, and which part of the device's arithmetic they use (MFU)."""

import time
from collections.abc import Mapping

import torch
from torch import nn

PEAK_MATRIX = {"cuda": 8192, "cpu": 1024}
PEAK_SECONDS = 0.2


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matrix product on ``device``, the best of 0.2 s of them.

    Measured, so that utilization is against what this machine does now, with its number of threads, and not against a datasheet.
    """
    size = PEAK_MATRIX.get(device.type, 2048)
    a = torch.ones(size, size, device=device, dtype=dtype)  # drawn numbers would take from the generator that dropout has
    best, end = float("inf"), time.perf_counter() + PEAK_SECONDS
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class Throughput:
    """Counts the texts and real tokens of training steps, and the model's arithmetic on them, without waiting for the device.

    A step on texts of s tokens takes 6·N·s + 12·L·C·s² operations, forward and backward: N parameters outside the embeddings,
    L layers of width C (Chowdhery et al., "PaLM", appendix B). Encoder-decoders are counted half by half. Where an output has the
    weights of the embeddings, these count 6 operations for each token with a label. Recomputation is not counted.
    """

    def __init__(self, model: nn.Module):
        self.parts = list(_parts(model))
        self.tied = _tied_output(model)
        self.tokens = self.flops = self.texts = 0
        self.seconds, self._since = 0.0, None

    def start(self) -> None:
        """Time counts from now on."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Time does not count from now on: of evaluation, say, or of a checkpoint."""
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None

    def add(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Counts a batch, as the model gets it."""
        for index, (parameters, width, source) in enumerate(self.parts):
            lengths = _lengths(inputs, source)
            if lengths is None:
                continue
            tokens, squares = lengths.sum(), (lengths * lengths).sum()
            self.flops = self.flops + 6 * parameters * tokens + 12 * width * squares
            if index == 0:
                self.tokens, self.texts = self.tokens + tokens, self.texts + lengths.numel()
        if self.tied and inputs.get("labels") is not None:
            self.flops = self.flops + 6 * self.tied * (inputs["labels"] != -100).sum()

    def drain(self) -> tuple[int, float, float]:
        """(tokens, operations, seconds) since the last call; waits for the device."""
        if self._since is not None:
            self.stop()
            self.start()
        drained = int(self.tokens), float(self.flops), self.seconds
        self.tokens = self.flops = 0
        self.seconds = 0.0
        return drained


def _parts(model):
    """(parameters outside the embeddings, layers × width, the input that holds its texts) of the model's halves."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        yield _size(model.get_encoder()), _layers_by_width(config.encoder), "attention_mask"
        yield _size(model.decoder), _layers_by_width(config.decoder), "labels"
    elif config is not None:
        yield _size(model), _layers_by_width(config), "attention_mask"


def _tied_output(model):
    """Elements of the output's weights where they are an embedding's, which no part counts; 0 else."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(output, "weight", None)
    embeddings = (m.weight for m in model.modules() if isinstance(m, nn.Embedding))
    return weight.numel() if weight is not None and any(weight is e for e in embeddings) else 0


def _size(module):
    """Parameters that rows are multiplied with."""
    inside = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return sum(p.numel() for p in module.parameters() if id(p) not in inside)


def _layers_by_width(config):
    return getattr(config, "num_hidden_layers", 0) * getattr(config, "hidden_size", 0)


def _lengths(inputs, source):
    """The real tokens of each text of a batch, as a tensor on its device, or None."""
    if source == "labels":
        labels = inputs.get("labels")
        return None if labels is None or labels.dim() < 2 else (labels != -100).sum(-1)
    if inputs.get("cu_seq_lens_q") is not None:
        return inputs["cu_seq_lens_q"].long().diff()
    if inputs.get("attention_mask") is not None:
        return inputs["attention_mask"].long().sum(-1)
    ids = inputs.get("input_ids")
    return None if ids is None else torch.full((ids.shape[0],), ids.shape[-1], device=ids.device)
