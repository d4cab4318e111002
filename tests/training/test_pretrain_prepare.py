"""`roberta-fast pretrain prepare`: formats, damaged lines, the same bytes by any number of processes, whole or not at all."""

import gzip
import itertools
import json
import pickle
import re
import time
from pathlib import Path

import numpy as np
import pytest
from runs import start
from transformers import AutoTokenizer

from roberta_fast.cli import main
from roberta_fast.training.bpe import byte_level_bpe
from roberta_fast.training.pretraining import prepare as module
from roberta_fast.training.pretraining.corpus import Corpus, CorpusError, read_index
from roberta_fast.training.pretraining.documents import Damage, Document, read_dataset, read_file
from roberta_fast.training.pretraining.prepare import prepare
from roberta_fast.training.pretraining.vocabulary import load_tokenizer

TEXT = "The first line.\nIts second.\n\n\nAnother document, été 中文.\n   \nA third one.\n"
DOCUMENTS = [["The first line.", "Its second."], ["Another document, été 中文."], ["A third one."]]
COMMAND = ["pretrain", "prepare", "--vocab_size", "400", "--num_proc", "1", "--input"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def lines_of(items):
    items = list(items)
    assert all(isinstance(item, Document) for item in items), items
    return [item.lines for item in items]


def as_parquet(rows, path, **columns):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    parquet.write_table(arrow.table(columns or {"text": rows}), path)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_text_files(text):
    assert lines_of(read_file(text, "blank_line", "text")) == DOCUMENTS
    assert lines_of(read_file(text, "line", "text")) == [[line] for document in DOCUMENTS for line in document]


def test_compressed_windows_and_marked_files(text, tmp_path):
    packed = tmp_path / "text.txt.gz"
    packed.write_bytes(gzip.compress(TEXT.encode()))
    assert lines_of(read_file(packed, "blank_line", "text")) == DOCUMENTS
    text.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    assert lines_of(read_file(text, "blank_line", "text")) == DOCUMENTS


def test_jsonl_and_parquet_and_data_sets(tmp_path):
    rows = ["\n".join(document) for document in DOCUMENTS]
    jsonl, parquet = tmp_path / "a.jsonl", tmp_path / "rows" / "a.parquet"
    jsonl.write_text("".join(json.dumps({"body": row, "id": 1}) + "\n" for row in rows))
    parquet.parent.mkdir()
    as_parquet(rows, parquet)
    assert lines_of(read_file(jsonl, "blank_line", "body")) == DOCUMENTS
    assert lines_of(read_file(parquet, "blank_line", "text")) == DOCUMENTS
    assert lines_of(read_dataset(str(parquet.parent), None, "train", "text")) == DOCUMENTS


DAMAGED_JSON = ['{"text": "good one"}', '{"text": ', "[1]", '{"body": "x"}', '{"text": 7}', '{"text": "\\ud800"}', '{"text": ""}']


def test_damaged_lines_are_told_and_not_fatal(tmp_path):
    text, jsonl, parquet = tmp_path / "a.txt", tmp_path / "a.jsonl", tmp_path / "a.parquet"
    text.write_bytes(b"good one\nbad \xff one\ngood two\n")
    jsonl.write_text("\n".join(DAMAGED_JSON))
    as_parquet(["good one", None], parquet)

    def told(path):
        return [(d.line, d.reason) for d in read_file(path, "line", "text") if isinstance(d, Damage)]

    assert told(text) == [(2, "no UTF-8: byte 0xff at column 5")]
    reasons = dict(told(jsonl))
    assert list(reasons) == [2, 3, 4, 5, 6]
    assert reasons[2].startswith("no JSON: ") and reasons[3] == "expected an object with the field 'text', got list"
    assert reasons[4] == "the field 'text' is missing, where text is expected"
    assert reasons[5] == "the field 'text' is int, where text is expected" and "surrogates" in reasons[6]
    assert told(parquet) == [(2, "the field 'text' is NoneType, where text is expected")]
    cut = tmp_path / "cut.txt.gz"
    cut.write_bytes(gzip.compress(b"good\n" * 9999)[:-12])
    (last,) = told(cut)
    assert "the compressed file ends here" in last[1]


def test_the_command_reports_damage(tmp_path, capsys):
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("\n".join(DAMAGED_JSON))
    output = tmp_path / "corpus"
    assert (
        main(["pretrain", "prepare", "--input", str(jsonl), "--vocab_size", "300", "--num_proc", "1", "--output", str(output)])
        == 0
    )
    said = capsys.readouterr().out
    assert "5 damaged lines were left out" in said and f"{jsonl}, line 2: no JSON: " in said
    assert read_index(output)["damaged"] == 5
    assert len((output / "damaged.jsonl").read_text().splitlines()) == 5


def test_a_corpus_holds_the_text(text, tmp_path):
    prepare(tmp_path / "corpus", [text], vocab_size=300)
    corpus = Corpus(tmp_path / "corpus", verify=True)
    tokenizer = load_tokenizer(str(tmp_path / "corpus" / "tokenizer"))
    assert corpus.documents.tolist() == [2, 1, 1]
    again = pickle.dumps(corpus)
    assert len(again) < 1000 and np.array_equal(pickle.loads(again).tokens(1, 9), corpus.tokens(1, 9))
    bounds = np.cumsum([0, *corpus.sentences])
    decoded = [tokenizer.decode(corpus.tokens(a, b)) for a, b in itertools.pairwise(bounds)]
    # Behind a document's first line there is a space, as in running text.
    assert decoded == ["The first line.", " Its second.", "Another document, été 中文.", "A third one."]
    counts = np.bincount(corpus.tokens(0, len(corpus)))
    shares = counts[counts > 0] / counts.sum()
    assert corpus.index["splits"]["train"]["unigram_entropy"] == pytest.approx(-(shares * np.log(shares)).sum())


def test_special_tokens_in_a_text_are_text(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("a <mask> and </s> in a text\n" * 3)
    prepare(tmp_path / "corpus", [text], vocab_size=300)
    corpus = Corpus(tmp_path / "corpus")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "corpus" / "tokenizer")
    assert not set(corpus.tokens(0, len(corpus)).tolist()) & set(tokenizer.all_special_ids)
    assert "<mask>" in tokenizer.decode(corpus.tokens(0, len(corpus)))


def test_the_vocabulary_has_the_layout_of_roberta():
    tokenizer = byte_level_bpe(["some words of a text, some words again"] * 3, 290)
    assert tokenizer.convert_ids_to_tokens(range(4)) == ["<s>", "<pad>", "</s>", "<unk>"]
    assert tokenizer.mask_token_id == len(tokenizer) - 1 <= 289
    ids = tokenizer("some words, ünseen <mask>")["input_ids"]
    assert " <mask>" in tokenizer.tokenize("words <mask> again"), "the mask takes the place of a word and its space"
    assert ids[0] == 0 and ids[-2:] == [tokenizer.mask_token_id, 2] and 3 not in ids, "every byte has a token"
    assert tokenizer.decode(tokenizer("Zoë\t☃").input_ids, skip_special_tokens=True) == "Zoë\t☃"


def test_vocabulary_and_merges_from_files(text, tmp_path):
    trained = byte_level_bpe([TEXT] * 3, 300)
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps({**model["vocab"], "<mask>": trained.mask_token_id}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"]) + "\n")
    prepare(tmp_path / "files", [text], vocab=tmp_path / "vocab.json", merges=tmp_path / "merges.txt")
    trained.save_pretrained(tmp_path / "saved")
    prepare(tmp_path / "folder", [text], tokenizer=str(tmp_path / "saved"))
    corpora = [Corpus(tmp_path / name) for name in ("files", "folder")]
    assert np.array_equal(*(corpus.tokens(0, len(corpus)) for corpus in corpora))
    assert corpora[0].index["tokenizer"] == corpora[1].index["tokenizer"]


def test_a_wordpiece_tokenizer(text, tmp_path, checkpoint):
    index = prepare(tmp_path / "corpus", [text], tokenizer=checkpoint)
    corpus = Corpus(tmp_path / "corpus")
    assert (index["tokenizer"]["bos"], index["tokenizer"]["eos"]) == (101, 102)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert corpus.tokens(0, len(corpus)).tolist() == [
        token for d in DOCUMENTS for line in d for token in tokenizer(line, add_special_tokens=False).input_ids
    ]


def test_roberta_bpe_of_the_shared_data(text, tmp_path, shared_data):
    bpe = shared_data / "bpe"
    prepare(tmp_path / "corpus", [text], vocab=bpe / "vocab.json", merges=bpe / "merges.txt")
    tokenizer = load_tokenizer(str(tmp_path / "corpus" / "tokenizer"))
    assert tokenizer("Hello world!").input_ids == [0, 31414, 232, 328, 2]
    assert tokenizer("Hello <mask>!").input_ids == [0, 31414, 50264, 328, 2]


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """Distinct documents, some 800 KB."""
    path = tmp_path_factory.mktemp("larger") / "larger.txt"
    generator = np.random.default_rng(0)
    words = [f"word{n}" for n in range(200)]
    path.write_text("\n\n".join(" ".join(generator.choice(words, 40)) for _ in range(2500)))
    return path


def test_the_same_bytes_by_any_number_of_processes(larger, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 16)
    made = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        prepare(folder, [larger], vocab_size=400, validation_percentage=10, processes=processes, shard_tokens=50_000)
        made[processes] = contents(folder)
    assert made[1] == made[2]
    index = read_index(folder)
    assert len(index["splits"]["train"]["shards"]) > 1
    share = index["splits"]["validation"]["documents"] / 2500
    assert abs(share - 0.1) < 0.025


def test_tokens_across_shards(larger, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 16)
    for name, size in (("one", 1 << 28), ("many", 50_000)):
        prepare(tmp_path / name, [larger], vocab_size=400, shard_tokens=size)
    one, many = Corpus(tmp_path / "one"), Corpus(tmp_path / "many")
    assert len(many._shards) > 2 and len(one._shards) == 1
    cut = len(many._shards[0])
    for first, last in ((0, len(one)), (cut - 3, cut + 5), (cut, cut + 1), (cut - 1, cut), (5, 5)):
        assert np.array_equal(one.tokens(first, last), many.tokens(first, last))
    assert np.array_equal(one.sentences, many.sentences) and np.array_equal(one.documents, many.documents)


def test_equal_documents_go_to_the_same_split(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("\n\n".join(f"document {n % 50}" for n in range(500)))
    prepare(tmp_path / "corpus", [text], vocab_size=300, validation_percentage=30)
    splits = [Corpus(tmp_path / "corpus", split) for split in ("train", "validation")]
    texts = []
    for corpus in splits:
        bounds = np.cumsum([0, *corpus.sentences])
        texts.append({tuple(corpus.tokens(a, b)) for a, b in itertools.pairwise(bounds)})
    assert not texts[0] & texts[1] and len(texts[0] | texts[1]) == 50


def test_killed_at_any_moment_it_leaves_nothing_that_looks_complete(larger, tmp_path):
    """And the next call takes the place over."""
    output = tmp_path / "corpus"
    process = start([*COMMAND, *[str(larger)] * 8, "--output", str(output)], tmp_path / "log")
    try:
        while not (tmp_path / "corpus.incomplete" / "train-00000.tokens.bin").exists():
            assert process.exitcode is None, (tmp_path / "log").read_text()
            time.sleep(0.002)
    finally:
        process.kill()
        process.join()
    assert not output.exists()
    with pytest.raises(CorpusError, match=r"holds no index\.json: it is no prepared corpus, or its preparation was interrupted"):
        Corpus(tmp_path / "corpus.incomplete")
    prepare(output, [larger], vocab_size=400)
    assert len(Corpus(output, verify=True)) and not (tmp_path / "corpus.incomplete").exists()


def test_two_do_not_write_one_corpus(text, tmp_path):
    with module._Staging(tmp_path / "corpus"), pytest.raises(ValueError, match=r"another process is writing .*corpus'"):
        prepare(tmp_path / "corpus", [text], vocab_size=300)


def test_a_full_disk_leaves_nothing(larger, tmp_path):
    """The system refuses files beyond 100 KB, in another process."""
    output, log = tmp_path / "out" / "corpus", tmp_path / "log"
    process = start([*COMMAND, str(larger), "--output", str(output)], log, file_limit=100_000)
    process.join(240)
    assert process.exitcode == 1 and "roberta-fast pretrain prepare: [Errno 27] File too large" in log.read_text(), (
        log.read_text()
    )
    assert list(output.parent.iterdir()) == []


def spoil(name, change):
    def spoiled(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return spoiled


@pytest.mark.parametrize(("damage", "message"), [
    (spoil("train-00000.tokens.bin", lambda b: b[:-2]), r"tokens\.bin has .* bytes and should have .*: it is truncated; prepare"),
    (spoil("train-00000.sentences.bin", lambda b: b + b"\0"), r"sentences\.bin .* it is longer than it was written"),
    (spoil("train-00000.tokens.bin", lambda b: b"\xff" + b[1:]), r"tokens\.bin is not what was written: its SHA-256 differs"),
    (lambda folder: (folder / "train-00000.documents.bin").unlink(), r"documents\.bin is missing: No such file"),
    (spoil("index.json", lambda b: b[: len(b) // 2]), r"index\.json cannot be read"),
    (spoil("index.json", lambda b: b.replace(b'"version": 1', b'"version": 9')), r"is of format and version .* 9\)"),
], ids=["truncated", "longer", "changed", "missing", "cut index", "another version"])  # fmt: skip
def test_a_damaged_corpus_is_refused_by_name(damage, message, text, tmp_path):
    prepare(tmp_path / "corpus", [text], vocab_size=300)
    damage(tmp_path / "corpus")
    with pytest.raises(CorpusError, match=message):
        Corpus(tmp_path / "corpus", verify=True)


@pytest.mark.parametrize(("flags", "message"), [
    ([], "there is nothing to read"),
    (["--input", "nowhere.txt"], "'nowhere.txt' is no file"),
    (["--input", "TEXT", "--vocab_size", "12"], "vocab_size=12 is below 261"),
    (["--input", "TEXT", "--vocab", "TEXT"], "--vocab and --merges belong together"),
    (["--input", "TEXT", "--vocab", "TEXT", "--merges", "TEXT"], "--vocab .* cannot be read"),
    (["--input", "TEXT", "--tokenizer", "./nowhere"], "--tokenizer ./nowhere cannot be loaded"),
    (["--input", "TEXT", "--validation_split_percentage", "100"], r"must be in \[0, 100\), got 100"),
    (["--input", "TEXT", "--validation_split_percentage", "0.001"], "none of 3 documents falls to validation"),
    (["--input", "EMPTY"], "the input holds no text to train on"),
    (["--input", "BROKEN.parquet"], "is no whole parquet file"),
    (["--input", "TEXT", "--num_proc", "0"], "--num_proc must be at least 1, got 0"),
    (["--dataset_name", "./nowhere"], "--dataset_name ./nowhere"),
], ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "")  # fmt: skip
def test_wrong_arguments_are_named(flags, message, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").write_text("\n \n")
    (tmp_path / "BROKEN.parquet").write_bytes(b"PAR1 and no more")
    flags = [str(text) if flag == "TEXT" else flag for flag in flags]
    assert main(["pretrain", "prepare", *flags, "--output", "corpus"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("roberta-fast pretrain prepare: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert not Path("corpus").exists() and not Path("corpus.incomplete").exists()


def test_nothing_is_overwritten_unasked(text, tmp_path):
    output = tmp_path / "corpus"
    prepare(output, [text], vocab_size=300)
    before = contents(output)
    with pytest.raises(ValueError, match="exists already; --overwrite replaces it"):
        prepare(output, [text], vocab_size=301)
    with pytest.raises(ValueError, match="vocab_size=5 is below"):
        prepare(output, [text], vocab_size=5, overwrite=True)
    assert contents(output) == before
    prepare(output, [text], separator="line", vocab_size=300, overwrite=True)
    assert Corpus(output).documents.tolist() == [1, 1, 1, 1]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no prepared corpus, so --overwrite does not remove it"):
        prepare(tmp_path / "mine", [text], overwrite=True)
