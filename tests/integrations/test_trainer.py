"""Hugging Face's Trainer, autocast and gradient scaling train an accelerated model as they train the stock one."""

import copy

import pytest
import torch
from model_trio import Trio, assert_same_gradients, gradients, tiny_inputs, tiny_model, trio
from torch.nn.utils.rnn import pad_sequence
from transformers import RobertaForMaskedLM, RobertaForSequenceClassification, Trainer, TrainingArguments

from roberta_fast import accelerate_model, explain
from roberta_fast.testing import TINY

pytest.importorskip("accelerate", reason="the package accelerate, which Trainer needs, is not installed")

HEADS = {"classification": RobertaForSequenceClassification, "masked language model": RobertaForMaskedLM}


def examples(model_class, count=24):
    """Texts of 1 to 20 random tokens; one label each, or labels on two tokens in seven."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(5, TINY["vocab_size"], (int(torch.randint(1, 21, (), generator=generator)),), generator=generator)
        if model_class is RobertaForMaskedLM:
            labels = torch.where(torch.arange(len(ids)) % 7 < 2, ids, -100)
        else:
            labels = ids.sum() % 2
        yield {"input_ids": ids, "labels": labels}


def collate(batch):
    ids, labels = ([example[key] for example in batch] for key in ("input_ids", "labels"))
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    labels = pad_sequence(labels, batch_first=True, padding_value=-100) if labels[0].dim() else torch.stack(labels)
    return {"input_ids": pad_sequence(ids, batch_first=True, padding_value=1), "attention_mask": mask, "labels": labels}


def trainer_of(model, folder, **overrides):
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 3,
        **overrides,
    }
    model_class = next(c for c in HEADS.values() if isinstance(model, c))
    data = list(examples(model_class))
    return Trainer(model, TrainingArguments(str(folder), **settings), collate, data, data[:9])


def loss_curve(trainer, **arguments):
    """The loss at each step, in full precision: the log rounds it."""
    losses, compute = [], trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: losses.append(loss := compute(*args, **kwargs)) or loss
    trainer.train(**arguments)
    return torch.tensor([loss.item() for loss in losses], dtype=torch.float64)


def assert_same_curve(models, folder, **overrides):
    """The fast model's losses differ from those in float64 by three times what the stock ones do, or in the last place.

    models: a trio, or several, whose curves are one: AdamW makes steps of rounding errors, for some models far larger ones.
    """
    trios = models if isinstance(models, list) else [models]
    curves = [[loss_curve(trainer_of(model, folder, **overrides)) for model in models] for models in trios]
    fast, stock, exact = map(torch.cat, zip(*curves, strict=True))
    assert exact.unique().numel() == exact.numel() >= 6, "every step must change the model"
    assert (fast - exact).abs().max() <= 3 * (stock - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    return fast


@pytest.mark.parametrize("head", HEADS)
def test_same_loss_curve(head, tmp_path):
    trios = [trio(tiny_model(HEADS[head], seed=seed)) for seed in range(4)]
    assert_same_curve(trios, tmp_path)
    assert explain(trios[0].fast).fallbacks == ()
    assert explain(trios[0].fast).stock_calls == explain(trios[0].fast).whole_calls == {}


def test_gradient_accumulation(tmp_path):
    models = trio(tiny_model(RobertaForSequenceClassification))
    losses = assert_same_curve(models, tmp_path, gradient_accumulation_steps=2)
    assert len(losses) == 2 * 6


@pytest.mark.parametrize("head", HEADS)
def test_evaluates_predicts_and_saves(head, tmp_path):
    models = trio(tiny_model(HEADS[head]))
    fast, stock = (trainer_of(model, tmp_path) for model in models[:2])
    assert fast.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-5)
    ours, theirs = fast.predict(fast.eval_dataset), stock.predict(stock.eval_dataset)
    assert ours.predictions.shape == theirs.predictions.shape
    real = theirs.label_ids != -100
    assert ours.predictions[real] == pytest.approx(theirs.predictions[real], abs=1e-4)
    fast.save_model(str(tmp_path / "saved"))
    loaded = HEADS[head].from_pretrained(tmp_path / "saved")
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), models.stock.parameters(), strict=True))


def dropped_out():
    """A fast model with dropout, the same each time."""
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return accelerate_model(tiny_model(RobertaForSequenceClassification, num_hidden_layers=2, **rates))


def test_resumed_training_is_unbroken_training(tmp_path):
    """Bit by bit, with dropout: its seeds come from the generator whose state a checkpoint holds."""
    unbroken, resumed = dropped_out(), dropped_out()
    losses = loss_curve(trainer_of(unbroken, tmp_path, max_steps=4, save_strategy="steps", save_steps=2))
    rest = loss_curve(trainer_of(resumed, tmp_path, max_steps=4), resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(rest) == 2 and torch.equal(rest, losses[2:])
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters(), unbroken.parameters(), strict=True))


def test_the_stock_model_resumes_what_the_fast_one_began(tmp_path):
    models = trio(tiny_model(RobertaForSequenceClassification))
    losses = loss_curve(trainer_of(models.fast, tmp_path, save_strategy="steps", save_steps=3))
    rest = loss_curve(trainer_of(models.stock, tmp_path), resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert rest.tolist() == pytest.approx(losses[3:].tolist(), rel=1e-4)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(reentrant, tmp_path):
    """The recomputed forward draws the same dropout, so training does not change by a bit."""
    plain, checkpointed = dropped_out(), dropped_out()
    layer, calls = checkpointed.roberta.encoder.layer[1], []
    layer._block = lambda *args: calls.append(1) or type(layer)._block(layer, *args)
    # Fewer than eight rows, as the last layer would have them, have other bits where they are multiplied without a gradient.
    rows = {"per_device_train_batch_size": 8}
    losses = loss_curve(trainer_of(plain, tmp_path, **rows))
    how = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    again = loss_curve(trainer_of(checkpointed, tmp_path, **rows, **how))
    assert len(calls) == 2 * len(losses), "every layer must run again in backward"
    assert torch.equal(losses, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_scaled_step_under_autocast(dtype):
    """The gradients' error is at most three times that of the stock model under autocast; then one scaled step of SGD."""
    models = trio(tiny_model(RobertaForSequenceClassification), backend="torch")
    inputs = tiny_inputs(models.stock)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for model in models:
        with torch.autocast("cpu", dtype, enabled=model is not models.exact):
            scaler.scale(model(**inputs).loss).backward()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert_same_gradients(*(gradients(model) for model in models))
    assert_same_gradients(*({name: p.detach() for name, p in model.named_parameters()} for model in models))
    assert scaler.get_scale() == 2.0**8


def test_an_overflow_skips_the_step():
    model = accelerate_model(tiny_model(RobertaForSequenceClassification), backend="torch")
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.float16):
        scaler.scale(model(**tiny_inputs(model)).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**29
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_bfloat16_by_the_trainer(tmp_path):
    stock = tiny_model(RobertaForSequenceClassification)
    models = Trio(accelerate_model(copy.deepcopy(stock), backend="torch"), stock, copy.deepcopy(stock))
    fast, half = (loss_curve(trainer_of(model, tmp_path, bf16=True)) for model in models[:2])
    exact = loss_curve(trainer_of(models.exact, tmp_path))
    assert (fast - exact).abs().max() <= 3 * (half - exact).abs().max()
    assert explain(models.fast).stock_calls == {}
