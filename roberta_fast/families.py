"""Which Hugging Face classes are served, and how their names map to what the fast encoder computes with."""

import importlib
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import activations
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.utils import ModelOutput

from roberta_fast.parts import LayerParts, bert_parts, distilbert_parts


class HeadParts(NamedTuple):
    """The modules of a language-model head, in the order of their use, and those that hold them."""

    dense: nn.Module
    activation: Callable
    norm: nn.Module
    decoder: nn.Module
    containers: tuple[nn.Module, ...]


def roberta_head(model: nn.Module) -> HeadParts:
    """The head of a ``RobertaForMaskedLM`` or ``RobertaForCausalLM``."""
    head = model.lm_head
    return HeadParts(head.dense, activations.gelu, head.layer_norm, head.decoder, (head,))


def bert_head(model: nn.Module) -> HeadParts:
    """The head of a ``BertForMaskedLM`` or ``BertLMHeadModel``."""
    predictions = model.cls.predictions
    transform = predictions.transform
    containers = (model.cls, predictions, transform)
    return HeadParts(transform.dense, transform.transform_act_fn, transform.LayerNorm, predictions.decoder, containers)


def distilbert_head(model: nn.Module) -> HeadParts:
    """The head of a ``DistilBertForMaskedLM``."""
    return HeadParts(model.vocab_transform, model.activation, model.vocab_layer_norm, model.vocab_projector, ())


def electra_head(model: nn.Module) -> HeadParts:
    """The head of an ``ElectraForMaskedLM`` or ``ElectraForCausalLM``."""
    head = model.generator_predictions
    return HeadParts(head.dense, head.activation, head.LayerNorm, model.generator_lm_head, (head,))


class Family(NamedTuple):
    """A model family whose encoder layers are BERT's post-LayerNorm block.

    model_types: the ``config.model_type`` values. module: where its classes live, below ``transformers.models``.
    layer, encoder: names of its stock classes there. parts: finds the parts of a layer.
    output: what its encoder returns; ``BaseModelOutput`` where it cannot be a decoder.
    masked_lm, causal_lm: names of its language models there, or None. head: finds the parts of such a model's head.
    prefix: of the names of its base model and the heads on it, where that model's forward is the one that ``embeddings.py`` has.
    embeddings: the name of that model's embeddings.
    """

    model_types: tuple[str, ...]
    module: str
    layer: str
    encoder: str
    parts: Callable[[nn.Module], LayerParts] = bert_parts
    output: type[ModelOutput] = BaseModelOutputWithPastAndCrossAttentions
    masked_lm: str | None = None
    causal_lm: str | None = None
    head: Callable[[nn.Module], HeadParts] = bert_head
    prefix: str | None = None
    embeddings: str | None = None

    # Names of those ``MODELS`` that are built on the prefix, or None.
    base = property(lambda self: self.prefix and f"{self.prefix}Model")
    classifier = property(lambda self: self.prefix and f"{self.prefix}ForSequenceClassification")
    multiple_choice = property(lambda self: self.prefix and f"{self.prefix}ForMultipleChoice")
    question_answering = property(lambda self: self.prefix and f"{self.prefix}ForQuestionAnswering")
    next_sentence = property(lambda self: f"{self.prefix}ForNextSentencePrediction" if self.prefix in ("Bert", "Ernie") else None)

    def stock_class(self, role: str) -> type[nn.Module]:
        """The stock class for one of ``ROLES``, imported now; also while a replacement stands in its place."""
        found = getattr(self.modeling(), getattr(self, role))
        return next(c for c in found.__mro__ if c.__module__ == self.modeling().__name__)

    def replace_encoder(self, replacement: type[nn.Module]) -> type[nn.Module]:
        """Puts ``replacement`` where the family's models look for their encoder class; returns what stood there."""
        before = getattr(self.modeling(), self.encoder)
        setattr(self.modeling(), self.encoder, replacement)
        return before

    def modeling(self):
        """The Hugging Face module that defines the family."""
        return importlib.import_module(f"transformers.models.{self.module}")


FAMILIES = (
    Family(
        ("roberta",),
        "roberta.modeling_roberta",
        "RobertaLayer",
        "RobertaEncoder",
        masked_lm="RobertaForMaskedLM",
        causal_lm="RobertaForCausalLM",
        head=roberta_head,
        prefix="Roberta",
        embeddings="RobertaEmbeddings",
    ),
    Family(
        ("bert", "dpr"),
        "bert.modeling_bert",
        "BertLayer",
        "BertEncoder",
        masked_lm="BertForMaskedLM",
        causal_lm="BertLMHeadModel",
        prefix="Bert",
        embeddings="BertEmbeddings",
    ),
    Family(
        ("xlm-roberta",),
        "xlm_roberta.modeling_xlm_roberta",
        "XLMRobertaLayer",
        "XLMRobertaEncoder",
        masked_lm="XLMRobertaForMaskedLM",
        causal_lm="XLMRobertaForCausalLM",
        head=roberta_head,
        prefix="XLMRoberta",
        embeddings="XLMRobertaEmbeddings",
    ),
    Family(
        ("camembert",),
        "camembert.modeling_camembert",
        "CamembertLayer",
        "CamembertEncoder",
        masked_lm="CamembertForMaskedLM",
        causal_lm="CamembertForCausalLM",
        head=roberta_head,
        prefix="Camembert",
        embeddings="CamembertEmbeddings",
    ),
    Family(
        ("distilbert",),
        "distilbert.modeling_distilbert",
        "TransformerBlock",
        "Transformer",
        parts=distilbert_parts,
        output=BaseModelOutput,
        masked_lm="DistilBertForMaskedLM",
        head=distilbert_head,
        prefix="DistilBert",
        embeddings="Embeddings",
    ),
    Family(
        ("electra",),
        "electra.modeling_electra",
        "ElectraLayer",
        "ElectraEncoder",
        masked_lm="ElectraForMaskedLM",
        causal_lm="ElectraForCausalLM",
        head=electra_head,
        prefix="Electra",
        embeddings="ElectraEmbeddings",
    ),
    Family(
        ("ernie",),
        "ernie.modeling_ernie",
        "ErnieLayer",
        "ErnieEncoder",
        masked_lm="ErnieForMaskedLM",
        causal_lm="ErnieForCausalLM",
        prefix="Ernie",
        embeddings="ErnieEmbeddings",
    ),
    Family(
        ("data2vec-text",),
        "data2vec.modeling_data2vec_text",
        "Data2VecTextLayer",
        "Data2VecTextEncoder",
        masked_lm="Data2VecTextForMaskedLM",
        causal_lm="Data2VecTextForCausalLM",
        head=roberta_head,
        prefix="Data2VecText",
        embeddings="Data2VecTextEmbeddings",
    ),
    Family(
        ("roc_bert",),
        "roc_bert.modeling_roc_bert",
        "RoCBertLayer",
        "RoCBertEncoder",
        masked_lm="RoCBertForMaskedLM",
        causal_lm="RoCBertForCausalLM",
    ),
    Family(("bert-generation",), "bert_generation.modeling_bert_generation", "BertGenerationLayer", "BertEncoder"),
    Family(("splinter",), "splinter.modeling_splinter", "SplinterLayer", "SplinterEncoder", output=BaseModelOutput),
    Family(("align_text_model",), "align.modeling_align", "AlignTextLayer", "AlignTextEncoder", output=BaseModelOutput),
    Family(("clap_text_model",), "clap.modeling_clap", "ClapTextLayer", "ClapTextEncoder", output=BaseModelOutput),
    Family(
        ("chinese_clip_text_model",),
        "chinese_clip.modeling_chinese_clip",
        "ChineseCLIPTextLayer",
        "ChineseCLIPTextEncoder",
        output=BaseModelOutput,
    ),
)


def supported_model_types() -> tuple[str, ...]:
    """The ``config.model_type`` values that ``accelerate_model`` serves."""
    return tuple(model_type for family in FAMILIES for model_type in family.model_types)


def first_position(config) -> int:
    """The position of a text's first token: ``padding_idx + 1`` in RoBERTa and its kin, 0 in the others."""
    return config.pad_token_id + 1 if config.model_type in _POSITIONS_BEHIND_PADDING else 0


def longest_sequence(config) -> int:
    """How many tokens the model's position table serves."""
    return config.max_position_embeddings - first_position(config)


def position_ids(config, mask: torch.Tensor) -> torch.Tensor:
    """Positions for mask [B, S], nonzero at real tokens, wherever the padding is; ``generate`` wants them.

    Hugging Face's ``generate`` would have RoBERTa begin at 0, which is not where its texts begin when it is trained.
    """
    return ((mask != 0).cumsum(1) - 1).clamp(min=0) + first_position(config)


_POSITIONS_BEHIND_PADDING = ("roberta", "xlm-roberta", "camembert", "data2vec-text")


def family_of(model_type: str) -> Family:
    """The family that serves ``model_type``. Raises ValueError naming it and the supported ones if none does."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    raise ValueError(f"model_type={model_type!r} is not supported; supported are {', '.join(supported_model_types())}")


def family_of_encoder(module: nn.Module) -> Family | None:
    """The family whose stock encoder class ``module`` is an exact instance of, or None."""
    return _family_by_class("encoder", module)


def family_of_model(module: nn.Module, role: str) -> Family | None:
    """The family whose stock ``role``, one of ``MODELS``, ``module`` is an exact instance of, or None."""
    return _family_by_class(role, module)


def _family_by_class(role, module):
    return _STOCK_CLASSES.get((role, type(module).__module__, type(module).__name__))


def family_of_layer(layer: nn.Module) -> Family:
    """The family of a stock or fast ``layer``. Raises ValueError naming its class if no supported family has it."""
    layer = unwrapped(layer)
    family = getattr(type(layer), "family", None)
    family = family or _family_by_class("layer", layer)
    if family is None:
        raise ValueError(f"the encoder holds a {type(layer).__name__}, which is no layer of a supported family")
    return family


def unwrapped(layer: nn.Module) -> nn.Module:
    """The layer inside the wrappers of FSDP, activation checkpointing and ``torch.compile``."""
    for name in _WRAPPED:
        if name in layer._modules:
            return unwrapped(layer._modules[name])
    return layer


LANGUAGE_MODELS = ("masked_lm", "causal_lm")
FIRST_TOKEN_HEADS = ("classifier", "multiple_choice", "next_sentence")
MODELS = (*LANGUAGE_MODELS, "base", "question_answering", *FIRST_TOKEN_HEADS)
ROLES = ("layer", "encoder", *MODELS)
_WRAPPED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
_STOCK_CLASSES = {
    (role, f"transformers.models.{family.module}", getattr(family, role)): family
    for family in FAMILIES
    for role in ROLES
    if getattr(family, role)
}


class _Known(NamedTuple):
    """The parts of a layer, and what the layer and its containers held when they were found."""

    parts: LayerParts
    containers: tuple[nn.Module, ...]
    held: list[tuple]


# Of layers; finding the parts, which every call of a layer begins with, takes seven times as long as this. The values do not
# refer to their keys, which would keep layers alive.
_known = WeakKeyDictionary()


def layer_parts(layer: nn.Module) -> LayerParts:
    """The parts of a stock or fast ``layer``, wrapped or not."""
    layer = unwrapped(layer)
    known = None if torch.compiler.is_compiling() else _known.get(layer)
    if known is not None and _held(layer, known.containers) == known.held:
        return known.parts
    parts = family_of_layer(layer).parts(layer)
    if isinstance(parts.activation, nn.Module) and not torch.compiler.is_compiling():  # a new function would not be seen
        containers = (*parts.containers, *(parts.cross.containers if parts.cross else ()))
        _known[layer] = _Known(parts, containers, _held(layer, containers))
    return parts


def _held(layer, containers):
    return [tuple(module._modules.values()) for module in (layer, *containers)]


_GELU_FORMS = {
    activations.GELUActivation: "none",
    activations.NewGELUActivation: "tanh",
    activations.FastGELUActivation: "tanh",
    activations.GELUTanh: "tanh",
}


def gelu_form(activation: object) -> str | None:
    """``"none"`` for exact GELU, ``"tanh"`` for its tanh form, None for any other activation."""
    if is_plain(activation, nn.GELU):
        return activation.approximate
    return _GELU_FORMS.get(type(activation))


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True for an unwrapped module of exactly this class, whose parameters may be read instead of calling it.

    A class of ours that stands in for another one, as ``roberta_fast.deterministic.Linear``, counts as that one.
    """
    return getattr(type(module), "stock", type(module)) is kind and "forward" not in module.__dict__


def is_plain_norm(norm: nn.Module) -> bool:
    """Whether a module is nothing but a LayerNorm, with a bias."""
    return is_plain(norm, nn.LayerNorm) and norm.bias is not None
