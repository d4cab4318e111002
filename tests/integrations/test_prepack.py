"""prepack=True: the same results from packed weights, never from a weight that has changed, and nothing left behind."""

import copy
import gc
import io
import pickle
import threading

import pytest
import torch
from model_trio import tiny_inputs, tiny_model
from transformers import (
    AutoModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    RobertaForCausalLM,
    RobertaForSequenceClassification,
)

from roberta_fast import FastOptions, accelerate_model, check_parity, dispatch, explain, prepacked, restore_model
from roberta_fast.ops.linear import linear, prepack
from roberta_fast.testing import MASKS, assert_close_as_torch, random_inputs, randomize, tiny_config

pytestmark = pytest.mark.skipif(dispatch.load_cpp() is not None, reason=str(dispatch.load_cpp()))
LINEARS = 6  # of a layer


@pytest.fixture
def stock():
    return tiny_model(RobertaForSequenceClassification).eval()


@pytest.fixture
def model(stock):
    return accelerate_model(copy.deepcopy(stock), prepack=True, on_unsupported="error")


@pytest.fixture
def inputs(stock):
    return many_rows(tiny_inputs(stock, labels=None))


def many_rows(inputs):
    """So often that the kernel takes the packed weights."""
    return {name: value.repeat(60, 1) for name, value in inputs.items()}


@torch.inference_mode()
def logits(model, inputs):
    return model(**inputs).logits


def packed(model):
    return sum(map(prepacked.is_packed, model.parameters()))


def assert_same(model, stock, inputs):
    torch.testing.assert_close(logits(model, inputs), logits(stock, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["roberta", "bert", "distilbert"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("mask", MASKS)
def test_families_activations_and_masks(model_type, activation, mask):
    named = {"activation" if model_type == "distilbert" else "hidden_act": activation}
    model = accelerate_model(randomize(AutoModel.from_config(tiny_config(model_type, **named))).eval(), prepack=True)
    assert check_parity(model, many_rows(random_inputs(MASKS[mask], model.config))).max_abs_difference < 2e-5
    layers = explain(model).layers
    assert packed(model) == LINEARS * layers
    assert f"prepack: {LINEARS * layers} of {LINEARS * layers} weights by now" in str(explain(model))


def test_a_real_model(checkpoint):
    model = accelerate_model(AutoModel.from_pretrained(checkpoint).eval(), prepack=True)
    parity = check_parity(model, many_rows(random_inputs(MASKS["right padding"], model.config)))
    assert parity.max_abs_difference < 1e-4 and parity.cosine > 0.999999


def test_weights_that_change_are_packed_anew(model, stock, inputs):
    assert_same(model, stock, inputs)
    ours, other = (m.roberta.encoder.layer[0].intermediate.dense for m in (model, stock))
    with torch.no_grad():
        ours.weight.mul_(2)
        other.weight.mul_(2)
    assert packed(model) == LINEARS * 3 - 1
    assert_same(model, stock, inputs)
    assert packed(model) == LINEARS * 3
    state = {name: value + 0.01 for name, value in stock.state_dict().items()}
    for m in (model, stock):
        m.load_state_dict(state)
    assert_same(model, stock, inputs)
    for m in (model, stock):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        m(**inputs).logits.sum().backward()
        optimizer.step()
    assert packed(model) == 0
    assert_same(model, stock, inputs)
    ours.weight = torch.nn.Parameter(torch.randn_like(ours.weight))
    other.weight = ours.weight
    assert_same(model, stock, inputs)
    for m in (model, stock):
        m.double().float()
    assert_same(model, stock, inputs)


def test_writes_that_autograd_does_not_see(model, stock, inputs):
    """As averaging of weights makes them, and the merging of adapters."""
    for change in (lambda data: data.mul_(1.1), lambda data: data.add_(torch.full_like(data, 1e-3))):
        logits(model, inputs)
        for m in (model, stock):
            for parameter in m.parameters():
                change(parameter.data)
        assert packed(model) == 0
        assert_same(model, stock, inputs)


def test_a_single_number_written_through_data_needs_a_call(model, stock, inputs):
    logits(model, inputs)
    for m in (model, stock):
        m.roberta.encoder.layer[0].attention.self.value.weight.data[3, 5] += 5
    assert not torch.allclose(logits(model, inputs), logits(stock, inputs), rtol=1e-3), "as the option's text says"
    assert_same(accelerate_model(model, prepack=True), stock, inputs)


def test_training_does_without(model, stock, inputs):
    """So do calls in eval mode that record gradients."""
    for mode in (True, False):
        for m in (model, stock):
            m.train(mode).zero_grad()
            torch.manual_seed(0)
            m(**inputs).logits.sum().backward()
        assert packed(model) == 0
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_nothing_is_left_behind(model, stock, inputs, tmp_path):
    logits(model, inputs)
    assert list(model.state_dict()) == list(stock.state_dict())
    model.save_pretrained(tmp_path)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert packed(copied) == 0
        assert_same(copied, stock, inputs)
    del copied
    gc.collect()
    before = len(prepacked._table)
    assert packed(restore_model(model)) == 0 and len(prepacked._table) == before - LINEARS * 3
    accelerate_model(model, prepack=True)
    logits(model, inputs)
    assert packed(accelerate_model(model)) == 0
    accelerate_model(model, prepack=True)
    logits(model, inputs)
    assert packed(model) == LINEARS * 3


def test_a_model_that_is_gone_frees_its_copies(stock, inputs):
    gc.collect()
    before = len(prepacked._table)
    model = accelerate_model(copy.deepcopy(stock), prepack=True)
    logits(model, inputs)
    assert len(prepacked._table) == before + LINEARS * 3
    del model
    gc.collect()
    assert len(prepacked._table) == before


def test_weights_made_in_inference_mode(inputs):
    with torch.inference_mode():
        model = accelerate_model(tiny_model(RobertaForSequenceClassification).eval(), prepack=True)
    assert check_parity(model, inputs).max_abs_difference < 2e-5 and packed(model) == LINEARS * 3


def test_threads_share_a_model(model, stock, inputs):
    wanted, got = logits(stock, inputs), []
    threads = [threading.Thread(target=lambda: got.append(logits(model, inputs))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    for found in got:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 33, 700])
def test_any_number_of_threads_multiplies_what_another_packed(rows):
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, 384, generator=generator) for n in (max(rows, 64), 1152))
    # The yardstick is a product of matrices: of a single row PyTorch makes dot products, whose sums are other ones.
    plain, exact = (x @ weight.mT)[:rows], (x.double() @ weight.double().mT)[:rows]
    x = x[:rows]
    before = torch.get_num_threads()
    try:
        for packing, multiplying in ((1, 2), (2, 1), (3, 2)):
            torch.set_num_threads(packing)
            packed_now = prepack(weight)
            torch.set_num_threads(multiplying)
            assert_close_as_torch(linear(x, weight, packed=packed_now), plain, exact)
    finally:
        torch.set_num_threads(before)


def test_generation_by_decoders():
    decoder = tiny_config("bert", is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(tiny_config("bert"), decoder)
    config.decoder_start_token_id, config.pad_token_id = 2, 1
    causal = RobertaForCausalLM(tiny_config(is_decoder=True))
    for stock in (causal, EncoderDecoderModel(config)):
        randomize(stock).eval()
        model = accelerate_model(copy.deepcopy(stock), prepack=True, on_unsupported="error")
        ids = torch.randint(5, 50, (3, 7), generator=torch.Generator().manual_seed(0))
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
        assert torch.equal(model.generate(ids, **options), stock.generate(ids, **options))
        assert packed(model) > 0


def test_bits_are_those_of_deterministic_products(stock, inputs):
    with_copies, without = (
        accelerate_model(copy.deepcopy(stock), deterministic=True, prepack=prepack, on_unsupported="error")
        for prepack in (True, False)
    )
    wanted = logits(without, inputs)
    assert torch.equal(logits(with_copies, inputs), wanted) and packed(with_copies) > 0
    alone = {name: value[:1] for name, value in inputs.items()}
    assert torch.equal(logits(with_copies, alone), wanted[:1])


def test_compiled_models_do_without(model, stock, inputs):
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, logits(stock, inputs), rtol=1e-4, atol=1e-5)
    assert packed(model) == 0


def test_where_nothing_can_be_packed(stock, inputs, monkeypatch):
    for place in (
        prepacked,
        __import__("roberta_fast.encoder", fromlist=["_"]),
        __import__("roberta_fast.report", fromlist=["_"]),
    ):
        monkeypatch.setattr(place, "prepack_objection", lambda weight, backend="auto": "no extension")
    model = accelerate_model(copy.deepcopy(stock), prepack=True)
    assert_same(model, stock, inputs)
    assert explain(model).fallbacks == ("no weight is prepacked: no extension",) and packed(model) == 0


def test_another_backend_reads_none(stock, inputs):
    model = accelerate_model(copy.deepcopy(stock), prepack=True, backend="torch")
    assert torch.equal(logits(model, inputs), logits(accelerate_model(copy.deepcopy(stock), backend="torch"), inputs))
    assert packed(model) == 0 and "read by the C++ kernel alone, and backend='torch'" in str(explain(model))


def test_options():
    with pytest.raises(ValueError, match="prepack=1 is not True or False"):
        FastOptions(prepack=1)
    with pytest.raises(NotImplementedError, match=r"no weight can be prepacked: weights are torch\.bfloat16"):
        prepack(torch.zeros(2, 2, dtype=torch.bfloat16))
