"""Documents from text, jsonl and parquet files, and data sets by name; what is damaged in them is told, and not fatal.

A document is a list of lines without white space around them, none of them empty. In text files documents are separated by
blank lines (or each line is one); in the others a document is the text of a row, and its lines are the text's.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SEPARATORS = ("blank_line", "line")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


class Damage(NamedTuple):
    """What could not be read: the file or data set, the line or row, counted from 1, and why."""

    source: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.source}, line {self.line}: {self.reason}"


class Document(NamedTuple):
    """One document: its lines, and the bytes that these are in UTF-8."""

    lines: list[str]
    bytes: int

    @classmethod
    def of(cls, lines: Iterable[str]) -> "Document | None":
        """The document of these lines, or None where nothing is left of them."""
        lines = [stripped for line in lines if (stripped := line.strip())]
        return cls(lines, sum(len(line.encode()) for line in lines)) if lines else None

    def share(self, seed: int) -> float:
        """A number in [0, 1) that follows (seed, text) alone: equal documents have the same, wherever they stand."""
        digest = hashlib.blake2b("\n".join(self.lines).encode(), digest_size=8, key=str(seed).encode())
        return int.from_bytes(digest.digest(), "big") / 2**64


def read_file(path: Path, separator: str, text_column: str) -> Iterator[Document | Damage]:
    """The documents of a file, by its ending: ``.parquet``; ``.jsonl``, ``.json``; anything else is text. ``.gz`` is unpacked.

    Raises ValueError naming the file where it is no parquet file, or has no such column.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    if kind == ".parquet":
        yield from _read_parquet(path, text_column)
    elif kind in JSON_SUFFIXES:
        yield from _read_jsonl(path, text_column)
    else:
        yield from _read_text(path, separator)


def read_dataset(name: str, config: str | None, split: str, text_column: str) -> Iterator[Document | Damage]:
    """The documents of a data set of the library ``datasets``. Raises ValueError where it cannot be had or lacks the column."""
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
    except (OSError, ValueError, ConnectionError) as error:
        raise ValueError(f"--dataset_name {name}: {error}") from error
    for number, row in enumerate(rows, 1):
        yield from _row(row, f"{name}[{split}]", number, text_column)


def _lines(path):
    """(number, line or Damage) of a file, decoded."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    number = 0
    with opened(path, "rb") as file:
        try:
            for number, line in enumerate(file, 1):
                try:
                    # A byte order mark belongs to no line.
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    yield (
                        number,
                        Damage(str(path), number, f"no UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}"),
                    )
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            yield number + 1, Damage(str(path), number + 1, f"the compressed file ends here: {error}")


def _read_text(path, separator):
    lines = []
    for _, line in _lines(path):
        if isinstance(line, Damage):
            yield line
            continue
        if line.strip():
            lines.append(line)
        if lines and (separator == "line" or not line.strip()):
            yield Document.of(lines)
            lines = []
    if lines:
        yield Document.of(lines)


def _read_jsonl(path, text_column):
    for number, line in _lines(path):
        if isinstance(line, Damage):
            yield line
        elif line.strip():
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                yield Damage(str(path), number, f"no JSON: {error}")
                continue
            yield from _row(row, str(path), number, text_column)


def _read_parquet(path, text_column):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
        if text_column not in file.schema_arrow.names:
            raise ValueError(f"{path} has no column {text_column!r}; it has {file.schema_arrow.names} (--text_column_name)")
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[text_column]):
            for row in batch.to_pylist():
                number += 1
                yield from _row(row, str(path), number, text_column)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no whole parquet file: {error}") from error


def _row(row, source, number, text_column):
    """The document of a row of named fields, or what is wrong with it; nothing where its text is empty."""
    if not isinstance(row, dict):
        yield Damage(source, number, f"expected an object with the field {text_column!r}, got {type(row).__name__}")
    elif not isinstance(row.get(text_column), str):
        found = f"is {type(row[text_column]).__name__}" if text_column in row else "is missing"
        yield Damage(source, number, f"the field {text_column!r} {found}, where text is expected")
    else:
        try:
            document = Document.of(row[text_column].splitlines())
        except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair
            yield Damage(source, number, f"the text is no Unicode: {error.reason}")
            return
        if document:
            yield document
