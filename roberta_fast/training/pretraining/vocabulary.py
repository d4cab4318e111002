"""The tokenizer of a pretraining run: RoBERTa's own files, or any fast tokenizer."""

import hashlib
import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from roberta_fast.training.bpe import MASK, SPECIALS, roberta_tokenizer


def load_tokenizer(
    name: str | None, vocab: Path | None = None, merges: Path | None = None, max_length: int = 512
) -> PreTrainedTokenizerBase:
    """The tokenizer ``name``, a folder or a name on the Hub, or that of RoBERTa's files ``vocab`` and ``merges``.

    Raises ValueError naming what cannot be read, or a tokenizer without a special token that pretraining needs.
    """
    if (vocab is None) != (merges is None):
        raise ValueError("--vocab and --merges belong together")
    if vocab is not None:
        tokenizer = roberta_tokenizer(_read_vocab(vocab), _read_merges(merges), max_length)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"--tokenizer {name} cannot be loaded: {error}") from error
    check_tokenizer(tokenizer)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError naming the special token that a tokenizer lacks, or a slow tokenizer."""
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is no tokenizer of the library tokenizers")
    for role in ("bos", "eos", "pad", "mask"):
        if _role(tokenizer, role) is None:
            raise ValueError(f"{type(tokenizer).__name__} has no {role} token")


def enclosing_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The ids of the tokens in front of a text and behind it: ``<s>`` and ``</s>``, or ``[CLS]`` and ``[SEP]``."""
    return _role(tokenizer, "bos"), _role(tokenizer, "eos")


def _role(tokenizer, role):
    instead = {"bos": tokenizer.cls_token_id, "eos": tokenizer.sep_token_id}.get(role)
    return getattr(tokenizer, f"{role}_token_id") if instead is None else instead


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides which ids a text becomes: the tokens and their ids, merges, normalization, special tokens."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for unrelated in ("truncation", "padding"):
        state.pop(unrelated, None)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


class LineEncoder:
    """Lines of documents into ids, without special tokens.

    Lines behind a document's first are encoded with a space in front, as they would stand in running text, where a tokenizer
    makes a difference. Special tokens that a text spells out, ``"<mask>"``, say, are ordinary characters.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        self.joint = " " if self.backend.encode(" a", add_special_tokens=False).ids != self._ids("a") else ""

    def _ids(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def __call__(self, documents: list[list[str]]) -> list[list[list[int]]]:
        """The ids of each line of each document."""
        texts = [self.joint * (number > 0) + line for lines in documents for number, line in enumerate(lines)]
        encoded = iter(self.backend.encode_batch_fast(texts, add_special_tokens=False))
        return [[next(encoded).ids for _ in lines] for lines in documents]


def _read_vocab(path):
    try:
        vocabulary = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--vocab {path} cannot be read: {error}") from None
    if not isinstance(vocabulary, dict) or sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError(f"--vocab {path} does not map tokens to the ids 0, 1, 2, ...")
    missing = [token for token in (*SPECIALS, MASK) if token not in vocabulary]
    if missing:
        raise ValueError(f"--vocab {path} lacks {', '.join(missing)}")
    return vocabulary


def _read_merges(path):
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--merges {path} cannot be read: {error}") from None
    merges = []
    for number, line in enumerate(lines, 1):
        if line and not (number == 1 and line.startswith("#version")):
            if len(line.split(" ")) != 2:
                raise ValueError(f"--merges {path}, line {number}, is not two tokens: {line!r}")
            merges.append(tuple(line.split(" ")))
    return merges
