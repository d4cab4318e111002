"""Models to serve, and a server for each task."""

import contextlib
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer

pytest.importorskip("fastapi", reason="needs the extra serve")

from servers import served

from roberta_fast.training.bpe import byte_level_bpe

SENTENCES = Path(__file__).parents[2] / "roberta_fast/sentences.txt"

GENERATING = ("translation", "text-generation")
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
        if task in GENERATING and task not in made:
            made[task] = str(tmp_path_factory.mktemp(task))
            make_generating(task, Path(made[task]))
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


def make_generating(task, folder):
    """A random model whose texts are of any words and lengths, in a folder as ``roberta-fast finetune`` leaves it."""
    lines = SENTENCES.read_text(encoding="utf-8").splitlines()
    source, target = byte_level_bpe(lines, 600), byte_level_bpe(lines, 400)

    def config(tokenizer, **options):
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
        return transformers.RobertaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=130, initializer_range=0.4, **sizes, **options
        )

    torch.manual_seed(3)
    source.save_pretrained(folder)
    if task == "text-generation":
        model = transformers.RobertaForCausalLM(config(source, is_decoder=True, tie_word_embeddings=False))
    else:
        target.save_pretrained(folder / "decoder_tokenizer")
        decoder = config(target, is_decoder=True, add_cross_attention=True, tie_word_embeddings=False)
        both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(config(source), decoder)
        model = transformers.EncoderDecoderModel(both)
        model.generation_config.update(
            decoder_start_token_id=target.bos_token_id,
            eos_token_id=target.eos_token_id,
            pad_token_id=target.pad_token_id,
            num_beams=2,
            max_length=24,
        )
    decoder = model if task == "text-generation" else model.decoder
    decoder.roberta.embeddings.position_embeddings.weight.data *= 4  # lest a word follow itself for ever
    decoder.lm_head.decoder.weight.data *= 0.2  # so that there is something to choose
    model.save_pretrained(folder)


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
    lines = SENTENCES.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip()]
