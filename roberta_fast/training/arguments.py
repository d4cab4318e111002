"""Flags of the training commands, named as in Hugging Face's example scripts; light to import, so that ``--help`` is quick."""

import argparse
import dataclasses
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers.hf_argparser import HfArgumentParser

from roberta_fast.options import PRECISIONS

EXTRA = "pip install --no-build-isolation 'roberta_fast[train]'"

# What the short help says of transformers.TrainingArguments and of what FastTrainingArguments adds.
MAIN_TRAINING_FLAGS = {
    "output_dir": "where the model, its checkpoints and the report go",
    "overwrite_output_dir": "replace what an earlier run left there, its checkpoints with it",
    "do_train": "train; with none of --do_train, --do_eval and --do_predict: what there are files for",
    "do_eval": "evaluate on the validation file",
    "do_predict": "predict the test file",
    "learning_rate": "of the head; lower layers have less with --layer_lr_decay",
    "layer_lr_decay": "factor of the learning rate from each layer to the one below; 1: the same everywhere",
    "num_train_epochs": "passes over the training file",
    "max_steps": "optimizer steps, in place of epochs",
    "tokens_per_batch": "real tokens in a batch and process; 0: --per_device_train_batch_size texts instead",
    "per_device_train_batch_size": "texts in a batch and process, where there is no token budget",
    "gradient_accumulation_steps": "batches in an optimizer step",
    "warmup_steps": "steps of linear warm-up, or, below 1, their share of all",
    "weight_decay": "of matrices; biases and LayerNorms have none",
    "label_smoothing_factor": "label smoothing",
    "token_dropout": "probability of a token to be hidden behind the mask token, in training alone",
    "optim": "adamw_torch, adamw_torch_fused, adafactor, ...",
    "lr_scheduler_type": "linear, cosine, constant, ...",
    "bf16": "bfloat16 autocast",
    "fp16": "float16 autocast with loss scaling",
    "gradient_checkpointing": "recompute activations in backward",
    "seed": "of parameters, order and dropout",
    "seeds": "several seeds, 1,2,3: one run each, and mean ± std",
    "search_trials": "search for better flags first, in so many trials; 0: train with those that are given",
    "search_space": "json or yaml with the values to search by flag; default: usual ones",
    "early_stopping_patience": "stop after as many evaluations without a better metric; 0: never",
    "eval_strategy": "when to evaluate: no, steps, epoch",
    "save_strategy": "when to save a checkpoint: no, steps, epoch, best",
    "save_total_limit": "how many checkpoints to keep",
    "metric_for_best_model": "by which the best checkpoint is chosen",
    "logging_steps": "steps from one line of the log to the next",
    "report_to": "tensorboard, wandb, ..., none",
    "resume_from_checkpoint": "a checkpoint, or 'last': the last complete one in --output_dir",
}


def flag(default, help: str, **metadata):
    """A field of a dataclass of flags."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelArguments:
    """Which model is trained, and on which encoder. Raises ValueError for adapters that cannot be, or would change nothing."""

    _argument_group_name = "model"

    model_name_or_path: str = flag(None, "a folder or a name on the Hub with the checkpoint to start from")
    config_name: str | None = flag(None, "a config of its own, where it is not beside the checkpoint")
    tokenizer_name: str | None = flag(None, "a tokenizer of its own, where it is not beside the checkpoint")
    cache_dir: str | None = flag(None, "where downloads are kept")
    model_revision: str = flag("main", "branch, tag or commit on the Hub")
    fast: bool = flag(True, "train on the accelerated encoder; --no-fast: on the stock one")
    precision: str | None = flag(
        None, "evaluate and predict in 8 bits a model that is trained: int8 on a CPU, fp8 on a GPU", choices=list(PRECISIONS[1:])
    )
    lora_r: int = flag(0, "rank of LoRA adapters, trained in place of the encoder; 0: train all")
    lora_alpha: int = flag(16, "LoRA scales its adapters by lora_alpha / lora_r")
    lora_dropout: float = flag(0.0, "dropout in front of the adapters")
    lora_target_modules: str = flag(
        "query,value", "names of the linear modules that get adapters; all-linear: every one but the head"
    )

    def __post_init__(self):
        if self.lora_r < 0:
            raise ValueError(f"lora_r={self.lora_r} must be 0 or more")
        if self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha={self.lora_alpha} must be above 0")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout} must lie in [0, 1)")


@dataclass
class DataArguments:
    """What is read: local files, or a data set by name."""

    _argument_group_name = "data"

    train_file: str | None = flag(None, "the training data: csv, tsv, json, jsonl, or the task's own format")
    validation_file: str | None = flag(None, "the data that is evaluated")
    test_file: str | None = flag(None, "the data that is predicted; labels are not needed")
    dataset_name: str | None = flag(
        None, "a data set of the library datasets, in place of files: a name on the Hub, a folder of files, or of save_to_disk"
    )
    dataset_config_name: str | None = flag(None, "its configuration")
    validation_split_percentage: int = flag(0, "percent of the training data to evaluate on, where no validation data is given")
    max_seq_length: int = flag(128, "tokens of a text, specials included; what is longer is cut")
    max_train_samples: int | None = flag(None, "train on the first so many only")
    max_eval_samples: int | None = flag(None, "evaluate the first so many only")
    max_predict_samples: int | None = flag(None, "predict the first so many only")


@dataclass
class ClassificationArguments(DataArguments):
    """Texts or pairs of texts with one label, several, or a number."""

    text_column_names: str | None = flag(
        None, "the column with the text, or two with a comma between them; default: as in GLUE's files"
    )
    text_columns: int | None = flag(None, "1: texts, 2: pairs of them; default: what the file has", choices=[1, 2])
    label_column_name: str | None = flag(None, "the column with the label (label or labels)")
    problem_type: str | None = flag(
        None,
        "default: by the labels: numbers with a decimal point are a regression, lists are several labels a text",
        choices=["single_label_classification", "multi_label_classification", "regression"],
    )
    label_separator: str = flag(",", "between several labels of a text in a csv or tsv file")
    class_weights: str | None = flag(None, "balanced: by inverse frequency; or a weight for each label in order, 1,2.5")
    jieba: bool = flag(False, "cut Chinese into words by jieba first, for tokenizers that split at white space")


@dataclass
class NerArguments(DataArguments):
    """Tokens with a tag each."""

    text_column_name: str | None = flag(None, "the column with the tokens of a json file (tokens)")
    label_column_name: str | None = flag(None, "the column with their tags (ner_tags or tags)")
    label_all_tokens: bool = flag(False, "train on all pieces of a word, not on its first alone")


@dataclass
class QaArguments(DataArguments):
    """Questions whose answer is a span of a context."""

    max_seq_length: int = flag(384, "tokens of a window, question and specials included")
    doc_stride: int = flag(128, "tokens that neighbouring windows of a context share")
    n_best_size: int = flag(20, "answers that are written for each question")
    max_answer_length: int = flag(30, "tokens of the longest answer")
    version_2_with_negative: bool = flag(False, "there are questions without an answer, as in SQuAD 2.0")
    null_score_diff_threshold: float = flag(
        0.0, "no answer is predicted where its score exceeds the best one's by more than this"
    )


@dataclass
class TranslationArguments(DataArguments):
    """Sentences in two languages."""

    source_lang: str = flag("en", "source language: a parallel text is FILE.en and FILE.de, a json has it under translation")
    target_lang: str = flag("de", "target language")
    decoder_name_or_path: str | None = flag(None, "checkpoint that the decoder starts from; default: the encoder's")
    decoder_tokenizer_name: str | None = flag(None, "tokenizer of the target language; default: that of the source")
    decoder_vocab_size: int = flag(
        0, "learn a byte-level BPE of this size from the target sentences; 0: use a tokenizer that exists"
    )
    max_source_length: int = flag(128, "tokens of a source sentence; what is longer is cut")
    max_target_length: int = flag(128, "tokens of a target sentence, in training and in generation")
    num_beams: int = flag(4, "beams of the search, in evaluation and prediction")
    length_penalty: float = flag(1.0, "exponent of the length by which a beam's score is divided")


@dataclass
class GenerationArguments(DataArguments):
    """Running text."""

    text_column_name: str | None = flag(None, "the column with the text of a csv, tsv or json file (text)")
    block_size: int = flag(128, "tokens of a training example: texts are laid one after the other and cut")
    prompt: str | None = flag(None, "continue this text, after training or with --do_predict")
    max_new_tokens: int = flag(64, "tokens of a continuation")
    do_sample: bool = flag(True, "sample; --no-do-sample: the likeliest token each time")
    temperature: float = flag(1.0, "of the samples")
    top_k: int = flag(50, "sample among so many likeliest tokens; 0: all")
    top_p: float = flag(1.0, "sample among the likeliest tokens of this total probability")


@dataclass
class MultitaskArguments:
    """Several tasks on one encoder."""

    _argument_group_name = "data"

    task: list[str] = field(
        default_factory=list,
        metadata={
            "help": "a task, once for each: NAME=classification,train_file=...,validation_file=... with the flags of "
            "'roberta-fast finetune classification', 'ner' or 'qa'; or a json object with name, task and these"
        },
    )
    sampling_alpha: float = flag(0.7, "a task's share of the batches is its size to this power; 1: each text once an epoch")


def parse(
    command: str,
    description: str,
    argv: Sequence[str],
    *dataclasses_: type,
    training: str,
    training_help: Mapping[str, str] = MAIN_TRAINING_FLAGS,
    presets: Callable[..., Mapping] | None = None,
) -> tuple:
    """The flags of ``argv`` as one object of each dataclass, and one of the training arguments.

    ``--config FILE``, json or yaml, holds flags by name; those on the command line override it. training: where the dataclass of
    the training arguments is, ``"module:name"``; it is imported only when its flags are needed, not for the short help, which
    shows ``training_help`` of it. presets: given those objects, the flags by name that the others override.
    Exits with one line for a flag or a value that does not exist, with status 2 where it is argparse that finds it.
    """
    short = _parser(command, description, dataclasses_, epilog=_training_help(training_help))
    short.add_argument("--config", metavar="FILE", help="json or yaml with flags by name; the command line overrides it")
    short.add_argument("--help_all", action="store_true", help="this help, with every flag of transformers.TrainingArguments")
    if "-h" in argv or "--help" in argv or not argv:
        short.print_help()
        raise SystemExit(0 if argv else 2)
    require_extra()
    module, name = training.split(":")
    training_class = getattr(importlib.import_module(module), name)
    full = _parser(command, description, (*dataclasses_, training_class))
    full.add_argument("--config", metavar="FILE")
    if "--help_all" in argv:
        full.print_help()
        raise SystemExit(0)
    config, _ = _ConfigOnly(prog=short.prog).parse_known_args(argv)
    try:
        given = [*(config_flags(config.config, full) if config.config else []), *argv]
        if presets:
            lighter = _parser(command, description, dataclasses_)
            lighter.allow_abbrev = False  # of the flags that it does not know, none is short for another
            known = lighter.parse_args_into_dataclasses(given, return_remaining_strings=True, look_for_args_file=False)
            given = [*_as_command_line(presets(*known[: len(dataclasses_)])), *given]
        *parsed, _, unknown = full.parse_args_into_dataclasses(given, return_remaining_strings=True, look_for_args_file=False)
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no flag of this command, or a value too many")
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"roberta-fast {command}: {error}") from None
    return tuple(parsed)


class _ConfigOnly(argparse.ArgumentParser):
    def __init__(self, **kwargs):
        super().__init__(**kwargs, add_help=False, allow_abbrev=False)
        self.add_argument("--config")


def config_flags(file: str | Path, parser: argparse.ArgumentParser) -> list[str]:
    """The flags of a json or yaml ``file`` as a command line. Raises ValueError naming the file and what is wrong in it."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--config: {str(path)!r} is no file")
    loaded = load_config(path)
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected flags by name, got a {type(loaded).__name__}")
    known = {action.dest: action.nargs for action in parser._actions}
    for name in loaded:
        if name not in known:
            raise ValueError(f"{path}: {name!r} is no flag of this command")
        if isinstance(loaded[name], list) and known[name] is None:
            loaded[name] = ",".join(map(str, loaded[name]))  # as the command line has the seeds, say
    return _as_command_line(loaded)


def _as_command_line(flags: Mapping) -> list[str]:
    line = []
    for name, value in flags.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            line += [f"--{name}", *(json.dumps(value) if isinstance(value, dict) else str(value) for value in values)]
    return line


def load_config(path: Path):
    """What a json or yaml file holds. Raises ValueError naming the file, the line and what is wrong."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from None
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: a config file ends in .json, .yaml or .yml")
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError(f"{path}{f', line {mark.line + 1}' if mark else ''}: {getattr(error, 'problem', error)}") from None


def _parser(command, description, types, epilog=None):
    parser = HfArgumentParser(
        types,
        prog=f"roberta-fast {command}",
        description=description,
        epilog=epilog,
        allow_abbrev=False,  # a flag that is mistyped is no flag
        formatter_class=lambda prog: _Help(prog, max_help_position=34, width=130),
    )
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """One name a flag, defaults where there are any, and the epilog as it is written."""

    def _format_action_invocation(self, action):
        long = [name for name in action.option_strings if "-" not in name.lstrip("-")] or action.option_strings
        value = "" if action.nargs in (0, "?") else f" {self._format_args(action, 'VALUE')}"
        return long[0] + value

    def _get_help_string(self, action):
        text = action.help or ""
        return text if action.default in (None, False, argparse.SUPPRESS, []) or "%(default)" in text else f"{text} (%(default)s)"

    def _format_usage(self, usage, actions, groups, prefix):
        return f"usage: {self._prog} [--config FILE] [--flag value ...]\n\n"


def _training_help(flags):
    rows = "\n".join(f"  {'--' + name:<31} {text}" for name, text in flags.items())
    return f"training (all of transformers.TrainingArguments; --help_all shows the rest):\n{rows}"


def require_extra(*modules: str) -> None:
    """Exits with one line that names the pip command where what training needs is not installed."""
    needed = modules or ("accelerate", "datasets", "sklearn", "matplotlib", "yaml")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"roberta-fast: training needs {', '.join(missing)}: {EXTRA}")


def as_flags(arguments: object) -> dict:
    """The flags of a dataclass that differ from its defaults, for records of a run."""
    flags = {}
    for spec in dataclasses.fields(arguments):
        value = getattr(arguments, spec.name)
        default = spec.default_factory() if spec.default_factory is not dataclasses.MISSING else spec.default
        if spec.init and value != default:
            flags[spec.name] = value
    return flags
