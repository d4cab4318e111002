"""NER: entity scores as seqeval's, alignment of words and pieces, schemes, long sentences, and a tiny model that learns."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval import metrics as seqeval
from tiny_tasks import QUICK, jsonl_file, named_entities, run_card
from transformers import AutoModelForTokenClassification

from roberta_fast.training import DataError, Ner, finetune, predict
from roberta_fast.training.arguments import ModelArguments, NerArguments
from roberta_fast.training.data import read_conll
from roberta_fast.training.ner import IGNORED, as_bio, entity_scores
from roberta_fast.training.training_arguments import FineTuningArguments

TAGS = st.sampled_from(["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-A-B", "I-A-B"])
SENTENCES = st.lists(st.lists(st.tuples(TAGS, TAGS), min_size=1, max_size=12), min_size=1, max_size=6)


@given(SENTENCES)
def test_entity_scores_are_those_of_seqeval(sentences):
    truth, predicted = ([[pair[i] for pair in row] for row in sentences] for i in (0, 1))
    found = entity_scores(truth, predicted)
    for name, score in (("precision", seqeval.precision_score), ("recall", seqeval.recall_score), ("f1", seqeval.f1_score)):
        assert found["overall"][name] == pytest.approx(score(truth, predicted, zero_division=0))
    theirs = seqeval.classification_report(truth, predicted, output_dict=True, zero_division=0) if len(found) > 1 else {}
    for kind in found.keys() - {"overall"}:
        expected = theirs[kind]
        ours = found[kind]
        assert ours["f1"] == pytest.approx(expected["f1-score"]) and ours["support"] == expected["support"]


def test_entities_are_whole_and_of_their_type():
    """A scorer that counted tokens, or boundaries without types, would give something else."""
    scores = entity_scores([["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "O", "O", "B-PER"]])["overall"]
    assert scores == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 2}


@pytest.mark.parametrize(
    ("tags", "bio"),
    [
        ("I-PER I-PER O I-LOC B-LOC", "B-PER I-PER O B-LOC B-LOC"),
        ("S-PER B-LOC E-LOC O", "B-PER B-LOC I-LOC O"),
        ("I-PER I-LOC", "B-PER B-LOC"),
    ],
    ids=["IOB1", "IOBES", "neighbours"],
)
def test_every_scheme_becomes_bio(tags, bio):
    assert as_bio(tags.split()) == bio.split()


def run(folder, checkpoint, train, validation, **flags):
    files = {"train_file": train, "validation_file": validation, "output_dir": str(folder / "out")}
    return finetune("ner", **{**QUICK, "num_train_epochs": 8, **flags}, model_name_or_path=checkpoint, **files)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_checkpoint):
    folder = tmp_path_factory.mktemp("ner")
    train = named_entities(folder / "train.conll", scheme="IOB1")
    return run(folder, tiny_checkpoint, train, named_entities(folder / "validation.conll", 12, seed=1), seed=1)


def test_learns_from_iob1_and_is_measured_on_bio(trained):
    assert trained.metrics["eval_f1"] > 0.9
    lines = (Path(trained.output_dir) / "report.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["type", "LOC", "PER", "overall"]
    assert run_card(trained.output_dir)["predict"]("in Oslo it rains")[0]["entity"].endswith("LOC")
    model = AutoModelForTokenClassification.from_pretrained(trained.output_dir)
    assert list(model.config.id2label.values()) == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def test_a_window_inside_of_one_word_has_no_loss_to_be_lost(tmp_path, tiny_checkpoint):
    """Alone in a batch, its loss was no number; its word's tag is predicted all the same."""
    (tmp_path / "train.conll").write_text("\n".join(["a" * 400 + " B-PER", "went O"]) + "\n")
    path = str(tmp_path / "train.conll")
    result = run(tmp_path, tiny_checkpoint, path, path, num_train_epochs=1, tokens_per_batch=20, test_file=path, logging_steps=1)
    assert math.isfinite(result.metrics["train_loss"]) and math.isfinite(result.metrics["eval_loss"])
    assert [len(row["tags"]) for row in result.predictions] == [2]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CR LF", "CR"])
def test_lines_end_as_they_do(end, tmp_path):
    (tmp_path / "a.conll").write_bytes(end.join(["Anna B-PER", "went O", "", "Oslo B-LOC", ""]).encode())
    table = read_conll(tmp_path / "a.conll")
    assert table.columns == {"tokens": [["Anna", "went"], ["Oslo"]], "tags": [["B-PER", "O"], ["B-LOC"]]}
    assert list(table.lines) == [1, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Anna went to Oslo\n", "new.conll, line 1: 'Oslo' is no tag: one token a line is expected"),
        ("Anna went to Oslo\nTom too\n", "new.conll, line 2: 2 columns, but the sentence begins with 4: 'Tom too'"),
        ("in O\nNew York B-LOC\n", "new.conll, line 2: 3 columns, but the sentence begins with 2: 'New York B-LOC'"),
        ("Anna\nOslo B-LOC\n", "new.conll, line 2: 2 columns, but the sentence begins with 1: 'Oslo B-LOC'"),
    ],
    ids=["running text", "lines of it", "a space in a token", "a tag for some"],
)
def test_words_are_not_taken_for_tags(text, message, trained, tmp_path):
    (tmp_path / "new.conll").write_text(text)
    with pytest.raises(DataError, match=message):
        predict(trained.output_dir, tmp_path / "new.conll", use_cpu=True)


def test_foreign_tags_are_passed_over_in_prediction(trained, tmp_path):
    (tmp_path / "new.conll").write_text("Anna NNP B-HUMAN\nwent VBD O\n")
    (row,) = predict(trained.output_dir, tmp_path / "new.conll", use_cpu=True)
    assert row["tokens"] == ["Anna", "went"]


def test_one_tag_only(tmp_path, tiny_checkpoint):
    (tmp_path / "train.conll").write_text("Anna O\nwent O\n")
    with pytest.raises(DataError, match=r"train.conll: tags has one value only: 'O'"):
        run(tmp_path, tiny_checkpoint, str(tmp_path / "train.conll"), None)


def test_predicts_tokens_without_tags(trained, tmp_path):
    (tmp_path / "new.conll").write_text("yesterday\nAnna\nBerg\nwent\nto\nOslo\nby\ntrain\n\nParis\n", encoding="utf-8")
    rows = predict(trained.output_dir, tmp_path / "new.conll", use_cpu=True, disable_tqdm=True)
    assert [len(row["tags"]) for row in rows] == [8, 1]
    assert {"label": "PER", "begin": 1, "end": 3, "words": ["Anna", "Berg"]} in rows[0]["entities"]


def task_of(path, checkpoint, **flags):
    arguments = FineTuningArguments("out", report_to="none", use_cpu=True)
    return Ner(ModelArguments(checkpoint), NerArguments(train_file=path, **flags), arguments)


def test_first_pieces_have_labels_and_no_word_of_a_long_sentence_is_lost(tmp_path, tiny_checkpoint):
    tokens = ["Anna", "", "incomprehensibilities", "Oslo"] * 20
    tags = ["B-PER", "O", "O", "B-LOC"] * 20
    task = task_of(jsonl_file(tmp_path / "a.jsonl", [{"tokens": tokens, "tags": tags}] * 2), tiny_checkpoint, max_seq_length=24)
    table = task.tables["train"]
    encoded = task.encode(table)
    assert len(encoded) > 4 and max(map(len, encoded["input_ids"])) <= 24
    assert all(len(row["labels"]) == len(row["input_ids"]) for row in encoded)
    kept = [label for row in encoded["labels"] for label in row if label != IGNORED]
    named = [task.labels[label] for label in kept]
    assert [name for name in named if name != "O"] == [tag for tag in tags if tag != "O"] * 2
    # What the labels themselves predict is what they say.
    assert task._predicted([[max(label, 0) for label in row] for row in encoded["labels"]], table) == task._true(table)


def test_all_pieces_have_labels_where_asked_for(tmp_path, tiny_checkpoint):
    path = jsonl_file(tmp_path / "a.jsonl", [{"tokens": ["Zzyzxberg", "x"], "tags": ["B-LOC", "O"]}] * 2)
    task = task_of(path, tiny_checkpoint, label_all_tokens=True)
    names = [task.labels[i] for i in task.encode(task.tables["train"])["labels"][0] if i != IGNORED]
    place, other = (
        len(task.tokenizer([[word]], is_split_into_words=True, add_special_tokens=False)["input_ids"][0])
        for word in ("Zzyzxberg", "x")
    )
    assert place > 2 and names == ["B-LOC"] + ["I-LOC"] * (place - 1) + ["O"] * other


def test_plain_tags(tmp_path, tiny_checkpoint):
    rows = [{"tokens": ["Anna", "went"], "pos_tags": ["NOUN", "VERB"]}, {"tokens": ["went"], "pos_tags": ["VERB"]}] * 4
    train = jsonl_file(tmp_path / "a.jsonl", rows)
    result = run(tmp_path, tiny_checkpoint, train, train, num_train_epochs=1)
    assert set(result.model.config.label2id) == {"NOUN", "VERB"} and 0 <= result.metrics["eval_f1"] <= 1


BAD = [
    ("Oslo B-LOC\n\nAnna B-PER\nx B-ORG\n", r"v.conll, line 4: the tag 'B-ORG' is in no training example: O, B-LOC"),
    ("Oslo B-LOC\nAnna\n", r"v.conll, line 2: a token without a tag"),
    ("", r"v.conll: the file is empty"),
    ("Anna O\n\nin O\nOslo i-LOC\n", r"v.conll, line 4: the tag 'i-LOC' is neither O nor B-TYPE or I-TYPE, as others are"),
]


@pytest.mark.parametrize(("validation", "message"), BAD)
def test_stops_before_training(validation, message, tmp_path, tiny_checkpoint):
    (tmp_path / "v.conll").write_text(validation)
    train = named_entities(tmp_path / "train.conll", 4)
    with pytest.raises(DataError, match=message):
        run(tmp_path, tiny_checkpoint, train, str(tmp_path / "v.conll"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "line 2: 2 tokens, but tags has 1"),
        ({"tokens": [], "tags": []}, "line 2: tokens is no list of tokens"),
        ({"tokens": ["a"], "tags": [3]}, "line 2: token 1: the tag 3 is no text"),
    ],
)
def test_rows_that_do_not_fit(row, message, tmp_path, tiny_checkpoint):
    with pytest.raises(DataError, match=message):
        task_of(jsonl_file(tmp_path / "a.jsonl", [{"tokens": ["a"], "tags": ["O"]}, row]), tiny_checkpoint)


@pytest.mark.parametrize(("tags", "odd"), [(["b-per", "i-per", "O"], "b-per"), (["B-PER", "o", "o"], "o")])
def test_tags_in_lower_case_are_no_plain_tags(tags, odd, tmp_path, tiny_checkpoint):
    with pytest.raises(DataError, match=rf"line 1: token \d: the tag '{odd}' (begins in lower case|is neither O nor B-TYPE)"):
        task_of(jsonl_file(tmp_path / "a.jsonl", [{"tokens": ["a", "b", "c"], "tags": tags}]), tiny_checkpoint)


def test_real_files_are_read_whole(shared_data):
    from roberta_fast.training.data import read_conll

    for path in sorted(shared_data.glob("ner/*/*.conll")):
        table = read_conll(path)
        assert len(table) > 100 and json.dumps(sorted({t[0] for tags in table.column("tags") for t in tags})) in (
            '["B", "I", "O"]',
            '["I", "O"]',
        )
