"""What docs/huggingface.md says runs, and its lists are those of the code."""

import re
import string
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast, RobertaForSequenceClassification

import roberta_fast
from roberta_fast.testing import tiny_config

tokenizers = pytest.importorskip("tokenizers")
PAGE = (Path(__file__).parent.parent.parent / "docs" / "huggingface.md").read_text()


def save_small_checkpoint(folder):
    """A RoBERTa with random weights, whose tokens are letters."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *string.printable[:95]])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    RobertaForSequenceClassification(tiny_config()).save_pretrained(folder)


def test_the_snippets_run(tmp_path, monkeypatch, capsys):
    save_small_checkpoint(tmp_path / "roberta-base")
    monkeypatch.chdir(tmp_path)
    scope = {}
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(snippets) == 2 and len(snippets[0].splitlines()) == 10
    try:
        for snippet in snippets:
            exec(compile(snippet, "docs/huggingface.md", "exec"), scope)
    finally:
        roberta_fast.unpatch_transformers()
    assert scope["batch"]["attention_mask"].min() == 0, "one text is padded"
    shown = capsys.readouterr().out
    assert shown.count("no fallback") == 2
    assert float(re.search(r"max_abs_difference=([\d.e-]+)", shown).group(1)) < 1e-4


def test_the_table_names_every_served_type():
    table = "".join(line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`([a-z0-9_-]+)`", table)) == set(roberta_fast.supported_model_types())
