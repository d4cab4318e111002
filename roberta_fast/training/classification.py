"""Fine-tuning on texts or pairs of texts: one label, several labels, or a number (the forms of GLUE)."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedModel
from transformers.trainer_utils import EvalPrediction, PredictionOutput

from roberta_fast.training import report
from roberta_fast.training.arguments import ClassificationArguments, require_extra
from roberta_fast.training.data import DataError, Table, read_lines, read_table
from roberta_fast.training.fine_tuning import FineTuning

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
# The text columns of GLUE's tasks and of data sets like them.
TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("sentence",),
    ("text",),
    ("review",),
)
LABEL_COLUMNS = ("label", "labels")
_MISSING = ("nan", "na", "n/a", "null", "none", "inf", "-inf")
WORST = 50


class Classification(FineTuning):
    """``roberta-fast finetune classification``."""

    name = "classification"
    pipeline_tag = "text-classification"
    lora_task_type = "SEQ_CLS"
    data_class = ClassificationArguments
    metric = "accuracy"

    def read(self, path: str, split: str) -> Table:
        if split == "test" and Path(path).suffix.lower() == ".txt":
            lines = read_lines(path)
            return Table(path, {self.data_args.text_column_names or "text": lines.column("text")}, lines.lines)
        return read_table(path)

    def prepare(self) -> None:
        self.check_length(self.data_args.max_seq_length, "max_seq_length")
        if self.data_args.jieba:
            require_extra("jieba")
        first = next(iter(self.tables.values()))
        self.text_columns = self._text_columns(first)
        given = self.data_args.label_column_name
        self.label_column = given or next((name for name in LABEL_COLUMNS if name in first.columns), "label")
        for split, table in self.tables.items():
            for column in self.text_columns:
                for row, text in enumerate(table.column(column)):
                    if text is None or (isinstance(text, str) and not text.strip()):
                        raise table.error(row, f"{column} is empty")
                    if not isinstance(text, str):
                        raise table.error(row, f"{column} {text!r:.60} is no text")
            if split != "test":
                table.column(self.label_column)
        if self.label_column in self.text_columns:
            raise ValueError(f"text_column_names: {self.label_column!r} is the column with the label")
        self._decide_labels()
        self.smooths_labels = self.problem_type == SINGLE
        self.targets = {split: self._targets(table) for split, table in self.tables.items() if self._is_labelled(split, table)}
        self.metric = {SINGLE: "accuracy", MULTI: "f1_micro", REGRESSION: "pearson"}[self.problem_type]
        self.class_weights = self._class_weights() if self.data_args.class_weights and "train" in self.targets else None

    def _is_labelled(self, split, table):
        if split != "test":
            return True
        given = [value not in (None, "") for value in table.columns.get(self.label_column, [None])]
        return self.score_test and (any(given) if self.problem_type == MULTI else all(given))

    def remembered(self) -> dict:
        return {**super().remembered(), "text_columns": len(self.text_columns)}

    def _text_columns(self, table):
        number = self.data_args.text_columns
        if self.data_args.text_column_names:
            columns = tuple(name.strip() for name in self.data_args.text_column_names.split(","))
            if len(columns) not in ((number,) if number else (1, 2)):
                wanted = {None: "one column or two", 1: "one column", 2: "two columns"}[number]
                raise ValueError(f"text_column_names={self.data_args.text_column_names!r} must name {wanted}")
            for column in columns:
                table.column(column)
            return columns
        known = (columns for columns in TEXT_COLUMNS if number in (None, len(columns)))
        found = next((columns for columns in known if all(c in table.columns for c in columns)), None)
        if found is None:
            what = "columns hold the pair of texts that the model reads" if number == 2 else "columns holds the text"
            raise DataError(f"{table.path}: text_column_names must say which of its {what}: {', '.join(table.columns)}")
        return found

    def _decide_labels(self):
        """The kind of problem, and the labels in order: the trained head's where it has them all, else the training data's."""
        trained = [a for a in self.config.architectures or () if a.endswith("ForSequenceClassification")]
        learned = self.tables.get("train")
        if learned is None:
            if not trained:
                path = self.model_args.model_name_or_path
                raise ValueError(f"model_name_or_path={path!r} has no classification head yet: train_file is needed")
            self.problem_type = self.config.problem_type or (REGRESSION if self.config.num_labels == 1 else SINGLE)
            self.labels = [self.config.id2label[i] for i in range(self.config.num_labels)]
            return
        values = learned.column(self.label_column)
        may_be_empty = self.data_args.problem_type == MULTI
        for row, value in enumerate(values):
            if value is None or (isinstance(value, str) and not value.strip() and not may_be_empty):
                raise learned.error(row, f"{self.label_column} is empty")
        self.problem_type = self.data_args.problem_type or _kind(values)
        if self.problem_type == SINGLE and not self.data_args.problem_type:
            self._refuse_odd_number(learned, values)
        if self.problem_type == REGRESSION:
            self.labels = ["value"]
        else:
            seen = {label for value in values for label in self._names(value)}
            kept = [self.config.id2label[i] for i in range(self.config.num_labels)] if trained else []
            self.labels = kept if seen <= set(kept) else sorted(seen, key=_natural)
            if kept and self.labels != kept:
                self.tell_of_new_head(kept, learned)
            if not self.labels:
                raise DataError(f"{learned.path}: there is no label in {self.label_column}")
            if len(self.labels) < 2 and self.problem_type == SINGLE:
                raise DataError(f"{learned.path}: {self.label_column} has one value only: {self.labels[0]!r}")
        self.config.num_labels = len(self.labels)
        self.config.id2label = dict(enumerate(self.labels))
        self.config.label2id = {label: index for index, label in enumerate(self.labels)}
        self.config.problem_type = self.problem_type

    def _names(self, value):
        """The labels of one row as text."""
        if self.problem_type == SINGLE:
            return [_text(value)]
        if isinstance(value, (list, tuple)):
            return [_text(label) for label in value]
        if not self.data_args.label_separator:
            raise ValueError("label_separator='' divides nothing")
        return [label.strip() for label in str(value).split(self.data_args.label_separator) if label.strip()]

    def _targets(self, table):
        """What the loss takes, a row: the label's index, 0 and 1 for each label, or the number."""
        index = {label: i for i, label in enumerate(self.labels)}
        targets = []
        for row, value in enumerate(table.column(self.label_column)):
            if self.problem_type == REGRESSION:
                targets.append(_number(table, row, self.label_column, value))
                continue
            if self.problem_type == SINGLE and isinstance(value, (list, dict)):
                raise table.error(row, f"{self.label_column} {value!r} is not one label, as others are")
            names = self._names(value)
            unknown = [name for name in names if name not in index]
            if unknown:
                outside = "is none of the head's labels" if "train" not in self.tables else "is in no training example"
                known = ", ".join(self.labels[:20]) + (", ..." if len(self.labels) > 20 else "")
                raise table.error(row, f"{self.label_column} {unknown[0]!r} {outside}: {known}")
            chosen = [index[name] for name in names]
            targets.append(chosen[0] if self.problem_type == SINGLE else [float(i in chosen) for i in range(len(self.labels))])
        return targets

    def _refuse_odd_number(self, table, values):
        """Raises DataError at the one label of ten or more that is no number where the others are, with decimal points.

        One that says by its name that a number is missing, as tables write it, is odd among any number of them.
        """
        numbers = [isinstance(value, str) and _is_number(value) for value in values]
        odd = [row for row, is_number in enumerate(numbers) if not is_number]
        is_missing = all(str(values[row]).strip().lower() in _MISSING for row in odd)
        if (
            odd
            and (is_missing or 10 * len(odd) <= len(values))
            and any("." in value for value in values if isinstance(value, str))
        ):
            reason = f"{self.label_column} {values[odd[0]]!r} is no number, as the others are; --problem_type says what they are"
            raise table.error(odd[0], reason)

    def build_model(self) -> PreTrainedModel:
        # A head for other labels begins anew.
        return self.load_model(AutoModelForSequenceClassification, ignore_mismatched_sizes="train" in self.tables)

    def encode(self, table: Table):
        from datasets import Dataset

        texts = [self._cut(table.column(column)) for column in self.text_columns]
        encoded = dict(self.tokenizer(*texts, truncation=True, max_length=self.data_args.max_seq_length))
        split = next(name for name, other in self.tables.items() if other is table)
        if split in self.targets:
            encoded["labels"] = self.targets[split]
        return Dataset.from_dict(encoded)

    def _cut(self, texts):
        if not self.data_args.jieba:
            return texts
        import jieba

        jieba.setLogLevel("WARNING")
        return [" ".join(jieba.cut(text)) for text in texts]

    def collator(self, model: PreTrainedModel):
        return DataCollatorWithPadding(self.tokenizer)

    def trainer_options(self) -> dict:
        return {"class_weights": self.class_weights} if self.class_weights else {}

    def _class_weights(self):
        given = self.data_args.class_weights
        if self.problem_type != SINGLE:
            raise ValueError(f"class_weights={given!r} are for one label a text, not for {self.problem_type}")
        if given == "balanced":
            counts = np.bincount(self.targets["train"], minlength=len(self.labels))
            return (counts.sum() / (len(counts) * np.maximum(counts, 1))).tolist()
        try:
            weights = [float(weight) for weight in given.split(",")]
        except ValueError:
            raise ValueError(f"class_weights={given!r} must be 'balanced' or numbers with commas between them") from None
        if len(weights) != len(self.labels):
            raise ValueError(f"class_weights={given!r} has {len(weights)} weights, but there are {len(self.labels)} labels")
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise ValueError(f"class_weights={given!r} must be finite, none below 0, and not all 0")
        return weights

    def metrics_of(self, prediction: EvalPrediction, table: Table) -> dict[str, float]:
        logits, targets = _logits(prediction.predictions), np.asarray(prediction.label_ids)
        return classification_metrics(logits, targets, self.problem_type)

    def measured(self) -> list[str]:
        targets = np.asarray(self.targets["validation"])
        return list(classification_metrics(np.zeros((len(targets), len(self.labels))), targets, self.problem_type))

    def write_report(self, folder: Path, output: PredictionOutput, table: Table) -> None:
        logits, targets = _logits(output.predictions), np.asarray(output.label_ids)
        if self.problem_type == REGRESSION:
            worst = np.argsort(-np.abs(logits[:, 0] - targets))[:WORST]
            lines = [f"{targets[i]:g}, predicted {logits[i, 0]:.3f}" for i in worst]
        elif self.problem_type == SINGLE:
            probabilities = _softmax(logits)
            chosen = logits.argmax(-1)
            self._write_confusion(folder, targets, chosen)
            loss = -np.log(np.maximum(probabilities[np.arange(len(targets)), targets], 1e-12))
            worst = [i for i in np.argsort(-loss) if chosen[i] != targets[i]][:WORST]
            lines = [
                f"{self.labels[targets[i]]}, predicted {self.labels[chosen[i]]} ({probabilities[i, chosen[i]]:.3f})"
                for i in worst
            ]
        else:
            probabilities = _sigmoid(logits)
            self._write_per_label(folder, targets > 0.5, logits > 0)
            distance = np.abs(probabilities - targets)
            worst = [i for i in np.argsort(-distance.max(-1)) if ((logits[i] > 0) != (targets[i] > 0.5)).any()][:WORST]
            lines = [f"{_named(self.labels, targets[i] > 0.5)}, predicted {_named(self.labels, logits[i] > 0)}" for i in worst]
        texts = [[table.column(column)[i] for column in self.text_columns] for i in worst]
        entries = [
            f"{table.where} {table.lines[i]}: {line}\n    " + "\n    ".join(text)
            for i, line, text in zip(worst, lines, texts, strict=True)
        ]
        report.write_text(folder / "mistakes.txt", "\n".join(entries) + "\n" if entries else "no mistakes\n")

    def _write_confusion(self, folder, targets, chosen):
        from sklearn.metrics import confusion_matrix

        matrix = confusion_matrix(targets, chosen, labels=range(len(self.labels)))
        self._write_per_label(folder, *(np.eye(len(self.labels), dtype=bool)[rows] for rows in (targets, chosen)), matrix)
        report.plot_matrix(matrix, self.labels, folder / "confusion_matrix.png")

    def _write_per_label(self, folder, targets, chosen, matrix=None):
        from sklearn.metrics import precision_recall_fscore_support

        scores = precision_recall_fscore_support(targets, chosen, average=None, zero_division=0)
        rows = [(label, *(score[i] for score in scores)) for i, label in enumerate(self.labels)]
        text = report.text_table(("label", "precision", "recall", "f1", "examples"), rows)
        if matrix is not None:
            rows = [(label, *counts) for label, counts in zip(self.labels, matrix.tolist(), strict=True)]
            text += "\n" + report.text_table(("true \\ predicted", *self.labels), rows)
        report.write_text(folder / "report.txt", text)

    def predictions_of(self, output: PredictionOutput, table: Table) -> Iterator[dict]:
        logits = _logits(output.predictions)
        for row in range(len(table)):
            example = {column: table.column(column)[row] for column in self.text_columns}
            if self.problem_type == REGRESSION:
                yield {**example, "value": float(logits[row, 0])}
            elif self.problem_type == SINGLE:
                probabilities = _softmax(logits[row])
                best = int(probabilities.argmax())
                yield {**example, "label": self.labels[best], "score": float(probabilities[best])}
            else:
                probabilities = _sigmoid(logits[row])
                names = {label: float(p) for label, p in zip(self.labels, probabilities, strict=True) if p > 0.5}
                yield {**example, "labels": list(names), "scores": list(names.values())}


def classification_metrics(logits: np.ndarray, targets: np.ndarray, problem_type: str) -> dict[str, float]:
    """The metrics of ``logits`` [texts, labels]. Precision, recall and F1 are of label 1 where there are two, else their means.

    targets: indices [texts]; 0 and 1 [texts, labels] for several labels; numbers [texts] for a regression.
    """
    from scipy import stats
    from sklearn import metrics

    if problem_type == REGRESSION:
        values = logits.reshape(-1)
        is_flat = len(values) < 2 or np.ptp(values) == 0 or np.ptp(targets) == 0
        return {
            "pearson": 0.0 if is_flat else float(stats.pearsonr(values, targets)[0]),
            "spearman": 0.0 if is_flat else float(stats.spearmanr(values, targets)[0]),
            "mse": float(np.mean((values - targets) ** 2)),
            "mae": float(np.mean(np.abs(values - targets))),
        }
    if problem_type == MULTI:
        chosen, truth = logits > 0, targets > 0.5
        found = {"accuracy": float((chosen == truth).all(-1).mean())}
        for average in ("micro", "macro"):
            scores = metrics.precision_recall_fscore_support(truth, chosen, average=average, zero_division=0)
            found |= {f"{n}_{average}": float(s) for n, s in zip(("precision", "recall", "f1"), scores, strict=False)}
        return found
    chosen, labels = logits.argmax(-1), range(logits.shape[-1])
    binary = {"average": "binary", "pos_label": 1} if len(labels) == 2 else {"average": "macro", "labels": list(labels)}
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(targets, chosen, zero_division=0, **binary)
    return {
        "accuracy": float((chosen == targets).mean()),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "mcc": float(metrics.matthews_corrcoef(targets, chosen)),
    }


def _kind(values):
    """What the labels of a file say of the problem."""
    if all(isinstance(value, (list, tuple)) for value in values):
        return MULTI
    if any(isinstance(v, float) and not v.is_integer() for v in values):
        return REGRESSION
    texts = [value for value in values if isinstance(value, str)]
    is_decimal = len(texts) == len(values) and all(_is_number(t) for t in texts) and any("." in t for t in texts)
    return REGRESSION if is_decimal else SINGLE


def _is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _number(table, row, column, value):
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise table.error(row, f"{column} {value!r} is no number")
    return number


def _text(value):
    """A label as text, without spaces around it: 1.0, as tables of numbers have it, is 1."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _natural(label):
    """Numbers in their order, before names."""
    return (0, float(label), label) if _is_number(label) else (1, 0.0, label)


def _logits(predictions):
    """Logits [texts, labels]; some models return more than them."""
    return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)


def _softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


def _named(labels, chosen):
    return " ".join(label for label, is_in in zip(labels, chosen, strict=True) if is_in) or "none"
