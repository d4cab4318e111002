"""Dtypes and devices chosen after acceleration, and weights changed by whatever means, count as they do in the stock model."""

import copy

import pytest
import torch
from model_trio import tiny_inputs, tiny_model
from transformers import AutoModel, AutoTokenizer, BertForMaskedLM, BertModel, RobertaForSequenceClassification

from roberta_fast import accelerate_model, dispatch, explain, restore_model
from roberta_fast.ops.linear import product_objection
from roberta_fast.testing import MASKS, assert_close_as_torch, random_inputs

RIGHT = MASKS["right padding"]
REAL = RIGHT.bool()
CASTS = {
    "half": lambda model: model.half(),
    "to bfloat16": lambda model: model.to(torch.bfloat16),
    "to device and dtype": lambda model: model.to("cpu", torch.float16),
    "double": lambda model: model.double(),
    "half and back": lambda model: model.half().float(),
}


@pytest.fixture
def model():
    return accelerate_model(tiny_model(BertModel, "bert").eval())


@pytest.fixture
def inputs(model):
    return random_inputs(RIGHT, model.config)


def hidden(model, inputs):
    return model(**inputs).last_hidden_state[REAL].detach()


def assert_as_stock(model, inputs, atol=1e-5):
    """The accelerated model against a stock one made of the same parameters, now."""
    stock = restore_model(copy.deepcopy(model))
    assert torch.allclose(hidden(model, inputs), hidden(stock, inputs), atol=atol)


@pytest.mark.filterwarnings("ignore:roberta_fast.*not cpp:RuntimeWarning")
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_cast_after_acceleration(cast, model, inputs):
    cast(model)
    stock = restore_model(copy.deepcopy(model))
    exact = copy.deepcopy(stock).double()
    output = hidden(model, inputs)
    assert output.dtype == model.dtype
    if output.dtype == torch.float64:
        assert torch.allclose(output, hidden(exact, inputs), rtol=0, atol=1e-13)
    else:
        assert_close_as_torch(output, hidden(stock, inputs), hidden(exact, inputs))
    assert explain(model).dtype == str(model.dtype).removeprefix("torch.")
    assert explain(model).stock_calls == {}


@pytest.mark.filterwarnings("ignore:roberta_fast.*not cpp:RuntimeWarning")
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, trains):
    """Outputs have the stock dtype; errors and gradients are of the size that autocast causes in the stock model."""
    model = accelerate_model(tiny_model(RobertaForSequenceClassification).train(trains))
    stock = restore_model(copy.deepcopy(model))
    exact, inputs, results = copy.deepcopy(stock).double(), tiny_inputs(stock), []
    for m, enabled in ((model, True), (stock, True), (exact, False)):
        with torch.autocast("cpu", dtype, enabled=enabled):
            output = m(**inputs)
        output.loss.backward()
        results.append((output.logits.detach(), torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])))
    (fast_logits, fast_grad), (stock_logits, stock_grad), (exact_logits, exact_grad) = results
    assert fast_logits.dtype == stock_logits.dtype
    assert (fast_grad.dtype, fast_logits.shape) == (torch.float32, stock_logits.shape)
    rounding = torch.finfo(dtype).eps
    for fast, slow, true, factor in ((fast_logits, stock_logits, exact_logits, 2), (fast_grad, stock_grad, exact_grad, 3)):
        error, allowed = ((t.double() - true).abs().max() for t in (fast, slow))
        assert error <= factor * allowed + rounding * true.abs().max()


def test_bfloat16_of_a_real_checkpoint(checkpoint):
    """Kernels round where operations end, the stock layers inside them as well: no farther from float64 on the whole."""
    if reason := dispatch.load_cpp() or product_objection(dispatch.Facts("cpu", "bfloat16")):
        pytest.skip(reason)
    exact, stock = (AutoModel.from_pretrained(checkpoint, dtype=dtype).eval() for dtype in (torch.float64, torch.bfloat16))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts = ["A short text.", "Nothing beats the quick brown fox, who jumps over the lazy dog and sleeps in the sun.", "1, 2, 3!"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        true, slow = exact(**inputs)[0][real], stock(**inputs)[0][real]
        fast = accelerate_model(stock)(**inputs)[0][real]
    assert (fast.double() - true).abs().mean() < 1.1 * (slow.double() - true).abs().mean()
    assert torch.cosine_similarity(fast.double(), true).min() > 0.9998
    explanation = explain(stock)
    assert not explanation.fallbacks and explanation.backends["linear"] == ("cpp", "oneDNN")


PARTS = (
    "layer.1.attention.self.key.weight",
    "layer.1.attention.output.dense.bias",
    "layer.1.intermediate.dense.bias",
    "layer.1.intermediate.dense.weight",
    "layer.1.output.dense.weight",
)


@pytest.mark.filterwarnings("ignore:roberta_fast.*not cpp:RuntimeWarning")
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_parameter_of_another_dtype_is_refused_by_name(name, dtype, model, inputs):
    parameter = model.encoder.get_parameter(name)
    parameter.data = parameter.data.to(dtype)
    expected = rf"encoder\.{name} is {dtype}, but hidden_states are torch.float32".removeprefix(r"encoder\.")
    with pytest.raises(ValueError, match=expected):
        model(**inputs)
    parameter.data = parameter.data.float()
    assert_as_stock(model, inputs, atol=1e-2 if dtype == torch.float16 else 1e-5)


@pytest.mark.filterwarnings("ignore:roberta_fast.*not cpp:RuntimeWarning")
def test_a_layer_of_another_dtype_is_refused_by_name(model, inputs):
    model.encoder.layer[2].half()
    with pytest.raises(ValueError, match=r"layer\.2\.attention\.self\.query\.weight is torch.float16"):
        model(**inputs)


@pytest.mark.filterwarnings("ignore:roberta_fast.*not cpp:RuntimeWarning")
def test_norms_may_stay_in_float32(model, inputs):
    """As some train it; their statistics are float32 anyway, and only stock layers on the CPU refuse it."""
    exact = restore_model(copy.deepcopy(model)).bfloat16().double()
    model.bfloat16()
    half = hidden(model, inputs)
    for layer in model.encoder.layer:
        for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
            norm.float()
    assert_close_as_torch(hidden(model, inputs), half, hidden(exact, inputs))


def edit(encoder):
    """In place, without a trace in a version counter."""
    encoder.layer[0].attention.self.key.weight.data.mul_(1.5)
    encoder.layer[1].output.LayerNorm.bias.data = encoder.layer[1].output.LayerNorm.bias.data + 1
    with torch.no_grad():
        encoder.layer[2].intermediate.dense.bias.add_(0.5)


def replace(encoder):
    old = encoder.layer[0].attention.self.query
    encoder.layer[0].attention.self.query = torch.nn.Linear(old.in_features, old.out_features)
    encoder.layer[1].output.dense.weight = torch.nn.Parameter(-encoder.layer[1].output.dense.weight.detach())


def load(encoder):
    encoder.load_state_dict({name: value * 0.7 for name, value in encoder.state_dict().items()})


def load_assign(encoder):
    encoder.load_state_dict({name: value * 0.7 for name, value in encoder.state_dict().items()}, assign=True)


def drop_a_layer(encoder):
    del encoder.layer[1]


@pytest.mark.parametrize("change", [edit, replace, load, load_assign, drop_a_layer])
def test_changed_weights_are_seen_at_once(change, model, inputs):
    before = hidden(model, inputs)
    change(model.encoder)
    assert not torch.allclose(hidden(model, inputs), before, atol=1e-2), "the change must count"
    assert_as_stock(model, inputs)


def test_resized_and_tied_embeddings():
    """The head's weight is the embedding's before and after a resize, as it is saved, and as it learns."""
    model = accelerate_model(tiny_model(BertForMaskedLM, "bert").eval())
    for _ in range(2):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        model.resize_token_embeddings(model.config.vocab_size + 8)
    inputs = random_inputs(RIGHT, model.config)
    stock = restore_model(copy.deepcopy(model))
    labels = inputs["input_ids"].masked_fill(~REAL, -100)
    for m in (model, stock):
        m(**inputs, labels=labels).loss.backward()
    output, expected = (m(**inputs).logits for m in (model, stock))
    assert output.shape[-1] == model.config.vocab_size == 136
    assert torch.allclose(output[REAL], expected[REAL], atol=1e-4)
    gradients = [m.get_input_embeddings().weight.grad for m in (model, stock)]
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[1].abs().max()
    assert gradients[0][128:].abs().max() > 0, "an untied embedding has no gradient for ids that do not occur"


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False, capturable=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, capturable=False),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=1e-2, fused=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_step_is_seen_at_once(optimizer):
    """Fused optimizers leave a parameter's version as it was; a hidden copy of a weight would be stale."""
    model = accelerate_model(tiny_model(RobertaForSequenceClassification).eval())
    inputs = tiny_inputs(model)
    steps = optimizer(list(model.parameters()))

    def closure():
        steps.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return loss

    for _ in range(2):
        before = model(**inputs).logits.detach()
        steps.step(closure)
        after = model(**inputs).logits.detach()
        assert not torch.allclose(after, before, atol=1e-3), "the step must count"
        assert torch.allclose(after, restore_model(copy.deepcopy(model))(**inputs).logits, atol=1e-5)
