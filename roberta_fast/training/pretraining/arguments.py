"""Flags of ``roberta-fast pretrain``, named as in Hugging Face's run_mlm.py where they overlap."""

from dataclasses import dataclass

from roberta_fast.training.arguments import flag

# What the short help says of transformers.TrainingArguments and of what PretrainingArguments adds.
MAIN_TRAINING_FLAGS = {
    "output_dir": "where the model, its checkpoints and the report go",
    "learning_rate": "its highest value",
    "lr_scheduler_type": "linear, cosine, warmup_stable_decay, ...",
    "warmup_steps": "steps of linear warm-up, or, below 1, their share of all",
    "max_steps": "optimizer steps; -1: --num_train_epochs",
    "num_train_epochs": "passes over the corpus",
    "global_batch_size": "blocks in an optimizer step, over all processes; 0: per device × accumulation × processes",
    "per_device_train_batch_size": "blocks in a forward pass; accumulation follows from --global_batch_size",
    "batch_size_warmup_steps": "steps in which the batch grows linearly",
    "batch_size_warmup_start": "blocks in the first step of that; default: an eighth",
    "length_warmup_steps": "steps in which blocks are shorter, their length doubling",
    "length_warmup_start": "tokens of the first blocks of that",
    "weight_decay": "of matrices; --decay_all_parameters: of biases and LayerNorms too",
    "bf16": "bfloat16 autocast",
    "deterministic": "the same bits in every run",
    "seed": "of parameters, order, masks and dropout",
    "eval_strategy": "when to evaluate: no, steps, epoch",
    "eval_steps": "steps from one evaluation to the next",
    "early_stopping_patience": "stop after as many evaluations without a lower loss; 0: never",
    "save_steps": "steps from one checkpoint to the next",
    "save_total_limit": "how many checkpoints to keep",
    "logging_steps": "steps from one line of the log to the next",
    "report_to": "tensorboard, wandb, ..., none",
    "fsdp": "shard over processes, with torchrun or accelerate launch",
    "resume_from_checkpoint": "a checkpoint, or 'last': the last good one in --output_dir",
}


@dataclass
class RunArguments:
    """What is trained, by which recipe."""

    _argument_group_name = "run"

    recipe: str | None = flag(None, "roberta: the paper's; modern: what has proved better since; other flags override it")
    config_name: str | None = flag(None, "tiny, mini, small, medium, base or large, or a config's folder or name; default base")
    config_overrides: str | None = flag(None, "fields of the config: num_hidden_layers=6,hidden_size=384")
    model_name_or_path: str | None = flag(None, "go on from this model: a folder, a name on the Hub, or fairseq's .pt")
    attention_dropout: float | None = flag(None, "of a model from scratch; default: as in its config, 0.1")
    hidden_dropout: float | None = flag(None, "of a model from scratch; default: as in its config, 0.1")


@dataclass
class CorpusArguments:
    """What it is trained on."""

    _argument_group_name = "data"

    data: str | None = flag(None, "the folder that `roberta-fast pretrain prepare` has written")
    verify_data: bool = flag(True, "compare the corpus with its checksums first; --no-verify-data: its sizes only")
    max_seq_length: int = flag(512, "tokens of a block, special ones included")
    attend_across_documents: bool = flag(False, "a token sees its whole block, not its own document alone")
    mlm_probability: float = flag(0.15, "share of tokens that are predicted")
    mask_replace_prob: float = flag(0.8, "share of these that become <mask>")
    random_replace_prob: float = flag(0.1, "share of these that become a random token")
    whole_word_mask: bool = flag(False, "select whole words")
    max_eval_samples: int | None = flag(None, "evaluate on the first so many blocks only")
