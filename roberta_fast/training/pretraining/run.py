"""One pretraining run, from a prepared corpus to a model that stock Hugging Face loads."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from transformers import (
    AutoModelForMaskedLM,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from roberta_fast.accelerate import accelerate_model
from roberta_fast.fairseq import from_fairseq
from roberta_fast.families import first_position, longest_sequence
from roberta_fast.training import report
from roberta_fast.training.arguments import as_flags
from roberta_fast.training.checkpoints import STAGING, damage_of, last_complete_checkpoint
from roberta_fast.training.pretraining.arguments import CorpusArguments, RunArguments
from roberta_fast.training.pretraining.batches import BlockReader, EvaluationBatches, TrainingBatches
from roberta_fast.training.pretraining.corpus import TOKENIZER, Corpus, CorpusError, read_index
from roberta_fast.training.pretraining.masking import masking_rule
from roberta_fast.training.pretraining.recipes import config_of
from roberta_fast.training.pretraining.schedule import StepSchedule, length_stages
from roberta_fast.training.pretraining.trainer import PretrainingArguments, PretrainingTrainer
from roberta_fast.training.pretraining.vocabulary import fingerprint, load_tokenizer

# What a run must have in common with the one that it resumes, for both to see the same data.
SETTINGS = "pretrain.json"
_DATA_FLAGS = ("seed", "global_batch_size", "batch_size_warmup_steps", "batch_size_warmup_start", "length_warmup_steps")


def pretrain(run: RunArguments, data: CorpusArguments, args: PretrainingArguments) -> dict[str, float]:
    """Trains, evaluates and saves as ``roberta-fast pretrain`` with these flags does; returns the metrics at the end.

    ``args.output_dir`` then holds the model and its tokenizer, ``metrics.json``, ``curves.png`` and the checkpoints.
    Raises ValueError for flags or a corpus that do not fit, before anything is trained, and NotFiniteError.
    """
    if not data.data:
        raise ValueError("--data is needed: a folder that `roberta-fast pretrain prepare` has written")
    resumed = _resumed_checkpoint(args)
    index, tokenizer = read_index(data.data), corpus_tokenizer(data.data)
    tokenizer.model_max_length = data.max_seq_length
    set_seed(args.seed)
    model = build_model(run, tokenizer, data.max_seq_length)
    train_batches, eval_batches = batches_of(data, args, tokenizer, first_position(model.config))
    settings = _settings(index, data, args, train_batches)
    _check_settings(Path(args.output_dir), settings, resumed)
    accelerate_model(model, deterministic=args.deterministic)
    callbacks = [EarlyStoppingCallback(args.early_stopping_patience)] if args.early_stopping_patience else []
    trainer = PretrainingTrainer(
        model,
        args,
        fast=False,
        train_dataset=train_batches,
        eval_dataset=eval_batches,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    if trainer.is_world_process_zero():
        print(_summary(model, index, args, train_batches), flush=True)
        report.write_json(Path(args.output_dir) / SETTINGS, settings)
    metrics = dict(trainer.train(resume_from_checkpoint=resumed).metrics)
    if eval_batches:
        metrics |= trainer.evaluate()
    _save(trainer)
    if trainer.is_world_process_zero():
        _report(trainer, metrics, index, run, data, args)
    return metrics


def corpus_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a corpus. Raises CorpusError where it is not the one that the corpus was tokenized with."""
    tokenizer = load_tokenizer(str(Path(folder) / TOKENIZER))
    if fingerprint(tokenizer) != read_index(folder)["tokenizer"]["fingerprint"]:
        raise CorpusError(f"{Path(folder) / TOKENIZER} is not the tokenizer that the corpus was prepared with: prepare again")
    return tokenizer


def build_model(run: RunArguments, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> PreTrainedModel:
    """The model that is trained, from scratch or from a checkpoint. Raises ValueError where it does not fit the tokenizer."""
    if max_seq_length <= 2:
        raise ValueError(f"--max_seq_length {max_seq_length} leaves no room for a token beside <s> and </s>")
    if run.model_name_or_path is None:
        ids = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
        dropout = {"attention_probs_dropout_prob": run.attention_dropout, "hidden_dropout_prob": run.hidden_dropout}
        name = run.config_name or "base"
        config = config_of(name, run.config_overrides, len(tokenizer), max_seq_length, ids, **dropout)
        model = AutoModelForMaskedLM.from_config(config)
    elif run.config_name or run.config_overrides:
        raise ValueError("--model_name_or_path brings its config: --config_name and --config_overrides do not go with it")
    elif run.model_name_or_path.endswith(".pt"):
        if not Path(run.model_name_or_path).is_file():
            raise ValueError(f"--model_name_or_path {run.model_name_or_path} is no file")
        model = from_fairseq(run.model_name_or_path)
    else:
        try:
            model = AutoModelForMaskedLM.from_pretrained(run.model_name_or_path)
        except (OSError, ValueError) as error:
            raise ValueError(f"--model_name_or_path {run.model_name_or_path} cannot be loaded: {error}") from error
    _check_fit(model.config, tokenizer, max_seq_length)
    return model


def _check_fit(config, tokenizer, max_seq_length):
    if config.vocab_size < len(tokenizer):
        raise ValueError(f"the model has {config.vocab_size} tokens, and the corpus's tokenizer {len(tokenizer)}")
    if config.pad_token_id != tokenizer.pad_token_id:
        raise ValueError(f"the model's pad_token_id is {config.pad_token_id}, and the tokenizer's {tokenizer.pad_token_id}")
    longest = longest_sequence(config)
    if max_seq_length > longest:
        raise ValueError(f"--max_seq_length {max_seq_length} is beyond the model's {longest} positions")


def batches_of(
    data: CorpusArguments, args: PretrainingArguments, tokenizer: PreTrainedTokenizerBase, position: int
) -> tuple[TrainingBatches, EvaluationBatches | None]:
    """The micro-batches to train on, and those to evaluate on, if any; sets ``args.max_steps`` where epochs are asked for."""
    shares = (data.mlm_probability, data.mask_replace_prob, data.random_replace_prob)
    rule = masking_rule(tokenizer, *shares, whole_words=data.whole_word_mask)

    def reader(corpus, length):
        return BlockReader(corpus, length, rule, args.seed, position, data.attend_across_documents)

    with args.main_process_first(desc="checking the corpus"):
        corpus = Corpus(data.data, "train", verify=data.verify_data and args.local_process_index == 0)
    stages = length_stages(data.max_seq_length, args.length_warmup_steps, args.length_warmup_start)
    readers = [reader(corpus, stage.length) for stage in stages]
    schedule = StepSchedule(
        stages,
        args.global_batch_size,
        args.world_size * args.gradient_accumulation_steps,
        args.batch_size_warmup_steps,
        args.batch_size_warmup_start or max(args.global_batch_size // 8, args.world_size * args.gradient_accumulation_steps),
    )
    if args.max_steps <= 0:
        args.max_steps = schedule.steps_for(args.num_train_epochs, [len(r) for r in readers])
    train_batches = TrainingBatches(readers, schedule, args.max_steps, args.seed)
    if "validation" not in corpus.index["splits"]:
        if args.eval_strategy != "no" or args.early_stopping_patience:
            raise ValueError(f"{data.data} has no validation split to evaluate on: prepare it with --validation_split_percentage")
        return train_batches, None
    held_out = reader(Corpus(data.data, "validation", verify=data.verify_data), data.max_seq_length)
    return train_batches, EvaluationBatches(held_out, args.per_device_eval_batch_size, data.max_eval_samples)


def _resumed_checkpoint(args):
    """The checkpoint to resume from, or None. Raises ValueError for a damaged one, and where a run would overwrite another's."""
    wanted = args.resume_from_checkpoint
    if wanted in ("last", "true", "True", True):
        return last_complete_checkpoint(args.output_dir)
    if wanted:
        damage = damage_of(wanted) if Path(wanted).is_dir() else "there is no such folder"
        if damage:
            raise ValueError(f"--resume_from_checkpoint {wanted}: {damage}")
        return wanted
    if any(Path(args.output_dir).glob("checkpoint-*")):
        raise ValueError(
            f"--output_dir {args.output_dir} holds checkpoints: go on from them with --resume_from_checkpoint last, "
            "or choose another folder"
        )
    return None


def _settings(index, data, args, batches):
    """What decides which tokens a step sees, and which of them it masks."""
    corpus = {split["name"]: split["sha256"]["tokens"] for split in index["splits"]["train"]["shards"]}
    masking = ("max_seq_length", "attend_across_documents", "mlm_probability", "mask_replace_prob", "random_replace_prob")
    return {
        "corpus": corpus,
        **{name: getattr(data, name) for name in (*masking, "whole_word_mask")},
        **{name: getattr(args, name) for name in _DATA_FLAGS},
        "stages": [list(stage) for stage in batches.schedule.stages],
    }


def _check_settings(folder, settings, resumed):
    """Raises ValueError naming what differs from the run that is resumed."""
    path = folder / SETTINGS
    if resumed is None or not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(settings))
    for name, value in now.items():
        if before.get(name) != value:
            shown = "differs" if name == "corpus" else f"is {value}, and was {before.get(name)}"
            raise ValueError(f"{name} {shown} in the run that {resumed} is of: a run resumes with the data that it began with")


def _summary(model, index, args, batches):
    split = index["splits"]["train"]
    parameters = sum(p.numel() for p in model.parameters())
    blocks = ", ".join(f"{len(r):,} of {s.length}" for r, s in zip(batches.readers, batches.schedule.stages, strict=True))
    return (
        f"{type(model).__name__}: {parameters:,} parameters, {model.config.num_hidden_layers} layers × "
        f"{model.config.hidden_size}\n"
        f"corpus: {split['tokens']:,} tokens in {split['documents']:,} documents; blocks: {blocks}\n"
        f"unigram entropy: {split['unigram_entropy']:.4f} nats, the loss of knowing how often each token is\n"
        f"a step: {args.global_batch_size} blocks, {args.world_size} × {args.gradient_accumulation_steps} micro-batches; "
        f"{args.max_steps:,} steps, {batches.epoch(args.max_steps):.2f} passes over the corpus"
    )


def _save(trainer):
    """The model and its tokenizer into the output folder, each file whole or not at all."""
    folder = Path(trainer.args.output_dir)
    staging = folder / STAGING
    if trainer.args.should_save:
        shutil.rmtree(staging, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(staging))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        for file in staging.iterdir():
            os.replace(file, folder / file.name)
        shutil.rmtree(staging)


def _report(trainer, metrics: Mapping, index, run, data, args):
    folder = Path(args.output_dir)
    record = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "metrics": metrics,
        "unigram_entropy": {name: split["unigram_entropy"] for name, split in index["splits"].items()},
        "tokens": {name: split["tokens"] for name, split in index["splits"].items()},
        "flags": {**as_flags(run), **as_flags(data), **as_flags(args)},
        "parameters": sum(p.numel() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()),
        "log_history": trainer.state.log_history,
    }
    report.write_json(folder / "metrics.json", record)
    report.plot_learning_curves(trainer.state.log_history, folder / "curves.png")
    loss = metrics.get("eval_loss", metrics["train_loss"])
    print(f"loss {loss:.4f}, unigram entropy {index['splits']['train']['unigram_entropy']:.4f}\nwritten: {folder}", flush=True)
