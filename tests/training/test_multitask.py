"""Several tasks on one encoder: all are learned, each is saved as a model of its own, and what is wrong names its task."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_tasks import BAD, GOOD, QUICK, named_entities, questions, reviews
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    pipeline,
)

from roberta_fast import explain
from roberta_fast.testing import assert_close_as_torch
from roberta_fast.training import DataError, TokenBatchSampler, finetune, predict
from roberta_fast.training.batching import TaskBatchSampler
from roberta_fast.training.cli import run as run_command
from roberta_fast.training.multitask import MultiTaskModel, parse_task

CLASSES = {
    "mood": AutoModelForSequenceClassification,
    "names": AutoModelForTokenClassification,
    "answers": AutoModelForQuestionAnswering,
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three tasks as ``task`` takes them."""
    folder = tmp_path_factory.mktemp("tasks")
    mood, names, answers = reviews(folder / "a.tsv", 32), named_entities(folder / "a.conll", 24), questions(folder / "a.json", 16)
    return [
        f"mood=classification,train_file={mood},validation_file={reviews(folder / 'b.tsv', 12, seed=1)},max_seq_length=32",
        f"names=ner,train_file={names},validation_file={names},max_seq_length=32",
        {
            "name": "answers",
            "task": "qa",
            "train_file": answers,
            "validation_file": answers,
            "max_seq_length": 32,
            "doc_stride": 8,
        },
    ]


def run(folder, checkpoint, tasks, **flags):
    quick = {name: value for name, value in QUICK.items() if name != "max_seq_length"}
    flags = {**quick, "learning_rate": 3e-3, **flags}
    return finetune("multitask", **flags, model_name_or_path=checkpoint, task=tasks, output_dir=str(folder))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_checkpoint, tasks):
    return run(tmp_path_factory.mktemp("multitask"), tiny_checkpoint, tasks, num_train_epochs=10, layer_lr_decay=0.95)


def test_all_are_learned_and_their_mean_chooses_the_checkpoint(trained):
    metrics = trained.metrics
    assert metrics["eval_mood_accuracy"] > 0.9 and metrics["eval_names_f1"] > 0.9 and metrics["eval_answers_f1"] > 60
    mean = np.mean([metrics["eval_mood_accuracy"], metrics["eval_names_f1"], metrics["eval_answers_f1"] / 100])
    assert metrics["eval_mean"] == pytest.approx(mean)
    folder = Path(trained.output_dir)
    assert json.loads((folder / "metrics.json").read_text())["eval_mean"] == metrics["eval_mean"]
    state = json.loads((folder / "trainer_state.json").read_text())
    evaluated = [entry["eval_mean"] for entry in state["log_history"] if "eval_mean" in entry]
    assert len(evaluated) == 10 and state["best_metric"] == max(evaluated) == pytest.approx(mean)
    assert explain(trained.model).stock_calls == {}


def test_each_is_a_model_of_stock_hugging_face(trained):
    """With the encoder of all, the logits of the trained model, and the report of its task."""
    encoders = []
    for name, auto_class in CLASSES.items():
        folder = Path(trained.output_dir) / name
        model, report = auto_class.from_pretrained(folder, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(model.roberta.encoder).__module__.startswith("transformers.")
        encoders.append(model.roberta.state_dict())
        batch = AutoTokenizer.from_pretrained(folder)([*GOOD, *BAD], padding=True, return_tensors="pt")
        with torch.no_grad():
            stock, found = model.eval()(**batch), trained.model.eval()(name, **batch)
            exact = model.double()(**batch)
        # Where there is padding, hidden states are zeros in the one and anything in the other.
        real = ... if name == "mood" else batch["attention_mask"].bool()
        for key, value in stock.items():
            assert_close_as_torch(found[key][real], value[real], exact[key][real], name=f"{name}: {key}")
        assert {"metrics.json", "README.md", "learning_curves.png", "finetune.json"} <= {p.name for p in folder.iterdir()}
    for encoder in encoders[1:]:
        assert all(torch.equal(encoder[key], value) for key, value in encoders[0].items())
    classify = pipeline("text-classification", str(Path(trained.output_dir) / "mood"))
    assert [found["label"] for found in classify([GOOD[0], BAD[0]])] == ["1", "0"]


def test_predicts_by_each(trained, tmp_path):
    (tmp_path / "new.txt").write_text(f"{GOOD[1]}\n{BAD[1]}\n")
    (tmp_path / "new.conll").write_text("Anna\nBerg\nlikes\nOslo\n")
    folder = Path(trained.output_dir)
    assert [row["label"] for row in predict(folder / "mood", tmp_path / "new.txt", use_cpu=True)] == ["1", "0"]
    with pytest.raises(ValueError, match=r"there is no finetune.json here, but in answers, mood, names"):
        predict(folder, tmp_path / "new.txt")
    (row,) = predict(folder / "names", tmp_path / "new.conll", use_cpu=True)
    assert [entity["label"] for entity in row["entities"]] == ["PER", "LOC"]


@pytest.mark.parametrize("token_dropout", [0.0, 0.3])
def test_a_run_that_resumes_is_an_unbroken_one(token_dropout, tmp_path, tiny_checkpoint, tasks):
    """In the middle of an epoch, bit by bit, with small tasks seen more often."""
    flags = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 5, "save_total_limit": 9, "sampling_alpha": 0.5}
    flags |= {"token_dropout": token_dropout, "eval_strategy": "no"}
    run(tmp_path / "whole", tiny_checkpoint, tasks, **flags)
    checkpoints = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda p: int(p.name.partition("-")[2]))
    shutil.copytree(checkpoints[-2], tmp_path / "rest" / checkpoints[-2].name)
    run(tmp_path / "rest", tiny_checkpoint, tasks, **flags, resume_from_checkpoint="last")
    for name in CLASSES:
        assert len({(tmp_path / out / name / "model.safetensors").read_bytes() for out in ("whole", "rest")}) == 1


def test_a_pooler_that_only_some_heads_have():
    config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    models = {"tags": BertForTokenClassification(config), "label": BertForSequenceClassification(config)}
    expected = {name: list(model.state_dict()) for name, model in models.items()}
    model = MultiTaskModel(models)
    assert model.encoder.pooler is not None and model.names == expected
    parameters = list(model.parameters())
    assert len(parameters) == len(set(map(id, parameters))) == len(list(model.encoder.parameters())) + 4
    model("label", input_ids=torch.tensor([[2, 3]]), labels=torch.tensor([1])).loss.backward()
    assert model.encoder.embeddings.word_embeddings.weight.grad is not None
    assert model.heads["tags"].classifier.weight.grad is None


LENGTHS = [[3, 4, 5] * 40, [6, 2] * 10, [4]]
SIZES = [len(TokenBatchSampler(lengths, 20)) for lengths in LENGTHS]


def sets_of(sampler, epoch):
    sampler.set_epoch(epoch)
    bounds = np.cumsum([0, *map(len, LENGTHS)])
    batches = list(sampler)
    owners = [{int(np.searchsorted(bounds, text, side="right")) - 1 for text in batch} for batch in batches]
    assert len(batches) == len(sampler) and all(len(owner) == 1 for owner in owners)
    return batches, [owner.pop() for owner in owners]


def test_with_alpha_1_each_text_is_seen_once():
    sampler = TaskBatchSampler(LENGTHS, 20, alpha=1.0)
    batches, owners = sets_of(sampler, 0)
    assert sorted(text for batch in batches for text in batch) == list(range(sum(map(len, LENGTHS))))
    assert owners != sorted(owners) and batches != sets_of(sampler, 1)[0] and batches == sets_of(sampler, 0)[0]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.7])
def test_shares_are_powers_of_sizes(alpha):
    sampler = TaskBatchSampler(LENGTHS, 20, alpha=alpha)
    _, owners = sets_of(sampler, 0)
    powers = np.array(SIZES) ** alpha
    assert np.abs(np.bincount(owners) - sum(SIZES) * powers / powers.sum()).max() <= 1
    # No text of a set is seen again before all of them have been, over epochs too.
    seen = [text for epoch in range(9) for batch in sets_of(sampler, epoch)[0] for text in batch]
    for first, lengths in zip(np.cumsum([0, *map(len, LENGTHS)]), LENGTHS, strict=False):
        counts = np.bincount([text - first for text in seen if first <= text < first + len(lengths)], minlength=len(lengths))
        assert counts.max() - counts.min() <= 1 and counts.min() > 0


def test_processes_train_on_the_same_task_in_a_step():
    lengths = LENGTHS[:2]
    samplers = [TaskBatchSampler(lengths, 20, alpha=1.0, num_replicas=2, rank=rank) for rank in (0, 1)]
    for pair in zip(*samplers, strict=True):
        assert len({text < len(lengths[0]) for batch in pair for text in batch}) == 1
    assert sorted(text for sampler in samplers for batch in sampler for text in batch) == list(range(140))
    with pytest.raises(ValueError, match=r"alpha=1.5 must lie in \[0, 1\]"):
        TaskBatchSampler(lengths, 20, alpha=1.5)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("classification,train_file=a.tsv", "expected name=kind,flag=value"),
        ("a=translation,train_file=a", "a kind of classification, ner, qa"),
        ("../a=ner", "letters, digits, - and _ in the name"),
        ("a=ner,train=x", "task a: ner has no flag 'train'"),
        ("a=ner,max_seq_length=many", "task a: argument --max_seq_length"),
        ('{"name": "a"', "no json: "),
    ],
)
def test_a_task_that_does_not_fit(task, message):
    with pytest.raises(ValueError, match=message):
        parse_task(task)


def test_wrong_input_names_its_task(tmp_path, tiny_checkpoint, tasks):
    (tmp_path / "bad.tsv").write_text("sentence\tlabel\na\t1\nb\n")
    with pytest.raises(DataError, match=r"task bad: .*bad.tsv, line 3: 1 fields, but the header has 2"):
        run(tmp_path / "out", tiny_checkpoint, [tasks[0], f"bad=classification,train_file={tmp_path / 'bad.tsv'}"])
    with pytest.raises(ValueError, match="task: 'mood' is there twice"):
        run(tmp_path / "out", tiny_checkpoint, [tasks[0], tasks[0]])
    with pytest.raises(ValueError, match="task: 1 is given, but several are trained together"):
        run(tmp_path / "out", tiny_checkpoint, tasks[:1])
    with pytest.raises(ValueError, match=r"task untrained: .* has no classification head yet: train_file is needed"):
        run(
            tmp_path / "out",
            tiny_checkpoint,
            [tasks[1], tasks[0].replace("mood", "untrained").replace("train_file", "test_file")],
        )
    with pytest.raises(ValueError, match="early_stopping_patience=1 needs validation data of a task"):
        run(
            tmp_path / "out",
            tiny_checkpoint,
            [t.replace("validation_file", "test_file") for t in tasks[:2]],
            early_stopping_patience=1,
        )
    with pytest.raises(ValueError, match="lora_r=2 is for one task alone"):
        run(tmp_path / "out", tiny_checkpoint, tasks, lora_r=2)


def test_one_task_with_validation_data_is_enough_to_stop_early(tmp_path, tiny_checkpoint, tasks):
    tasks = [tasks[0], tasks[1].replace("validation_file", "test_file")]
    result = run(tmp_path / "out", tiny_checkpoint, tasks, early_stopping_patience=1, max_steps=2)
    assert "eval_mood_accuracy" in result.metrics


@pytest.mark.parametrize("source", ["flags", "config"])
def test_the_command(source, tmp_path, tiny_checkpoint, tasks, capsys):
    import yaml

    out = tmp_path / "out"
    flags = ["--model_name_or_path", tiny_checkpoint, "--output_dir", str(out), "--use_cpu", "true", "--disable_tqdm", "true"]
    flags += ["--report_to", "none", "--max_steps", "2", "--save_strategy", "no"]
    if source == "flags":
        flags += ["--task", tasks[0], "--token_dropout", "0.1", "--task", tasks[1]]
    else:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"task": [tasks[0], tasks[2]], "sampling_alpha": 1.0}))
        flags += ["--config", str(tmp_path / "run.yaml")]
    assert run_command(["multitask", *flags]) == 0
    said = capsys.readouterr().out
    assert "eval_mean: " in said and "eval_mood_accuracy: " in said
    assert {p.name for p in out.iterdir() if p.is_dir()} == ({"mood", "names"} if source == "flags" else {"mood", "answers"})
