"""Fine-tuning on questions whose answer is a span of a context, SQuAD 1.1 and 2.0."""

import json
import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Sized
from pathlib import Path

import numpy as np
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, PreTrainedModel
from transformers.trainer_utils import EvalPrediction, PredictionOutput

from roberta_fast.tasks.question_answering import Prediction, best_answers, windows_of
from roberta_fast.training import report
from roberta_fast.training.arguments import QaArguments
from roberta_fast.training.data import DataError, Table, check_answer, read_squad, read_table, read_text
from roberta_fast.training.fine_tuning import FineTuning
from roberta_fast.training.token_dropout import KEPT

COLUMNS = ("id", "title", "context", "question", "answers")
WORST = 50


class QuestionAnswering(FineTuning):
    """``roberta-fast finetune qa``. Contexts of any length are read in windows."""

    name = "qa"
    pipeline_tag = "question-answering"
    lora_task_type = "QUESTION_ANS"
    data_class = QaArguments
    metric = "f1"
    smooths_labels = False
    highest = 100.0

    def read(self, path: str, split: str) -> Table:
        if Path(path).suffix.lower() == ".json" and _is_squad(path):
            questions = list(read_squad(path))
            return Table(path, {c: [q[c] for q in questions] for c in COLUMNS}, [q["id"] for q in questions], "question")
        return self._checked(read_table(path), split)

    def from_hub(self, table: Table | None, split: str) -> Table | None:
        return table and self._checked(table, split)

    def _checked(self, table, split):
        """A table with a question a row, as in Hugging Face's data sets, whose answers are in their contexts."""
        contexts, questions = table.column("context"), table.column("question")
        answers = table.columns.get("answers")
        if answers is None and split != "test":
            table.column("answers")
        ids = [str(identity) for identity in table.columns.get("id", table.lines)]
        seen = set()
        for row, (context, question) in enumerate(zip(contexts, questions, strict=True)):
            if ids[row] in seen:
                raise table.error(row, f"the id {ids[row]!r} is there twice")
            seen.add(ids[row])
            if not isinstance(context, str) or not isinstance(question, str) or not question.strip():
                raise table.error(row, "context and question must be texts")
            if answers is None:
                continue
            given = answers[row]
            if not isinstance(given, Mapping) or {"text", "answer_start"} - given.keys():
                raise table.error(row, f"answers must hold lists under text and answer_start, got {given!r:.80}")
            parts = given["text"], given["answer_start"]
            if any(isinstance(part, (str, Mapping)) or not isinstance(part, Sized) for part in parts):
                raise table.error(row, f"text and answer_start of answers must be lists, got {given!r:.80}")
            if len(parts[0]) != len(parts[1]):
                raise table.error(row, f"answers has {len(parts[0])} text, but {len(parts[1])} answer_start")
            for text, start in zip(*parts, strict=True):
                check_answer(f"{table.path}, {table.where} {table.lines[row]}", context, text, start)
        columns = {
            "answers": [{"text": [], "answer_start": []}] * len(table),
            **table.columns,
            "id": ids,
        }
        return Table(table.path, columns, table.lines, table.where)

    def prepare(self) -> None:
        given = self.data_args
        self.check_length(given.max_seq_length, "max_seq_length")
        for name, least in (("doc_stride", 0), ("n_best_size", 1), ("max_answer_length", 1)):
            if getattr(given, name) < least:
                raise ValueError(f"{name}={getattr(given, name)} must be at least {least}")
        if math.isnan(given.null_score_diff_threshold):
            raise ValueError("null_score_diff_threshold=nan is no number")
        trained = any(name.endswith("ForQuestionAnswering") for name in self.config.architectures or ())
        if "train" not in self.tables and not trained:
            path = self.model_args.model_name_or_path
            raise ValueError(f"model_name_or_path={path!r} has no question answering head yet: train_file is needed")
        self.windows = {}
        for split, table in self.tables.items():
            if split == "test" or given.version_2_with_negative:
                continue
            for row, answers in enumerate(table.column("answers")):
                if not answers["text"]:
                    raise table.error(row, "there is no answer: --version_2_with_negative trains on such questions")

    def build_model(self) -> PreTrainedModel:
        return self.load_model(AutoModelForQuestionAnswering)

    def encode(self, table: Table):
        """One example a window; a window without the answer points at its classification token."""
        from datasets import Dataset

        given = self.data_args
        try:
            windows = windows_of(
                self.tokenizer, table.column("question"), table.column("context"), given.max_seq_length, given.doc_stride
            )
        except ValueError as error:
            of_row = re.fullmatch(r"text (\d+):? (.*)", str(error))
            raise table.error(int(of_row[1]), of_row[2]) if of_row else DataError(f"{table.path}: {error}") from None
        self.windows[self._split_of(table)] = windows
        columns = {
            "input_ids": [w.input_ids for w in windows],
            "attention_mask": [[1] * len(w.input_ids) for w in windows],
        }
        if windows[0].token_type_ids is not None:
            columns["token_type_ids"] = [w.token_type_ids for w in windows]
        if self._split_of(table) != "test" or any(answers["text"] for answers in table.column("answers")):
            spans = [self._span(window, table.column("answers")[window.example]) for window in windows]
            columns["start_positions"], columns["end_positions"] = zip(*spans, strict=True)
            if self._split_of(table) == "train":
                self._check_reach(table, windows, spans)
        return Dataset.from_dict(columns)

    def _check_reach(self, table, windows, spans):
        """Warns of answers that are whole in no window, and so are trained as if there were none. Raises where all are."""
        asked = [row for row, answers in enumerate(table.column("answers")) if answers["text"]]
        reached = {w.example for w, (start, _) in zip(windows, spans, strict=True) if start != w.cls_index}
        lost = [row for row in asked if row not in reached]
        if lost:
            given = self.data_args
            reason = (
                f"{len(lost)} of {len(asked)} answers are whole in no window of --max_seq_length {given.max_seq_length} that "
                f"overlap by --doc_stride {given.doc_stride}, this one first"
            )
            if len(lost) == len(asked):
                raise table.error(lost[0], reason)
            warnings.warn(f"{table.error(lost[0], reason)}: such questions are trained as if they had none", stacklevel=2)

    def _span(self, window, answers):
        if not answers["text"]:
            return window.cls_index, window.cls_index
        start = answers["answer_start"][0]
        return window.token_span(start, start + len(answers["text"][0]))

    def usage(self) -> str:
        return """import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

folder = "path/to/this/folder"
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForQuestionAnswering.from_pretrained(folder)
question, context = "Who went to Oslo?", "Yesterday Anna Berg went to Oslo by train."
inputs = tokenizer(question, context, return_tensors="pt")
with torch.inference_mode():
    output = model(**inputs)
scores = (output.start_logits[0][:, None] + output.end_logits[0]).triu()  # of each first and last token
inside = torch.tensor([part == 1 for part in inputs.sequence_ids(0)])
start, end = divmod(scores.masked_fill(~(inside[:, None] & inside).triu(), -torch.inf).argmax().item(), len(inside))
print(context[inputs.token_to_chars(0, start).start : inputs.token_to_chars(0, end).end])

# Of contexts of any length, with other answers, scores and places:
from roberta_fast.training import predict

predict(folder, "questions.json")"""

    def _split_of(self, table):
        return next(name for name, other in self.tables.items() if other is table)

    def dropout_units(self, encoded) -> list[list[int]]:
        """Tokens of the context outside the answer."""
        rows = []
        for units, window, start, end in zip(
            super().dropout_units(encoded),
            self.windows["train"],
            encoded["start_positions"],
            encoded["end_positions"],
            strict=True,
        ):
            context = range(window.place, window.place + len(window.offsets))
            rows.append([unit if i in context and not start <= i <= end else KEPT for i, unit in enumerate(units)])
        return rows

    def collator(self, model: PreTrainedModel):
        return DataCollatorWithPadding(self.tokenizer)

    def _answers(self, logits, table) -> list[Prediction]:
        """The best answers of each question; start and end logits, [windows, S] each."""
        given, windows = self.data_args, self.windows[self._split_of(table)]
        by_question = [[] for _ in range(len(table))]
        for index, window in enumerate(windows):
            by_question[window.example].append(index)
        starts, ends = logits
        return [
            best_answers(
                context,
                [windows[i] for i in inside],
                [starts[i] for i in inside],
                [ends[i] for i in inside],
                top_k=given.n_best_size,
                max_answer_length=given.max_answer_length,
                handle_impossible_answer=given.version_2_with_negative,
                null_threshold=given.null_score_diff_threshold,
            )
            for context, inside in zip(table.column("context"), by_question, strict=True)
        ]

    def metrics_of(self, prediction: EvalPrediction, table: Table) -> dict[str, float]:
        texts = [_text(found) for found in self._answers(prediction.predictions, table)]
        return squad_scores(texts, [answers["text"] for answers in table.column("answers")])

    def measured(self) -> list[str]:
        answers = self.tables["validation"].column("answers")
        return list(squad_scores([""] * len(answers), [each["text"] for each in answers]))

    def write_report(self, folder: Path, output: PredictionOutput, table: Table) -> None:
        found = self._answers(output.predictions, table)
        texts = [_text(answers) for answers in found]
        ids, questions = table.column("id"), table.column("question")
        # The layout of the official evaluation script's second argument.
        report.write_json(folder / "eval_predictions.json", dict(zip(ids, texts, strict=True)))
        truth = [answers["text"] for answers in table.column("answers")]
        f1 = [token_f1(text, gold) for text, gold in zip(texts, truth, strict=True)]
        rows = []
        for kind in sorted({_kind(question) for question in questions}):
            scores = [score for score, question in zip(f1, questions, strict=True) if _kind(question) == kind]
            rows.append((kind, 100 * float(np.mean(scores)), len(scores)))
        report.write_text(folder / "report.txt", report.text_table(("question", "f1", "questions"), rows))
        sure = [answers.answers[0].score if answers.answers else 0.0 for answers in found]
        worst = sorted((i for i in range(len(f1)) if f1[i] < 1), key=lambda i: (f1[i], -sure[i]))[:WORST]
        right = [" / ".join(map(repr, dict.fromkeys(gold))) or "no answer" for gold in truth]
        lines = [f"{ids[i]}: {questions[i]}\n    predicted {texts[i]!r} ({sure[i]:.3f}), true {right[i]}" for i in worst]
        report.write_text(folder / "mistakes.txt", "\n".join(lines) + "\n" if lines else "no mistakes\n")

    def predictions_of(self, output: PredictionOutput, table: Table) -> Iterator[dict]:
        for identity, question, found in zip(
            table.column("id"), table.column("question"), self._answers(output.predictions, table), strict=True
        ):
            yield {
                "id": identity,
                "question": question,
                "answer": _text(found),
                "n_best": [answer._asdict() for answer in found.answers],
                **({} if found.null_odds is None else {"null_odds": found.null_odds}),
            }


def squad_scores(texts: Sequence[str], truth: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 in percent, by the arithmetic of the official script (rajpurkar.github.io/SQuAD-explorer, version 2.0).

    texts: the predicted answers, ``""`` for none. truth: the right answers of each question, none for one without an answer.
    """
    pairs = [(text, gold) for text, gold in zip(texts, truth, strict=True)]
    kinds = {"": pairs}
    if any(truth) and not all(truth):
        kinds |= {"has_answer_": [p for p in pairs if p[1]], "no_answer_": [p for p in pairs if not p[1]]}
    return {
        prefix + name: 100 * float(np.mean([score(text, gold) for text, gold in chosen]))
        for prefix, chosen in kinds.items()
        for name, score in (("exact_match", exact_match), ("f1", token_f1))
    }


def exact_match(text: str, gold: Sequence[str]) -> float:
    """1 where ``text`` is one of the right answers after normalization, else 0."""
    return float(any(_words(text) == words for words in _golden(gold)))


def token_f1(text: str, gold: Sequence[str]) -> float:
    """The best F1 of the words of ``text`` and those of a right answer."""
    return max(_f1(_words(text), words) for words in _golden(gold))


def _golden(gold):
    """The words of the right answers; a question without any has the empty one."""
    return [words for words in map(_words, gold) if words] or [[]]


def _words(text):
    """Lower case, no punctuation, no articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(found, there):
    common = (Counter(found) & Counter(there)).total()
    if not found or not there:
        return float(found == there)
    return 2 * common / (len(found) + len(there))


def _text(found):
    """The best answer, the empty text for none."""
    return found.answers[0].answer if found.answers else ""


def _kind(question):
    """The question word, for the table by kind."""
    words = question.lower().replace("?", " ").split()
    return next((w for w in words if w in ("who", "what", "when", "where", "which", "why", "how")), "other")


def _is_squad(path):
    try:
        data = json.loads(read_text(path)).get("data")
    except (json.JSONDecodeError, AttributeError):
        return False
    return isinstance(data, list) and bool(data) and isinstance(data[0], dict) and "paragraphs" in data[0]
