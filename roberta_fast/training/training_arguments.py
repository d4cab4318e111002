"""How a model is trained: transformers.TrainingArguments, with defaults for an encoder and a few more flags."""

import re
from dataclasses import dataclass, field

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments

TOKENS_PER_BATCH = 2048


@dataclass
class FastTrainingArguments(TrainingArguments):
    """TrainingArguments with the defaults of fine-tuning an encoder, and a few of their own.

    Raises ValueError for a budget or a patience below 0, no epochs, an empty batch, a decay outside (0, 1], a dropout or a label
    smoothing outside [0, 1), or seeds that are no integers or repeat.
    """

    _argument_group_name = "training"

    per_device_train_batch_size: int = field(default=0, metadata={"help": "Texts in a batch, in place of a token budget."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Texts in a batch of evaluation."})
    warmup_steps: float = field(default=0.06, metadata={"help": "Steps of linear warm-up, or, below 1, their share of all."})
    logging_steps: float = field(default=50, metadata={"help": "Steps from one line of the log to the next."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are not finite from the log."})
    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Real tokens in a batch and process; 0: per_device_train_batch_size texts instead. "
            f"Default: {TOKENS_PER_BATCH}, or 0 where per_device_train_batch_size is given."
        },
    )
    layer_lr_decay: float = field(
        default=1.0,
        metadata={"help": "Factor of the learning rate from each layer to the one below; the head has it whole."},
    )
    token_dropout: float = field(
        default=0.0, metadata={"help": "Probability of a token to be hidden behind the mask token, in training alone."}
    )
    early_stopping_patience: int = field(
        default=0, metadata={"help": "Stop after as many evaluations without a better metric; 0: never."}
    )
    seeds: str | None = field(default=None, metadata={"help": "Seeds, 1,2,3: one run each, and mean ± std of their metrics."})

    def __post_init__(self):
        if (self.tokens_per_batch or 0) > 0 and self.per_device_train_batch_size > 0:
            raise ValueError(
                f"tokens_per_batch={self.tokens_per_batch} and per_device_train_batch_size={self.per_device_train_batch_size}: "
                "a batch is as many tokens, or as many texts"
            )
        if self.bf16 and self.fp16:
            raise ValueError("bf16=True and fp16=True: mixed precision is in one of them")
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # which Trainer wants to be told
        if self.tokens_per_batch is None:
            self.tokens_per_batch = 0 if self.per_device_train_batch_size else TOKENS_PER_BATCH
        if self.tokens_per_batch < 0:
            raise ValueError(f"tokens_per_batch={self.tokens_per_batch} must be 0 or more")
        for name, least in (("per_device_train_batch_size", 0), ("gradient_accumulation_steps", 1), ("weight_decay", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not self.num_train_epochs > 0 and self.max_steps <= 0:
            raise ValueError(f"num_train_epochs={self.num_train_epochs} must be above 0")
        if not 0 < self.layer_lr_decay <= 1:
            raise ValueError(f"layer_lr_decay={self.layer_lr_decay} must lie in (0, 1]")
        if not 0 <= self.token_dropout < 1:
            raise ValueError(f"token_dropout={self.token_dropout} must lie in [0, 1)")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(f"label_smoothing_factor={self.label_smoothing_factor} must lie in [0, 1)")
        if self.per_device_eval_batch_size < 1:
            raise ValueError(f"per_device_eval_batch_size={self.per_device_eval_batch_size} must be at least 1")
        if self.early_stopping_patience < 0:
            raise ValueError(f"early_stopping_patience={self.early_stopping_patience} must be 0 or more")
        if self.seeds is not None:
            self.seeds = _distinct_integers("seeds", str(self.seeds))
            if self.seed != TrainingArguments.seed and str(self.seed) not in self.seeds.split(","):
                raise ValueError(f"seed={self.seed} is none of seeds={self.seeds!r}, which take its place")
        for name, seeds in (("seed", self.seed), ("data_seed", self.data_seed or 0), ("seeds", self.seeds or 0)):
            if not all(0 <= int(seed) < 2**32 for seed in str(seeds).split(",")):
                raise ValueError(f"{name}={seeds!r} must lie in [0, 2**32)")
        self.per_device_train_batch_size = self.per_device_train_batch_size or 32
        self.dataloader_pin_memory &= torch.cuda.is_available()
        super().__post_init__()


@dataclass
class FastSeq2SeqTrainingArguments(FastTrainingArguments, Seq2SeqTrainingArguments):
    """The same for models that generate while they are evaluated."""


@dataclass
class FineTuningArguments(FastSeq2SeqTrainingArguments):
    """FastTrainingArguments that evaluate and save each epoch and end with the best model."""

    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps, epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint: no, steps, epoch, best."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint's model."})
    metric_for_best_model: str | None = field(default="auto", metadata={"help": "The metric that chooses it; auto: the task's."})
    weight_decay: float = field(default=0.01, metadata={"help": "Of matrices; biases and LayerNorms have none."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace what an earlier run left in output_dir, its checkpoints with it."}
    )
    search_trials: int = field(
        default=0, metadata={"help": "Search for better flags first, in so many trials; 0: train with those that are given."}
    )
    search_space: str | None = field(
        default=None, metadata={"help": "A json or yaml file with the values to search by flag; default: usual ones."}
    )

    def __post_init__(self):
        if self.resume_from_checkpoint in ("true", "True"):
            self.resume_from_checkpoint = True  # as the text "last", which Trainer does not know
        if self.resume_from_checkpoint not in (None, True, "last") and "," in (self.seeds or ""):
            raise ValueError(f"resume_from_checkpoint={self.resume_from_checkpoint!r} is of one seed: 'last' is each one's own")
        if self.search_trials < 0:
            raise ValueError(f"search_trials={self.search_trials} must be 0 or more")
        if self.search_space and not self.search_trials:
            raise ValueError(f"search_space={self.search_space!r} is for a search: search_trials says of how many trials")
        for name in ("eval_strategy", "save_strategy") if self.early_stopping_patience else ():
            if getattr(self, name) == "no":
                why = "has no effect" if name == "eval_strategy" else "ends with the last model, not the best,"
                raise ValueError(f"early_stopping_patience={self.early_stopping_patience} {why} with {name}='no'")
        asked, direction = self.do_eval, self.greater_is_better
        if "no" in (self.eval_strategy, self.save_strategy):
            self.load_best_model_at_end = False
        elif self.load_best_model_at_end and self.save_strategy != "best":
            # The best model is among those that are both evaluated and saved: what was asked for of the one goes for both.
            if self.eval_strategy == "epoch":
                self.eval_strategy, self.eval_steps = self.save_strategy, self.eval_steps or self.save_steps
            elif self.save_strategy == "epoch":
                self.save_strategy, self.save_steps = self.eval_strategy, self.eval_steps or self.logging_steps
        super().__post_init__()
        if direction is None and self.metric_for_best_model.rpartition("_")[2] in ("mse", "mae"):
            self.greater_is_better = False  # Trainer knows of losses alone
        self.do_eval = asked  # an eval_strategy turns it on, but here it says which data is read


def _distinct_integers(name, text):
    """``text`` without spaces. Raises ValueError where it is no list of integers, or one is there twice."""
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", text.replace(" ", "")):
        raise ValueError(f"{name}={text!r} must be integers with commas between them, such as 1,2,3")
    values = [int(value) for value in text.split(",")]
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{name}={text!r}: {value} is there twice")
    return ",".join(map(str, values))


def training_flags(args: FineTuningArguments) -> dict[str, str]:
    """The training flags that a reader of the model card wants to know."""
    names = (
        "learning_rate",
        "layer_lr_decay",
        "num_train_epochs",
        "max_steps",
        "tokens_per_batch",
        "gradient_accumulation_steps",
        "warmup_steps",
        "weight_decay",
        "label_smoothing_factor",
        "token_dropout",
        "optim",
        "lr_scheduler_type",
        "bf16",
        "fp16",
        "seed",
    )
    values = {name: getattr(args, name) for name in names}
    values["per_device_train_batch_size"] = None if args.tokens_per_batch else args.per_device_train_batch_size
    values["max_steps" if args.max_steps < 0 else "num_train_epochs"] = None
    return {
        name: str(getattr(value, "value", value)) for name, value in values.items() if value is not None and value is not False
    }
