"""Where the layers of a family keep what the fast layer computes with."""

from typing import NamedTuple

from torch import nn


class AttentionParts(NamedTuple):
    """The modules of one attention, by what they do; ``containers`` are those whose own ``forward`` is passed over."""

    attention: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_dropout: nn.Module
    attention_output: nn.Module
    attention_output_dropout: nn.Module
    attention_norm: nn.Module
    containers: tuple[nn.Module, ...]


LINEARS = ("query", "key", "value", "attention_output", "intermediate", "output")  # a layer's own, as LayerParts names them


class LayerParts(NamedTuple):
    """The modules of one layer, by what they do; ``containers`` are those whose own ``forward`` the fast layer passes over."""

    attention: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_dropout: nn.Module
    attention_output: nn.Module
    attention_output_dropout: nn.Module | None
    attention_norm: nn.Module
    intermediate: nn.Module
    activation: nn.Module
    output: nn.Module
    output_dropout: nn.Module
    output_norm: nn.Module
    containers: tuple[nn.Module, ...]
    cross: AttentionParts | None = None

    def modules(self) -> tuple[nn.Module, ...]:
        """All of them, once each."""
        found = (*self.containers, *self[:-2], *((*self.cross.containers, *self.cross[:-1]) if self.cross else ()))
        return tuple(dict.fromkeys(module for module in found if isinstance(module, nn.Module)))


def bert_parts(layer: nn.Module) -> LayerParts:
    """The parts of a layer with BERT's names."""
    own, intermediate, output = _bert_attention(layer.attention), layer.intermediate, layer.output
    return LayerParts(
        **{**own._asdict(), "containers": (*own.containers, intermediate, output)},
        cross=_bert_attention(layer.crossattention) if "crossattention" in layer._modules else None,
        intermediate=intermediate.dense,
        activation=intermediate.intermediate_act_fn,
        output=output.dense,
        output_dropout=output.dropout,
        output_norm=output.LayerNorm,
    )


def _bert_attention(attention):
    heads, projection = attention.self, attention.output
    return AttentionParts(
        attention=heads,
        query=heads.query,
        key=heads.key,
        value=heads.value,
        attention_dropout=heads.dropout,
        attention_output=projection.dense,
        attention_output_dropout=projection.dropout,
        attention_norm=projection.LayerNorm,
        containers=(attention, heads, projection),
    )


def distilbert_parts(layer: nn.Module) -> LayerParts:
    """The parts of a DistilBERT layer, which drops nothing between its attention and the first LayerNorm."""
    attention, feed_forward = layer.attention, layer.ffn
    return LayerParts(
        attention=attention,
        query=attention.q_lin,
        key=attention.k_lin,
        value=attention.v_lin,
        attention_dropout=attention.dropout,
        attention_output=attention.out_lin,
        attention_output_dropout=None,
        attention_norm=layer.sa_layer_norm,
        intermediate=feed_forward.lin1,
        activation=feed_forward.activation,
        output=feed_forward.lin2,
        output_dropout=feed_forward.dropout,
        output_norm=layer.output_layer_norm,
        containers=(attention, feed_forward),
    )
