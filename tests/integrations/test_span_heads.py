"""Question answering's logits and loss, where a batch is padded: those of each text alone."""

import copy
import pickle

import pytest
import torch
from transformers import (
    BertForQuestionAnswering,
    DistilBertForQuestionAnswering,
    ElectraForQuestionAnswering,
    RobertaForQuestionAnswering,
)

from roberta_fast import accelerate_model, explain, restore_model
from roberta_fast.testing import MASKS, assert_close_as_torch, random_inputs, randomize, tiny_config

MASK = MASKS["right padding"]
CLASSES = {
    "roberta": RobertaForQuestionAnswering,
    "bert": BertForQuestionAnswering,
    "distilbert": DistilBertForQuestionAnswering,
    "electra": ElectraForQuestionAnswering,
}


def model_of(model_type):
    return randomize(CLASSES[model_type](tiny_config(model_type)), std=0.1).eval()


def asked(config, mask=MASK):
    """Inputs, and positions of answers in each text."""
    lengths = mask.sum(1)
    positions = {"start_positions": lengths // 3, "end_positions": lengths - 1}
    return random_inputs(mask, config) | positions


def alone(model, inputs):
    """The mean loss of a stock model's texts, each without padding, and their logits."""
    lengths, losses, logits = inputs["attention_mask"].sum(1), [], []
    for i, length in enumerate(lengths.tolist()):
        one = {name: value[i : i + 1] if "positions" in name else value[i : i + 1, :length] for name, value in inputs.items()}
        output = model(**one)
        losses.append(output.loss)
        logits.append(torch.stack((output.start_logits[0], output.end_logits[0])))
    return torch.stack(losses).mean(), torch.cat(logits, 1)


def test_a_position_at_padding_does_not_count():
    """As one beyond the text does not: its logit is the least there is."""
    fast, inputs = accelerate_model(model_of("bert")), asked(tiny_config("bert"))
    assert not MASK[1].all()
    rest = {name: value[[i for i in range(len(value)) if i != 1]] for name, value in inputs.items()}
    expected = fast(**rest).loss
    for name in ("start_positions", "end_positions"):
        inputs[name] = inputs[name].clone()
        inputs[name][1] = MASK.shape[1] - 1
    torch.testing.assert_close(fast(**inputs).loss, expected)


@pytest.mark.parametrize("model_type", CLASSES)
def test_a_batch_is_its_texts(model_type):
    stock = model_of(model_type)
    fast, inputs = accelerate_model(copy.deepcopy(stock)), asked(stock.config)
    exact = copy.deepcopy(stock).double()
    output = fast(**inputs)
    results = []
    for model, (loss, logits) in ((fast, (output.loss, None)), (stock, alone(stock, inputs)), (exact, alone(exact, inputs))):
        gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        results.append((loss, logits, torch.cat([g.flatten() for g in gradients if g is not None])))
    (loss, _, gradient), theirs, reference = results
    real = torch.stack((output.start_logits[MASK.bool()], output.end_logits[MASK.bool()]))
    assert_close_as_torch(real.detach(), theirs[1].detach(), reference[1].detach(), name="logits")
    torch.testing.assert_close(loss, theirs[0], rtol=1e-5, atol=1e-6)
    assert_close_as_torch(gradient, theirs[2], reference[2], factor=3.0, name="gradients")
    least = torch.finfo(torch.float32).min
    assert (output.start_logits[~MASK.bool()] == least).all() and (output.end_logits[~MASK.bool()] == least).all()
    assert explain(fast).stock_calls == {}


@pytest.mark.parametrize("mask", [None, torch.ones(4, 17, dtype=torch.int64)], ids=["no mask", "all ones"])
def test_without_padding_it_is_the_stock_loss(mask):
    stock = model_of("roberta")
    inputs = asked(stock.config, torch.ones(4, 17, dtype=torch.int64)) | {"attention_mask": mask}
    fast = accelerate_model(copy.deepcopy(stock))
    torch.testing.assert_close(fast(**inputs).loss, stock(**inputs).loss, rtol=1e-5, atol=1e-6)


def test_positions_outside_do_not_count():
    stock = model_of("roberta")
    inputs = asked(stock.config)
    some = {name: value[:2] for name, value in inputs.items()}
    inputs["start_positions"][2:], inputs["end_positions"][2:] = 99, 99
    inputs["end_positions"] = inputs["end_positions"][:, None]
    fast = accelerate_model(stock)
    torch.testing.assert_close(fast(**inputs).loss, fast(**some).loss)


def test_forms_of_calls_and_ways_back():
    stock = model_of("bert")
    inputs = asked(stock.config)
    fast = accelerate_model(copy.deepcopy(stock))
    output = fast(**inputs)
    loss, start, end = fast(
        inputs["input_ids"], inputs["attention_mask"], **{k: inputs[k] for k in list(inputs)[2:]}, return_dict=False
    )
    assert torch.equal(loss, output.loss) and torch.equal(start, output.start_logits) and torch.equal(end, output.end_logits)
    assert torch.equal(pickle.loads(pickle.dumps(fast))(**inputs).loss, output.loss)
    unlabelled = {name: value for name, value in inputs.items() if "positions" not in name}
    assert fast(**unlabelled).loss is None
    assert type(restore_model(fast)) is BertForQuestionAnswering
    assert torch.equal(fast(**inputs).loss, stock(**inputs).loss)
