"""Models to serve, and a server for each task."""

import contextlib
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer

pytest.importorskip("fastapi", reason="needs the extra serve")

from servers import served

LABELS = {
    "question-answering": None,
    "text-classification": ["NEGATIVE", "NEUTRAL", "POSITIVE"],
    "token-classification": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"],
    "fill-mask": None,
    "reranking": ["LABEL_0"],
}
CLASSES = {
    "question-answering": "AutoModelForQuestionAnswering",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "fill-mask": "AutoModelForMaskedLM",
    "reranking": "AutoModelForSequenceClassification",
}


@pytest.fixture(scope="session")
def model_folder(checkpoint, tmp_path_factory):
    """folder(task) of all-MiniLM-L6-v2 with a random head that tells texts apart."""
    made = {"embedding": checkpoint}

    def folder(task):
        if task not in made:
            torch.manual_seed(1)
            labels = LABELS[task]
            options = {} if labels is None else {"id2label": dict(enumerate(labels)), "num_labels": len(labels)}
            model = getattr(transformers, CLASSES[task]).from_pretrained(checkpoint, **options)
            for name, parameter in model.named_parameters():
                if name.startswith(("classifier", "qa_outputs", "cls.predictions.transform")) and parameter.dim() == 2:
                    torch.nn.init.normal_(parameter, std=0.5)
            made[task] = str(tmp_path_factory.mktemp(task))
            model.save_pretrained(made[task])
            AutoTokenizer.from_pretrained(checkpoint).save_pretrained(made[task])
        return made[task]

    return folder


@pytest.fixture(scope="session")
def server(model_folder):
    """client(task) of a server that lives as long as the tests, one a task."""
    clients = {}
    with contextlib.ExitStack() as stack:

        def client(task):
            if task not in clients:
                clients[task] = stack.enter_context(served(model=model_folder(task)))
            return clients[task]

        yield client


@pytest.fixture(scope="session")
def sentences():
    """Real text: the lines that come with the package."""
    lines = Path(__file__).parents[2].joinpath("roberta_fast/sentences.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip()]
