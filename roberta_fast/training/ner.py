"""Fine-tuning on tokens with a tag each: named entities in any of the usual tag schemes, or plain tags like parts of speech."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import AutoModelForTokenClassification, AutoTokenizer, DataCollatorForTokenClassification, PreTrainedModel
from transformers.trainer_utils import EvalPrediction, PredictionOutput

from roberta_fast.tasks.token_classification import spans_of
from roberta_fast.training import report
from roberta_fast.training.arguments import NerArguments
from roberta_fast.training.data import TABLES, DataError, Table, read_conll, read_table
from roberta_fast.training.fine_tuning import FineTuning
from roberta_fast.training.token_dropout import KEPT

TOKEN_COLUMNS, TAG_COLUMNS = ("tokens", "words"), ("ner_tags", "tags", "labels", "pos_tags")
_ENTITY_TAG = re.compile(r"O|[BIESLU]-.+", re.DOTALL)
IGNORED = -100
WORST = 50


class Ner(FineTuning):
    """``roberta-fast finetune ner``. Entities are trained as BIO (IOB2), whatever scheme the files have."""

    name = "ner"
    pipeline_tag = "token-classification"
    lora_task_type = "TOKEN_CLS"
    data_class = NerArguments
    metric = "f1"

    def read(self, path: str, split: str) -> Table:
        if Path(path).suffix.lower() in TABLES:
            return read_table(path)
        return read_conll(path, tag_column=None if split == "test" and not _has_tags(path) else -1)

    def prepare(self) -> None:
        self.check_length(self.data_args.max_seq_length, "max_seq_length")
        given = self.data_args
        first = next(iter(self.tables.values()))
        self.token_column = given.text_column_name or next((c for c in TOKEN_COLUMNS if c in first.columns), TOKEN_COLUMNS[0])
        self.tag_column = given.label_column_name or next((c for c in TAG_COLUMNS if c in first.columns), TAG_COLUMNS[0])
        self.tagged = {s: t for s, t in self.tables.items() if s != "test" or (self.score_test and self.tag_column in t.columns)}
        for table in self.tables.values():
            self._check_tokens(table)
        for table in self.tagged.values():
            self._check_tags(table)
        for split in self.tables.keys() - self.tagged.keys():
            self._refuse_running_text(self.tables[split])
        found = {tag for table in self.tagged.values() for tags in table.column(self.tag_column) for tag in tags}
        prefixed = set(filter(_ENTITY_TAG.fullmatch, found))
        self.has_entities = found == prefixed
        reason = "the tag {!r} is neither O nor B-TYPE or I-TYPE, as others are"
        if "O" in found and len(found) / 2 < len(prefixed) < len(found):
            self._refuse_tags(found - prefixed, reason)
        small = {tag for tag in found - prefixed if _ENTITY_TAG.fullmatch(tag[:2].upper() + tag[2:])}
        if small and found == prefixed | small and {"O", "o"} & found:  # among other plain tags one may look so
            self._refuse_tags(small, "the tag {!r} begins in lower case: entities are B-TYPE, I-TYPE and O")
        self._decide_labels()
        self.tags = {split: self._ids_of(table) for split, table in self.tagged.items()}
        self.windows = {}

    def _refuse_tags(self, odd, reason):
        for table in self.tagged.values():
            for row, tags in enumerate(table.column(self.tag_column)):
                for place, tag in enumerate(tags):
                    if tag in odd:
                        raise self._error(table, row, place, reason.format(tag))

    def _refuse_running_text(self, table):
        """Raises DataError where the last words of lines would be taken for their tags."""
        last = {tag for tags in table.columns.get(self.tag_column, []) for tag in tags}
        labels = set(self.config.id2label.values())
        if (
            Path(table.path).suffix.lower() not in TABLES
            and last
            and not any(_ENTITY_TAG.fullmatch(t) or t in labels for t in last)
        ):
            raise self._error(table, 0, 0, f"{table.columns[self.tag_column][0][0]!r} is no tag: one token a line is expected")

    def _check_tokens(self, table):
        for row, tokens in enumerate(table.column(self.token_column)):
            if not isinstance(tokens, (list, tuple)) or not all(isinstance(token, str) for token in tokens) or not tokens:
                raise table.error(row, f"{self.token_column} is no list of tokens: {tokens!r:.60}")

    def _check_tags(self, table):
        columns = table.column(self.token_column), table.column(self.tag_column)
        for row, (tokens, tags) in enumerate(zip(*columns, strict=True)):
            if not isinstance(tags, (list, tuple)) or len(tags) != len(tokens):
                count = len(tags) if isinstance(tags, (list, tuple)) else repr(tags)
                raise table.error(row, f"{len(tokens)} {self.token_column}, but {self.tag_column} has {count}")
            for place, tag in enumerate(tags):
                if not isinstance(tag, str) or not tag:
                    raise self._error(table, row, place, f"the tag {tag!r} is no text")

    def _decide_labels(self):
        trained = [a for a in self.config.architectures or () if a.endswith("ForTokenClassification")]
        kept = [self.config.id2label[i] for i in range(self.config.num_labels)] if trained else []
        if "train" not in self.tables:
            if not trained:
                path = self.model_args.model_name_or_path
                raise ValueError(f"model_name_or_path={path!r} has no token classification head yet: train_file is needed")
            self.labels = kept
            self.has_entities = all(map(_ENTITY_TAG.fullmatch, kept))
            return
        tags = {tag for row in self.tables["train"].column(self.tag_column) for tag in row}
        if self.has_entities:
            # Both tags of a type, so that a scheme which hardly writes one of them, as IOB1 does B, loses nothing.
            types = sorted({tag.partition("-")[2] for tag in tags} - {""})
            wanted = ["O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI")]
        else:
            wanted = sorted(tags)
        self.labels = kept if set(wanted) <= set(kept) else wanted
        if kept and self.labels != kept:
            self.tell_of_new_head(kept, self.tables["train"])
        if len(self.labels) < 2:
            raise DataError(f"{self.tables['train'].path}: {self.tag_column} has one value only: {self.labels[0]!r}")
        self.config.num_labels = len(self.labels)
        self.config.id2label = dict(enumerate(self.labels))
        self.config.label2id = {label: index for index, label in enumerate(self.labels)}

    def _ids_of(self, table):
        """The label of each token of each row."""
        index = {label: i for i, label in enumerate(self.labels)}
        rows = []
        for row, tags in enumerate(table.column(self.tag_column)):
            tags = as_bio(tags) if self.has_entities else tags
            for place, tag in enumerate(tags):
                if tag not in index:
                    outside = "is none of the head's labels" if "train" not in self.tables else "is in no training example"
                    raise self._error(table, row, place, f"the tag {tag!r} {outside}: {', '.join(self.labels[:20])}")
            rows.append([index[tag] for tag in tags])
        return rows

    def _error(self, table, row, place, reason):
        """In a CoNLL file each token has its line."""
        if Path(table.path).suffix.lower() in TABLES or table.where != "line":
            return table.error(row, f"token {place + 1}: {reason}")
        return DataError(f"{table.path}, line {table.lines[row] + place}: {reason}")

    def load_tokenizer(self):
        given = self.model_args
        name = given.tokenizer_name or given.model_name_or_path or given.config_name
        tokenizer = AutoTokenizer.from_pretrained(name, **self._where())
        if not tokenizer.is_fast:
            raise ValueError(f"tokenizer_name={name!r}: a slow tokenizer does not say which word a piece belongs to")
        # Byte-level BPE tells words by the space before them.
        return (
            AutoTokenizer.from_pretrained(name, add_prefix_space=True, **self._where())
            if _is_byte_level(tokenizer)
            else tokenizer
        )

    def build_model(self) -> PreTrainedModel:
        return self.load_model(AutoModelForTokenClassification, ignore_mismatched_sizes="train" in self.tables)

    def encode(self, table: Table):
        """A long sentence is cut into windows, none of whose tokens is lost."""
        from datasets import Dataset

        encoded = self.tokenizer(
            [list(map(_visible, tokens)) for tokens in table.column(self.token_column)],
            is_split_into_words=True,
            truncation=True,
            max_length=self.data_args.max_seq_length,
            return_overflowing_tokens=True,
            verbose=False,
        )
        rows = encoded.pop("overflow_to_sample_mapping", range(len(table)))
        split = next(name for name, other in self.tables.items() if other is table)
        windows, labels, before = [], [], None
        for window, row in enumerate(rows):
            words = encoded.word_ids(window)
            pieces, ids = [], [IGNORED] * len(words)
            for place, word in enumerate(words):
                if word is None:
                    continue
                is_first = (row, word) != before
                before = (row, word)
                if is_first:
                    pieces.append((place, word))
                if split in self.tags and (is_first or self.data_args.label_all_tokens):
                    ids[place] = self.tags[split][row][word] if is_first else self._inside(self.tags[split][row][word])
            windows.append((row, pieces))
            labels.append(ids)
        # A window inside of one long word has no label: a batch of such ones alone would have no loss.
        kept = [i for i, ids in enumerate(labels) if any(label != IGNORED for label in ids)] or range(len(labels))
        kept = kept if split in self.tags else range(len(labels))
        self.windows[split] = [windows[i] for i in kept]
        columns = {**encoded, **({"labels": labels} if split in self.tags else {})}
        return Dataset.from_dict({name: [values[i] for i in kept] for name, values in columns.items()})

    def _inside(self, label):
        """The label of a word's further pieces."""
        name = self.labels[label]
        return self.labels.index(f"I-{name[2:]}") if self.has_entities and name.startswith("B-") else label

    def dropout_units(self, encoded) -> list[list[int]]:
        """Whole words: whose first piece is hidden has its label from what stands around it."""
        rows = []
        for units, (_, pieces) in zip(super().dropout_units(encoded), self.windows["train"], strict=True):
            first = {place for place, _ in pieces}
            for place in range(1, len(units)):
                # A window may begin inside a word.
                if units[place] != KEPT and place not in first and units[place - 1] != KEPT:
                    units[place] = units[place - 1]
            rows.append(units)
        return rows

    def collator(self, model: PreTrainedModel):
        return DataCollatorForTokenClassification(self.tokenizer)

    def trainer_options(self) -> dict:
        return {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}

    def _predicted(self, predictions, table):
        """The tag of each token; a token without pieces, as invisible characters are, has the one outside of entities."""
        split = next(name for name, other in self.tables.items() if other is table)
        outside = "O" if "O" in self.labels else self.labels[0]
        tags = [[outside] * len(tokens) for tokens in table.column(self.token_column)]
        for (row, pieces), predicted in zip(self.windows[split], predictions, strict=True):
            for place, word in pieces:
                tags[row][word] = self.labels[predicted[place]]
        return tags

    def _true(self, table):
        split = next(name for name, other in self.tables.items() if other is table)
        return [[self.labels[i] for i in row] for row in self.tags[split]]

    def metrics_of(self, prediction: EvalPrediction, table: Table) -> dict[str, float]:
        truth, predicted = self._true(table), self._predicted(prediction.predictions, table)
        pairs = [(a, b) for t, p in zip(truth, predicted, strict=True) for a, b in zip(t, p, strict=True)]
        accuracy = {"accuracy": sum(a == b for a, b in pairs) / len(pairs)}
        if self.has_entities:
            overall = entity_scores(truth, predicted)["overall"]
            return {name: overall[name] for name in ("precision", "recall", "f1")} | accuracy
        from sklearn.metrics import f1_score

        return {"f1": float(f1_score(*zip(*pairs, strict=True), average="macro", zero_division=0))} | accuracy

    def measured(self) -> list[str]:
        return ["precision", "recall", "f1", "accuracy"] if self.has_entities else ["f1", "accuracy"]

    def write_report(self, folder: Path, output: PredictionOutput, table: Table) -> None:
        from sklearn.metrics import confusion_matrix

        truth, predicted = self._true(table), self._predicted(output.predictions, table)
        flat = [[tag for row in rows for tag in row] for rows in (truth, predicted)]
        if self.has_entities:
            scores = entity_scores(truth, predicted)
            rows = [(kind, s["precision"], s["recall"], s["f1"], s["support"]) for kind, s in scores.items()]
            report.write_text(folder / "report.txt", report.text_table(("type", "precision", "recall", "f1", "entities"), rows))
            # Types by token say more than tags that differ in where an entity begins.
            flat = [[tag.partition("-")[2] or tag for tag in tags] for tags in flat]
        names = sorted({*flat[0], *flat[1]})
        report.plot_matrix(confusion_matrix(*flat, labels=names), names, folder / "confusion_matrix.png", "tokens")
        wrong = sorted(range(len(truth)), key=lambda i: -sum(a != b for a, b in zip(truth[i], predicted[i], strict=True)))
        lines = []
        for row in wrong[:WORST]:
            tokens = table.column(self.token_column)[row]
            marks = [
                f"{token} [{a}, predicted {b}]" if a != b else token
                for token, a, b in zip(tokens, truth[row], predicted[row], strict=True)
            ]
            if truth[row] != predicted[row]:
                lines.append(f"{table.where} {table.lines[row]}: {' '.join(marks)}")
        report.write_text(folder / "mistakes.txt", "\n".join(lines) + "\n" if lines else "no mistakes\n")

    def predictions_of(self, output: PredictionOutput, table: Table) -> Iterator[dict]:
        for tokens, tags in zip(table.column(self.token_column), self._predicted(output.predictions, table), strict=True):
            row = {"tokens": list(tokens), "tags": tags}
            if self.has_entities:
                row["entities"] = [
                    {"label": s.label, "begin": s.begin, "end": s.end, "words": list(tokens[s.begin : s.end])}
                    for s in spans_of(tags)
                ]
            yield row


def as_bio(tags: Sequence[str]) -> list[str]:
    """The same entities in BIO (IOB2): each begins with ``B-`` and goes on with ``I-``."""
    bio = ["O"] * len(tags)
    for span in spans_of(tags):
        bio[span.begin : span.end] = [f"B-{span.label}", *[f"I-{span.label}"] * (span.end - span.begin - 1)]
    return bio


def entity_scores(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, dict[str, float]]:
    """Precision, recall and F1 of whole entities, by type and ``"overall"`` (micro average), as seqeval and conlleval count them.

    truth, predicted: tags of each sentence. support: the true entities of a type.
    """
    right, found, there = Counter(), Counter(), Counter()
    for true_tags, predicted_tags in zip(truth, predicted, strict=True):
        true_spans, predicted_spans = set(spans_of(true_tags)), set(spans_of(predicted_tags))
        for counter, spans in ((right, true_spans & predicted_spans), (found, predicted_spans), (there, true_spans)):
            counter.update(span.label for span in spans)
    rows = {kind: (right[kind], found[kind], there[kind]) for kind in sorted(found.keys() | there.keys())}
    rows["overall"] = (right.total(), found.total(), there.total())
    return {kind: _scores(*counts) for kind, counts in rows.items()}


def _scores(right, found, there):
    precision, recall = right / found if found else 0.0, right / there if there else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "support": there}


def _has_tags(path):
    """Whether the first token of a CoNLL file has a second column."""
    from roberta_fast.training.data import read_text

    first = next(line for line in read_text(path).split("\n") if line.strip())
    return len(first.split()) > 1


def _is_byte_level(tokenizer):
    pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    return "ByteLevel" in repr(pre_tokenizer)


def _visible(token):
    """A word's text; some tokenizers fail on an empty one."""
    return token or " "
