"""roberta_fast: a drop-in, kernel-accelerated encoder for the RoBERTa and BERT family."""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "FastOptions": "options",
    "FastRobertaEncoder": "encoder",
    "accelerate_model": "accelerate",
    "check_parity": "report",
    "explain": "report",
    "load_quantized": "quantized",
    "patch_transformers": "accelerate",
    "release_weights": "quantized",
    "restore_model": "accelerate",
    "save_quantized": "quantized",
    "supported_model_types": "families",
    "unpatch_transformers": "accelerate",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Imports a public name when it is first used, so that ``roberta_fast.ops`` alone does not load transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"roberta_fast.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
