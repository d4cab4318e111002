"""A small corpus of real text, made once."""

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Some 150,000 tokens of a vocabulary of 320, nearly letters, 5% of them for validation."""
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    from runs import write_text

    from roberta_fast.training.pretraining.prepare import prepare

    folder = tmp_path_factory.mktemp("corpus")
    prepare(folder / "data", [write_text(folder / "text.txt", 1200)], vocab_size=320, max_length=64, validation_percentage=5)
    return folder / "data"
