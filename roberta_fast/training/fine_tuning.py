"""What all fine-tuning tasks have in common: read, check, train, evaluate, predict, save, report."""

import copy
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, EarlyStoppingCallback, PreTrainedModel, set_seed
from transformers.trainer_utils import EvalPrediction, PredictionOutput

from roberta_fast.families import longest_sequence
from roberta_fast.training import report
from roberta_fast.training.arguments import DataArguments, ModelArguments, as_flags, require_extra
from roberta_fast.training.data import Table, load_hub, split_table
from roberta_fast.training.output_folder import clear, require_free
from roberta_fast.training.search import search, space_of, table_of
from roberta_fast.training.token_dropout import UNITS, dropped_token, units_of_tokens
from roberta_fast.training.trainer import FastTrainer, require_metric
from roberta_fast.training.training_arguments import FineTuningArguments, training_flags

# What a trained folder remembers of how its texts were read.
SETTINGS = "finetune.json"


@dataclass
class Result:
    """What a run ends with. metrics: by name, ``eval_...`` of the validation data. predictions: of the test data, one a row."""

    output_dir: str
    metrics: dict[str, float]
    model: PreTrainedModel
    predictions: list[dict] = field(default_factory=list)


class FineTuning:
    """One task on one data set. A subclass says what is read, which head is trained, and what is measured."""

    name: str
    pipeline_tag: str
    metric: str  # the best checkpoint's
    lora_task_type: str
    data_class: type[DataArguments]
    trainer_class: type[FastTrainer] = FastTrainer
    greater_is_better = True
    smooths_labels = True  # whether Trainer's label smoothing is of the task's loss
    highest = 1.0  # the value of ``metric`` that cannot be exceeded

    def __init__(
        self, model_args: ModelArguments, data_args: DataArguments, args: FineTuningArguments, *, score_test: bool = True
    ):
        """Reads and checks all data and loads the tokenizer. Raises DataError or ValueError before anything is trained.

        score_test: whether labels of the test data, where it has any, are checked and measured.
        """
        self.model_args, self.data_args, self.args, self.score_test = model_args, data_args, args, score_test
        if not (model_args.model_name_or_path or model_args.config_name):
            raise ValueError("model_name_or_path is needed, or config_name to start from random parameters")
        wanted = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
        if not any(wanted.values()):
            wanted = dict.fromkeys(wanted, True)
        self.tables = {split: table for split in wanted if wanted[split] and (table := self._table(split)) is not None}
        if data_args.validation_split_percentage and data_args.validation_file:
            percentage = data_args.validation_split_percentage
            raise ValueError(f"validation_split_percentage={percentage} beside validation_file: validation data is one of them")
        if data_args.validation_split_percentage and "train" in self.tables and "validation" not in self.tables:
            self.tables["train"], self.tables["validation"] = split_table(
                self.tables["train"], data_args.validation_split_percentage
            )
        for split, given in (("train", args.do_train), ("validation", args.do_eval), ("test", args.do_predict)):
            if given and split not in self.tables:
                raise ValueError(f"there is no {split} data: {split}_file or a dataset_name that has it is needed")
        if not self.tables:
            raise ValueError("there is no data: train_file, validation_file, test_file or dataset_name is needed")
        require_free(args, model_args.model_name_or_path, trains="train" in self.tables)
        for split, name in zip(wanted, ("max_train_samples", "max_eval_samples", "max_predict_samples"), strict=True):
            limit = getattr(data_args, name)
            if limit is not None and limit < 1:
                raise ValueError(f"{name}={limit} must be at least 1")
            if split in self.tables:
                self.tables[split] = self.tables[split].first(limit)
        if model_args.precision and ("train" in self.tables or not model_args.fast):
            raise ValueError(f"precision={model_args.precision!r} is for evaluation and prediction on the fast encoder")
        if args.search_trials and not {"train", "validation"} <= self.tables.keys():
            raise ValueError(f"search_trials={args.search_trials}: a search needs training and validation data")
        self.space = space_of(args, bool(model_args.lora_r)) if args.search_trials else {}
        self._evaluated = None
        self.drops_tokens = bool(args.token_dropout) or "token_dropout" in self.space
        self.config = self._config()
        self.tokenizer = self.load_tokenizer()
        if args.prediction_loss_only:
            raise ValueError("prediction_loss_only=True leaves no predictions to measure and to report on")
        self.prepare()
        if {"train", "validation"} <= self.tables.keys() and args.metric_for_best_model not in ("auto", None):
            require_metric(args.metric_for_best_model, {f"eval_{name}": 0.0 for name in ("loss", *self.measured())})
        if args.early_stopping_patience and "train" in self.tables and "validation" not in self.tables:
            raise ValueError(f"early_stopping_patience={args.early_stopping_patience} needs validation data")
        if args.label_smoothing_factor and "train" in self.tables and not self.smooths_labels:
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor} is not for {self.name} of this kind of answer"
            )

    # What a subclass says.

    def read(self, path: str, split: str) -> Table:
        """The examples of a file; those of the split ``"test"`` may lack labels."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Checks the tables against each other and the config, and puts labels into the config."""

    def build_model(self) -> PreTrainedModel:
        """The model that is trained, with the head of the task."""
        raise NotImplementedError

    def encode(self, table: Table):
        """The examples as a ``datasets.Dataset`` of what the model takes."""
        raise NotImplementedError

    def dropout_units(self, encoded) -> list[list[int]]:
        """For each token of the training data ``encoded``, what token dropout drops it with, as ``TokenDropout`` takes it."""
        special = {*self.tokenizer.all_special_ids} - {self.tokenizer.unk_token_id}
        return [units_of_tokens(ids, special) for ids in encoded["input_ids"]]

    def collator(self, model: PreTrainedModel):
        """Makes batches of them."""
        raise NotImplementedError

    def metrics_of(self, prediction: EvalPrediction, table: Table) -> dict[str, float]:
        """The metrics of predictions on ``table``."""
        raise NotImplementedError

    def measured(self) -> list[str]:
        """The names of the metrics that ``metrics_of`` gives of the validation data."""
        raise NotImplementedError

    def write_report(self, folder: Path, output: PredictionOutput, table: Table) -> None:
        """Tables, figures and the worst mistakes, into ``folder``."""

    def predictions_of(self, output: PredictionOutput, table: Table) -> Iterator[dict]:
        """What is predicted for each row."""
        raise NotImplementedError

    def trainer_options(self) -> dict:
        """More arguments of the trainer."""
        return {}

    def save_more(self, folder: Path) -> None:
        """What the saved model needs beside itself and its tokenizer."""

    def usage(self) -> str:
        """The model card's snippet."""
        return f'from transformers import pipeline\n\npredict = pipeline("{self.pipeline_tag}", "path/to/this/folder")'

    # What is common.

    def load_tokenizer(self):
        """The tokenizer of the model, or of ``tokenizer_name``."""
        given = self.model_args
        return AutoTokenizer.from_pretrained(
            given.tokenizer_name or given.model_name_or_path or given.config_name, **self._where()
        )

    def load_model(self, auto_class, **options) -> PreTrainedModel:
        """A model with the task's config, from the checkpoint or, without one, from random parameters."""
        if not self.model_args.model_name_or_path:
            return auto_class.from_config(self.config)
        return auto_class.from_pretrained(self.model_args.model_name_or_path, config=self.config, **options, **self._where())

    def processing_class(self):
        """What the trainer saves beside the model, and takes the special tokens of its config from."""
        return self.tokenizer

    def tell_of_new_head(self, kept: list[str], table: Table) -> None:
        """Warns that the labels of the training data take the place of the trained head's."""
        begins = (
            "the head begins with the weights of as many other labels" if len(kept) == len(self.labels) else "a new head begins"
        )
        there = ", ".join(kept[:20]) + (", ..." if len(kept) > 20 else "")
        warnings.warn(f"{table.path} has labels that the trained head lacks, which has {there}: {begins}", stacklevel=3)

    def check_length(self, length: int, argument: str) -> None:
        """Raises ValueError where the model has fewer positions, or special tokens alone would fill so many."""
        least = self.tokenizer.num_special_tokens_to_add() + 1
        if length < least:
            raise ValueError(f"{argument}={length} leaves no room for a text: it must be at least {least}")
        positions = longest_sequence(self.config) if hasattr(self.config, "max_position_embeddings") else length
        if length > positions:
            raise ValueError(f"{argument}={length}, but the model has {positions} positions")

    def run(self) -> Result:
        """Trains, evaluates and predicts what there is data for, once a seed, and writes all of it to ``output_dir``.

        Where a search is asked for, that comes first, with the first of the seeds.
        """
        seeds = [int(seed) for seed in (self.args.seeds or "").split(",") if seed]
        self.args.seed = seeds[0] if seeds else self.args.seed
        if "train" in self.tables:
            clear(self.args)
        if self.args.search_trials:
            self.args = search(self)
        if len(seeds) < 2 or "train" not in self.tables:
            return self._run(self.args)
        results = []
        for seed in seeds:
            args = copy.deepcopy(self.args)
            args.seed, args.output_dir = seed, str(Path(self.args.output_dir) / f"seed-{seed}")
            clear(args)
            results.append(self._run(args))
        summary = report.mean_std([result.metrics for result in results])
        runs = {f"seed-{seed}": result.metrics for seed, result in zip(seeds, results, strict=True)}
        report.write_json(Path(self.args.output_dir) / "metrics.json", {"summary": summary, **runs})
        rows = [(name, value["mean"], value["std"]) for name, value in summary.items()]
        report.write_text(Path(self.args.output_dir) / "metrics.txt", report.text_table(("metric", "mean", "std"), rows))
        for name in [name for name in summary if name.startswith("eval_")]:
            print(f"{name}: {summary[name]['mean']:.4f} ± {summary[name]['std']:.4f} over {len(seeds)} seeds")
        best = max if self.greater_is_better else min
        result = best(results, key=lambda result: result.metrics.get(f"eval_{self.metric}", 0.0))
        print(f"all of them: {self.args.output_dir}; the best one:")
        return result

    def _run(self, args):
        set_seed(args.seed)
        folder = Path(args.output_dir)
        model = self.new_model()
        encoded = self.encode_all(*self.tables)
        trainer = self.new_trainer(args, model, encoded)
        metrics = {}
        if "train" in encoded:
            resume = args.resume_from_checkpoint
            trained = trainer.train(resume_from_checkpoint=True if resume == "last" else resume)
            metrics |= trained.metrics | {"train_samples": len(encoded["train"])}
            trainer.save_state()
            if self.model_args.lora_r:
                trainer.model.save_pretrained(folder / "adapter")
                trainer.model = trainer.model.merge_and_unload()
            trainer.save_model(str(folder))
            self.save_more(folder)
        return self.finish(trainer, encoded, folder, metrics)

    def finish(self, trainer: FastTrainer, encoded: dict, folder: Path, metrics: dict[str, float]) -> Result:
        """Evaluates and predicts with the trained model and writes all of it; metrics: of training."""
        predictions = []
        if "validation" in encoded:
            metrics |= self.evaluate(trainer, encoded["validation"], folder)
        if "test" in encoded:
            found, predictions = self.predict(trainer, encoded["test"])
            metrics |= found
        if trainer.is_world_process_zero():
            self._write(trainer, folder, metrics)
            if "test" in encoded:
                rows = [json.dumps(row, ensure_ascii=False, default=str) for row in predictions]
                report.write_text(folder / "predictions.jsonl", "\n".join(rows) + "\n")
        return Result(str(folder), metrics, trainer.model, predictions)

    def new_model(self) -> PreTrainedModel:
        """The model as training begins with it: with adapters, where they are asked for."""
        model = self.build_model()
        return self._with_adapters(model) if self.model_args.lora_r and "train" in self.tables else model

    def encode_all(self, *splits: str) -> dict:
        """What ``encode`` makes of the tables, by split."""
        encoded = {split: self.encode(self.tables[split]) for split in splits}
        if "train" in encoded and self.drops_tokens:
            encoded["train"] = encoded["train"].add_column(UNITS, self.dropout_units(encoded["train"]))
        return encoded

    def new_trainer(self, args: FineTuningArguments, model: PreTrainedModel, encoded: dict) -> FastTrainer:
        """A trainer of ``model`` on what ``encode`` made of the tables, by split; decides in ``args`` what the task does."""
        if args.metric_for_best_model == "auto":
            args.metric_for_best_model, args.greater_is_better = self.metric, self.greater_is_better
        if "validation" not in encoded:
            args.eval_strategy, args.load_best_model_at_end = "no", False
        stopping = args.early_stopping_patience and "validation" in encoded
        self._evaluated = self.tables.get("validation")
        return self.trainer_class(
            model,
            args,
            self.collator(model),
            encoded.get("train"),
            encoded.get("validation"),
            processing_class=self.processing_class(),
            compute_metrics=None if args.prediction_loss_only else self.metrics_now,
            callbacks=[EarlyStoppingCallback(args.early_stopping_patience)] if stopping else None,
            fast=self.model_args.fast,
            precision=self.model_args.precision,
            dropped_token=dropped_token(self.tokenizer) if self.drops_tokens else None,
            **self.trainer_options(),
        )

    def metrics_now(self, prediction: EvalPrediction) -> dict[str, float]:
        """The metrics of predictions on the table that is being predicted."""
        return self.metrics_of(prediction, self._evaluated)

    def predict_table(self, trainer: FastTrainer, dataset, table: Table, prefix: str) -> PredictionOutput:
        """Predictions on ``dataset``, which ``encode`` made of ``table``, and their metrics, named with ``prefix``."""
        before, self._evaluated = self._evaluated, table
        try:
            return trainer.predict(dataset, metric_key_prefix=prefix)
        finally:
            self._evaluated = before

    def predict(self, trainer: FastTrainer, dataset) -> tuple[dict[str, float], list[dict]]:
        """(metrics where the test data has labels, what is predicted for each of its rows)."""
        table = self.tables["test"]
        output = self.predict_table(trainer, dataset, table, "test")
        return output.metrics if output.label_ids is not None else {}, list(self.predictions_of(output, table))

    def evaluate(self, trainer: FastTrainer, dataset, folder: Path) -> dict[str, float]:
        """The metrics of the validation data; writes the report on it."""
        output = self.predict_table(trainer, dataset, self.tables["validation"], "eval")
        if trainer.is_world_process_zero():
            self.write_report(folder, output, self.tables["validation"])
        return output.metrics | {"eval_samples": len(self.tables["validation"])}

    def _write(self, trainer, folder, metrics):
        if "train" not in self.tables:
            # Beside its own model an evaluation adds to what training said.
            before = folder / "metrics.json"
            is_own = folder.resolve() == Path(self.model_args.model_name_or_path or "").resolve() and before.is_file()
            report.write_json(before, {**(json.loads(before.read_text(encoding="utf-8")) if is_own else {}), **metrics})
            return
        report.write_json(folder / "metrics.json", metrics)
        flags = {**as_flags(self.model_args), **as_flags(self.data_args), **training_flags(trainer.args)}
        # A card is for others, who do not have these files where they are here.
        flags = {name: Path(v).name if isinstance(v, str) and os.path.exists(v) else v for name, v in flags.items()}
        report.plot_learning_curves(trainer.state.log_history, folder / "learning_curves.png")
        settings = {"task": self.name, "data": self.remembered()}
        report.write_json(folder / SETTINGS, settings)
        report.model_card(
            folder / "README.md",
            name=folder.resolve().name,
            base_model=self.model_args.model_name_or_path or "random parameters",
            pipeline_tag=self.pipeline_tag,
            metrics={k: v for k, v in metrics.items() if k.startswith("eval_") and not k.endswith(("_runtime", "_second"))},
            hyperparameters=flags,
            data=self.data_args.dataset_name or Path(self.tables["train"].path).name,
            use=self.usage(),
            search=table_of(Path(self.args.output_dir)) if self.args.search_trials else "",
        )

    def remembered(self) -> dict:
        """The data flags that prediction needs again."""
        kept = as_flags(self.data_args)
        forgotten = [
            name for name in kept if name.endswith(("_file", "_samples", "_percentage", "prompt")) or name.startswith("dataset_")
        ]
        return {name: value for name, value in kept.items() if name not in forgotten}

    def _with_adapters(self, model):
        require_extra("peft")
        from peft import LoraConfig, get_peft_model

        given = self.model_args
        try:
            return get_peft_model(
                model,
                LoraConfig(
                    task_type=self.lora_task_type,
                    r=given.lora_r,
                    lora_alpha=given.lora_alpha,
                    lora_dropout=given.lora_dropout,
                    # PEFT's own word for every linear module but the head is no name of one.
                    target_modules=given.lora_target_modules
                    if given.lora_target_modules == "all-linear"
                    else given.lora_target_modules.split(","),
                ),
            )
        except ValueError as error:
            raise ValueError(f"lora_target_modules={given.lora_target_modules!r}: {error}") from None

    def _table(self, split):
        path = getattr(self.data_args, f"{split}_file")
        if path:
            return self.read(path, split)
        if not self.data_args.dataset_name:
            return None
        return self.from_hub(load_hub(self.data_args.dataset_name, self.data_args.dataset_config_name, split), split)

    def from_hub(self, table: Table | None, split: str) -> Table | None:
        """What ``read`` makes of a file, of a data set's split."""
        return table

    def _config(self):
        given = self.model_args
        flag = "config_name" if given.config_name else "model_name_or_path"
        name = getattr(given, flag)
        try:
            return AutoConfig.from_pretrained(name, **self._where())
        except (OSError, ValueError) as error:
            where = "the folder has no model that can be read" if Path(name).is_dir() else "no such folder, and not from the Hub"
            raise ValueError(f"{flag}={name!r}: {where}: {str(error).splitlines()[0]}") from None

    def _where(self):
        return {"cache_dir": self.model_args.cache_dir, "revision": self.model_args.model_revision}
