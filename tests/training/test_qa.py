"""Question answering: scores as the official ones, spans in any script, windows, and a tiny model that learns."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tasks import QUICK, jsonl_file, questions, run_card
from transformers import AutoModelForQuestionAnswering

from roberta_fast.training import DataError, QuestionAnswering, finetune, predict
from roberta_fast.training.arguments import ModelArguments, QaArguments
from roberta_fast.training.data import read_squad
from roberta_fast.training.qa import squad_scores
from roberta_fast.training.training_arguments import FineTuningArguments

WORDS = st.lists(st.sampled_from(["the", "a", "Oslo", "oslo", "new", "town,", "An", "1973", "-", "thé"]), max_size=5).map(
    " ".join
)


@given(
    st.lists(st.tuples(WORDS, st.lists(WORDS.filter(lambda w: w.strip(" -")), min_size=1, max_size=3)), min_size=1, max_size=5)
)
def test_scores_are_those_of_another_implementation(pairs):
    from torchmetrics.functional.text import squad

    found = squad_scores([text for text, _ in pairs], [gold for _, gold in pairs])
    predictions = [{"prediction_text": text, "id": str(i)} for i, (text, _) in enumerate(pairs)]
    truth = [{"answers": {"answer_start": [0] * len(g), "text": g}, "id": str(i)} for i, (_, g) in enumerate(pairs)]
    # Theirs, of version 1.1, knows no empty answers: what is nothing but articles scores otherwise in 2.0.
    if all(_is_something(text) for text, gold in pairs for text in (text, *gold)):
        theirs = squad(predictions, truth)
        assert found["exact_match"] == pytest.approx(float(theirs["exact_match"]), abs=1e-3)
        assert found["f1"] == pytest.approx(float(theirs["f1"]), abs=1e-3)


def _is_something(text):
    return bool({word.lower().strip(",-") for word in text.split()} - {"the", "a", "an", ""})


def test_scores_of_version_2():
    """A question without an answer is right where none is given, and wrong with any."""
    scores = squad_scores(["", "Oslo", "the Oslo!", ""], [[], [], ["Oslo", "Bergen"], ["Oslo"]])
    assert scores == {
        "exact_match": 50.0,
        "f1": 50.0,
        "has_answer_exact_match": 50.0,
        "has_answer_f1": 50.0,
        "no_answer_exact_match": 50.0,
        "no_answer_f1": 50.0,
    }


def test_f1_counts_words():
    assert squad_scores(["old Oslo town"], [["Oslo town hall"]])["f1"] == pytest.approx(100 * 2 / 3)


def run(folder, checkpoint, train, validation, **flags):
    files = {"train_file": train, "validation_file": validation, "output_dir": str(folder / "out")}
    quick = {**QUICK, "num_train_epochs": 12, "max_seq_length": 48, "doc_stride": 8, "tokens_per_batch": 200}
    return finetune("qa", **{**quick, **flags}, model_name_or_path=checkpoint, **files)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_checkpoint):
    folder = tmp_path_factory.mktemp("qa")
    return run(folder, tiny_checkpoint, questions(folder / "train.json", 40), questions(folder / "dev.json", 12, seed=1), seed=1)


def test_learns(trained):
    assert trained.metrics["eval_f1"] > 80 and trained.metrics["eval_exact_match"] > 60
    folder = Path(trained.output_dir)
    assert set(json.loads((folder / "eval_predictions.json").read_text())) == {f"q{i}" for i in range(12)}
    assert (folder / "report.txt").read_text().startswith("question")
    AutoModelForQuestionAnswering.from_pretrained(folder)


def test_the_card_runs(trained, tmp_path, monkeypatch, capsys):
    """And finds what prediction does."""
    monkeypatch.chdir(tmp_path)
    questions(tmp_path / "questions.json", 3)
    names = run_card(trained.output_dir)
    file = jsonl_file(tmp_path / "one.jsonl", [{"context": names["context"], "question": names["question"]}])
    quiet = {"use_cpu": True, "disable_tqdm": True, "max_answer_length": 100}
    assert capsys.readouterr().out.splitlines()[0] == predict(trained.output_dir, file, **quiet)[0]["answer"]


def test_predicts_without_answers(trained, tmp_path):
    context = "yesterday Eva Holm went to New Town by train"
    file = jsonl_file(tmp_path / "new.jsonl", [{"question": "went to ?", "context": context}])
    (row,) = predict(trained.output_dir, file, use_cpu=True, disable_tqdm=True, n_best_size=3)
    assert row["answer"] in context and len(row["n_best"]) == 3
    assert [context[found["start"] : found["end"]] for found in row["n_best"]] == [found["answer"] for found in row["n_best"]]


def test_questions_without_an_answer(tmp_path, tiny_checkpoint):
    train = questions(tmp_path / "train.json", 24, without_answer=12)
    with pytest.raises(DataError, match=r"question q0: there is no answer: --version_2_with_negative"):
        run(tmp_path, tiny_checkpoint, train, train)
    result = run(tmp_path, tiny_checkpoint, train, train, version_2_with_negative=True)
    assert {"eval_has_answer_f1", "eval_no_answer_f1"} <= result.metrics.keys()
    assert result.metrics["eval_no_answer_f1"] > 50


@pytest.mark.parametrize(
    "filler", ["x ", "日本語の", "e\u0301 ", "🙂 ", "ﷺ\u200d "], ids=["Latin", "Japanese", "combining", "emoji", "Arabic"]
)
def test_spans_are_found_again_in_long_contexts_of_any_script(filler, tmp_path, tiny_checkpoint):
    """The span that each window is trained on is the answer's, and every answer is whole in some window."""
    context = filler * 30 + "Zürich" + filler * 30
    row = {"question": "where ?", "context": context, "answers": {"text": ["Zürich"], "answer_start": [context.index("Zürich")]}}
    path = jsonl_file(tmp_path / "a.jsonl", [{"id": "1", **row}, {"id": "2", **row}])
    data = QaArguments(train_file=path, max_seq_length=64, doc_stride=20)
    task = QuestionAnswering(ModelArguments(tiny_checkpoint), data, FineTuningArguments("out", report_to="none", use_cpu=True))
    encoded = task.encode(task.tables["train"])
    windows, hits = task.windows["train"], 0
    for window, start, end in zip(windows, encoded["start_positions"], encoded["end_positions"], strict=True):
        if start != window.cls_index:
            low, high = window.offsets[start - window.place][0], window.offsets[end - window.place][1]
            assert context[low:high].strip() in ("Zürich", filler.strip() + "Zürich", "Zürich" + filler.strip())
            hits += 1
    assert hits >= 2 and len(windows) > 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": {"text": ["Rome"], "answer_start": [3]}}, "line 1: the answer 'Rome' is not in its context"),
        ({"answers": "Oslo"}, "line 1: answers must hold lists under text and answer_start"),
        ({"answers": {"text": "Oslo", "answer_start": 3}}, "line 1: text and answer_start of answers must be lists, got"),
        ({"answers": {"text": ["Oslo"], "answer_start": []}}, "line 1: answers has 1 text, but 0 answer_start"),
        ({"context": None}, "line 1: context and question must be texts"),
        ({"answers": {"text": [5], "answer_start": [3]}}, "line 1: the answer 5 is no text"),
    ],
)
def test_stops_before_training(change, message, tmp_path, tiny_checkpoint):
    row = {"id": "1", "question": "where ?", "context": "in Oslo", "answers": {"text": ["Oslo"], "answer_start": [3]}}
    with pytest.raises(DataError, match=message):
        run(tmp_path, tiny_checkpoint, jsonl_file(tmp_path / "a.jsonl", [row | change]), None)


@pytest.mark.parametrize("ids", [("a", "a"), (1, "1")], ids=["texts", "a number and its text"])
@pytest.mark.parametrize("layout", ["squad", "rows"])
def test_an_id_that_is_there_twice(layout, ids, tmp_path, tiny_checkpoint):
    """Predictions are written by id: the second question would take the place of the first."""
    row = {"question": "where ?", "answers": [{"text": "Oslo", "answer_start": 3}]}
    paragraphs = [{"context": "in Oslo", "qas": [row | {"id": identity} for identity in ids]}]
    path = tmp_path / "dev.json"
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    if layout == "rows":
        row |= {"context": "in Oslo", "answers": {"text": ["Oslo"], "answer_start": [3]}}
        path = jsonl_file(tmp_path / "dev.jsonl", [row | {"id": identity} for identity in ids])
    place = r"question '?\w'?" if layout == "squad" else "line 2"
    with pytest.raises(DataError, match=rf"{path}, {place}: the id .*is there twice"):
        run(tmp_path, tiny_checkpoint, questions(tmp_path / "train.json", 4), str(path))
    assert not (tmp_path / "out").exists()


def test_a_question_of_squads_layout_that_is_no_text(tmp_path):
    question = {"id": "q", "question": None, "answers": [{"text": "Oslo", "answer_start": 3}]}
    data = {"data": [{"title": "t", "paragraphs": [{"context": "in Oslo", "qas": [question]}]}]}
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"a.json, question 'q': context and question must be texts"):
        list(read_squad(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"doc_stride": -1}, "doc_stride=-1 must be at least 0"),
        ({"n_best_size": 0}, "n_best_size=0 must be at least 1"),
        ({"max_answer_length": 0}, "max_answer_length=0 must be at least 1"),
        ({"null_score_diff_threshold": float("nan")}, "null_score_diff_threshold=nan is no number"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not for qa"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_flags_that_do_not_fit(flags, message, tmp_path, tiny_checkpoint):
    path = questions(tmp_path / "a.json", 4)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, tiny_checkpoint, path, path, **flags)
    assert not (tmp_path / "out").exists(), "nothing is trained before"


def test_a_model_without_a_head_is_not_evaluated(tmp_path, tiny_checkpoint):
    with pytest.raises(ValueError, match="has no question answering head yet"):
        run(tmp_path, tiny_checkpoint, None, questions(tmp_path / "dev.json", 2))


def test_answers_longer_than_a_window_are_told_of(tmp_path, tiny_checkpoint):
    context = "Oslo lies by the sea. " * 12
    long = {"answer_start": [0], "text": [context.strip()]}
    short = {"answer_start": [0], "text": ["Oslo"]}
    rows = [{"id": str(i), "question": "where?", "context": context, "answers": a} for i, a in enumerate([short, long])]
    for chosen, expectation in (
        (rows, pytest.warns(UserWarning, match="line 2: 1 of 2 answers are whole in no window of --max_seq_length 40")),
        (rows[1:], pytest.raises(DataError, match="line 1: 1 of 1 answers are whole in no window")),
    ):
        data = QaArguments(train_file=jsonl_file(tmp_path / "a.jsonl", chosen), max_seq_length=40, doc_stride=8)
        arguments = FineTuningArguments(output_dir=str(tmp_path / "out"), report_to="none")
        task = QuestionAnswering(ModelArguments(model_name_or_path=tiny_checkpoint), data, arguments)
        with expectation:
            task.encode(task.tables["train"])


def test_a_question_that_leaves_no_room(tmp_path, tiny_checkpoint):
    row = {"question": "who " * 60, "context": "in Oslo", "answers": {"text": ["Oslo"], "answer_start": [3]}}
    with pytest.raises(DataError, match=r"a.jsonl, line 1: a first text of"):
        run(tmp_path, tiny_checkpoint, jsonl_file(tmp_path / "a.jsonl", [row]), None)
