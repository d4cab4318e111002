"""Gradient accumulation: a step's loss and gradient are the mean over its items, however they are divided into micro-batches."""

import pytest
import torch
from transformers import (
    EncoderDecoderModel,
    RobertaForCausalLM,
    RobertaForMaskedLM,
    RobertaForMultipleChoice,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
)

from roberta_fast.testing import randomize
from roberta_fast.testing import tiny_config as config_with_dropout
from roberta_fast.training import FastTrainer, FastTrainingArguments

LENGTHS = (3, 9, 4, 12, 5, 7, 6, 11)


def tiny_config(**overrides):
    return config_with_dropout(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **overrides)


def rows(label):
    """Texts of ids from 5 on, each with what ``label`` makes of its ids."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 60, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": ids, "labels": label(ids)} for ids in texts]


def collate(batch):
    size = max(len(example["input_ids"]) for example in batch)
    ids = torch.tensor([example["input_ids"] + [1] * (size - len(example["input_ids"])) for example in batch])
    labels = [example["labels"] for example in batch]
    if isinstance(labels[0], list) and len(labels[0]) == len(batch[0]["input_ids"]):
        labels = [row + [-100] * (size - len(row)) for row in labels]
    return {"input_ids": ids, "attention_mask": (ids != 1).long(), "labels": torch.tensor(labels)}


def choices(batch):
    inputs = collate(batch)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    others = torch.where(mask.bool(), 65 - ids, ids)
    return {
        "input_ids": torch.stack([ids, others], 1),
        "attention_mask": torch.stack([mask, mask], 1),
        "labels": inputs["labels"],
    }


def encoder_decoder():
    model = EncoderDecoderModel(
        encoder=RobertaForMaskedLM(tiny_config(num_hidden_layers=1)).roberta,
        decoder=RobertaForCausalLM(tiny_config(num_hidden_layers=1, is_decoder=True, add_cross_attention=True)),
    )
    model.config.decoder_start_token_id, model.config.pad_token_id = 0, 1
    return model


CASES = {
    "one label": (lambda: RobertaForSequenceClassification(tiny_config(num_labels=3)), lambda ids: ids[0] % 3, collate),
    "several labels": (
        lambda: RobertaForSequenceClassification(tiny_config(num_labels=2, problem_type="multi_label_classification")),
        lambda ids: [float(ids[0] % 2), 1.0],
        collate,
    ),
    "a number": (lambda: RobertaForSequenceClassification(tiny_config(num_labels=1)), lambda ids: ids[0] / 60, collate),
    "tags": (lambda: RobertaForTokenClassification(tiny_config()), lambda ids: [i % 2 for i in ids], collate),
    "choices": (lambda: RobertaForMultipleChoice(tiny_config()), lambda ids: ids[0] % 2, choices),
    "masked tokens": (lambda: RobertaForMaskedLM(tiny_config()), lambda ids: [-100] * (len(ids) - 1) + ids[-1:], collate),
    "next tokens": (lambda: RobertaForCausalLM(tiny_config(is_decoder=True)), lambda ids: ids, collate),
    "translation": (encoder_decoder, lambda ids: ids, collate),
}


def step(case, folder, size, fast, **settings):
    """(the parameters after a step on all texts, the loss) in micro-batches of ``size``."""
    build, label, collator = CASES[case]
    model = randomize(build(), std=0.1)
    model.config.use_cache = False
    quick = {
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "optim": "sgd",
        "logging_steps": 1,
    }
    quick |= {
        "learning_rate": 0.1,
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "lr_scheduler_type": "constant",
    }
    arguments = FastTrainingArguments(
        str(folder),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=-(-len(LENGTHS) // size),
        **{**quick, **settings},
    )
    trainer = FastTrainer(model, arguments, collator, rows(label), fast=fast)
    trainer.train()
    assert trainer.state.global_step == 1
    return [p.detach() for p in model.parameters()], trainer.state.log_history[0]["loss"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "stock"])
@pytest.mark.parametrize("case", CASES)
def test_micro_batches_are_their_step(case, fast, tmp_path):
    """8 texts at once, or 3, 3 and 2 of them, which do not have as many items each."""
    at_once, loss = step(case, tmp_path, 8, fast)
    divided, same = step(case, tmp_path, 3, fast)
    assert same == pytest.approx(loss, rel=1e-4)
    for one, other in zip(at_once, divided, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-4)


def test_smoothed_labels(tmp_path):
    at_once, loss = step("tags", tmp_path, 8, True, label_smoothing_factor=0.1)
    divided, same = step("tags", tmp_path, 3, True, label_smoothing_factor=0.1)
    assert same == pytest.approx(loss, rel=1e-4)
    for one, other in zip(at_once, divided, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-4)
