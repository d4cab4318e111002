"""A layer by one call into C++ has the bits of its operations, and is left alone where something is out of the ordinary."""

import pytest
import torch
from torch import nn
from transformers import AutoModel

from roberta_fast import accelerate_model, dispatch, layer
from roberta_fast.testing import MASKS, ragged_mask, random_inputs, randomize, tiny_config

pytestmark = pytest.mark.skipif(dispatch.load_cpp() is not None, reason=str(dispatch.load_cpp()))
MASK = MASKS["right padding"]
MANY = {
    "enough rows for tasks": ragged_mask([70, 3, 120, 9]),
    "left padding for tasks": ragged_mask([70, 3, 0, 120, 9, 100]).flip(1),
    "no tokens": torch.zeros(2, 4, dtype=torch.int64),
}


def has_int8():
    return torch.ops.roberta_fast_cpp.int8_linear_is_fast()


@pytest.fixture(params=["float32", "bfloat16", "int8"])
def kind(request):
    """(options, dtype) of an inference that this processor computes in C++."""
    if request.param == "int8" and not has_int8():
        pytest.skip("this processor has no AVX-512 VNNI")
    if request.param == "bfloat16" and not torch.ops.roberta_fast_cpp.multiplies_bfloat16():
        pytest.skip("this processor has no AVX-512 BF16")
    int8 = request.param == "int8"
    return ({"precision": "int8"} if int8 else {}), torch.float32 if int8 else getattr(torch, request.param)


def build(kind, model_type="roberta", **overrides):
    """A function that accelerates, with more options, a new model of the same parameters."""
    options, dtype = kind
    stock = randomize(AutoModel.from_config(tiny_config(model_type, **overrides)), std=0.1).eval().to(dtype)
    return lambda **more: accelerate_model(stock, **options, **more)


@pytest.fixture
def calls(monkeypatch):
    """What ``by_one_call`` returned, for each layer."""
    seen, original = [], layer.by_one_call
    monkeypatch.setattr(layer, "by_one_call", lambda *given: seen.append(original(*given)) or seen[-1])
    return seen


def hidden_states(model, inputs):
    with torch.inference_mode():
        return model(**inputs).last_hidden_state


def is_by_one_call(calls):
    """Whether all layers since the last question were."""
    found = [result is not None for result in calls]
    calls.clear()
    assert found and len(set(found)) == 1, found
    return found[0]


@pytest.mark.parametrize("mask", {**MASKS, **MANY}.values(), ids={**MASKS, **MANY})
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_it_has_the_bits_of_the_operations(kind, mask, activation, deterministic, calls, monkeypatch):
    model = build(kind, hidden_act=activation, max_position_embeddings=130)(deterministic=deterministic)
    inputs = random_inputs(mask, model.config)
    found = hidden_states(model, inputs)
    assert is_by_one_call(calls)
    monkeypatch.setattr(layer, "by_one_call", lambda *_: None)
    assert torch.equal(hidden_states(model, inputs), found)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "electra"])
def test_families(kind, model_type, calls, monkeypatch):
    model = build(kind, model_type)()
    inputs = random_inputs(MASK, model.config)
    found = hidden_states(model, inputs)
    assert is_by_one_call(calls)
    monkeypatch.setattr(layer, "by_one_call", lambda *_: None)
    assert torch.equal(hidden_states(model, inputs), found)


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 128])  # panels have 64 columns: some of them fill one, some do not
@pytest.mark.parametrize("heads", [2, 3, 4])
def test_heads_of_any_width_in_8_bits(head_dim, heads, calls, monkeypatch):
    if not has_int8():
        pytest.skip("this processor has no AVX-512 VNNI")
    sizes = {"hidden_size": heads * head_dim, "num_attention_heads": heads, "max_position_embeddings": 610}
    model = build(({"precision": "int8"}, torch.float32), **sizes)()
    many = MANY["left padding for tasks"]
    for mask in (many, ragged_mask([520, 7]), ragged_mask([300, 260, 1])):  # 520 tokens are more than a task takes
        inputs = random_inputs(mask, model.config)
        with monkeypatch.context() as patch:
            found = hidden_states(model, inputs)
            assert is_by_one_call(calls)
            patch.setattr(layer, "by_one_call", lambda *_: None)
            assert torch.equal(hidden_states(model, inputs), found)


@pytest.mark.parametrize("hidden", [256, 260])  # whole vectors that are written past the caches, and others
def test_results_that_are_larger_than_caches(hidden, calls, monkeypatch):
    if not has_int8():
        pytest.skip("this processor has no AVX-512 VNNI")
    sizes = {"hidden_size": hidden, "intermediate_size": 72, "num_hidden_layers": 1, "max_position_embeddings": 260}
    model = build(({"precision": "int8"}, torch.float32), **sizes)()
    inputs = random_inputs(torch.ones(36, 250, dtype=torch.int64), model.config)  # 9,000 rows, over 8 MiB
    found = hidden_states(model, inputs)
    assert is_by_one_call(calls)
    monkeypatch.setattr(layer, "by_one_call", lambda *_: None)
    assert torch.equal(hidden_states(model, inputs), found)


def test_whoever_watches_sees_the_operations(kind, calls):
    accelerated = build(kind)
    inputs = random_inputs(MASK, accelerated().config)
    model = accelerated()
    seen = []
    handle = model.encoder.layer[0].register_forward_hook(lambda *given: seen.append(given[-1].shape))
    hidden_states(model, inputs)
    assert is_by_one_call(calls) and seen == [(*MASK.shape, model.config.hidden_size)]
    handle.remove()
    model.encoder.layer[0].attention.self.query.register_forward_hook(lambda *given: seen.append(given[-1].shape))
    hidden_states(model, inputs)
    assert len(calls) == len(model.encoder.layer) - 1 and len(seen) == 2


def test_others_are_left_alone(kind, calls):
    options, dtype = kind
    accelerated = build(kind)
    inputs = random_inputs(MASK, accelerated().config)
    hidden_states(accelerated(), inputs)
    assert is_by_one_call(calls)
    relu = build(kind, hidden_act="relu")()
    hidden_states(relu, inputs)
    assert not is_by_one_call(calls)
    if not options:
        hidden_states(accelerated(backend="torch"), inputs)
        assert not is_by_one_call(calls)
        model = accelerated()
        model(**inputs).last_hidden_state.sum().backward()
        assert not is_by_one_call(calls)
        assert all(p.grad is not None for p in model.encoder.parameters())
        model.train()
        hidden_states(model, inputs)
        assert not calls, "dropout"
        model.eval()
        model.encoder.layer[0].output.dense = nn.Sequential(model.encoder.layer[0].output.dense)
        hidden_states(model, inputs)
        assert [result is None for result in calls] == [True] + [False] * (len(calls) - 1)
        calls.clear()
    if dtype == torch.float32 and not options:
        with torch.autocast("cpu", torch.bfloat16):
            hidden_states(accelerated(), inputs)
        assert not is_by_one_call(calls)
        hidden_states(accelerated(prepack=True), inputs)
        assert not is_by_one_call(calls)


def test_the_environment_decides(kind, calls, monkeypatch):
    if kind[0]:
        pytest.skip("8 bits have one backend on the CPU with kernels")
    model = build(kind)()
    inputs = random_inputs(MASK, model.config)
    monkeypatch.setenv("ROBERTA_FAST_BACKEND", "torch")
    hidden_states(model, inputs)
    assert not is_by_one_call(calls)


def test_a_parameter_of_another_dtype_is_named(kind):
    if kind[0]:
        pytest.skip("8-bit copies are dropped with a cast")
    model = build(kind)()
    other = torch.bfloat16 if kind[1] == torch.float32 else torch.float32
    model.encoder.layer[1].output.dense.to(other)
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense\.weight is .* but hidden_states are"):
        hidden_states(model, random_inputs(MASK, model.config))


def test_choices_are_asked_for_in_silence(recwarn):
    facts = dispatch.Facts("cpu", "float16", 64)
    dispatch.forget_choices()
    assert dispatch.backends(("attention", "linear"), facts) == ("torch", "torch")
    assert not [w for w in recwarn if "roberta_fast" in str(w.message)]
    assert dispatch.backends(("int8_linear",), facts._replace(device="mps")) in (("torch",), (None,))
    with pytest.raises(ValueError, match="backend='nonesuch'"):
        dispatch.backends(("attention",), facts, "nonesuch")
