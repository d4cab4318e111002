"""FastTrainer: groups and rates of the optimizer, whole checkpoints, resuming, stopping, counting."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import RobertaForMaskedLM, RobertaForSequenceClassification

from roberta_fast.accelerate import fast_encoders
from roberta_fast.testing import TINY, randomize, tiny_config
from roberta_fast.training import FastTrainer, FastTrainingArguments, NotFiniteError
from roberta_fast.training.checkpoints import last_complete_checkpoint
from roberta_fast.training.throughput import Throughput, peak_flops
from roberta_fast.training.trainer import layer_depths
from roberta_fast.training.training_arguments import FineTuningArguments


def model_of(**overrides):
    return randomize(RobertaForSequenceClassification(tiny_config(num_hidden_layers=2, **overrides)))


def texts(count=40):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, TINY["vocab_size"], (3 + i % 13,), generator=generator).tolist() for i in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": [sum(row) % 2 for row in ids]})


def collate(batch):
    size = max(len(example["input_ids"]) for example in batch)
    rows = [(example["input_ids"], size - len(example["input_ids"])) for example in batch]
    return {
        "input_ids": torch.tensor([ids + [1] * pads for ids, pads in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * pads for ids, pads in rows]),
        "labels": torch.tensor([example["labels"] for example in batch]),
    }


def trainer_of(model, folder, trainer_class=FastTrainer, **settings):
    quick = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-3, "logging_steps": 2}
    quick |= {"num_train_epochs": 3, "tokens_per_batch": 60, "save_strategy": "no", "seed": 3}
    arguments = FastTrainingArguments(str(folder), **{**quick, **settings})
    return trainer_class(model, arguments, collate, texts(), texts(8))


class Crash(Exception):
    pass


def test_resumed_training_is_unbroken_training(tmp_path):
    """Bit by bit, in the middle of an epoch, with dropout, batches by tokens and rates by layer."""
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    unbroken, resumed = model_of(**dropout), model_of(**dropout)
    settings = {"layer_lr_decay": 0.8, "weight_decay": 0.01, "save_strategy": "steps", "save_steps": 5}
    whole = trainer_of(unbroken, tmp_path, **settings)
    whole.train()
    assert whole.state.global_step % 5 and whole.state.global_step > 10
    for step in (10, whole.state.global_step):  # what an interrupted run would not have
        for folder in tmp_path.glob(f"checkpoint-{step}"):
            folder.rename(tmp_path / f"later-{step}")
    assert last_complete_checkpoint(tmp_path).endswith(("checkpoint-5", "checkpoint-15"))
    rest = trainer_of(resumed, tmp_path, **settings)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert rest.state.global_step == whole.state.global_step
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters(), unbroken.parameters(), strict=True))


def test_every_token_is_counted_once_and_in_the_log(tmp_path):
    trainer = trainer_of(model_of(), tmp_path)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == 3 * sum(map(len, texts()["input_ids"]))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged and all(entry["tokens_per_second"] > 0 and 0 < entry["mfu"] < 1.5 for entry in logged)


def test_the_arithmetic_of_a_step():
    model = model_of()
    counted = Throughput(model)
    counted.start()
    counted.add({"input_ids": torch.zeros(2, 7), "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])})
    tokens, flops, seconds = counted.drain()
    parameters = sum(p.numel() for n, p in model.named_parameters() if "_embeddings." not in n)
    assert tokens == 11 and seconds > 0
    assert flops == 6 * parameters * 11 + 12 * 2 * TINY["hidden_size"] * (49 + 16)
    assert counted.drain()[0] == 0
    tied = Throughput(RobertaForMaskedLM(model.config))
    batch = {"input_ids": torch.zeros(1, 7), "labels": torch.tensor([[-100, 5, -100, 6, 7, -100, -100]])}
    flops = []
    for labels in (batch["labels"], None):
        tied.add({**batch, "labels": labels})
        flops.append(tied.drain()[1])
    assert flops[0] - flops[1] == 6 * 3 * TINY["vocab_size"] * TINY["hidden_size"]
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e14


def test_matrices_decay_and_lower_layers_learn_more_slowly(tmp_path):
    model = model_of()
    optimizer = trainer_of(model, tmp_path, layer_lr_decay=0.5, weight_decay=0.1, learning_rate=1.0).create_optimizer()
    names = {parameter: name for name, parameter in model.named_parameters()}
    seen = {names[p]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert seen.keys() == set(names.values())
    for name, (rate, decay) in seen.items():
        depth = 3 if "embeddings" in name else 2 - int(name.split(".")[3]) if ".layer." in name else 0
        assert rate == 0.5**depth, name
        assert decay == (0.0 if name.endswith("bias") or "LayerNorm" in name else 0.1), name
    assert max(layer_depths(model).values()) == 3


@pytest.mark.parametrize("crash_in", ["_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_crash_in_a_save_leaves_no_checkpoint(crash_in, tmp_path):
    class Crashing(FastTrainer):
        pass

    def crash(self, output_dir):
        if self.state.global_step > 4:
            raise Crash
        getattr(super(Crashing, self), crash_in)(output_dir)

    setattr(Crashing, crash_in, crash)
    with pytest.raises(Crash):
        trainer_of(model_of(), tmp_path, Crashing, save_strategy="steps", save_steps=4).train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert list((tmp_path / ".saving").iterdir()), "the crash was in the middle of a save"
    resumed = trainer_of(model_of(), tmp_path, save_strategy="steps", save_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step > 8 and not (tmp_path / ".saving").exists()


def test_half_a_checkpoint_of_another_program_is_passed_over(tmp_path):
    trainer_of(model_of(), tmp_path, save_strategy="steps", save_steps=4).train()
    good = last_complete_checkpoint(tmp_path)
    half = tmp_path / "checkpoint-900"
    half.mkdir()
    assert last_complete_checkpoint(tmp_path) == good
    (half / "model.safetensors").write_bytes(b"")
    (half / "trainer_state.json").write_text('{"global_step": ')
    assert last_complete_checkpoint(tmp_path) == good
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_the_best_checkpoint_is_remembered_where_it_is(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 1}
    trainer = trainer_of(model_of(), tmp_path, load_best_model_at_end=True, **settings)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and best.is_dir()
    saved = json.loads((Path(last_complete_checkpoint(tmp_path)) / "trainer_state.json").read_text())
    assert Path(saved["best_model_checkpoint"]).parent == tmp_path
    assert len(list(tmp_path.glob("checkpoint-*"))) <= 2


@pytest.mark.parametrize("fast", [True, False])
def test_a_model_that_the_trainer_makes_is_fast(fast, tmp_path):
    settings = FastTrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    trainer = FastTrainer(None, settings, collate, texts(), model_init=lambda: model_of(), fast=fast)
    trainer.train()
    assert bool(fast_encoders(trainer.model)) == fast


class Explodes(nn.Module):
    """A model whose loss is no number from its sixth step on."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.steps = model, model.config, 0

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        self.steps += self.training
        output["loss"] = output["loss"] * (math.nan if self.steps >= 6 else 1.0)
        return output


@pytest.mark.parametrize("save_steps", [1, 2])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(save_steps, tmp_path):
    """Which is not that of the step before, whose weights have made no other loss than this one."""
    trainer = trainer_of(Explodes(model_of()), tmp_path, save_strategy="steps", save_steps=save_steps, logging_steps=4)
    with pytest.raises(NotFiniteError, match=r"at step 6 .*the last good checkpoint is .*checkpoint-4.*learning_rate"):
        trainer.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in range(save_steps, 6, save_steps)]


def test_class_weights_weigh_the_loss(tmp_path):
    model = model_of().eval()
    trainer = FastTrainer(model, FastTrainingArguments(str(tmp_path), use_cpu=True, report_to="none"), class_weights=[3.0, 1.0])
    batch = collate([texts()[i] for i in range(6)])
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        expected = nn.functional.cross_entropy(logits, batch["labels"], torch.tensor([3.0, 1.0]))
        assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(ValueError, match="class_weights has 3 weights for num_labels=2"):
        FastTrainer(model, FastTrainingArguments(str(tmp_path), use_cpu=True, report_to="none"), class_weights=[1.0] * 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens_per_batch": -1}, "tokens_per_batch=-1"),
        ({"layer_lr_decay": 0.0}, r"layer_lr_decay=0.0 must lie in \(0, 1\]"),
        ({"early_stopping_patience": -1}, "early_stopping_patience=-1"),
        ({"seeds": "1;2"}, "seeds='1;2' must be integers"),
        ({"seed": -1}, r"seed=-1 must lie in \[0, 2\*\*32\)"),
        ({"data_seed": 2**32}, r"data_seed=4294967296 must lie in"),
        ({"seeds": "1,4294967296"}, "seeds='1,4294967296' must lie in"),
        ({"seed": 3, "seeds": "1,2"}, "seed=3 is none of seeds='1,2'"),
        (
            {"tokens_per_batch": 80, "per_device_train_batch_size": 4},
            "tokens_per_batch=80 and per_device_train_batch_size=4: a batch",
        ),
        ({"bf16": True, "fp16": True}, "bf16=True and fp16=True"),
    ],
)
def test_settings_that_do_not_fit(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        FastTrainingArguments(str(tmp_path), **settings)


def test_the_best_of_evaluations_by_steps_is_saved_at_each(tmp_path):
    given = FineTuningArguments(str(tmp_path), eval_strategy="steps", use_cpu=True)
    assert given.save_strategy == "steps" and given.save_steps == given.eval_steps == given.logging_steps == 50


@pytest.mark.skipif(torch.accelerator.is_available(), reason="it is for machines without an accelerator")
def test_bfloat16_without_an_accelerator(tmp_path):
    trainer = trainer_of(model_of(), tmp_path, use_cpu=False, bf16=True, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.args.device.type == "cpu"


def test_a_run_says_how_many_texts_it_saw_and_how_its_last_steps_went(tmp_path):
    trainer = trainer_of(model_of(), tmp_path, max_steps=5, logging_steps=3)
    metrics = trainer.train().metrics
    sampler = trainer.batch_sampler()
    seen = sum(len(batch) for batch, _ in zip(sampler, range(5), strict=False))
    assert len(list(sampler)) > 5 and seen != 5 * trainer.args.per_device_train_batch_size
    assert metrics["train_samples_per_second"] == pytest.approx(seen / metrics["train_runtime"], rel=0.01)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [3, 5]


def test_resuming_without_a_checkpoint_is_said(tmp_path):
    with pytest.warns(UserWarning, match="there is no checkpoint in .*: training begins anew"):
        trainer_of(model_of(), tmp_path, max_steps=1).train(resume_from_checkpoint=True)


def test_a_batch_of_texts_where_one_asks_for_it(tmp_path):
    given = FastTrainingArguments(str(tmp_path), per_device_train_batch_size=4)
    assert (given.tokens_per_batch, given.per_device_train_batch_size) == (0, 4)
    assert FastTrainingArguments(str(tmp_path)).tokens_per_batch == 2048
