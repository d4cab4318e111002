"""Multi-task fine-tuning: several tasks, each with a head of its own, on one encoder that learns from all of them.

Liu et al., "Multi-Task Deep Neural Networks for Natural Language Understanding" (2019), algorithm 1: a batch is of one task, and
a step on it changes the encoder and that task's head. Each task reads, measures and reports as it does alone.
"""

import copy
import dataclasses
import inspect
import json
import re
from pathlib import Path

import numpy as np
from torch import nn
from torch.utils.data import ConcatDataset, Dataset
from transformers import EarlyStoppingCallback, HfArgumentParser, PreTrainedModel, set_seed
from transformers.utils.generic import find_labels

from roberta_fast.training import report
from roberta_fast.training.arguments import ModelArguments, MultitaskArguments
from roberta_fast.training.batching import TaskBatchSampler
from roberta_fast.training.data import DataError
from roberta_fast.training.fine_tuning import Result
from roberta_fast.training.output_folder import clear, require_free
from roberta_fast.training.token_dropout import UNITS, TokenDropout, dropped_token
from roberta_fast.training.trainer import FastTrainer, data_seed, require_metric, text_lengths
from roberta_fast.training.training_arguments import FineTuningArguments

KINDS = ("classification", "ner", "qa")
# The mean of the tasks' metrics, by which the best checkpoint is chosen.
MEAN = "mean"


class MultiTaskModel(nn.Module):
    """One encoder, and for each task the head of a Hugging Face model that computes with it.

    models: by task, of one architecture. The encoder of the first that has the most parts, such as a pooler, is everyone's.
    """

    accepts_loss_kwargs = False

    def __init__(self, models: dict[str, PreTrainedModel]):
        super().__init__()
        self.names = {task: list(model.state_dict()) for task, model in models.items()}
        self.prefix = next(iter(models.values())).base_model_prefix
        self.encoder = max((model.base_model for model in models.values()), key=lambda base: len(list(base.children())))
        self.config = self.encoder.config
        for model in models.values():
            delattr(model, self.prefix)
            # Not registered a second time: parameters are listed, saved and moved once.
            object.__setattr__(model, self.prefix, self.encoder)
        self.heads = nn.ModuleDict(models)

    def forward(self, task: str, **inputs):
        """What the model of ``task`` makes of ``inputs``."""
        return self.heads[task](**inputs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """As of the encoder alone: heads are small."""
        self.encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def save(self, task: str, folder: Path) -> None:
        """Saves encoder and head of a task as the model that stock Hugging Face loads."""
        encoder = {f"{self.prefix}.{name}": value for name, value in self.encoder.state_dict().items()}
        values = encoder | self.heads[task].state_dict()
        self.heads[task].save_pretrained(folder, state_dict={name: values[name] for name in self.names[task]})


class TaskExamples(Dataset):
    """The examples of one task, as far as its model takes them, each with the task's name."""

    def __init__(self, task: str, examples, lengths: list[int]):
        self.task, self.examples, self.lengths = task, examples, lengths

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        return {**self.examples[index], "task": self.task}

    def set_epoch(self, epoch: int) -> None:
        """Tells token dropout, where there is any, which epoch begins."""
        if isinstance(self.examples, TokenDropout):
            self.examples.set_epoch(epoch)


class AllExamples(ConcatDataset):
    """The examples of all tasks, one task's after the other's."""

    def set_epoch(self, epoch: int) -> None:
        """Tells token dropout, where there is any, which epoch begins."""
        for dataset in self.datasets:
            dataset.set_epoch(epoch)


class MultiTaskTrainer(FastTrainer):
    """FastTrainer on batches of one task each; evaluates all tasks, and the mean of their metrics.

    tasks: the FineTuning of each name. validation: their TaskExamples that are evaluated. alpha: as in ``TaskBatchSampler``.
    """

    def __init__(self, model, args, tasks, train, validation, *, alpha: float, **options):
        self.tasks, self.validation, self.alpha = tasks, validation, alpha
        self.collators = {name: task.collator(model.heads[name]) for name, task in tasks.items()}
        super().__init__(model, args, self._collate, AllExamples(train), list(validation.values()) or None, **options)

    def _collate(self, examples):
        (task,) = {example["task"] for example in examples}
        batch = self.collators[task]([{k: v for k, v in example.items() if k != "task"} for example in examples])
        return {**batch, "task": task}

    def batch_sampler(self) -> TaskBatchSampler:
        """Batches of one task, by token budget, or of as many texts."""
        budget, lengths = self.args.tokens_per_batch, [dataset.lengths for dataset in self.train_dataset.datasets]
        return TaskBatchSampler(
            lengths if budget else [[1] * len(of_task) for of_task in lengths],
            budget or self.args.per_device_train_batch_size,
            alpha=self.alpha,
            seed=data_seed(self.args),
            num_replicas=self.args.world_size,
            rank=self.args.process_index,
        )

    def predict(self, test_dataset: TaskExamples, ignore_keys=None, metric_key_prefix: str = "test"):
        """Trainer's, on the examples of one task."""
        task, head = self.tasks[test_dataset.task], self.accelerator.unwrap_model(self.model).heads[test_dataset.task]
        self.compute_metrics = task.metrics_now
        self.label_names = [name for name in find_labels(type(head)) if name in test_dataset[0]]
        self.preprocess_logits_for_metrics = task.trainer_options().get("preprocess_logits_for_metrics")
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The metrics of every task, ``eval_<task>_<metric>``, and ``eval_mean`` of the tasks' own, on a scale from 0 to 1."""
        metrics, own = {}, []
        for name, dataset in self.validation.items():
            task = self.tasks[name]
            output = task.predict_table(self, dataset, task.tables["validation"], f"{metric_key_prefix}_{name}")
            metrics |= output.metrics
            own.append(output.metrics[f"{metric_key_prefix}_{name}_{task.metric}"] / task.highest)
        metrics[f"{metric_key_prefix}_{MEAN}"] = float(np.mean(own))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class MultiTask:
    """``roberta-fast finetune multitask``: fine-tuning of several tasks on one encoder, with the interface of ``FineTuning``."""

    data_class = MultitaskArguments

    def __init__(
        self, model_args: ModelArguments, data_args: MultitaskArguments, args: FineTuningArguments, *, score_test: bool = True
    ):
        """Reads and checks the data of all tasks. Raises DataError or ValueError, naming the task, before anything is trained."""
        from roberta_fast.training.api import task_class

        self.data_args, self.args = data_args, args
        require_free(args, model_args.model_name_or_path, trains=True)
        if len(data_args.task) < 2:
            raise ValueError(f"task: {len(data_args.task)} is given, but several are trained together")
        for name in ("seeds", "search_trials", "label_smoothing_factor"):
            if getattr(args, name):
                raise ValueError(f"{name}={getattr(args, name)!r} is for one task alone")
        if model_args.lora_r:
            raise ValueError(f"lora_r={model_args.lora_r} is for one task alone")
        self.tasks = {}
        for given in data_args.task:
            name, kind, flags = parse_task(given)
            if name in self.tasks:
                raise ValueError(f"task: {name!r} is there twice")
            of_task = copy.deepcopy(args)
            of_task.output_dir = str(Path(args.output_dir) / name)
            of_task.metric_for_best_model, of_task.early_stopping_patience = "auto", 0  # they are of all tasks together
            try:
                task = task_class(kind)(copy.deepcopy(model_args), flags, of_task, score_test=score_test)
                if "train" not in task.tables:
                    raise ValueError("train_file or a dataset_name is needed")
                if getattr(flags, "class_weights", None):
                    raise ValueError(f"class_weights={flags.class_weights!r} is for one task alone")
            except ValueError as error:
                raise (DataError if isinstance(error, DataError) else ValueError)(f"task {name}: {error}") from None
            self.tasks[name] = task
        measured = {name: ("loss", *task.measured()) for name, task in self.tasks.items() if "validation" in task.tables}
        if args.early_stopping_patience and not measured:
            raise ValueError(f"early_stopping_patience={args.early_stopping_patience} needs validation data of a task")
        if measured and args.metric_for_best_model not in ("auto", None):
            names = [MEAN, *(f"{name}_{metric}" for name, metrics in measured.items() for metric in metrics)]
            require_metric(args.metric_for_best_model, {f"eval_{name}": 0.0 for name in names})

    def run(self) -> Result:
        """Trains all tasks together and writes each one's model, with its report, to a folder of its name in ``output_dir``."""
        args, folder = copy.deepcopy(self.args), Path(self.args.output_dir)
        clear(args)
        for task in self.tasks.values():
            clear(task.args)
        set_seed(args.seed)
        model = MultiTaskModel({name: task.new_model() for name, task in self.tasks.items()})
        encoded = {name: self._examples(name, task, model) for name, task in self.tasks.items()}
        trainer = self._trainer(args, model, encoded)
        resume = args.resume_from_checkpoint
        metrics = trainer.train(resume_from_checkpoint=True if resume == "last" else resume).metrics
        trainer.save_state()
        for name, task in self.tasks.items():
            if trainer.is_world_process_zero():
                model.save(name, folder / name)
                task.tokenizer.save_pretrained(folder / name)
            trained = {"train_samples": len(encoded[name]["train"])}
            found = task.finish(trainer, encoded[name], folder / name, trained).metrics
            metrics |= {f"eval_{name}_{k.removeprefix('eval_')}": v for k, v in found.items() if k.startswith("eval_")}
        own = [metrics[f"eval_{name}_{t.metric}"] / t.highest for name, t in self.tasks.items() if "validation" in t.tables]
        if own:
            metrics[f"eval_{MEAN}"] = float(np.mean(own))
        if trainer.is_world_process_zero():
            report.write_json(folder / "metrics.json", metrics)
            report.plot_learning_curves(trainer.state.log_history, folder / "learning_curves.png")
        return Result(str(folder), metrics, model)

    def _trainer(self, args, model, encoded):
        # Columns are chosen task by task, and in each step the other tasks' heads have no gradient.
        args.remove_unused_columns, args.ddp_find_unused_parameters = False, True
        validation = {name: sets["validation"] for name, sets in encoded.items() if "validation" in sets}
        if args.metric_for_best_model == "auto":
            args.metric_for_best_model, args.greater_is_better = MEAN, True
        if not validation:
            args.eval_strategy, args.load_best_model_at_end = "no", False
        first = next(iter(self.tasks.values()))
        return MultiTaskTrainer(
            model,
            args,
            self.tasks,
            [sets["train"] for sets in encoded.values()],
            validation,
            alpha=self.data_args.sampling_alpha,
            processing_class=first.tokenizer,
            callbacks=[EarlyStoppingCallback(args.early_stopping_patience)]
            if args.early_stopping_patience and validation
            else None,
            fast=first.model_args.fast,
            dropped_token=dropped_token(first.tokenizer) if args.token_dropout else None,
        )

    def _examples(self, name, task, model):
        """What ``encode`` made of a task's tables, by split, with its name."""
        taken = inspect.signature(type(model.heads[name]).forward).parameters
        found = {}
        for split, dataset in task.encode_all(*task.tables).items():
            examples = dataset.select_columns([c for c in dataset.column_names if c in taken or c == UNITS])
            if split == "train" and self.args.token_dropout:
                token = dropped_token(task.tokenizer)
                examples = TokenDropout(examples, self.args.token_dropout, token, data_seed(self.args))
            found[split] = TaskExamples(name, examples, text_lengths(dataset))
        return found


def parse_task(given: str | dict) -> tuple[str, str, object]:
    """(name, kind, data arguments) of a task: ``name=kind,flag=value,...``, or an object with ``name``, ``task`` and the flags.

    The object may be a dict or json. Raises ValueError naming what does not fit.
    """
    from roberta_fast.training.api import task_class

    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(f"task {given!r:.80}: no json: {error.msg}") from None
    if isinstance(given, str):
        pairs = [pair.partition("=")[::2] for pair in given.split(",")]
        (name, kind), *flags = pairs
        flags = dict(flags)
    else:
        flags = {key: value for key, value in given.items() if key not in ("name", "task")}
        name, kind = given.get("name", ""), given.get("task", "")
    if not re.fullmatch(r"[\w-]+", name) or kind not in KINDS:
        raise ValueError(
            f"task {given!r:.80}: expected name=kind,flag=value,... with letters, digits, - and _ in the name, and a kind of "
            f"{', '.join(KINDS)}"
        )
    data_class = task_class(kind).data_class
    known = {spec.name for spec in dataclasses.fields(data_class)}
    for flag in flags:
        if flag not in known:
            raise ValueError(f"task {name}: {kind} has no flag {flag!r}")
    line = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    try:
        (parsed,) = _Strict(data_class).parse_args_into_dataclasses(line, look_for_args_file=False)
    except ValueError as error:
        raise ValueError(f"task {name}: {error}") from None
    return name, kind, parsed


class _Strict(HfArgumentParser):
    """Raises what argparse would exit with."""

    def error(self, message):
        raise ValueError(message)
