"""The commands and Python blocks of the pages on fine-tuning run, on small files and a tiny model under the names they use."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
PAGES = sorted(DOCS.glob("finetune-*.md"))
# What the pages' commands leave to the defaults of a real run.
SMALL = "--use_cpu true --disable_tqdm true --max_steps 2 --eval_strategy no"
SMALL_SEARCH = "--use_cpu true --disable_tqdm true --max_train_samples 4 --max_eval_samples 4 --search_trials 1"

pytest.importorskip("sklearn", reason="the extra train is not installed")
sys.path.insert(0, str(HERE.parent / "training"))


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_checkpoint):
    """A working folder with every file that the pages name."""
    import tiny_tasks as tiny

    shutil.copytree(tiny_checkpoint, tmp_path / "roberta-base")
    for name in ("train.tsv", "validation.tsv"):
        tiny.reviews(tmp_path / name, 12)
    tiny.csv_file(tmp_path / "pairs.csv", ("question", "sentence", "label"), [("who ?", "Anna", "yes"), ("who ?", "a", "no")] * 5)
    (tmp_path / "reviews.tsv").write_text("sentence\tlabel\n" + "这本书很好看\t1\n房间又小又脏\t0\n" * 10, encoding="utf-8")
    for name in ("train.conll", "validation.conll"):
        tiny.named_entities(tmp_path / name, 8)
    for name in ("train.json", "dev.json"):
        tiny.questions(tmp_path / name, 6)
    for name in ("train", "val"):
        tiny.translations(tmp_path / name, 12)
    context = "yesterday Eva Holm went to New Town by train"
    tiny.jsonl_file(tmp_path / "new.jsonl", [{"question": "went to ?", "context": context}])
    texts = {"new.txt": "a warm film\ndull\n", "new.conll": "Anna\nwent\n", "new.en": "one\n", "prompts.txt": "a\n"}
    texts |= {name: "\n".join(tiny.SENTENCES * 2) for name in ("train.txt", "validation.txt")}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    for page in PAGES:
        for name, text in re.findall(r"`(\w+\.yaml)`:\n\n```yaml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:roberta_fast.*decoder mode:RuntimeWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_runs(page, folder):
    from roberta_fast.cli import main

    blocks = re.findall(r"^```(bash|python)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    assert {language for language, _ in blocks} == {"bash", "python"}
    for language, code in blocks:
        if language == "python":
            exec(compile(code.replace("max_steps=2", 'max_steps=2, use_cpu=True, eval_strategy="no"'), str(page), "exec"), {})
            continue
        for command in code.replace("\\\n", " ").strip().splitlines():
            program, *arguments = shlex.split(command)
            assert program == "roberta-fast"
            small = SMALL_SEARCH if "--search_trials" in arguments else SMALL
            assert main(arguments + (shlex.split(small) if arguments[0] == "finetune" else [])) == 0, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
