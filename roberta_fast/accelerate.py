"""One call makes a loaded model fast, and one takes it back."""

import dataclasses

from torch import nn
from transformers import PreTrainedConfig

from roberta_fast import copies, fp8
from roberta_fast import encoder as fast
from roberta_fast.deterministic import set_deterministic
from roberta_fast.families import FAMILIES, MODELS, Family, family_of, family_of_encoder, family_of_model, supported_model_types
from roberta_fast.options import FastOptions
from roberta_fast.reporting import FastModel, make_fast, make_stock


def accelerate_model(model: nn.Module, options: FastOptions | None = None, **overrides) -> nn.Module:
    """Makes every encoder of a supported family inside ``model`` fast, in place, and returns ``model``.

    Parameters, their names, hooks and ``save_pretrained`` stay as they are; ``restore_model`` undoes it.
    model: any module that holds Hugging Face encoders, e.g. ``RobertaForSequenceClassification`` or a ``SentenceTransformer``.
    options: see ``FastOptions``; overrides: its fields by name, e.g. ``backend="torch"``.
    Raises ValueError, with nothing changed, naming the model's type and the supported ones where there is no such encoder.
    """
    options = _options(options, overrides)
    encoders = fast_encoders(model) + [m for m in model.modules() if family_of_encoder(m)]
    if not encoders:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        raise ValueError(
            f"model {type(model).__name__} (model_type={model_type!r}) has no encoder of a supported family; "
            f"supported are {', '.join(supported_model_types())}"
        )
    for module in encoders:
        fast.layer_classes(module)  # raises before anything is changed
        if options.precision != "int8":
            copies.check_released(module.layer, "accelerate_model without precision='int8'")
        if options.precision == "fp8":
            fp8.check_device(next(module.parameters()), options.backend)
    for module in encoders:
        family = family_of_encoder(module)
        if family:
            module.__class__ = fast.fast_class(family, "encoder")
        fast.make_fast(module, options, _owners(model, module))
    for module in list(model.modules()):
        for role in MODELS:
            family = family_of_model(module, role)
            if family:
                module.__class__ = fast.fast_class(family, role)
        if isinstance(module, FastModel):
            make_fast(module, options)
    set_deterministic(model, options.deterministic)  # of its heads too
    return model


def restore_model(model: nn.Module) -> nn.Module:
    """Makes the encoders of ``model`` stock again, in place, and returns it; one without fast encoders stays as it is.

    Raises ValueError, with nothing changed, where ``release_weights`` has freed what a stock model computes with.
    """
    for module in fast_encoders(model):
        copies.check_released(module.layer, "restore_model")
    for module in fast_encoders(model):
        fast.make_stock(module, _owners(model, module))
    for module in list(model.modules()):
        if isinstance(module, FastModel):
            make_stock(module)
    set_deterministic(model, False)
    return model


def patch_transformers(model_types: list[str] | None = None, options: FastOptions | None = None, **overrides) -> None:
    """Makes every model of these types that is built or loaded from now on fast, without a change to the code that does so.

    model_types: ``config.model_type`` values, None for all supported ones. options, overrides: as in ``accelerate_model``.
    Raises ValueError naming an unsupported type, or for ``deterministic`` and ``precision``; nothing is patched then.
    """
    options = _options(options, overrides)
    if isinstance(model_types, str):
        raise ValueError(f"model_types must be a list, such as [{model_types!r}], got {model_types!r}")
    if options.deterministic:
        raise ValueError("deterministic=True reaches heads only through accelerate_model, not through patch_transformers")
    if options.precision is not None:
        raise ValueError(
            f"precision={options.precision!r} copies weights that are loaded: call accelerate_model on the model then"
        )
    for family in FAMILIES if model_types is None else [family_of(model_type) for model_type in model_types]:
        replacement = fast.fast_class(family, "encoder")
        replacement.fast_options = options
        _patched.setdefault(family, family.replace_encoder(replacement))


def unpatch_transformers() -> None:
    """Undoes ``patch_transformers`` for models built from now on; those that exist stay fast."""
    while _patched:
        family, stock = _patched.popitem()
        family.replace_encoder(stock)


_patched: dict[Family, type[nn.Module]] = {}


def _options(options, overrides):
    if options is not None and not isinstance(options, FastOptions):
        raise ValueError(f"options must be FastOptions or None, got {type(options).__name__}")
    try:
        return dataclasses.replace(options or FastOptions(), **overrides)
    except TypeError:
        names = [field.name for field in dataclasses.fields(FastOptions)]
        raise ValueError(f"options {sorted(set(overrides) - set(names))} do not exist; there are {names}") from None


def _owners(model, encoder):
    """The modules that hold ``encoder`` and have a config, by which they make its mask."""
    models = [module for module in model.modules() if isinstance(getattr(module, "config", None), PreTrainedConfig)]
    return [module for module in models if any(child is encoder for child in module.children())]


def fast_encoders(model: nn.Module) -> list[nn.Module]:
    """The accelerated encoders inside ``model``."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a loaded model, a torch.nn.Module, got {model!r:.80}")
    return [module for module in model.modules() if isinstance(module, fast.FastEncoder)]
