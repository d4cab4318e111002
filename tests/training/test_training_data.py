"""What is wrong in a file is said with its name, the line and the reason."""

import json

import pytest

from roberta_fast.training import DataError
from roberta_fast.training.data import load_hub, read_conll, read_lines, read_parallel, read_squad, read_table

SQUAD = {
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "Ä man in Oslo.",
                    "qas": [{"id": "q1", "question": "Where?", "answers": [{"text": "Oslo", "answer_start": 9}]}],
                }
            ],
        }
    ]
}


def squad(change):
    changed = json.loads(json.dumps(SQUAD))
    change(changed["data"][0]["paragraphs"][0])
    return json.dumps(changed).encode()


BAD_FILES = [
    ("nothing.tsv", None, read_table, "cannot be read: No such file"),
    ("empty.tsv", b"", read_table, "the file is empty"),
    ("blank.jsonl", b"\n \n", read_table, "the file is empty"),
    ("header.csv", b"text,label\n", read_table, "there are no rows"),
    ("latin.csv", "text,label\ngood,1\nschön,0\n".encode("latin-1"), read_table, r"line 3: byte 0xf6 is not UTF-8"),
    ("short.tsv", b"text\tlabel\na\t1\nb\n", read_table, "line 3: 1 fields, but the header has 2: text, label"),
    ("long.csv", b'text,label\n"a\nb",1\nc,1,2\n', read_table, "line 4: 3 fields, but the header has 2"),
    ("quote.csv", b'text,label\n"a"b,1\n', read_table, "line 2: "),
    ("twice.csv", b"text,text\na,b\n", read_table, "line 1: a column is named twice"),
    ("broken.jsonl", b'{"text": "a"}\n{"text": \n', read_table, "line 2: no json"),
    ("lacks.jsonl", b'{"text": "a", "label": 1}\n{"text": "b"}\n', read_table, "line 2: there is no 'label'"),
    ("list.json", b'[{"text": "a"}, 3]', read_table, "item 2: expected an object, got 3"),
    ("number.json", b"3", read_table, "expected a list of objects"),
    ("other.parquet", b"x", read_table, "ends in .csv, .tsv, .json, .jsonl"),
    ("tags.conll", b"Anna B-PER\n\nOslo\n", read_conll, "line 3: a token without a tag: 'Oslo'"),
    ("none.conll", b"-DOCSTART- O\n\n", read_conll, "there is no sentence"),
    ("layout.json", b"[]", read_squad, "SQuAD's layout has a list under 'data'"),
    (
        "off.json",
        squad(lambda p: p["qas"][0]["answers"][0].update(answer_start=8)),
        read_squad,
        "question 'q1': the answer 'Oslo'",
    ),
    (
        "far.json",
        squad(lambda p: p["qas"][0]["answers"][0].update(answer_start=99)),
        read_squad,
        "answer_start 99, where '' stands",
    ),
    ("under.json", squad(lambda p: p["qas"][0]["answers"][0].update(answer_start=-5)), read_squad, "answer_start -5"),
    ("double.json", squad(lambda p: p["qas"].append(p["qas"][0])), read_squad, "question 'q1': the id is there twice"),
    ("field.json", squad(lambda p: p["qas"][0].pop("question")), read_squad, "question 'q1': there is no 'question'"),
    ("text.txt", b"\n\n", read_lines, "the file is empty"),
]


@pytest.mark.parametrize(("name", "content", "read", "message"), BAD_FILES, ids=[case[0] for case in BAD_FILES])
def test_a_bad_file(name, content, read, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        list(read(path)) if read is read_squad else read(path)
    assert str(raised.value).startswith(str(path))


def test_lines_are_those_of_the_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbftext,label\n\n"one\ntwo",0\n"he said ""no""",1\n')
    table = read_table(path)
    assert table.columns == {"text": ["one\ntwo", 'he said "no"'], "label": ["0", "1"]}
    assert str(table.error(1, "odd")) == f"{path}, line 5: odd"


def test_a_tsv_is_not_quoted(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('sentence\tlabel\n" open quote\t1\nb\t0\n', encoding="utf-8")
    assert read_table(path).columns["sentence"] == ['" open quote', "b"]


@pytest.mark.parametrize("content", ['{"a": 1}\n{"a": 2}\n', '[{"a": 1}, {"a": 2}]', '{"data": [{"a": 1},\n{"a": 2}]}'])
def test_layouts_of_json(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(content)
    assert read_table(path).columns == {"a": [1, 2]}


def test_line_separators_of_unicode_do_not_end_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x\u2028y"}\n{"a": "z\x85"}\n', encoding="utf-8")
    assert read_table(path).columns == {"a": ["x\u2028y", "z\x85"]}


def test_conll_with_tabs_keeps_tokens_that_are_empty(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("-DOCSTART-\tO\n\nAnna\tx\tB-PER\r\n\ty\tO\n\n\u3000\tx\tO\n", encoding="utf-8")
    table = read_conll(path)
    assert table.columns == {"tokens": [["Anna", ""], ["\u3000"]], "tags": [["B-PER", "O"], ["O"]]}
    assert list(table.lines) == [3, 6]


def test_lines_that_end_as_on_windows(tmp_path):
    for name, text in {"a.en": b"one\r\ntwo\r\n", "a.de": b"eins\r\nzwei"}.items():
        (tmp_path / name).write_bytes(text)
    table = read_parallel(tmp_path / "a.en", tmp_path / "a.de")
    assert table.columns == {"source": ["one", "two"], "target": ["eins", "zwei"]}
    assert read_lines(tmp_path / "a.en").columns == {"text": ["one", "two"]}


def test_texts_that_do_not_belong_together(tmp_path):
    for name, text in {"a.en": "one\ntwo\n", "a.de": "eins\n", "b.de": "eins\n\n"}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=r"a.en has 2 lines, but .*a.de has 1"):
        read_parallel(tmp_path / "a.en", tmp_path / "a.de")
    (tmp_path / "c.de").write_text("eins\n \n")
    with pytest.raises(DataError, match=r"c.de, line 2: the line is empty"):
        read_parallel(tmp_path / "a.en", tmp_path / "c.de")


def test_squad_without_answers(tmp_path):
    path = tmp_path / "a.json"
    impossible = {"is_impossible": True, "plausible_answers": [{"text": "x", "answer_start": 0}]}
    path.write_bytes(squad(lambda p: p["qas"][0].update(impossible)))
    assert [question["answers"] for question in read_squad(path)] == [{"text": [], "answer_start": []}]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A data set of reviews and one of tags, in each way that the library datasets keeps one in a folder."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("datasets")
    label, tag = datasets.ClassLabel(names=["bad", "good"]), datasets.ClassLabel(names=["O", "B-PER"])
    text = datasets.Value("string")
    features = datasets.Features({"text": text, "label": label, "tokens": datasets.List(text), "ner_tags": datasets.List(tag)})
    rows = [{"text": f"text {i}", "label": i % 2 if i < 3 else -1, "tokens": ["Anna", "x"], "ner_tags": [1, 0]} for i in range(4)]
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(rows, features=features) for name in ("train", "validation")})
    splits.save_to_disk(folder / "dict")
    splits["train"].save_to_disk(folder / "single")
    (folder / "files").mkdir()
    for name, split in splits.items():
        split.to_parquet(folder / "files" / f"{name}.parquet")
    return folder


@pytest.mark.parametrize("kind", ["dict", "single", "files"])
def test_a_data_set_in_a_folder(kind, saved):
    table = load_hub(str(saved / kind), None, "train")
    assert table.columns["label"] == ["bad", "good", "bad", None] and table.columns["ner_tags"][0] == ["B-PER", "O"]
    assert str(table.error(3, "odd")).endswith(f"{kind}[train], row 4: odd")
    assert (load_hub(str(saved / kind), None, "validation") is None) == (kind == "single")
    assert load_hub(str(saved / kind), None, "test") is None


def test_a_folder_without_a_data_set(tmp_path):
    with pytest.raises(DataError, match=r"data set '.*': "):
        load_hub(str(tmp_path), None, "train")
