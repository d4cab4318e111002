"""What people do with a graph, with parameters and with checkpointing does the same to an accelerated model."""

import copy
import functools

import pytest
import torch
from model_trio import (
    assert_same_gradients,
    assert_same_outputs,
    assert_same_training_step,
    gradients,
    tiny_inputs,
    tiny_model,
    trio,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.func import functional_call
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from transformers import RobertaForSequenceClassification

from roberta_fast import accelerate_model, explain, restore_model
from roberta_fast.testing import MASKS, assert_close_as_torch, random_inputs


@pytest.fixture
def models():
    return trio(tiny_model(RobertaForSequenceClassification))


@pytest.fixture
def inputs(models):
    return tiny_inputs(models.stock)


def test_used_twice_in_one_graph(models, inputs):
    """Each use saves what it needs, of its own lengths."""
    others = tiny_inputs(models.stock, MASKS["left padding"][:, :12], seed=1)
    for model in models:
        first, second = model(**inputs), model(**others)
        (first.loss * second.loss + second.loss).backward()
    assert_same_gradients(*(gradients(model) for model in models))


def test_backward_twice(models, inputs):
    model = models.fast
    loss = model(**inputs).loss
    loss.backward(retain_graph=True)
    once = {name: gradient.clone() for name, gradient in gradients(model).items()}
    loss.backward()
    assert all(torch.equal(gradient, 2 * once[name]) for name, gradient in gradients(model).items())
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_two_losses_of_one_graph(models, inputs):
    found = []
    for model in models:
        logits, value = model(**inputs).logits, model.roberta.encoder.layer[0].attention.self.value.weight
        first, second = (torch.autograd.grad(logits[:, i].sum(), value, retain_graph=True)[0] for i in range(2))
        found.append({"first": first, "second": second})
    assert_same_gradients(*found)
    assert not torch.allclose(found[0]["first"], found[0]["second"])


def test_gradients_of_the_embeddings_alone(models, inputs):
    """As adversarial training and attributions take them, with every parameter frozen."""
    found = []
    for model in models:
        model.requires_grad_(False)
        embeddings = model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
        output = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], labels=inputs["labels"])
        found.append({"embeddings": torch.autograd.grad(output.loss, embeddings)[0]})
    assert_same_gradients(*found)
    assert not found[0]["embeddings"][inputs["attention_mask"] == 0].any()


def test_hooks_on_parameters(models, inputs):
    """Of linears that are read and of linears that are called."""
    for model in models:
        layer = model.roberta.encoder.layer[1]
        for parameter in (layer.intermediate.dense.weight, layer.attention.self.query.bias, layer.output.LayerNorm.weight):
            parameter.register_hook(lambda gradient: 3 * gradient)
    plain = trio(tiny_model(RobertaForSequenceClassification)).stock
    plain(**inputs).loss.backward()
    assert_same_training_step(models, inputs)
    weights = [model.roberta.encoder.layer[1].intermediate.dense.weight.grad for model in (models.fast, plain)]
    assert torch.allclose(weights[0], 3 * weights[1], atol=1e-6)


def test_optimizer_in_backward(models, inputs):
    """A step for each parameter as soon as its gradient is there, which then is dropped."""

    def update(parameter):
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    for model in models:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(update)
        model(**inputs).loss.backward()
        assert gradients(model) == {}
    assert_same_gradients(*({name: p.detach() for name, p in model.named_parameters()} for model in models))


def test_functional_call(models, inputs):
    """The parameters that are given are used, in every layer, and get the gradients."""
    others, found = tiny_model(RobertaForSequenceClassification, seed=1), []
    for model in models:
        dtype = next(model.parameters()).dtype
        given = {name: p.detach().to(dtype).requires_grad_() for name, p in others.named_parameters()}
        loss = functional_call(model, given, (), inputs).loss
        loss.backward()
        assert gradients(model) == {}
        found.append({name: p.grad for name, p in given.items() if p.grad is not None} | {"loss": loss.detach()})
    assert_same_gradients(*found)
    assert torch.allclose(found[0]["loss"], others(**inputs).loss, atol=1e-5)


TRANSFORMS = {
    "grad": lambda function, point: torch.func.grad(function)(point),
    "jvp": lambda function, point: torch.func.jvp(function, (point,), ({name: p.sin() for name, p in point.items()},))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_function_transforms_take_the_stock_path(transform, inputs):
    """Without a rule for it, torch would drop a tangent in silence."""
    stock = tiny_model(RobertaForSequenceClassification, attn_implementation="eager")
    fast = accelerate_model(copy.deepcopy(stock))

    def result(model):
        point = {name: p.detach() for name, p in model.named_parameters()}
        return transform(lambda p: functional_call(model, p, (), inputs).loss, point)

    with pytest.warns(RuntimeWarning, match="takes the stock path: a torch.func transform or forward-mode differentiation"):
        ours = result(fast)
    theirs = result(stock)
    for a, b in zip(*(r.values() if isinstance(r, dict) else [r] for r in (ours, theirs)), strict=True):
        assert torch.equal(a, b)
    accelerate_model(fast, on_unsupported="error")
    with pytest.raises(NotImplementedError, match="forward-mode"):
        result(fast)


def test_second_derivatives_are_refused(inputs):
    """A gradient penalty on the embeddings: right on the stock model, an error on the fast one, never a wrong number."""
    models = trio(tiny_model(RobertaForSequenceClassification, attn_implementation="eager"))

    def penalty(model):
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        output = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], labels=inputs["labels"])
        return torch.autograd.grad(output.loss, embeddings, create_graph=True)[0].square().sum()

    value = penalty(models.fast)
    assert torch.allclose(value, penalty(models.stock), rtol=1e-4)
    with pytest.raises(NotImplementedError, match=r"roberta_fast::\w+ cannot be differentiated twice; restore_model"):
        value.backward()
    restore_model(models.fast).zero_grad()
    for model in models:
        penalty(model).backward()
    assert_same_gradients(*(gradients(model) for model in models))


def test_saved_tensors_may_be_moved(models, inputs):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t), torch.autograd.detect_anomaly():
        models.fast(**inputs).loss.backward()
    for model in models[1:]:
        model(**inputs).loss.backward()
    assert_same_gradients(*(gradients(model) for model in models))


@pytest.mark.parametrize("mask", ["right padding", "all ones"])
def test_the_result_may_be_changed_in_place(mask, models):
    """As the stock model's may; no operation may have saved it for backward."""
    found = []
    for model in models:
        states = model.roberta(**random_inputs(MASKS[mask], model.config)).last_hidden_state
        states[:, 0].mul_(2)
        states.add_(1)
        states[:, :1].square().sum().backward()
        found.append(gradients(model))
    assert_same_gradients(*found)


CHECKPOINTED = {
    "a replaced forward": lambda layers, model: [
        setattr(layer, "forward", functools.partial(checkpoint, layer.forward, use_reentrant=False)) for layer in layers
    ],
    "wrapped layers": lambda layers, model: apply_activation_checkpointing(model, check_fn=lambda m: m in list(layers)),
    "wrapped before acceleration": lambda layers, model: apply_activation_checkpointing(
        restore_model(model), check_fn=lambda m: m in list(layers)
    ),
}


@pytest.mark.parametrize("way", CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_checkpointing_of_ones_own(way, inputs):
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    plain = accelerate_model(tiny_model(RobertaForSequenceClassification, num_hidden_layers=2, **rates))
    model, calls = copy.deepcopy(plain), []
    layers = model.roberta.encoder.layer[:1]
    layers[0].intermediate.dense.__class__ = type("Counted", (nn.Linear,), {"forward": counted(calls)})
    way(layers, model)
    accelerate_model(model, on_unsupported="error")
    for m in (plain, model):
        torch.manual_seed(0)
        m(**inputs).loss.backward()
    assert len(calls) == 2, "the checkpointed layer must run again in backward"
    for a, b in zip(gradients(plain).values(), gradients(model).values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert explain(model).layers == 2
    if "forward" not in layers[0].__dict__:
        assert torch.allclose(restore_model(model).eval()(**inputs).loss, plain.eval()(**inputs).loss, atol=1e-5)


def counted(calls):
    def forward(self, x):
        calls.append(x.shape)
        return nn.functional.linear(x, self.weight, self.bias)

    return forward


def test_checkpointing_of_layers_called_by_hand(models, inputs):
    """In a loop of one's own the layers are called as stock ones, with a stock mask."""
    found = []
    for model in models:
        embeddings = model.get_submodule("roberta.embeddings")(input_ids=inputs["input_ids"])
        mask = inputs["attention_mask"].bool()[:, None, None, :]
        for layer in model.roberta.encoder.layer:
            embeddings = checkpoint(layer, embeddings, mask, use_reentrant=False)
        embeddings[:, 0].square().sum().backward()
        found.append(gradients(model))
    assert_same_gradients(*found)


@pytest.mark.parametrize("kind", ["weight norm", "pruning"])
def test_reparametrized_linears(kind, inputs):
    """torch's parametrizations swap a module's class or hook into it; neither may be passed over."""
    models = trio(tiny_model(RobertaForSequenceClassification))
    for model in models:
        torch.manual_seed(0)
        for layer in model.roberta.encoder.layer:
            for linear in (layer.attention.self.key, layer.intermediate.dense, layer.output.dense):
                if kind == "pruning":
                    prune.random_unstructured(linear, "weight", 0.5)
                else:
                    nn.utils.parametrizations.weight_norm(linear)
                    linear.parametrizations.weight.original0.data *= 1.5
    assert_same_outputs(models, inputs)
    assert_same_training_step(models, inputs)
    assert (models.fast(**inputs).logits - tiny_model(RobertaForSequenceClassification)(**inputs).logits).abs().max() > 0.1


def test_operations_refuse_forward_mode():
    from roberta_fast import ops

    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(NotImplementedError, match="roberta_fast::linear_gelu has no forward-mode derivative"):
        torch.func.jvp(lambda t: ops.linear_gelu(t, weight, backend="torch"), (x,), (x,))


def test_no_graph_in_inference(models, inputs):
    model = models.fast.eval()
    expected = model(**inputs).logits.detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            logits = model(**inputs).logits
        # Four rows, as the last layer has them, are multiplied in another order where no gradient is wanted.
        assert not logits.requires_grad and torch.allclose(logits, expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        exact = models.exact.eval()(**inputs).logits
        assert_close_as_torch(expected, models.stock.eval()(**inputs).logits, exact)
