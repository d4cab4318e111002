"""Token dropout: what it hides and what it never does, by (seed, epoch, index) alone, in training alone."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from tiny_tasks import QUICK, SENTENCES, jsonl_file, named_entities, questions, reviews, translations
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from roberta_fast.training import FineTuningArguments, finetune
from roberta_fast.training.api import task_class
from roberta_fast.training.arguments import ModelArguments
from roberta_fast.training.token_dropout import KEPT, UNITS, TokenDropout, dropped_token

MASK, RATE = 999, 0.3
UNIT_ROWS = [[KEPT, 0, 0, 2, 3, 3, 3, KEPT], [KEPT, 0, 1, 2, 3, 4, 5, 6, KEPT]] * 500


def dropping(seed=0, rate=RATE):
    ids = [[100 * row + place for place in range(len(units))] for row, units in enumerate(UNIT_ROWS)]
    return TokenDropout(Dataset.from_dict({"input_ids": ids, "labels": ids, UNITS: UNIT_ROWS}), rate, MASK, seed)


def dropped(data, epoch=0):
    data.set_epoch(epoch)
    return [[token == MASK for token in data[row]["input_ids"]] for row in range(len(data))]


def test_units_are_dropped_as_a_whole_at_the_rate_and_labels_stay():
    rows = dropped(dropping())
    draws = [{u: d for u, d in zip(units, row, strict=True) if u != KEPT} for units, row in zip(UNIT_ROWS, rows, strict=True)]
    for units, row, of_unit in zip(UNIT_ROWS, rows, draws, strict=True):
        assert row == [u != KEPT and of_unit[u] for u in units]
    drawn = [d for of_unit in draws for d in of_unit.values()]
    assert abs(np.mean(drawn) - RATE) < 4 * (RATE * (1 - RATE) / len(drawn)) ** 0.5
    example = dropping()[7]
    assert UNITS not in example and example["labels"] == [700 + place for place in range(9)]
    assert all(token in (MASK, 700 + place) for place, token in enumerate(example["input_ids"]))


def test_it_follows_seed_epoch_and_index_alone():
    data = dropping()
    first, second = dropped(data, 0), dropped(data, 1)
    assert first != second and first[0] != first[2] and dropped(dropping(seed=1)) != first
    assert dropped(data, 0) == first == dropped(dropping())
    assert not np.any(np.concatenate(dropped(dropping(rate=0.0))))


def test_workers_that_outlive_an_epoch_see_the_next():
    data = dropping()
    loader = DataLoader(
        data, 50, num_workers=1, persistent_workers=True, collate_fn=lambda rows: [row["input_ids"] for row in rows]
    )
    for epoch in (0, 3):
        data.set_epoch(epoch)
        seen = [row for batch in loader for row in batch]
        assert seen == [data[row]["input_ids"] for row in range(len(data))]


FILES = {
    "classification": lambda folder: reviews(folder / "a.tsv", 24),
    "ner": lambda folder: named_entities(folder / "a.conll", 24),
    "qa": lambda folder: questions(folder / "a.json", 24, without_answer=4),
    "translation": lambda folder: translations(folder / "a", 24),
    "generation": lambda folder: jsonl_file(folder / "a.jsonl", [{"text": text} for text in SENTENCES]),
}
MORE = {"qa": {"version_2_with_negative": True, "max_seq_length": 24, "doc_stride": 4}, "generation": {"block_size": 16}}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("batches", [{"tokens_per_batch": 90}, {"per_device_train_batch_size": 6}], ids=["tokens", "texts"])
def test_what_each_task_drops(name, batches, tmp_path, tiny_checkpoint):
    file, kind = FILES[name](tmp_path), task_class(name)
    data = kind.data_class(train_file=file, validation_file=file, **MORE.get(name, {}))
    args = FineTuningArguments(
        str(tmp_path / "out"), report_to="none", use_cpu=True, token_dropout=0.6, dataloader_pin_memory=False, **batches
    )
    task = kind(ModelArguments(tiny_checkpoint), data, args)
    encoded = task.encode_all("train", "validation")
    trainer = task.new_trainer(args, task.new_model(), encoded)
    mask, special = task.tokenizer.mask_token_id, set(task.tokenizer.all_special_ids)
    loader = trainer.get_train_dataloader()
    seen = loader.dataset
    hidden = 0
    for index, clean in enumerate(encoded["train"]):
        given = seen[index]
        is_dropped = np.array(given["input_ids"]) == mask
        assert [m if d else t for t, d, m in zip(clean["input_ids"], is_dropped, [mask] * 999, strict=False)] == given[
            "input_ids"
        ]
        assert not any(d and t in special for t, d in zip(clean["input_ids"], is_dropped, strict=True))
        assert all(given[column] == clean[column] for column in given if column != "input_ids")
        hidden += is_dropped.sum()
        if name == "ner":
            words = task.tokenizer(task.tables["train"].column("tokens")[index], is_split_into_words=True).word_ids()
            assert len({(w, d) for w, d in zip(words, is_dropped, strict=True)}) == len(set(words))
        if name == "qa":
            window = task.windows["train"][index]
            answer = range(clean["start_positions"], clean["end_positions"] + 1)
            assert not is_dropped[: window.place].any() and not is_dropped[list(answer)].any()
    assert hidden > 30
    assert any((batch["input_ids"] == mask).any() for batch in loader)
    assert not any((batch["input_ids"] == mask).any() for batch in trainer.get_eval_dataloader())


@pytest.mark.parametrize("batches", [{"tokens_per_batch": 80}, {"tokens_per_batch": 0, "per_device_train_batch_size": 8}])
def test_a_run_that_resumes_sees_the_same(batches, tmp_path, tiny_checkpoint):
    """In the middle of the second epoch, bit by bit; and another dropout makes another model."""
    train = reviews(tmp_path / "train.tsv", 32)
    flags = {
        **QUICK,
        **batches,
        "model_name_or_path": tiny_checkpoint,
        "train_file": train,
        "num_train_epochs": 2,
        "save_total_limit": 9,
    }

    def model(out, **more):
        saves = {"save_strategy": "steps", "save_steps": 3}
        folder = Path(finetune("classification", **flags, **saves, output_dir=str(tmp_path / out), **more).output_dir)
        return (folder / "model.safetensors").read_bytes()

    whole = model("whole", token_dropout=0.4)
    checkpoints = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda p: int(p.name.partition("-")[2]))
    shutil.copytree(checkpoints[-2], tmp_path / "rest" / checkpoints[-2].name)
    assert model("rest", token_dropout=0.4, resume_from_checkpoint="last") == whole
    assert model("other", token_dropout=0.2) != whole


def test_a_tokenizer_without_a_mask(tiny_checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    assert dropped_token(tokenizer) == tokenizer.mask_token_id
    tokenizer.mask_token = None
    assert dropped_token(tokenizer) == tokenizer.unk_token_id
    tokenizer.unk_token = None
    with pytest.raises(ValueError, match="neither a mask token nor one for unknown words"):
        dropped_token(tokenizer)
    with pytest.raises(ValueError, match=r"token_dropout=1.0 must lie in \[0, 1\)"):
        FineTuningArguments("out", token_dropout=1.0)
