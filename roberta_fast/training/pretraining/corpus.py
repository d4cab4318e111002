"""A tokenized corpus on disk: memory-mapped shards and one index, which is there only when all of them are.

``index.json`` says what the folder holds. Each shard is three flat little-endian files: ``<name>.tokens.bin``, uint16 where the
vocabulary fits and uint32 else; ``<name>.sentences.bin``, uint32, the tokens of each sentence; ``<name>.documents.bin``, uint32,
the sentences of each document. Special tokens are in none of them.
"""

import contextlib
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np

INDEX = "index.json"
TOKENIZER = "tokenizer"
FORMAT, VERSION = "roberta_fast corpus", 1
SHARD_TOKENS = 1 << 28
PARTS = ("tokens", "sentences", "documents")
_COUNTS = np.dtype("<u4")


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that holds the ids of a vocabulary."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class SplitWriter:
    """Writes the documents of one split, ``"train"`` say, into shards of about ``shard_tokens`` tokens; none is divided."""

    def __init__(self, folder: Path, name: str, vocab_size: int, shard_tokens: int = SHARD_TOKENS):
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.dtype = token_dtype(vocab_size)
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        self.shards, self._files = [], None

    def add(self, tokens: np.ndarray, sentences: np.ndarray, documents: np.ndarray) -> None:
        """Appends whole documents: tokens [T], sentences, the tokens of each, and documents, the sentences of each."""
        if self._files is not None and self._written["tokens"] + len(tokens) > self.shard_tokens:
            self._close()
        if self._files is None:
            self._open()
        self.counts += np.bincount(tokens, minlength=len(self.counts))
        for part, array, dtype in zip(PARTS, (tokens, sentences, documents), (self.dtype, _COUNTS, _COUNTS), strict=True):
            data = np.ascontiguousarray(array, dtype=dtype).tobytes()
            self._files[part].write(data)
            self._digests[part].update(data)
            self._written[part] += len(array)

    def close(self) -> dict:
        """Ends the last shard; returns what the index says of the split."""
        if self._files is not None:
            self._close()
        totals = {part: sum(shard[part] for shard in self.shards) for part in PARTS}
        return {**totals, "unigram_entropy": entropy(self.counts), "shards": self.shards}

    def abandon(self) -> None:
        """Closes what is open, where writing has failed."""
        for file in (self._files or {}).values():
            # What its buffer holds may not fit on the disk either.
            with contextlib.suppress(OSError):
                file.close()

    def _open(self):
        name = f"{self.name}-{len(self.shards):05d}"
        self._files = {part: open(self.folder / f"{name}.{part}.bin", "wb") for part in PARTS}  # noqa: SIM115
        self._digests = {part: hashlib.sha256() for part in PARTS}
        self._written = dict.fromkeys(PARTS, 0)

    def _close(self):
        for file in self._files.values():
            file.close()
        sums = {part: digest.hexdigest() for part, digest in self._digests.items()}
        self.shards.append({"name": f"{self.name}-{len(self.shards):05d}", **self._written, "sha256": sums})
        self._files = None


def entropy(counts: np.ndarray) -> float:
    """The entropy of a distribution of counts, in nats: the loss of a model that knows how often each token is, and no more."""
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(shares * np.log(shares)).sum())


class CorpusError(ValueError):
    """A folder that is no corpus, or a damaged one; the message names the file."""


class Corpus:
    """The split ``split`` of the corpus in ``folder``: its tokens one after the other, without reading them.

    sentences: uint32, the tokens of each sentence; documents: uint32, the sentences of each document.
    verify: compare the checksums of all files, which reads them once; their sizes are compared in any case.
    Raises CorpusError naming the file that is missing, truncated, or changed, and the split that is not there.
    """

    def __init__(self, folder: str | Path, split: str = "train", verify: bool = False):
        self.folder, self.split = Path(folder), split
        self.index = read_index(folder)
        if split not in self.index["splits"]:
            raise CorpusError(f"{self.folder} has no split {split!r}; it has {sorted(self.index['splits'])}")
        self.dtype = np.dtype(self.index["dtype"])
        shards = self.index["splits"][split]["shards"]
        parts = {part: [self._map(shard, part, verify) for shard in shards] for part in PARTS}
        self._shards = parts["tokens"]
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        self.sentences = np.concatenate([*parts["sentences"], np.empty(0, _COUNTS)])
        self.documents = np.concatenate([*parts["documents"], np.empty(0, _COUNTS)])

    def _map(self, shard, part, verify):
        path = self.folder / f"{shard['name']}.{part}.bin"
        dtype = self.dtype if part == "tokens" else _COUNTS
        wanted = shard[part] * dtype.itemsize
        try:
            found = path.stat().st_size
        except OSError as error:
            raise CorpusError(f"{path} is missing: {error.strerror}") from None
        if found != wanted:
            raise CorpusError(
                f"{path} has {found:,} bytes and should have {wanted:,}: it is {_damage(found, wanted)}; prepare again"
            )
        if verify:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"][part]:
                    raise CorpusError(f"{path} is not what was written: its SHA-256 differs from that in {INDEX}; prepare again")
        return np.memmap(path, dtype, "r") if found else np.empty(0, dtype)

    def __reduce__(self):
        # A map pickles as all that it holds; processes that load data map the files themselves.
        return type(self), (self.folder, self.split)

    def __len__(self) -> int:
        """Tokens of the split."""
        return int(self._starts[-1])

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """The tokens from number ``start`` to ``stop``, as the shards hold them."""
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        if stop <= self._starts[shard + 1]:
            return self._shards[shard][start - self._starts[shard] : stop - self._starts[shard]]
        bounds = [start, *self._starts[(self._starts > start) & (self._starts < stop)].tolist(), stop]
        return np.concatenate([self.tokens(*pair) for pair in itertools.pairwise(bounds)])


def _damage(found, wanted):
    return "truncated" if found < wanted else "longer than it was written"


def read_index(folder: str | Path) -> dict:
    """What ``index.json`` of a corpus says. Raises CorpusError where there is none that this version reads."""
    path = Path(folder) / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise CorpusError(f"{folder} holds no {INDEX}: it is no prepared corpus, or its preparation was interrupted") from None
    except ValueError as error:
        raise CorpusError(f"{path} cannot be read: {error}") from None
    found = (index.get("format"), index.get("version")) if isinstance(index, dict) else None
    if found != (FORMAT, VERSION):
        raise CorpusError(f"{path} is of format and version {found}, and this roberta_fast reads {(FORMAT, VERSION)}")
    return index


def write_index(folder: Path, vocab_size: int, splits: dict[str, dict], **facts) -> None:
    """Writes ``index.json``; facts: what else it is to say."""
    index = {"format": FORMAT, "version": VERSION, "dtype": token_dtype(vocab_size).str, "vocab_size": vocab_size}
    (folder / INDEX).write_text(json.dumps({**index, **facts, "splits": splits}, indent=1) + "\n", encoding="utf-8")
