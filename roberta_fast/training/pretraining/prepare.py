"""``roberta-fast pretrain prepare``: text into a tokenized corpus that training maps into memory.

The same input gives the same bytes, whatever the number of processes. The folder appears under its name when all is written;
until then it is ``<name>.incomplete``, and an interrupted one is taken over by the next call.
"""

import argparse
import fcntl
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from roberta_fast.training import arguments
from roberta_fast.training.bpe import byte_level_bpe
from roberta_fast.training.checkpoints import publish
from roberta_fast.training.pretraining import corpus
from roberta_fast.training.pretraining.documents import SEPARATORS, Damage, Document, read_dataset, read_file
from roberta_fast.training.pretraining.vocabulary import (
    LineEncoder,
    check_tokenizer,
    enclosing_ids,
    fingerprint,
    load_tokenizer,
)

# What a process tokenizes at a time: enough that sending it costs little, little enough that all processes have some.
CHUNK_BYTES = 1 << 20
DAMAGED = "damaged.jsonl"
SPLITS = ("train", "validation")


def prepare(
    output: Path,
    files: list[Path],
    *,
    validation_files: list[Path] = (),
    tokenizer: str = "bpe",
    vocab: Path | None = None,
    merges: Path | None = None,
    vocab_size: int = 50265,
    max_length: int = 512,
    separator: str = SEPARATORS[0],
    text_column: str = "text",
    dataset: tuple[str, str | None, str] | None = None,
    validation_percentage: float = 0.0,
    seed: int = 0,
    processes: int = 1,
    shard_tokens: int = corpus.SHARD_TOKENS,
    overwrite: bool = False,
    progress: bool = False,
) -> dict:
    """Writes the corpus ``output`` and returns its index; the arguments are the command's flags.

    dataset: (name, configuration, split) of the library ``datasets``, in place of files or beside them.
    Raises ValueError naming an input, a tokenizer or an output that cannot be used, and OSError where writing fails; then nothing
    is left under ``output``.
    """
    _check(output, files, validation_files, dataset, validation_percentage, processes, overwrite)
    with _Staging(output) as folder:
        sources = [(files, dataset, SPLITS[0]), (validation_files, None, SPLITS[1])]

        def documents():
            for paths, named, split in sources:
                for path in paths:
                    for item in read_file(path, separator, text_column):
                        yield split, item
                if named:
                    for item in read_dataset(*named, text_column):
                        yield split, item

        if vocab is None and tokenizer == "bpe":
            lines = (
                line for split, item in documents() if split == "train" and isinstance(item, Document) for line in item.lines
            )
            made = byte_level_bpe(_counted(lines, "training the BPE", "lines", progress), vocab_size, max_length)
        else:
            made = load_tokenizer(None if vocab else tokenizer, vocab, merges, max_length)
        check_tokenizer(made)
        made.save_pretrained(folder / corpus.TOKENIZER)
        writers = {split: corpus.SplitWriter(folder, split, len(made), shard_tokens) for split in SPLITS}
        try:
            with open(folder / DAMAGED, "w", encoding="utf-8") as report:
                counts = _write(documents(), writers, folder, report, validation_percentage / 100, seed, processes, progress)
            splits = {split: writer.close() for split, writer in writers.items()}
        finally:
            for writer in writers.values():
                writer.abandon()
        _check_written(splits, counts, validation_percentage)
        if not counts["damaged"]:
            (folder / DAMAGED).unlink()
        bos, eos = enclosing_ids(made)
        corpus.write_index(
            folder,
            len(made),
            {split: facts for split, facts in splits.items() if facts["documents"]},
            tokenizer={"fingerprint": fingerprint(made), "bos": bos, "eos": eos, "pad": made.pad_token_id},
            inputs=[str(path) for path in (*files, *validation_files)] + ([list(dataset)] if dataset else []),
            settings={"document_separator": separator, "validation_split_percentage": validation_percentage, "seed": seed},
            **counts,
        )
    return corpus.read_index(output)


def _check(output, files, validation_files, dataset, validation_percentage, processes, overwrite):
    if not files and not dataset:
        raise ValueError("there is nothing to read: give --input FILES or --dataset_name")
    for path in (*files, *validation_files):
        if not path.is_file():
            raise ValueError(f"{str(path)!r} is no file")
    if not 0 <= validation_percentage < 100:
        raise ValueError(f"--validation_split_percentage must be in [0, 100), got {validation_percentage}")
    if processes < 1:
        raise ValueError(f"--num_proc must be at least 1, got {processes}")
    if output.exists() and not overwrite and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {str(output)!r} exists already; --overwrite replaces it when the new one is complete")
    if overwrite and output.exists() and not (output / corpus.INDEX).is_file():
        raise ValueError(f"--output {str(output)!r} is no prepared corpus, so --overwrite does not remove it")


def _check_written(splits, counts, validation_percentage):
    if not splits["train"]["tokens"]:
        raise ValueError(f"the input holds no text to train on ({counts['damaged']} lines were damaged)")
    if validation_percentage and not splits["validation"]["tokens"]:
        raise ValueError(
            f"none of {splits['train']['documents']} documents falls to validation with --validation_split_percentage "
            f"{validation_percentage}: raise it, give --validation_files, or see --document_separator"
        )


class _Staging:
    """``<output>.incomplete``, for one process at a time; takes the place of ``output`` when all went well, and goes else."""

    def __init__(self, output: Path):
        output = Path(os.path.abspath(output))
        self.output, self.folder = output, output.with_name(f"{output.name}.incomplete")

    def __enter__(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held the lock before may have given the folder its final name.
            if not os.path.samestat(os.fstat(self._lock), os.stat(self.folder)):
                raise BlockingIOError
        except OSError:
            os.close(self._lock)
            raise ValueError(f"another process is writing {str(self.output)!r}") from None
        for left in self.folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return self.folder

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                publish(self.folder, self.output)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)


def _write(documents, writers, folder, report, validation_share, seed, processes, progress):
    """Tokenizes ``(split, document or damage)`` into the writers; returns what the index counts beside their tokens."""
    damaged = bytes_read = 0

    def kept():
        nonlocal damaged, bytes_read
        for split, item in documents:
            if isinstance(item, Damage):
                damaged += 1
                report.write(json.dumps(item._asdict(), ensure_ascii=False) + "\n")
                continue
            bytes_read += item.bytes
            if split == "train" and validation_share and item.share(seed) < validation_share:
                split = "validation"
            yield split, item

    with _bar("tokenizing", "B", progress) as bar:
        for size, parts in _tokenized(_chunks(kept()), str(folder / corpus.TOKENIZER), processes):
            for split, arrays in parts.items():
                writers[split].add(*arrays)
            bar.update(size)
    return {"bytes": bytes_read, "damaged": damaged}


def _chunks(documents: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    chunk, size = [], 0
    for split, document in documents:
        chunk.append((split, document))
        size += document.bytes
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _tokenized(chunks, tokenizer, processes):
    """(bytes, {split: arrays}) of each chunk, in order, tokenized by that many processes."""
    if processes == 1:
        _start(tokenizer)
        yield from map(_tokenize, chunks)
        return
    # Forked processes would inherit the locks of threads that they do not have; a server without threads imports for all.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=(tokenizer,))
    try:
        waiting = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_tokenize, chunk))
            if len(waiting) > 3 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError("a process that tokenizes has ended, for want of memory perhaps: try a smaller --num_proc") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start(tokenizer):
    global _encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encode = LineEncoder(load_tokenizer(tokenizer))


def _tokenize(chunk):
    """The arrays of ``SplitWriter.add`` for each split of a chunk."""
    encoded = _encode([document.lines for _, document in chunk])
    parts = {}
    for split in dict.fromkeys(split for split, _ in chunk):
        # Lines without a token are no sentences, and documents without one are none.
        found = [[ids for ids in lines if ids] for (of, _), lines in zip(chunk, encoded, strict=True) if of == split]
        found = [lines for lines in found if lines]
        parts[split] = (
            np.array([token for lines in found for ids in lines for token in ids], dtype=np.uint32),
            np.array([len(ids) for lines in found for ids in lines], dtype=np.uint32),
            np.array([len(lines) for lines in found], dtype=np.uint32),
        )
    return sum(document.bytes for _, document in chunk), parts


def _bar(description, unit, shown):
    from tqdm import tqdm

    return tqdm(desc=description, unit=unit, unit_scale=True, disable=not shown)


def _counted(items, description, unit, shown):
    with _bar(description, unit, shown) as bar:
        for item in items:
            yield item
            bar.update()


def run(argv: list[str]) -> int:
    """Runs the command. Returns 0 with the corpus written, 1 with a reason and nothing written."""
    parser = argparse.ArgumentParser(prog="roberta-fast pretrain prepare", description=__doc__.split("\n")[0].replace("`", ""))
    parser.add_argument("--input", type=Path, nargs="+", default=[], metavar="FILE", help="text, .jsonl or .parquet, also .gz")
    parser.add_argument("--validation_files", type=Path, nargs="+", default=[], metavar="FILE", help="what is held out")
    parser.add_argument("--validation_split_percentage", type=float, default=0.0, help="or this much of the documents; default 0")
    parser.add_argument("--dataset_name", help="a data set of the library datasets, beside files or in their place")
    parser.add_argument("--dataset_config_name", help="its configuration")
    parser.add_argument("--dataset_split", default="train", help="its split, default train")
    parser.add_argument("--text_column_name", default="text", help="the field with the text, default text")
    parser.add_argument(
        "--document_separator", choices=SEPARATORS, default=SEPARATORS[0], help="what separates documents in text files"
    )
    parser.add_argument("--tokenizer", default="bpe", help="bpe: trained on the input; else a folder or a name on the Hub")
    parser.add_argument("--vocab_size", type=int, default=50265, help="of a BPE that is trained, default 50265")
    parser.add_argument("--vocab", type=Path, help="vocab.json of a byte-level BPE, with --merges")
    parser.add_argument("--merges", type=Path, help="its merges.txt")
    parser.add_argument("--max_length", type=int, default=512, help="model_max_length of a tokenizer that is made here")
    parser.add_argument("--num_proc", type=int, default=len(os.sched_getaffinity(0)), help="processes, default: one a core")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of validation documents, default 0")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the corpus that is there")
    a = parser.parse_args(argv)
    arguments.require_extra("tokenizers", "tqdm")
    if a.dataset_name:
        arguments.require_extra("datasets")
    if any(".parquet" in path.suffixes for path in (*a.input, *a.validation_files)):
        arguments.require_extra("pyarrow")
    try:
        index = prepare(
            a.output,
            a.input,
            validation_files=a.validation_files,
            tokenizer=a.tokenizer,
            vocab=a.vocab,
            merges=a.merges,
            vocab_size=a.vocab_size,
            max_length=a.max_length,
            separator=a.document_separator,
            text_column=a.text_column_name,
            dataset=(a.dataset_name, a.dataset_config_name, a.dataset_split) if a.dataset_name else None,
            validation_percentage=a.validation_split_percentage,
            seed=a.seed,
            processes=a.num_proc,
            overwrite=a.overwrite,
            progress=sys.stderr.isatty(),
        )
    except (ValueError, OSError) as error:
        print(f"roberta-fast pretrain prepare: {error}", file=sys.stderr)
        return 1
    print(describe(a.output, index))
    return 0


def describe(folder: Path, index: dict, shown: int = 5) -> str:
    """What a corpus holds, and the first damaged lines of its input, for a terminal."""
    lines = [f"{folder}: vocabulary {index['vocab_size']:,}, {index['bytes']:,} bytes of text"]
    for name, split in index["splits"].items():
        lines.append(
            f"  {name:<11} {split['documents']:>12,} documents {split['sentences']:>12,} sentences {split['tokens']:>14,} tokens"
            f"   unigram entropy {split['unigram_entropy']:.3f} nats"
        )
    if index["damaged"]:
        report = folder / DAMAGED
        lines.append(f"  {index['damaged']:,} damaged lines were left out, see {report}:")
        with open(report, encoding="utf-8") as file:
            lines += [f"    {Damage(**json.loads(line))}" for line, _ in zip(file, range(shown), strict=False)]
    return "\n".join(lines)
