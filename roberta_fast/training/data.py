"""Files of training data, read strictly: what is wrong in them is said with file, line and reason, before anything is trained."""

import csv
import io
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLES = (".csv", ".tsv", ".json", ".jsonl")


class DataError(ValueError):
    """What is wrong in a file, with its name and line."""


@dataclass(frozen=True)
class Table:
    """Rows of a file: values by column, and the line on which each row begins, for messages.

    where: what ``lines`` count: ``"line"``, or ``"item"`` of a json list.
    """

    path: str
    columns: dict[str, list]
    lines: Sequence[int]
    where: str = "line"

    def __len__(self) -> int:
        return len(self.lines)

    def error(self, row: int, reason: str) -> DataError:
        """An error in that row, to raise."""
        return DataError(f"{self.path}, {self.where} {self.lines[row]}: {reason}")

    def column(self, name: str) -> list:
        """The values of a column. Raises DataError naming the columns that there are."""
        if name not in self.columns:
            raise DataError(f"{self.path}: there is no column {name!r}; there are {', '.join(map(repr, self.columns))}")
        return self.columns[name]

    def first(self, count: int | None) -> "Table":
        """The first ``count`` rows, or all."""
        columns = {name: values[:count] for name, values in self.columns.items()}
        return Table(self.path, columns, self.lines[:count], self.where)


def split_table(table: Table, percentage: int) -> tuple[Table, Table]:
    """The table without ``percentage`` percent of its rows, drawn once and for all, and those rows."""
    if not 0 < percentage < 100:
        raise ValueError(f"validation_split_percentage={percentage} must lie between 1 and 99")
    order = list(range(len(table)))
    random.Random(0).shuffle(order)
    count = max(1, len(order) * percentage // 100)
    if count == len(order):
        raise DataError(f"{table.path}: {len(order)} rows cannot be split")
    return tuple(
        Table(
            table.path,
            {name: [values[i] for i in rows] for name, values in table.columns.items()},
            [table.lines[i] for i in rows],
            table.where,
        )
        for rows in (sorted(order[count:]), sorted(order[:count]))
    )


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises DataError for one that is not there, is empty or holds other bytes, with their line."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8: convert the file first (iconv -f ... -t utf-8)"
        ) from None
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    return text


def read_table(path: str | Path) -> Table:
    """The rows of a csv (quoted), tsv (GLUE's: not quoted), json (a list of objects, or one under ``data``) or jsonl file.

    Raises DataError for another ending, a row of another length than the header, an object without a field that the first one
    has, and what is no json.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in TABLES:
        raise DataError(f"{path}: a file of examples ends in {', '.join(TABLES)}")
    text = read_text(path)
    table = _delimited(path, text, suffix) if suffix in (".csv", ".tsv") else _objects(path, text, suffix)
    if not len(table):
        raise DataError(f"{path}: there are no rows")
    return table


def _delimited(path, text, suffix):
    dialect = {"delimiter": ","} if suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **dialect)
    rows, lines, before = [], [], 0
    try:
        for row in reader:
            if row:
                rows.append(row)
                lines.append(before + 1)
            before = reader.line_num
    except csv.Error as error:
        raise DataError(f"{path}, line {before + 1}: {error}") from None
    header, *rows = rows
    for row, line in zip(rows, lines[1:], strict=True):
        if len(row) != len(header):
            raise DataError(f"{path}, line {line}: {len(row)} fields, but the header has {len(header)}: {', '.join(header)}")
    if len(set(header)) != len(header):
        raise DataError(f"{path}, line 1: a column is named twice: {', '.join(header)}")
    return Table(str(path), {name: [row[i] for row in rows] for i, name in enumerate(header)}, lines[1:])


def _objects(path, text, suffix):
    if suffix == ".jsonl" or _is_lines(text):
        where, lines = "line", [number for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        objects = [_json(path, line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        where, loaded = "item", _json(path, text)
        objects = loaded.get("data") if isinstance(loaded, dict) else loaded
        if not isinstance(objects, list):
            raise DataError(f"{path}: expected a list of objects, or one under 'data'")
        lines = range(1, len(objects) + 1)
    names = list(objects[0]) if objects and isinstance(objects[0], dict) else []
    for number, entry in zip(lines, objects, strict=True):
        if not isinstance(entry, dict):
            raise DataError(f"{path}, {where} {number}: expected an object, got {entry!r:.60}")
        missing = [name for name in names if name not in entry]
        if missing:
            raise DataError(f"{path}, {where} {number}: there is no {', '.join(map(repr, missing))}")
    return Table(str(path), {name: [entry[name] for entry in objects] for name in names}, lines, where)


def _is_lines(text):
    """Whether a .json file holds an object a line, as Hugging Face's scripts take it."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(first), dict)
    except json.JSONDecodeError:
        return False


def _json(path, text, line=None) -> Any:
    place = f"{path}, line {line}" if line else str(path)
    try:
        loaded = json.loads(text, object_pairs_hook=_object)
        if "\\ud" in text.lower():
            json.dumps(loaded, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {line or error.lineno}: no json: {error.msg}") from None
    except KeyError as error:
        raise DataError(f"{place}: an object has {error} twice") from None
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: \\u{ord(error.object[error.start]):04x} is half of a character") from None
    return loaded


def _object(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return found


def read_conll(path: str | Path, token_column: int = 0, tag_column: int | None = -1) -> Table:
    """Sentences of a CoNLL file: one token a line, its columns divided by tabs or spaces, an empty line behind each sentence.

    Where a line has tabs, they alone divide it, and its token may be empty, as invisible characters have made it in real files.
    The columns ``tokens`` and ``tags`` hold lists, ``tags`` only where tag_column is not None; ``lines`` the line of each
    sentence's first token. Raises DataError at a line with more or fewer columns than the sentence's first one, as running text
    and tokens with a space have.
    """
    tokens, tags, lines = [], [], []
    ends = True
    for number, line in enumerate(_newlines(read_text(path)).split("\n"), 1):
        fields = line.rstrip("\r").split("\t") if "\t" in line else re.split(" +", line.strip("\r "))
        if fields in ([""], ["", ""]) or fields[0] == "-DOCSTART-":
            ends = True
            continue
        if len(fields) < 2 and tag_column is not None:
            raise DataError(f"{path}, line {number}: a token without a tag: {fields[0]!r}")
        if ends:
            width = len(fields)
            tokens.append([])
            tags.append([])
            lines.append(number)
        ends = False
        if len(fields) != width:
            raise DataError(
                f"{path}, line {number}: {len(fields)} columns, but the sentence begins with {width}: {line.strip()!r:.60}"
            )
        try:
            tokens[-1].append(fields[token_column])
            tags[-1].append(fields[tag_column] if tag_column is not None else None)
        except IndexError:
            reason = f"{len(fields)} columns, but column {token_column} or {tag_column} is asked for"
            raise DataError(f"{path}, line {number}: {reason}") from None
    if not lines:
        raise DataError(f"{path}: there is no sentence")
    columns = {"tokens": tokens} if tag_column is None else {"tokens": tokens, "tags": tags}
    return Table(str(path), columns, lines)


def read_squad(path: str | Path) -> Iterator[dict]:
    """The questions of a file in SQuAD's layout, 1.1 or 2.0: id, title, context, question and answers (text, answer_start).

    Raises DataError naming the question whose answer does not stand in its context at ``answer_start``, whose id is not its own,
    or that lacks a field.
    """
    loaded = _json(path, read_text(path))
    if not isinstance(loaded, dict) or not isinstance(loaded.get("data"), list):
        raise DataError(f"{path}: SQuAD's layout has a list under 'data'")
    seen, place = set(), "the first article"
    try:
        for article in loaded["data"]:
            place = f"article {article.get('title', '')!r}"
            for paragraph in article["paragraphs"]:
                context = paragraph["context"]
                for question in paragraph["qas"]:
                    place = f"question {question['id']!r}"
                    identity = str(question["id"])  # as predictions are written: 1 and "1" are the same
                    if identity in seen:
                        raise DataError(f"{path}, {place}: the id is there twice")
                    seen.add(identity)
                    if not isinstance(context, str) or not isinstance(question["question"], str):
                        raise DataError(f"{path}, {place}: context and question must be texts")
                    # SQuAD 2.0 lists plausible answers for what has none.
                    answers = [] if question.get("is_impossible") else question.get("answers", [])
                    for answer in answers:
                        check_answer(f"{path}, {place}", context, answer["text"], answer["answer_start"])
                    yield {
                        "id": identity,
                        "title": article.get("title", ""),
                        "context": context,
                        "question": question["question"],
                        "answers": {
                            "text": [answer["text"] for answer in answers],
                            "answer_start": [answer["answer_start"] for answer in answers],
                        },
                    }
    except (KeyError, TypeError, AttributeError) as error:
        missing = f"there is no {error}" if isinstance(error, KeyError) else "it is not of SQuAD's layout"
        raise DataError(f"{path}, {place}: {missing}") from None
    if not seen:
        raise DataError(f"{path}: there is no question")


def check_answer(place: str, context: str, text: str, start: int) -> None:
    """Raises DataError where ``context`` does not hold ``text`` at the character ``start``."""
    if not isinstance(text, str):
        raise DataError(f"{place}: the answer {text!r:.80} is no text")
    if not isinstance(start, int) or start < 0 or context[start : start + len(text)] != text or not text:
        found = context[start : start + len(text)] if isinstance(start, int) and start >= 0 else ""
        raise DataError(
            f"{place}: the answer {text!r:.80} is not in its context at answer_start {start}, where {found!r:.80} stands"
        )


def read_lines(path: str | Path) -> Table:
    """The lines of a text file that are not empty, as the column ``text``."""
    kept = [(number, line) for number, line in enumerate(_lines(path), 1) if line.strip()]
    return Table(str(path), {"text": [line for _, line in kept]}, [number for number, _ in kept])


def _lines(path):
    return _newlines(read_text(path)).rstrip("\n").split("\n")


def _newlines(text):
    """Lines that end in CR LF, or all of them in CR, as lines; a CR inside of a line is left as it is."""
    text = text.replace("\r\n", "\n")
    return text if "\n" in text else text.replace("\r", "\n")


def read_parallel(source: str | Path, target: str | Path) -> Table:
    """Two files with a sentence a line that belong together, as the columns ``source`` and ``target``.

    Raises DataError where one has more lines than the other, or a line is empty.
    """
    sides = [_lines(path) for path in (source, target)]
    if len(sides[0]) != len(sides[1]):
        raise DataError(f"{source} has {len(sides[0])} lines, but {target} has {len(sides[1])}: they must be translations")
    for path, side in zip((source, target), sides, strict=True):
        for number, line in enumerate(side, 1):
            if not line.strip():
                raise DataError(f"{path}, line {number}: the line is empty")
    return Table(str(source), {"source": sides[0], "target": sides[1]}, range(1, len(sides[0]) + 1))


def load_hub(name: str, config: str | None, split: str) -> Table | None:
    """A split of a data set of the library ``datasets``, or None where it has no such split.

    name: on the Hub, a folder of csv, json or parquet files, or one that ``save_to_disk`` wrote; a single split is ``"train"``.
    Raises DataError where it cannot be loaded.
    """
    import datasets

    try:
        if any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(name)
            splits = saved if isinstance(saved, dict) else {"train": saved}
            loaded = splits.get(split)
        else:
            found = datasets.get_dataset_split_names(name, config)
            loaded = datasets.load_dataset(name, config, split=split) if split in found else None
    except (OSError, ValueError) as error:
        raise DataError(f"data set {name!r}: {error}") from None
    if loaded is None:
        return None
    columns = {column: list(loaded[column]) for column in loaded.column_names}
    for column, feature in loaded.features.items():
        inner = getattr(feature, "feature", None)
        if isinstance(feature, datasets.ClassLabel):
            columns[column] = [None if value < 0 else feature.int2str(value) for value in columns[column]]
        elif isinstance(inner, datasets.ClassLabel):
            columns[column] = [[inner.int2str(value) for value in values] for values in columns[column]]
    return Table(f"{name}[{split}]", columns, range(1, len(loaded) + 1), "row")
