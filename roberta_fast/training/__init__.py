"""Training on the accelerated encoder: fine-tuning by task, on Hugging Face's Trainer."""

import importlib

_HOMES = {
    "Classification": "classification",
    "DataError": "data",
    "FastSeq2SeqTrainer": "trainer",
    "FastSeq2SeqTrainingArguments": "training_arguments",
    "FastTrainer": "trainer",
    "FastTrainingArguments": "training_arguments",
    "FineTuningArguments": "training_arguments",
    "Generation": "generation",
    "Ner": "ner",
    "NotFiniteError": "trainer",
    "QuestionAnswering": "qa",
    "TokenBatchSampler": "batching",
    "Translation": "translation",
    "finetune": "api",
    "predict": "api",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Imports a public name when it is first used, so that ``--help`` and one task do not load all the others."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"roberta_fast.training.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
