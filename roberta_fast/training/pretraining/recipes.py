"""Named settings of a run, and named sizes of a model."""

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig, RobertaConfig

from roberta_fast.families import first_position

# (layers, width); heads are 64 wide. The small ones are those of Turc et al. 2019, https://arxiv.org/abs/1908.08962.
SIZES = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}

# Liu et al. 2019, https://arxiv.org/abs/1907.11692: table 9; attention over whole blocks, section 4.2; decay of all parameters
# as in fairseq, where the paper's models were trained. Dropout 0.1 is in the model's config.
ROBERTA = {
    "learning_rate": 6e-4,
    "warmup_steps": 24_000,
    "max_steps": 500_000,
    "global_batch_size": 8192,
    "lr_scheduler_type": "linear",
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-6,
    "weight_decay": 0.01,
    "decay_all_parameters": True,
    "max_grad_norm": 0.0,
    "max_seq_length": 512,
    "mlm_probability": 0.15,
    "attend_across_documents": True,
}
ROBERTA_LARGE = {**ROBERTA, "learning_rate": 4e-4, "warmup_steps": 30_000}

# 30% masked, no dropout in attention, 6% warm-up, decay to 2%, batches of 4096: MosaicBERT (Portes et al. 2023,
# https://arxiv.org/abs/2312.17482). A trapezoidal learning rate with a 1-sqrt decay, no decay of biases and norms: ModernBERT
# (Warner et al. 2024, https://arxiv.org/abs/2412.13663). How long to train is the user's choice.
MODERN = {
    "learning_rate": 5e-4,
    "warmup_steps": 0.06,
    "global_batch_size": 4096,
    "lr_scheduler_type": "warmup_stable_decay",
    "lr_decay_ratio": 0.2,
    "min_lr_ratio": 0.02,
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-6,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "max_seq_length": 512,
    "mlm_probability": 0.3,
    "attention_dropout": 0.0,
    "attend_across_documents": False,
}
RECIPES = ("roberta", "modern")


def recipe_flags(recipe: str, model: str | None) -> dict:
    """The flags that ``recipe`` sets, for a model given by ``--config_name`` or ``--model_name_or_path``.

    Raises ValueError for a recipe that does not exist.
    """
    if recipe not in RECIPES:
        raise ValueError(f"--recipe {recipe!r} is not one of {', '.join(RECIPES)}")
    if recipe == "modern":
        return MODERN
    return ROBERTA_LARGE if _is_large(model) else ROBERTA


def _is_large(model):
    if model in SIZES:
        return model == "large"
    if model and Path(model).is_dir():
        return getattr(AutoConfig.from_pretrained(model), "hidden_size", 0) >= SIZES["large"][1]
    return "large" in (model or "")


def config_of(
    name: str, overrides: str | None, vocab_size: int, max_seq_length: int, specials: dict[str, int], **settings
) -> PreTrainedConfig:
    """The config of a model to be trained from scratch.

    name: one of ``SIZES``, or a folder or name on the Hub whose shape is taken. overrides: ``"hidden_size=192,..."``, fields that
    the config has. specials: the tokenizer's ``bos``, ``eos`` and ``pad`` ids. settings: other fields, None where the shape's own
    are to stay. Raises ValueError naming a config that cannot be had, or a field that cannot be set.
    """
    if name in SIZES:
        layers, width = SIZES[name]
        config = RobertaConfig(
            num_hidden_layers=layers,
            hidden_size=width,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        )
    else:
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"--config_name {name} is none of {', '.join(SIZES)} and cannot be loaded: {error}") from error
    config.vocab_size = vocab_size
    for role, token in specials.items():
        setattr(config, f"{role}_token_id", token)
    # RoBERTa's positions begin behind the padding's index.
    config.max_position_embeddings = max_seq_length + first_position(config)
    for field, value in settings.items():
        if value is not None:
            setattr(config, field, value)
    if overrides:
        try:
            config.update_from_string(overrides)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"--config_overrides {overrides!r}: {error}") from None
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"--config_overrides: hidden_size={config.hidden_size} is no multiple of "
            f"num_attention_heads={config.num_attention_heads}"
        )
    return config
