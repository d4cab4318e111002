"""Texts laid one after the other in one row, as ``DataCollatorWithFlattening`` makes them, do not see each other."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, DataCollatorWithFlattening

import roberta_fast
from roberta_fast.testing import assert_close_as_torch, tiny_config

LENGTHS = (5, 17, 1, 9)
FIRST_POSITION = {"roberta": 2, "bert": 0, "distilbert": 0, "electra": 0}


def model_of(model_type, **settings):
    torch.manual_seed(0)
    config = tiny_config(model_type)
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model(**{**config.to_dict(), **settings})).eval()


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 90, (length,), generator=generator).tolist() for length in LENGTHS]


def flattened(texts, model_type):
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, position_ids_start=FIRST_POSITION[model_type])
    batch = collate([{"input_ids": text} for text in texts])
    del batch["labels"]
    return batch


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", FIRST_POSITION)
def test_each_text_is_as_if_alone(model_type, attention, texts):
    model = model_of(model_type, attn_implementation=attention)
    exact = model.double()
    with torch.no_grad():
        wanted = [exact(torch.tensor([text])).logits[0] for text in texts]
        model.float()
        stock = [model(torch.tensor([text])).logits[0] for text in texts]
        fast = roberta_fast.accelerate_model(model, on_unsupported="error")
        got = fast(**flattened(texts, model_type)).logits[0].split(LENGTHS)
    for ours, theirs, exactly in zip(got, stock, wanted, strict=True):
        assert_close_as_torch(ours, theirs, exactly, factor=3.0)


def test_gradients_are_those_of_the_texts_alone(texts):
    gradients = []
    for packed in (False, True):
        model = roberta_fast.accelerate_model(model_of("roberta"))
        batches = [flattened(texts, "roberta")] if packed else [{"input_ids": torch.tensor([text])} for text in texts]
        for batch in batches:
            model(**batch).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


def test_the_test_can_fail(texts):
    """The stock model with sdpa lets the texts see each other."""
    model = model_of("roberta")
    with torch.no_grad():
        alone = model(torch.tensor([texts[0]])).logits[0]
        leaked = model(**flattened(texts, "roberta")).logits[0, : LENGTHS[0]]
    assert (alone - leaked).abs().max() > 1e-3


def test_hidden_states_and_hooks_on_layers(texts):
    model = roberta_fast.accelerate_model(model_of("roberta"))
    shapes = []
    with torch.no_grad():
        plain = model(**flattened(texts, "roberta"))
        model.roberta.encoder.layer[0].register_forward_hook(lambda *call: shapes.append(call[2].shape))
        states = model(**flattened(texts, "roberta"), output_hidden_states=True)
    torch.testing.assert_close(states.logits, plain.logits)
    assert len(states.hidden_states) == model.config.num_hidden_layers + 1
    assert shapes == [(1, sum(LENGTHS), model.config.hidden_size)]


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"attention_mask": torch.ones(1, sum(LENGTHS))}, ValueError, "attention_mask must be None where cu_seq_lens_q"),
    ({"output_attentions": True}, NotImplementedError, "attentions are requested, where texts .* see each other"),
    ({"cu_seq_lens_q": torch.tensor([0, 99])}, ValueError, "cu_seqlens_q must ascend from 0 to at most 32"),
], ids=["a mask too", "attentions", "lengths beyond the row"])  # fmt: skip
def test_what_would_mix_texts_is_refused(change, error, message, texts):
    if "cu_seq_lens_q" in change and roberta_fast.dispatch.load_cpp():
        pytest.skip("PyTorch's operations do not check lengths")
    model = model_of("roberta", attn_implementation="eager" if "output_attentions" in change else "sdpa")
    with pytest.raises(error, match=message), torch.no_grad():
        roberta_fast.accelerate_model(model)(**{**flattened(texts, "roberta"), **change})


def test_a_hook_inside_a_layer_is_refused(texts):
    model = roberta_fast.accelerate_model(model_of("roberta"))
    model.roberta.encoder.layer[1].attention.register_forward_hook(lambda *call: None)
    with pytest.raises(NotImplementedError, match=r"a hook on RobertaAttention, where texts .* see each other"):
        model(**flattened(texts, "roberta"))


def test_several_rows_are_refused(texts):
    model = roberta_fast.accelerate_model(model_of("roberta"))
    with pytest.raises(ValueError, match=r"cu_seq_lens_q divides one row, \[1, S, C\], but hidden_states is \(2, 3, "):
        model(torch.ones(2, 3, dtype=torch.long), cu_seq_lens_q=torch.tensor([0, 3]))
