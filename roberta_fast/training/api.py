"""Fine-tuning and prediction as two functions, by the name of a task."""

import dataclasses
import importlib
import json
import tempfile
from pathlib import Path

from roberta_fast.training.arguments import ModelArguments
from roberta_fast.training.fine_tuning import SETTINGS, FineTuning, Result
from roberta_fast.training.training_arguments import FineTuningArguments

TASKS = {
    "classification": "classification:Classification",
    "ner": "ner:Ner",
    "qa": "qa:QuestionAnswering",
    "translation": "translation:Translation",
    "generation": "generation:Generation",
    "multitask": "multitask:MultiTask",
}


def task_class(name: str) -> type[FineTuning]:
    """The class of a task by its name. Raises ValueError naming the tasks that there are."""
    if name not in TASKS:
        raise ValueError(f"task={name!r} is not one of {', '.join(TASKS)}")
    module, _, attribute = TASKS[name].partition(":")
    return getattr(importlib.import_module(f"roberta_fast.training.{module}"), attribute)


def predict(folder: str | Path, file: str | Path, *, fast: bool = True, **flags) -> list[dict]:
    """What the fine-tuned model in ``folder`` predicts for each row of ``file``, by the settings that it was trained with.

    fast: on the accelerated encoder. flags: those of the task's data arguments, to change a setting, and of FineTuningArguments.
    Raises ValueError where ``folder`` holds no model of ``finetune``, DataError for what is wrong in ``file``.
    """
    remembered = _remembered(folder)
    with tempfile.TemporaryDirectory() as scratch:
        flags = {**remembered["data"], "report_to": "none", **flags, "test_file": str(file), "do_predict": True}
        chosen = {"model_name_or_path": str(folder), "fast": fast, "output_dir": scratch}
        return _task(remembered["task"], {**flags, **chosen}, score_test=False).run().predictions


def task_of(folder: str | Path) -> str:
    """The task of the fine-tuned model in ``folder``. Raises ValueError where it holds none."""
    return _remembered(folder)["task"]


def _remembered(folder):
    settings = Path(folder) / SETTINGS
    if not settings.is_file():
        inside = sorted(found.parent.name for found in Path(folder).glob(f"*/{SETTINGS}"))
        hint = f" here, but in {', '.join(inside)}" if inside else ""
        raise ValueError(f"{str(folder)!r} holds no model of roberta-fast finetune: there is no {SETTINGS}{hint}")
    return json.loads(settings.read_text(encoding="utf-8"))


def finetune(task: str, /, **flags) -> Result:
    """Fine-tunes, evaluates and predicts, as ``roberta-fast finetune TASK`` with these flags does.

    task: one of ``TASKS``. flags: those of ``ModelArguments``, of the task's data arguments and of ``FineTuningArguments``.
    Raises DataError for what is wrong in a file, ValueError for a flag that does not exist or fit.
    """
    return _task(task, flags).run()


def _task(task, flags, **options):
    kind, flags = task_class(task), dict(flags)
    classes = (ModelArguments, kind.data_class, FineTuningArguments)
    taken = [{f.name: flags.pop(f.name) for f in dataclasses.fields(c) if f.init and f.name in flags} for c in classes]
    if flags:
        raise ValueError(f"{', '.join(map(repr, flags))}: the task {task} has no such flag")
    return kind(*(c(**values) for c, values in zip(classes, taken, strict=True)), **options)
