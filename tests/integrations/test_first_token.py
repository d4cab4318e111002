"""Heads that read the first token: the last layer computes one row of each text, and nothing else changes."""

import copy
import types

import pytest
import torch
import transformers
from model_trio import assert_same_training_step, gradients, tiny_model, trio
from torch import nn
from torch.utils.data import Dataset

from roberta_fast import accelerate_model, decoding, explain, restore_model
from roberta_fast.families import FAMILIES, FIRST_TOKEN_HEADS
from roberta_fast.first_token import FastHead, head_objection
from roberta_fast.testing import MASKS, assert_close_as_torch, ragged_mask, random_inputs

RIGHT = MASKS["right padding"]
NO_DROPOUT = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"), 0.0)
NO_DROPOUT |= {"seq_classif_dropout": 0.0, "summary_last_dropout": 0.0, "summary_type": "first"}
NAMED = [(f.model_types[0], getattr(f, role)) for f in FAMILIES for role in FIRST_TOKEN_HEADS if getattr(f, role)]
CLASSIFIER = transformers.RobertaForSequenceClassification


def head(model_type="roberta", name="RobertaForSequenceClassification", **overrides):
    return tiny_model(getattr(transformers, name), model_type, **{**NO_DROPOUT, **overrides})


def inputs_for(model, mask=RIGHT):
    """A batch of four texts, or of two questions with two choices each, with labels."""
    inputs, labels = random_inputs(mask, model.config), torch.arange(len(mask)) % 2
    if type(model).__name__.endswith("MultipleChoice"):
        return {name: value.unflatten(0, (-1, 2)) for name, value in inputs.items()} | {"labels": labels[: len(mask) // 2]}
    return inputs | {"labels": labels}


@pytest.fixture
def asked(monkeypatch):
    """Whether each call of self-attention was asked for first rows alone."""
    seen, attention = [], decoding.self_attention

    def watched(query, key, value, batch, *rest, **options):
        seen.append(batch.first_rows)
        assert len(query) == (batch.batch if batch.first_rows else len(key))
        return attention(query, key, value, batch, *rest, **options)

    monkeypatch.setattr("roberta_fast.layer.self_attention", watched)
    return seen


@pytest.mark.parametrize("mask", ["right padding", "left padding", "all ones"])
@pytest.mark.parametrize(("model_type", "name"), NAMED, ids=[name for _, name in NAMED])
def test_heads(model_type, name, mask, asked):
    """Logits in eval, and in training the loss, its gradients and a step: those of the stock model, of every parameter."""
    mask = MASKS[mask] if mask != "all ones" else torch.ones(32, 8, dtype=torch.int64)
    models = trio(head(model_type, name), on_unsupported="error")
    inputs = inputs_for(models.stock, mask)
    for model in models:
        model.eval()
    fast, stock, exact = (model(**inputs) for model in models)
    assert type(fast) is type(stock) and list(fast) == list(stock)
    # Few numbers may be exact by luck: the logits and the loss are held together.
    assert_close_as_torch(*(torch.cat([o.logits.flatten(), o.loss[None]]).detach() for o in (fast, stock, exact)))
    assert asked == [False, False, True]
    for model in models:
        model.train()
    assert_same_training_step(models, inputs)
    report = explain(models.fast)
    assert report.fallbacks == () and report.whole_calls == report.stock_calls == {}, report


def test_the_list_of_heads_is_whole():
    """Of ten families' classifiers and choices, those are missing whose base models pack after the embeddings."""
    assert len(NAMED) == len({name for _, name in NAMED}) == 2 * 8 + 2
    assert all(issubclass(getattr(transformers, name), transformers.PreTrainedModel) for _, name in NAMED)


@pytest.mark.parametrize("unpad", ["host", "device"])
@pytest.mark.parametrize(("model_type", "name"), [("roberta", CLASSIFIER.__name__), ("bert", "BertForSequenceClassification")])
def test_dropout_is_that_of_the_whole_layer(model_type, name, unpad):
    """With the same seed, loss and gradients are those of a model whose last layer computes all rows, but for sums' order."""
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    first = accelerate_model(head(model_type, name, **rates), unpad=unpad)
    whole = copy.deepcopy(first)
    whole.base_model.register_forward_hook(lambda *_: None)
    losses, exact = [], None
    for model in (first, whole):
        torch.manual_seed(3)
        loss = model(**inputs_for(model)).loss
        loss.backward()
        losses.append(loss.detach())
    assert torch.allclose(*losses, rtol=1e-6)
    ours, theirs = (torch.cat([g.flatten() for g in gradients(model).values()]) for model in (first, whole))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    torch.manual_seed(4)
    assert abs(first(**inputs_for(first)).loss - losses[0]) > 1e-3, "another seed drops otherwise"
    assert exact is None and explain(whole).whole_calls == {"a hook on " + type(whole.base_model).__name__: 1}


@pytest.mark.parametrize("row", ["of the next text", "behind the first"])
def test_rules_catch_a_head_that_reads_another_row(row, monkeypatch):
    models = trio(head().eval())
    inputs, shift = inputs_for(models.stock), (1 if row == "behind the first" else 9)
    monkeypatch.setattr("roberta_fast.packing.PackedBatch.asking", property(
        lambda batch: (batch.cu_seqlens[:-1].long() + shift) % 30 if batch.first_rows else None))  # fmt: skip
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close_as_torch(*(model(**inputs).logits.detach() for model in models))


@pytest.mark.parametrize(
    "options", [{"recompute": "layer"}, {"recompute": "gelu"}, {"backend": "torch"}, {"unpad": "device"}], ids=str
)
def test_options(options, asked):
    models = trio(head(), **options)
    assert_same_training_step(models, inputs_for(models.stock))
    assert True in asked


def test_deterministic_bits_do_not_depend_on_the_batch(asked):
    """A text alone, and among others."""
    model = accelerate_model(head().eval(), deterministic=True)
    inputs = random_inputs(RIGHT, model.config)
    together = model(**inputs).logits
    for i, length in enumerate(RIGHT.sum(1).tolist()):
        alone = model(**{name: value[i : i + 1, :length] for name, value in inputs.items()}).logits
        assert torch.equal(alone[0], together[i])
    assert True in asked


def test_int8(asked):
    model = accelerate_model(head(hidden_size=128, intermediate_size=256).eval(), precision="int8")
    inputs = random_inputs(RIGHT, model.config)
    with torch.inference_mode():
        first = model(**inputs).logits
        model.roberta.register_forward_hook(lambda *_: None)
        whole = model(**inputs).logits
    assert torch.equal(first, whole), "a row is quantized by itself"
    assert asked == [True], "the layers that compute all rows are one call each"
    assert explain(model).fp32_calls == {}


class Pooling(nn.Module):
    """A head of a user's own, which reads all rows."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(64, 2)

    def forward(self, features):
        return self.out(features.mean(1))


def hook(path):
    return lambda model: model.get_submodule(path).register_forward_hook(lambda *_: None)


def own_head(model):
    model.classifier = Pooling()


def stub(model):
    model.roberta.forward = model.roberta.forward


def own_forward(model):
    model.classifier.forward = model.classifier.forward


WHOLE = {
    "a hook on the base model": (hook("roberta"), "a hook on RobertaModel"),
    "a hook on what reads": (hook("classifier"), "a hook on RobertaClassificationHead"),
    "a head of one's own": (own_head, "the head reads by a Pooling of test_first_token"),
    "a head with another forward": (own_forward, "the head reads by a RobertaClassificationHead of transformers"),
    "a base model with another forward": (stub, "a replaced forward of RobertaModel"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_heads_whose_last_layer_computes_all_rows(name, asked):
    """The same numbers as the stock model's, and a fallback that names the cause."""
    change, reason = WHOLE[name]
    stock = head().eval()
    fast = accelerate_model(copy.deepcopy(stock), on_unsupported="error")
    for model in (fast, stock):
        torch.manual_seed(0)
        change(model)
    inputs = random_inputs(RIGHT, stock.config)
    if name == "a head of one's own":  # which reads padding as well: zeros here, anything in the stock model
        inputs = {key: value[2:3] for key, value in inputs.items()}
    assert torch.allclose(fast(**inputs).logits, stock(**inputs).logits, atol=1e-5)
    assert True not in asked
    report = explain(fast)
    assert [f for f in report.fallbacks if f.startswith(f"the last layer computes all rows: {reason}")], report
    assert list(report.whole_calls.values()) == [1]


@pytest.mark.parametrize("path", ["roberta.encoder.layer.2", "roberta.embeddings", "roberta.encoder"])
def test_hooks_see_whole_layers(path, asked):
    stock = head().eval()
    fast, seen = accelerate_model(copy.deepcopy(stock)), []
    fast.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output))
    inputs = random_inputs(RIGHT, stock.config)
    assert torch.allclose(fast(**inputs).logits, stock(**inputs).logits, atol=1e-5)
    assert len(seen) == 1 and True not in asked and sum(explain(fast).whole_calls.values()) == 1


def test_requested_hidden_states_are_whole(asked):
    stock = head().eval()
    fast, inputs = accelerate_model(copy.deepcopy(stock)), random_inputs(RIGHT, stock.config)
    ours, theirs = (model(**inputs, output_hidden_states=True) for model in (fast, stock))
    assert True not in asked and len(ours.hidden_states) == 4
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert torch.allclose(a[RIGHT.bool()], b[RIGHT.bool()], atol=1e-5)
    assert explain(fast).whole_calls == {"hidden states are requested": 1}


def test_electra_that_sums_up_the_last_token(asked):
    """``summary_type`` chooses the row that its head for choices reads."""
    models = trio(head("electra", "ElectraForMultipleChoice", summary_type="last").eval())
    inputs = inputs_for(models.stock, torch.ones(4, 8, dtype=torch.int64))
    assert_close_as_torch(*(model(**inputs).logits.detach() for model in models))
    assert True not in asked
    assert explain(models.fast).fallbacks == ("the last layer computes all rows: the head reads by summary_type='last'",)


def test_a_base_model_alone_returns_all_rows(asked):
    model = accelerate_model(head()).eval()
    inputs = random_inputs(RIGHT, model.config)
    assert model.roberta(**inputs).last_hidden_state[RIGHT.bool()].abs().amin(0).max() > 0
    assert True not in asked


def test_token_classifiers_are_not_touched():
    model = accelerate_model(tiny_model(transformers.RobertaForTokenClassification))
    assert type(model) is transformers.RobertaForTokenClassification


def test_peft_classifier(asked):
    """An adapter's copy of the head reads as the head does."""
    peft = pytest.importorskip("peft")
    stock = peft.get_peft_model(head(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    models = trio(stock.eval())
    inputs = random_inputs(RIGHT, models.stock.config)
    assert_close_as_torch(*(model(**inputs).logits.detach() for model in models))
    assert asked == [False, False, True]


class Pairs(Dataset):
    """Texts of several lengths with labels."""

    def __init__(self, config):
        lengths = [3, 9, 5, 7, 4, 8]
        inputs = random_inputs(ragged_mask(lengths), config)
        self.rows = [
            {"input_ids": ids[:n].tolist(), "attention_mask": [1] * n, "labels": i % 2}
            for i, (ids, n) in enumerate(zip(inputs["input_ids"], lengths, strict=True))
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def test_trainer_learns_the_same(tmp_path, asked):
    """Its signature tells which columns to pass; its own arguments for the loss go through to the base model."""
    losses = []
    for accelerate in (True, False):
        model = head(hidden_size=32, intermediate_size=64, num_attention_heads=2)
        if accelerate:
            accelerate_model(model, on_unsupported="error")
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=3, max_steps=4, learning_rate=1e-3, report_to="none", use_cpu=True,
            save_strategy="no", logging_steps=4, seed=1, disable_tqdm=True,
        )  # fmt: skip

        def collate(rows):
            longest = max(len(row["input_ids"]) for row in rows)
            padded = {
                "input_ids": [row["input_ids"] + [1] * (longest - len(row["input_ids"])) for row in rows],
                "attention_mask": [row["attention_mask"] + [0] * (longest - len(row["input_ids"])) for row in rows],
                "labels": [row["labels"] for row in rows],
            }
            return {name: torch.tensor(value) for name, value in padded.items()}

        trainer = transformers.Trainer(model, arguments, data_collator=collate, train_dataset=Pairs(model.config))
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert True in asked


def test_restored():
    model = head()
    stock_class = type(model)
    accelerate_model(model)
    assert isinstance(model, FastHead) and head_objection(model) is None
    assert type(restore_model(model)) is stock_class and not {"fast_options", "whole_calls"} & set(model.__dict__)


@pytest.mark.parametrize("name", ["RobertaForSequenceClassification", "RobertaModel", "RobertaForMaskedLM"])
def test_restored_while_someone_keeps_the_forward(name):
    """As Accelerate's ``prepare`` does under mixed precision: the forward becomes a wrapper around that of the class."""
    model = head(name=name).train()
    inputs = random_inputs(RIGHT, model.config)
    inputs |= {"labels": RIGHT} if name.endswith("MaskedLM") else {}
    expected = model(**inputs)[0]
    accelerate_model(model)
    model.forward = types.MethodType(type(model).forward, model)
    assert torch.equal(restore_model(model)(**inputs)[0], expected)
