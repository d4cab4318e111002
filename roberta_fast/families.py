"""Which Hugging Face classes are served, and where their layers keep what the fast layer computes with."""

import importlib
from typing import NamedTuple

from torch import nn
from transformers import activations


class Family(NamedTuple):
    """A model family whose encoder layers are BERT's post-LayerNorm block.

    model_types: the ``config.model_type`` values. module: where its classes live, below ``transformers.models``.
    layer, encoder: names of its stock classes there.
    """

    model_types: tuple[str, ...]
    module: str
    layer: str
    encoder: str

    def stock_class(self, role: str) -> type[nn.Module]:
        """The stock class for ``"layer"`` or ``"encoder"``, imported now."""
        return getattr(self.modeling(), getattr(self, role))

    def replace_encoder(self, replacement: type[nn.Module]) -> type[nn.Module]:
        """Puts ``replacement`` where the family's models look for their encoder class; returns what stood there."""
        before = self.stock_class("encoder")
        setattr(self.modeling(), self.encoder, replacement)
        return before

    def modeling(self):
        """The Hugging Face module that defines the family."""
        return importlib.import_module(f"transformers.models.{self.module}")


FAMILIES = (
    Family(("roberta",), "roberta.modeling_roberta", "RobertaLayer", "RobertaEncoder"),
    Family(("bert",), "bert.modeling_bert", "BertLayer", "BertEncoder"),
    Family(("xlm-roberta",), "xlm_roberta.modeling_xlm_roberta", "XLMRobertaLayer", "XLMRobertaEncoder"),
    Family(("camembert",), "camembert.modeling_camembert", "CamembertLayer", "CamembertEncoder"),
    Family(("electra",), "electra.modeling_electra", "ElectraLayer", "ElectraEncoder"),
    Family(("ernie",), "ernie.modeling_ernie", "ErnieLayer", "ErnieEncoder"),
    Family(("data2vec-text",), "data2vec.modeling_data2vec_text", "Data2VecTextLayer", "Data2VecTextEncoder"),
    Family(("roc_bert",), "roc_bert.modeling_roc_bert", "RoCBertLayer", "RoCBertEncoder"),
)


def supported_model_types() -> tuple[str, ...]:
    """The ``config.model_type`` values that ``accelerate_model`` serves."""
    return tuple(model_type for family in FAMILIES for model_type in family.model_types)


def family_of(model_type: str) -> Family:
    """The family that serves ``model_type``. Raises ValueError naming it and the supported ones if none does."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    raise ValueError(f"model_type={model_type!r} is not supported; supported are {', '.join(supported_model_types())}")


def family_of_encoder(module: nn.Module) -> Family | None:
    """The family whose stock encoder class ``module`` is an exact instance of, or None."""
    for family in FAMILIES:
        if type(module).__name__ == family.encoder and type(module).__module__ == f"transformers.models.{family.module}":
            return family
    return None


class LayerParts(NamedTuple):
    """The modules of one layer, by what they do; ``containers`` are those whose own ``forward`` the fast layer passes over."""

    attention: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_dropout: nn.Module
    attention_output: nn.Module
    attention_output_dropout: nn.Module
    attention_norm: nn.Module
    intermediate: nn.Module
    activation: nn.Module
    output: nn.Module
    output_dropout: nn.Module
    output_norm: nn.Module
    containers: tuple[nn.Module, ...]


def layer_parts(layer: nn.Module) -> LayerParts:
    """The parts of a BERT-style layer."""
    attention, intermediate, output = layer.attention, layer.intermediate, layer.output
    heads, projection = attention.self, attention.output
    return LayerParts(
        attention=heads,
        query=heads.query,
        key=heads.key,
        value=heads.value,
        attention_dropout=heads.dropout,
        attention_output=projection.dense,
        attention_output_dropout=projection.dropout,
        attention_norm=projection.LayerNorm,
        intermediate=intermediate.dense,
        activation=intermediate.intermediate_act_fn,
        output=output.dense,
        output_dropout=output.dropout,
        output_norm=output.LayerNorm,
        containers=(attention, heads, projection, intermediate, output),
    )


_GELU_FORMS = {
    activations.GELUActivation: "none",
    activations.NewGELUActivation: "tanh",
    activations.FastGELUActivation: "tanh",
    activations.GELUTanh: "tanh",
}


def gelu_form(activation: object) -> str | None:
    """``"none"`` for exact GELU, ``"tanh"`` for its tanh form, None for any other activation."""
    if isinstance(activation, nn.GELU):
        return activation.approximate
    return _GELU_FORMS.get(type(activation))


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True for an unwrapped module of exactly this class, whose parameters may be read instead of calling it."""
    return type(module) is kind and "forward" not in module.__dict__
