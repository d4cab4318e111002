"""FastOptions(recompute=...): less is kept, and the step stays what it was."""

import copy

import pytest
import torch
from model_trio import assert_same_gradients, gradients, tiny_inputs, tiny_model, trio
from transformers import RobertaForCausalLM, RobertaForSequenceClassification

from roberta_fast import FastOptions, accelerate_model, explain
from roberta_fast.testing import randomize, tiny_config


def kept(model, inputs):
    """How many numbers a forward pass keeps for the backward pass, parameters aside, and its loss; every tensor counts once."""
    parameters, seen = {p.data_ptr() for p in model.parameters()}, {}

    def note(tensor):
        if tensor.data_ptr() not in parameters:
            seen[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = model(**inputs).loss
    return sum(seen.values()), loss


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_each_step_keeps_less_and_computes_the_same(dropout):
    probabilities = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
    stock = tiny_model(RobertaForSequenceClassification, **probabilities).train()
    inputs, sizes, found = tiny_inputs(stock), [], []
    for recompute in (None, "gelu", "layer"):
        model = accelerate_model(copy.deepcopy(stock), recompute=recompute)
        assert ("feed_forward" in explain(model).backends) == (recompute == "gelu")
        torch.manual_seed(0)
        size, loss = kept(model, inputs)
        loss.backward()
        sizes.append(size)
        found.append((loss.detach(), gradients(model)))
    assert sizes[0] > 1.1 * sizes[1] > 1.1 * 1.5 * sizes[2], sizes
    for loss, ours in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, found[0][1][name], rtol=1e-4, atol=1e-5)


def test_layers_computed_twice_fill_no_cache():
    stock = randomize(RobertaForCausalLM(tiny_config(is_decoder=True))).eval()
    models = trio(stock, recompute="layer")
    inputs = tiny_inputs(stock, labels=None)
    real = inputs["attention_mask"].bool()
    for model in models:
        output = model(**inputs, use_cache=True)
        output.logits[real].square().mean().backward()
        if model is models.fast:
            assert output.past_key_values.get_seq_length() == 0
    assert_same_gradients(*map(gradients, models))
    with torch.no_grad():
        assert models.fast(**inputs, use_cache=True).past_key_values.get_seq_length() == inputs["input_ids"].shape[1]


def test_unknown_value():
    with pytest.raises(ValueError, match=r"recompute='all' is not one of \(None, 'gelu', 'layer'\)"):
        FastOptions(recompute="all")
