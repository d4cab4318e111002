"""What every peer is measured on: model shapes, batches and GEMM sizes. Nothing here depends on who is measured."""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

_MEDIAN, _SIGMA = 0.37, 0.47


@dataclass(frozen=True)
class ModelShape:
    """An encoder's dimensions. family: ``config.model_type``; positions: longest sequence that it takes."""

    family: str
    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int
    positions: int = 512

    def config(self, **overrides):
        """The Hugging Face config of this shape, every other value as that family's published models have it."""
        from transformers import BertConfig, RobertaConfig  # not loaded by benchmarks of operations

        common = {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary,
        }
        if self.family == "roberta":
            positions = self.positions + 2  # two rows stand before the first position
            return RobertaConfig(**common, max_position_embeddings=positions, type_vocab_size=1, layer_norm_eps=1e-5, **overrides)
        return BertConfig(**common, max_position_embeddings=self.positions, **overrides)


MODELS = {
    "roberta-base": ModelShape("roberta", 12, 768, 12, 3072, 50265),
    "roberta-large": ModelShape("roberta", 24, 1024, 16, 4096, 50265),
    "minilm": ModelShape("bert", 6, 384, 12, 1536, 30522),
    "roberta-long": ModelShape("roberta", 2, 768, 12, 3072, 50265, positions=8192),  # two of roberta-base's layers
    "mini": ModelShape("roberta", 4, 256, 4, 1024, 8192, positions=128),  # of the sizes of Turc et al. 2019
    "tiny": ModelShape("roberta", 2, 64, 4, 256, 1000, positions=128),
}


MODES = {
    "eval": "inference",
    "train": "fine-tuning step",
    "mlm": "masked-language-model step",
    "seq2seq": "encoder-decoder training step",
    "generate": "greedy generation",
}
TRAINING = ("train", "mlm", "seq2seq")
NEW_TOKENS = 32  # that a text is continued by in generation
# What BERT's relatives and DistilBERT call a probability of dropping.
HIDDEN_DROPOUT = ("hidden_dropout_prob", "dropout")
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")
HEAD_DROPOUT = ("classifier_dropout", "seq_classif_dropout", "qa_dropout")
LABELLED = 0.15  # of the tokens, as masked-language-model training has it


def build_model(name: str, *, mode: str = "eval", seed: int = 0, dropout: float | None = None):
    """The stock model on the CPU: for a name of ``MODELS`` with random weights, for a folder with the checkpoint's.

    mode: ``"eval"``: the bare encoder in eval mode; in training mode ``"train"``: with a two-class head, as fine-tuning has it;
    ``"mlm"``: with that of a masked language model; ``"seq2seq"``: with a decoder of the same shape behind it, which attends to
    it; ``"generate"``: that one in eval mode. dropout: all of its probabilities; None: as the config has them.
    Raises ValueError if ``name`` is neither.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, EncoderDecoderModel

    torch.manual_seed(seed)
    if name not in MODELS and not Path(name, "config.json").is_file():
        raise ValueError(f"{name!r} is neither one of {', '.join(MODELS)} nor a folder with a config.json")
    overrides = {}
    if dropout is not None:
        config = MODELS[name].config() if name in MODELS else AutoConfig.from_pretrained(name)
        overrides = {key: dropout for key in HIDDEN_DROPOUT + ATTENTION_DROPOUT + HEAD_DROPOUT if hasattr(config, key)}
    if mode in ("seq2seq", "generate"):
        if name in MODELS:
            model = EncoderDecoderModel(_encoder_decoder_config(MODELS[name], overrides))
        else:
            given = {f"{half}_{key}": value for half in ("encoder", "decoder") for key, value in overrides.items()}
            model = EncoderDecoderModel.from_encoder_decoder_pretrained(name, name, **given)
        start = model.config.encoder.bos_token_id or 0
        for config in (model.config, model.generation_config):
            config.decoder_start_token_id, config.pad_token_id = start, model.config.encoder.pad_token_id
    else:
        kind = {"eval": AutoModel, "train": AutoModelForSequenceClassification, "mlm": AutoModelForMaskedLM}[mode]
        overrides |= {"num_labels": 2} if mode == "train" else {}
        model = kind.from_config(MODELS[name].config(**overrides)) if name in MODELS else kind.from_pretrained(name, **overrides)
    return model.train(mode in TRAINING)


def _encoder_decoder_config(shape, overrides):
    from transformers import EncoderDecoderConfig

    return EncoderDecoderConfig.from_encoder_decoder_configs(*(shape.config(**overrides) for _ in range(2)))


def encoder_config(config):
    """The config of a model's encoder."""
    return getattr(config, "encoder", config)


def dropout_of(config, names: tuple[str, ...]) -> float:
    """The probability that the encoder's config has under one of ``names``; 0 under none."""
    config = encoder_config(config)
    return next((getattr(config, name) for name in names if hasattr(config, name)), 0.0)


def ragged_lengths(count: int, longest: int = 92, seed: int = 0) -> list[int]:
    """Lengths of ``count`` sentences, the longest exactly ``longest``, about 40% of the padded batch real (mean 38 of 92).

    A log-normal distribution with median 0.37 * longest and sigma 0.47, cut off at ``longest``: what English sentences
    in sub-word tokens look like. Taken at ``count`` evenly spaced quantiles, so that every batch has the same mix whatever its
    size; ``seed`` shuffles their order.
    """
    normal = statistics.NormalDist()
    below_longest = normal.cdf(-math.log(_MEDIAN) / _SIGMA)
    quantiles = [below_longest * (i + 1) / count for i in range(count)]
    lengths = [max(2, round(longest * _MEDIAN * math.exp(_SIGMA * normal.inv_cdf(q)))) for q in quantiles]
    random.Random(seed).shuffle(lengths)
    return lengths


@dataclass(frozen=True)
class Batch:
    """A padded batch. name: what tables call it. input_ids, attention_mask: int64 [B, S], padded on the right.

    decoded: a decoder gets the same texts.
    """

    name: str
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    decoded: bool = False

    @property
    def tokens(self) -> int:
        """How many tokens are real."""
        return int(self.attention_mask.sum())

    @property
    def lengths(self) -> list[int]:
        return self.attention_mask.sum(1).tolist()

    def inputs(self) -> dict[str, torch.Tensor]:
        """The keyword arguments of a model's ``forward``."""
        given = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return given | ({f"decoder_{name}": tensor for name, tensor in given.items()} if self.decoded else {})

    def labels(self, mode: str) -> torch.Tensor | None:
        """What a model of ``build_model`` in that mode learns: a class [B]; 15% of the tokens, or the one behind each, [B, S]."""
        if mode not in TRAINING:
            return None
        if mode == "seq2seq":
            following = torch.where(self.attention_mask.bool(), self.input_ids, -100).roll(-1, 1)
            following[:, -1] = -100
            return following
        if mode == "train":
            return torch.arange(self.input_ids.shape[0], device=self.input_ids.device) % 2
        chosen = torch.rand(self.input_ids.shape, generator=torch.Generator().manual_seed(0)).to(self.input_ids.device) < LABELLED
        return torch.where(chosen & self.attention_mask.bool(), self.input_ids, -100)

    def to(self, device: str) -> "Batch":
        return replace(self, input_ids=self.input_ids.to(device), attention_mask=self.attention_mask.to(device))

    def facts(self) -> dict:
        """What a result records of it."""
        batch, seqlen = self.input_ids.shape
        tokens = self.tokens
        return {"batch": batch, "seqlen": seqlen, "tokens": tokens, "fill": round(tokens / (batch * seqlen), 4)}


def batch_of(name: str, lengths: Sequence[int], config, seed: int = 0, padded_to: int | None = None) -> Batch:
    """A batch of these lengths with random token ids that are no padding.

    padded_to: S, by default the longest length. Raises ValueError for a length that does not fit.
    """
    from roberta_fast.families import longest_sequence

    limit, seqlen = longest_sequence(config), padded_to or max(lengths, default=0)
    if not lengths or min(lengths) < 1 or max(lengths) > seqlen or seqlen > limit:
        wrong = next((length for length in lengths if not 1 <= length <= min(seqlen, limit)), seqlen)
        raise ValueError(f"lengths must be from 1 to {limit}, which the model takes, got {wrong}")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(min(10, config.vocab_size - 1), config.vocab_size, (len(lengths), seqlen), generator=generator)
    mask = (torch.arange(seqlen) < torch.tensor(lengths)[:, None]).long()
    return Batch(name, torch.where(mask.bool(), ids, config.pad_token_id or 0), mask)


def batch_of_text(name: str, lines: Sequence[str], tokenizer, config) -> Batch:
    """A batch of these texts as ``tokenizer`` splits them, cut where the model's longest sequence ends."""
    from roberta_fast.families import longest_sequence

    encoded = tokenizer(list(lines), padding=True, truncation=True, max_length=longest_sequence(config), return_tensors="pt")
    return Batch(name, encoded["input_ids"], encoded["attention_mask"])


def forward_flops(config, lengths: Sequence[int], targets: Sequence[int] | None = None) -> int:
    """Floating-point operations of the layers' matrix products over the real tokens, multiply and add counted apart.

    targets: lengths that a decoder has, by default those of the encoder; what lies behind a token does not count.
    """
    if config.is_encoder_decoder:
        targets = lengths if targets is None else targets
        return forward_flops(config.encoder, lengths) + _decoder_flops(config.decoder, lengths, targets)
    hidden, intermediate = config.hidden_size, config.intermediate_size
    linears = (8 * hidden * hidden + 4 * hidden * intermediate) * sum(lengths)
    attention = 4 * hidden * sum(length * length for length in lengths)
    return config.num_hidden_layers * (linears + attention)


def _decoder_flops(config, sources, targets):
    hidden, intermediate = config.hidden_size, config.intermediate_size
    linears = (12 * hidden * hidden + 4 * hidden * intermediate) * sum(targets) + 4 * hidden * hidden * sum(sources)
    attention = sum(2 * hidden * t * t + 4 * hidden * t * s for s, t in zip(sources, targets, strict=True))
    return config.num_hidden_layers * (linears + attention)


def gemm_shapes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """(N, K) of the four GEMMs of a layer, y[M, N] = x[M, K] Wᵀ."""
    c, i = shape.hidden, shape.intermediate
    return {"qkv": (3 * c, c), "attention output": (c, c), "intermediate": (i, c), "output": (c, i)}


@dataclass(frozen=True)
class OperationSizes:
    """Sizes that the operations are measured at on one kind of device.

    rows: row counts of GEMMs and norms. models: names of ``MODELS`` whose dimensions they take. attention: (segments, length)
    pairs of dense batches; ragged: (segments, longest) of batches with ``ragged_lengths``. dropouts: attention's probabilities.
    """

    rows: tuple[int, ...]
    models: tuple[str, ...]
    attention: tuple[tuple[int, int], ...]
    ragged: tuple[tuple[int, int], ...]
    dropouts: tuple[float, ...] = (0.0,)


OPERATION_SIZES = {
    "cpu": OperationSizes((605,), ("roberta-base", "minilm"), ((8, 256), (32, 64)), ((32, 92),)),
    "cuda": OperationSizes(
        (8192, 32768, 65536),
        ("roberta-base", "roberta-large", "minilm"),
        ((512, 64), (256, 128), (128, 256), (64, 512)),
        ((256, 256), (128, 512)),
        (0.0, 0.1),
    ),
    "quick": OperationSizes((32768,), ("roberta-base",), ((256, 128), (64, 512)), ((256, 256),), (0.0, 0.1)),
    "tiny": OperationSizes((33,), ("tiny",), ((2, 16),), ((3, 20),), (0.0, 0.1)),
}
"""By device type; ``"quick"`` for a first look at a GPU, ``"tiny"`` to try every line out anywhere."""
