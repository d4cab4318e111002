"""torch.compile makes one graph of an accelerated model, for every mix of lengths; torch.export takes it too."""

import pytest
import torch
from model_trio import assert_same_gradients, gradients, tiny_model, trio
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import RobertaForMaskedLM, RobertaForSequenceClassification

from roberta_fast import accelerate_model, explain
from roberta_fast.testing import assert_close_as_torch, ragged_mask, random_inputs

HEADS = {"classification": RobertaForSequenceClassification, "masked language model": RobertaForMaskedLM}
LENGTHS = ([9, 3, 17, 2], [4, 4, 4, 19, 7], [11, 2, 30], [7, 7, 7])


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


def small_model(model_class=RobertaForSequenceClassification, **overrides):
    model = tiny_model(model_class, num_hidden_layers=1, **overrides)
    model.config.problem_type = "single_label_classification"  # else the first call sets it, and the second compiles again
    return model


def batch_of(lengths, model):
    mask = ragged_mask(lengths)
    inputs = random_inputs(mask, model.config, seed=sum(lengths))
    if isinstance(model, RobertaForMaskedLM):
        third = mask.bool() & (torch.arange(mask.shape[1]) % 3 == 0)
        return {**inputs, "labels": torch.where(third, inputs["input_ids"], -100)}
    return {**inputs, "labels": torch.arange(len(lengths)) % 2}


def whole_graph(model, backend):
    """The compiled model, and the counter of its graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, dynamic=True, backend=counter), counter


@pytest.mark.parametrize(
    ("head", "backend"),
    [
        ("classification", "inductor"),
        ("masked language model", "aot_eager"),
        pytest.param("masked language model", "inductor", marks=pytest.mark.slow),
    ],
)
def test_one_graph_for_every_length_mix(head, backend):
    """Forward and backward."""
    models = trio(small_model(HEADS[head]))
    compiled, counter = whole_graph(models.fast, backend)
    graphs = []
    for lengths in LENGTHS:
        inputs = batch_of(lengths, models.stock)
        outputs = []
        for model, call in zip(models, (compiled, *models[1:]), strict=True):
            model.zero_grad()
            output = call(**inputs)
            output.loss.backward()
            # A masked language model in training has a loss alone.
            outputs.append((output.loss[None] if head == "masked language model" else output.logits).detach())
        assert_close_as_torch(*outputs, name="outputs")
        assert_same_gradients(*(gradients(model) for model in models))
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1, f"a new mix of lengths must not compile again: {graphs}"


def test_inference_mode():
    model = accelerate_model(small_model()).eval()
    compiled, counter = whole_graph(model, "aot_eager")
    graphs = []
    with torch.inference_mode():
        for lengths in LENGTHS:
            inputs = batch_of(lengths, model)
            assert torch.allclose(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5)
            graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_dropout(backend):
    """It follows torch's seed, and backward drops what forward dropped: the gradient predicts the loss nearby."""
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    model = accelerate_model(small_model(**rates).double(), backend="torch").train()
    compiled, counter = whole_graph(model, backend)
    inputs, graphs = batch_of(LENGTHS[0], model), []

    def loss(seed):
        torch.manual_seed(seed)
        value = compiled(**inputs).loss
        graphs.append(counter.frame_count)
        return value

    value = loss(0)
    value.backward()
    assert loss(0) == value and loss(1) != value
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        direction = {name: torch.randn(g.shape, generator=generator, dtype=g.dtype) for name, g in gradients(model).items()}
    predicted = sum((gradient * direction[name]).sum() for name, gradient in gradients(model).items())
    around = []
    for step in (1e-5, -2e-5):
        for name, parameter in model.named_parameters():
            if name in direction:
                parameter.data.add_(direction[name], alpha=step)
        around.append(loss(0).item())
    assert (around[0] - around[1]) / 2e-5 == pytest.approx(predicted.item(), rel=1e-5)
    assert len(set(graphs)) == 1


def test_hidden_states_in_a_whole_graph():
    model = accelerate_model(small_model()).eval()
    inputs = batch_of(LENGTHS[0], model)
    model(**inputs, output_hidden_states=True)  # installs Hugging Face's hooks, which no graph can
    compiled, _ = whole_graph(model, "eager")
    ours, theirs = (call(**inputs, output_hidden_states=True).hidden_states for call in (compiled, model))
    assert len(ours) == len(theirs) == 2
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("in_place", [True, False], ids=["layer.compile()", "torch.compile(layer)"])
def test_layers_compiled_one_by_one(in_place):
    models = trio(small_model())
    layers, counter = models.fast.roberta.encoder.layer, CompileCounterWithBackend("aot_eager")
    settings = {"fullgraph": True, "dynamic": True, "backend": counter}
    if in_place:
        layers[0].compile(**settings)
    else:
        layers[0] = torch.compile(layers[0], **settings)
    graphs = []
    for lengths in LENGTHS[:3]:
        inputs = batch_of(lengths, models.stock)
        for model in models:
            model.zero_grad()
            model(**inputs).loss.backward()
        theirs = (gradients(model) for model in models[1:])
        ours = {name.replace("_orig_mod.", ""): gradient for name, gradient in gradients(models.fast).items()}
        assert_same_gradients(ours, *theirs)
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1
    assert explain(models.fast).fallbacks == () and explain(models.fast).stock_calls == {}


def test_export(tmp_path):
    """An exported program holds the fused operations, serves every mix of lengths, and is saved and loaded."""
    models = trio(small_model())
    for model in models:
        model.eval()
    inputs = batch_of(LENGTHS[0], models.stock)
    del inputs["labels"]
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(models.fast, (), inputs, dynamic_shapes=dict.fromkeys(inputs, dynamic))
    called = {str(node.target) for node in program.graph.nodes}
    assert {"roberta_fast.embedding.default", "roberta_fast.attention.default", "roberta_fast.linear_gelu.default"} <= called
    torch.export.save(program, tmp_path / "model.pt2")
    for exported in (program.module(), torch.export.load(tmp_path / "model.pt2").module()):
        for lengths in LENGTHS:
            inputs = batch_of(lengths, models.stock)
            del inputs["labels"]
            outputs = [exported(**inputs).logits, *(model(**inputs).logits for model in models[1:])]
            assert_close_as_torch(*(logits.detach() for logits in outputs), name="logits")
