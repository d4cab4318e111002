"""Hyper-parameter search: trials of short runs by optuna, through Trainer's ``hyperparameter_search``.

Values are proposed by a tree-structured Parzen estimator (Bergstra et al., "Algorithms for Hyper-Parameter Optimization", 2011),
seeded by (seed, trials before this one), so that a search that was interrupted goes on as an unbroken one does. Trials save no
model: the best one's flags are trained again, with the same seed.
"""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from transformers import set_seed
from transformers.trainer_utils import SaveStrategy

from roberta_fast.training import report
from roberta_fast.training.arguments import as_flags, load_config, require_extra
from roberta_fast.training.trainer import require_metric
from roberta_fast.training.training_arguments import FineTuningArguments, training_flags

STORAGE, TABLE = "search.db", "search.json"
STUDY = "search"
# What a trial may change, and between which bounds: flags that Trainer reads when it begins to train, not when it is made.
SEARCHABLE = {
    "learning_rate": (float, 0.0, math.inf),
    "layer_lr_decay": (float, 1e-6, 1.0),
    "num_train_epochs": (int, 1, math.inf),
    "max_steps": (int, 1, math.inf),
    "warmup_steps": (float, 0.0, math.inf),
    "weight_decay": (float, 0.0, math.inf),
    "token_dropout": (float, 0.0, 0.99),
    "tokens_per_batch": (int, 1, math.inf),
    "per_device_train_batch_size": (int, 1, math.inf),
    "gradient_accumulation_steps": (int, 1, math.inf),
    "max_grad_norm": (float, 0.0, math.inf),
    "adam_beta1": (float, 0.0, 1.0),
    "adam_beta2": (float, 0.0, 1.0),
    "adam_epsilon": (float, 0.0, math.inf),
    "optim": (str, None, None),
    "lr_scheduler_type": (str, None, None),
}
# What ends a trial, but not the search: a model that comes apart, values that do not fit one another, no memory left.
FAILURES = (ArithmeticError, RuntimeError, ValueError)


def search(task) -> FineTuningArguments:
    """The training arguments of ``task``, a ``FineTuning``, with the best trial's values in place of its own.

    Runs what is left of ``search_trials`` and writes all of them to ``search.json`` and ``search.txt`` in ``output_dir``. Raises
    ValueError where none of them came to an end, or the folder holds a search of another space, seed or data.
    """
    import optuna
    from sqlalchemy import URL

    args = task.args
    if args.world_size > 1:
        raise ValueError(f"search_trials={args.search_trials}: a search runs in one process, not in {args.world_size}")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    # Without pruning: steps of trials with batches of different sizes cannot be compared.
    storage = URL.create("sqlite", database=str(folder / STORAGE)).render_as_string(hide_password=False)
    same = {"study_name": STUDY, "storage": storage, "load_if_exists": True, "pruner": optuna.pruners.NopPruner()}
    trial_args = copy.deepcopy(args)
    trial_args.save_strategy, trial_args.load_best_model_at_end = SaveStrategy.NO, False
    set_seed(args.seed)
    trainer = task.new_trainer(trial_args, task.new_model(), task.encode_all("train", "validation"))
    trainer.model_init = _model_init(task, args.seed)
    direction = "maximize" if trial_args.greater_is_better else "minimize"
    study = optuna.create_study(direction=direction, **same)
    _require_same(study, _settings(task, trial_args.metric_for_best_model), folder)
    trials = _Trials(task.space, trial_args, keeps_best=args.load_best_model_at_end)
    while (count := len(_ended(study))) < args.search_trials:
        seed = int(np.random.SeedSequence((args.seed, count)).generate_state(1)[0])
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=False)
        try:
            trainer.hyperparameter_search(trials.begin, trials.objective, 1, direction, "optuna", sampler=sampler, **same)
        except FAILURES as error:
            study.set_user_attr(f"failed {study.trials[-1].number}", str(error) or type(error).__name__)
        _write(study, task, trial_args.metric_for_best_model)
    ended = [trial for trial in _ended(study) if trial.value is not None]
    if not ended:
        raise ValueError(f"none of search_trials={args.search_trials} came to an end: {_reason(study, study.trials[-1])}")
    _write(study, task, trial_args.metric_for_best_model)
    best = copy.deepcopy(args)
    for name, value in study.best_trial.params.items():
        setattr(best, name, _like(getattr(args, name), value))
    return best


class _Trials:
    """What Trainer asks of each trial: the values that it begins with, and its result."""

    def __init__(self, space, args, keeps_best):
        self.space, self.keeps_best, self.is_greater_better = space, keeps_best, args.greater_is_better
        self.metric = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        self.trial = self.best = None

    def begin(self, trial):
        self.trial, self.best = trial, None
        return {name: _suggest(trial, name, spec) for name, spec in self.space.items()}

    def objective(self, metrics):
        """The metric of the model that a run with these values ends with: its best checkpoint's, or the last one's."""
        require_metric(self.metric, metrics)
        value = metrics[self.metric]
        if not math.isfinite(value):
            raise FloatingPointError(f"{self.metric} is {value}")
        is_better = self.best is None or (value > self.best if self.is_greater_better else value < self.best)
        if is_better or not self.keeps_best:
            self.best = value
            self.trial.set_user_attr("metrics", {k: v for k, v in metrics.items() if k.startswith("eval_") and _is_score(k)})
        return self.best


def _is_score(name):
    return not name.endswith(("_runtime", "_per_second", "_samples"))


def _model_init(task, seed):
    def build():
        model = task.new_model()
        # What is drawn from here on is drawn alike in a trial, and where its values are trained again.
        set_seed(seed)
        return model

    return build


def _suggest(trial, name, spec):
    if isinstance(spec, list):
        return trial.suggest_categorical(name, spec)
    kind = trial.suggest_int if SEARCHABLE[name][0] is int else trial.suggest_float
    return kind(name, **spec)


def _like(old, value):
    """``value`` in the type of what it takes the place of, as Trainer sets it in a trial."""
    return value if old is None else type(old)(value)


def _ended(study):
    """The trials that came to an end by themselves; one that was interrupted is none of them."""
    return [t for t in study.trials if t.state.name == "COMPLETE" or _reason(study, t)]


def _reason(study, trial):
    return study.user_attrs.get(f"failed {trial.number}")


def _settings(task, metric):
    """What trials must have in common to be compared."""
    flags = {**as_flags(task.model_args), **as_flags(task.data_args), **training_flags(task.args)}
    rows = {f"rows of {split}": len(table) for split, table in task.tables.items()}
    flags = {name: value for name, value in flags.items() if name not in task.space}
    return json.loads(json.dumps({"space": task.space, "metric": metric, **flags, **rows}, default=str))


def _require_same(study, settings, folder):
    before = study.user_attrs.get("settings")
    if before is None:
        study.set_user_attr("settings", settings)
        return
    for name in {**before, **settings}:
        if before.get(name) != settings.get(name):
            raise ValueError(
                f"{folder / STORAGE} holds a search with {name}={before.get(name)!r}, now {settings.get(name)!r}: "
                "give another output_dir, or --overwrite_output_dir"
            )


def _write(study, task, metric):
    """``search.json`` and ``search.txt``: every trial that came to an end, and which is the best."""
    ended = _ended(study)
    done = [trial for trial in ended if trial.value is not None]
    best = study.best_trial.number if done else None
    rows = [
        {
            "number": trial.number,
            "value": trial.value,
            "params": trial.params,
            "metrics": trial.user_attrs.get("metrics", {}),
            "seconds": round(trial.duration.total_seconds(), 1),
            "failed": _reason(study, trial),
        }
        for trial in ended
    ]
    folder = Path(task.args.output_dir)
    report.write_json(
        folder / TABLE,
        {"metric": metric, "direction": study.direction.name.lower(), "space": task.space, "best": best, "trials": rows},
    )
    report.write_text(folder / "search.txt", table_of(folder))


def table_of(folder: Path) -> str:
    """The search in ``folder`` as a table, the best trial first."""
    found = json.loads((folder / TABLE).read_text(encoding="utf-8"))
    sign = -1 if found["direction"] == "maximize" else 1
    trials = sorted(found["trials"], key=lambda t: (t["value"] is None, sign * (t["value"] or 0.0)))
    names = list(found["space"])
    rows = [
        (
            t["number"],
            t["failed"] or t["value"],
            *(f"{v:.3g}" if isinstance(v, float) else v for v in (t["params"].get(name, "") for name in names)),
            t["seconds"],
        )
        for t in trials
    ]
    return report.text_table(("trial", found["metric"], *names, "seconds"), rows)


def space_of(args: FineTuningArguments, has_adapters: bool) -> dict[str, list | dict]:
    """The search space: that of the file ``search_space``, or one of values that papers fine-tune encoders with.

    By flag: a list of choices, or ``low`` and ``high``, with ``log: true`` for a logarithmic scale, or with a ``step``.
    Raises ValueError naming the file, the flag and what is wrong.
    """
    require_extra("optuna")
    if args.search_space:
        path = Path(args.search_space)
        if not path.is_file():
            raise ValueError(f"search_space={args.search_space!r} is no file")
        given = load_config(path)
        if not isinstance(given, Mapping) or not given:
            raise ValueError(f"{path}: expected values by flag, got {given!r:.60}")
        return {name: _checked(f"{path}: {name}", name, spec, args) for name, spec in given.items()}
    # RoBERTa (appendix C) tries 1e-5 to 3e-5, BERT (appendix A.3) to 5e-5 in 2 to 4 epochs, ELECTRA (appendix B) to 1e-4 in 3 to
    # 10, with decays by layer of 0.8 and 0.9; adapters take ten times as much (LoRA, appendix D).
    scale = 10 if has_adapters else 1
    space = {
        "learning_rate": {"low": 1e-5 * scale, "high": 1e-4 * scale, "log": True},
        "layer_lr_decay": {"low": 0.75, "high": 1.0},
        "warmup_steps": {"low": 0.0, "high": 0.1},
        "weight_decay": {"low": 0.0, "high": 0.1},
    }
    space |= {} if args.max_steps > 0 else {"num_train_epochs": {"low": 2, "high": 6}}
    batch = "tokens_per_batch" if args.tokens_per_batch else "per_device_train_batch_size"
    return space | {batch: [1024, 2048, 4096] if args.tokens_per_batch else [16, 32]}


def _checked(place, name, spec, args):
    """A range or a list of choices whose values fit the flag."""
    if name not in SEARCHABLE:
        raise ValueError(f"{place} cannot be searched over; {', '.join(SEARCHABLE)} can")
    without = {"num_train_epochs": args.max_steps > 0, "per_device_train_batch_size": args.tokens_per_batch > 0}
    if without.get(name):
        other = "max_steps" if name == "num_train_epochs" else "tokens_per_batch"
        raise ValueError(f"{place} has no effect beside {other}={getattr(args, other)}")
    if isinstance(spec, list) and spec:
        return [_value(place, name, value, args) for value in spec]
    kind, *_ = SEARCHABLE[name]
    if not isinstance(spec, Mapping) or not {"low", "high"} <= spec.keys() <= {"low", "high", "log", "step"} or kind is str:
        raise ValueError(f"{place} must be a list of choices{'' if kind is str else ', or have low and high'}, got {spec!r:.60}")
    bounds = {key: spec[key] if key == "log" else _value(place, name, spec[key], args) for key in spec}
    if bounds["low"] > bounds["high"]:
        raise ValueError(f"{place}: low={bounds['low']} is above high={bounds['high']}")
    if not isinstance(bounds.get("log", False), bool) or (bounds.get("log") and (bounds["low"] <= 0 or "step" in bounds)):
        raise ValueError(f"{place}: log is true or false, and a logarithmic scale begins above 0 and has no step")
    return bounds


def _value(place, name, value, args):
    kind, low, high = SEARCHABLE[name]
    try:
        # YAML takes 1e-5, without a point, for a text.
        value = kind(value) if kind is not int or float(value).is_integer() else None
        _like(getattr(args, name), value)
    except (TypeError, ValueError):
        value = None
    if value is None or (kind is not str and not low <= value <= high):
        wanted = (
            "a value of that flag" if kind is str else f"{'a whole number' if kind is int else 'a number'} in [{low}, {high}]"
        )
        raise ValueError(f"{place} must hold {wanted}")
    return value
