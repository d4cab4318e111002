"""Where only the device knows how many rows are real, results and gradients are those of exactly sized rows."""

import copy

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForSequenceClassification

from roberta_fast import FastOptions, accelerate_model, explain
from roberta_fast.packing import PackedBatch
from roberta_fast.testing import ragged_mask, random_inputs, randomize, tiny_config

MASKS = {
    "right": ragged_mask([3, 11, 7, 1]),
    "left": ragged_mask([3, 11, 7, 1]).flip(1),
    "nothing padded": torch.ones(4, 11, dtype=torch.int64),
    "no token": ragged_mask([0, 11, 0, 0]),
}


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    """So that a row behind the count that is read shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def model_of(model_type, **settings):
    config = AutoConfig.for_model(**{**tiny_config(model_type).to_dict(), **settings})
    return randomize(AutoModelForSequenceClassification.from_config(config))


class Adapter(nn.Module):
    """Adds a product of small matrices, as LoRA does; a sum over garbage rows would show in its gradients."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, 3)
        self.up = nn.Linear(3, linear.out_features)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


def with_adapters(model):
    torch.manual_seed(1)
    for layer in model.base_model.encoder.layer:
        layer.attention.self.query = Adapter(layer.attention.self.query)
        layer.intermediate.dense = Adapter(layer.intermediate.dense)
        layer.output.dense = Adapter(layer.output.dense)
    return model


def outcome(model, inputs, **options):
    """(logits, gradients of a loss by all parameters) of an accelerated copy of ``model``."""
    model = accelerate_model(copy.deepcopy(model), **options)
    torch.manual_seed(3)
    logits = model(**inputs).logits
    gradients = torch.autograd.grad(logits.square().sum(), model.parameters(), allow_unused=True)
    return logits.detach(), gradients


def assert_same_outcome(model, inputs, **options):
    (logits, gradients), (wanted, wanted_gradients) = (
        outcome(model, inputs, unpad=unpad, on_unsupported="error", **options) for unpad in ("device", "host")
    )
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    largest = max(float(g.abs().max()) for g in wanted_gradients if g is not None)
    for got, exact in zip(gradients, wanted_gradients, strict=True):
        assert (got is None) == (exact is None)
        if got is not None:
            torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("model_type", ["roberta", "distilbert"])
def test_rows_that_the_device_counts(model_type, mask, backend):
    model = model_of(model_type).eval()
    assert_same_outcome(model, random_inputs(MASKS[mask], model.config), backend=backend)


def test_dropout_is_the_same():
    model = model_of("roberta", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train()
    assert_same_outcome(model, random_inputs(MASKS["right"], model.config))


@pytest.mark.filterwarnings("ignore:roberta_fast. .* bfloat16 runs on torch:RuntimeWarning")
@pytest.mark.parametrize("setting", ["adapters", "another activation", "another norm", "bfloat16"])
def test_what_runs_as_modules(setting):
    model = model_of("roberta", **({"hidden_act": "silu"} if setting == "another activation" else {})).eval()
    inputs = random_inputs(MASKS["right"], model.config)
    if setting == "adapters":
        with_adapters(model)
    if setting == "another norm":
        for layer in model.roberta.encoder.layer:
            layer.output.LayerNorm = nn.Sequential(layer.output.LayerNorm, nn.Linear(*[model.config.hidden_size] * 2))
    if setting == "bfloat16":
        wanted, _ = outcome(model, inputs)
        got, _ = outcome(model.bfloat16(), inputs, unpad="device")
        torch.testing.assert_close(got.float(), wanted, rtol=0.1, atol=0.1)
    else:
        assert_same_outcome(model, inputs)


def test_hidden_states_and_a_hook_inside_a_layer():
    model = accelerate_model(model_of("roberta").eval(), unpad="device")
    inputs = random_inputs(MASKS["right"], model.config)
    with torch.no_grad():
        wanted = model(**inputs, output_hidden_states=True)
        model.roberta.encoder.layer[0].attention.register_forward_hook(lambda *call: None)
        got = model(**inputs, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    for a, b in zip(got.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-5)
    assert "a hook on RobertaAttention" in str(explain(model))


def test_nothing_is_packed_where_nothing_is_padded():
    """Gathering rows that are all there would only cost time: packing is a view."""
    states = torch.randn(4, 11, 8)
    for mask in (None, MASKS["nothing padded"]):
        batch = PackedBatch.of(states, mask, FastOptions())
        assert batch.pack(states).data_ptr() == states.data_ptr() == batch.unpack(batch.pack(states)).data_ptr()
    assert PackedBatch.of(states, MASKS["right"], FastOptions()).pack(states).shape == (22, 8)


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match=r"unpad='never' is not one of \('auto', 'host', 'device'\)"):
        FastOptions(unpad="never")


class Waited(Exception):
    pass


class NoWait(TorchFunctionMode):
    """Refuses what, on CUDA tensors, makes the host wait for the device."""

    WAITS = (
        "item",
        "tolist",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "cpu",
        "numpy",
        "nonzero",
        "masked_select",
        "unique",
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        index = args[1] if name in ("__getitem__", "__setitem__") else ()
        by_mask = any(getattr(i, "dtype", None) == torch.bool for i in (index if isinstance(index, tuple) else (index,)))
        if name in self.WAITS or by_mask:
            raise Waited(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trains", [False, True], ids=["eval", "train"])
def test_no_value_is_asked_for(trains):
    """In the package's own Python code, which is the same on every device; that of kernels is seen on a GPU alone."""
    model = model_of("roberta").train(trains)
    inputs = random_inputs(MASKS["right"], model.config)
    rows = model.roberta.embeddings(input_ids=inputs["input_ids"]).detach().requires_grad_()
    fast = {unpad: accelerate_model(copy.deepcopy(model), unpad=unpad, backend="torch") for unpad in ("device", "host")}
    with NoWait():
        fast["device"].roberta.encoder(rows, inputs["attention_mask"])[0].sum().backward()
        with pytest.raises(Waited, match="nonzero"):
            fast["host"].roberta.encoder(rows, inputs["attention_mask"])


@pytest.mark.gpu
@pytest.mark.parametrize("trains", [False, True])
def test_the_host_does_not_wait(trains):
    """Forward and backward pass with no synchronization in them."""
    model = accelerate_model(model_of("roberta").to("cuda", torch.float16).train(trains), unpad="device")
    inputs = {name: value.cuda() for name, value in random_inputs(MASKS["right"], model.config).items()}
    model(**inputs).logits.sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs).logits.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_graph_that_the_user_captures_serves_every_mix_of_lengths():
    model = accelerate_model(model_of("roberta").to("cuda", torch.float16).eval())
    inputs = {name: value.cuda() for name, value in random_inputs(MASKS["right"], model.config).items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        model(**inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = model(**inputs).logits
    for mask in MASKS.values():
        inputs["attention_mask"].copy_(mask)
        graph.replay()
        with torch.no_grad():
            torch.testing.assert_close(captured, model(**inputs).logits, rtol=1e-2, atol=1e-2)
