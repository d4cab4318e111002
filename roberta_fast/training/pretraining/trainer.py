"""Trainer for masked-language models on packed blocks."""

import math
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, seed_worker

from roberta_fast.training.trainer import FastTrainer


@dataclass
class PretrainingArguments(TrainingArguments):
    """TrainingArguments, and what pretraining adds. Raises ValueError naming an argument out of its range."""

    _argument_group_name = "training"

    global_batch_size: int = field(
        default=0,
        metadata={
            "help": "Blocks in an optimizer step; 0: per_device_train_batch_size × gradient_accumulation_steps × processes."
        },
    )
    batch_size_warmup_steps: int = field(default=0, metadata={"help": "Steps in which the batch grows linearly."})
    batch_size_warmup_start: int | None = field(
        default=None, metadata={"help": "Blocks in the first step of these; default: an eighth of the batch."}
    )
    length_warmup_steps: int = field(default=0, metadata={"help": "Steps on shorter blocks, whose length doubles."})
    length_warmup_start: int = field(default=64, metadata={"help": "Tokens of the first blocks of these."})
    lr_decay_ratio: float | None = field(
        default=None, metadata={"help": "Share of the steps in which warmup_stable_decay decays, as 1 - sqrt."}
    )
    min_lr_ratio: float = field(default=0.0, metadata={"help": "What warmup_stable_decay ends with, of the learning rate."})
    decay_all_parameters: bool = field(default=False, metadata={"help": "Weight decay of biases and LayerNorms too."})
    deterministic: bool = field(default=False, metadata={"help": "The same bits in every run."})
    early_stopping_patience: int = field(
        default=0, metadata={"help": "Stop after as many evaluations without a lower loss; 0: never."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are not finite from the log."})
    logging_steps: float = field(default=50, metadata={"help": "Steps from one line of the log to the next."})
    save_total_limit: int | None = field(default=3, metadata={"help": "Checkpoints that are kept."})

    def __post_init__(self):
        self.full_determinism = self.full_determinism or self.deterministic
        if self.deterministic and (self.bf16 or self.fp16):
            raise ValueError("deterministic=True computes in float32: bf16 and fp16 do not go with it")
        if self.early_stopping_patience < 0:
            raise ValueError(f"early_stopping_patience={self.early_stopping_patience} must be 0 or more")
        if self.lr_decay_ratio is not None and not 0 < self.lr_decay_ratio <= 1:
            raise ValueError(f"lr_decay_ratio={self.lr_decay_ratio} must be above 0 and at most 1")
        if not 0 <= self.min_lr_ratio < 1:
            raise ValueError(f"min_lr_ratio={self.min_lr_ratio} must be at least 0 and below 1")
        if self.early_stopping_patience or self.load_best_model_at_end:
            self.metric_for_best_model = self.metric_for_best_model or "loss"
        super().__post_init__()
        self.global_batch_size, self.gradient_accumulation_steps = self._batch()

    def _batch(self):
        """(blocks in a step, micro-batches of a process in it)."""
        if self.global_batch_size < 0 or self.per_device_train_batch_size < 1:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} must be 0 or more, and per_device_train_batch_size="
                f"{self.per_device_train_batch_size} at least 1"
            )
        at_once = self.per_device_train_batch_size * self.world_size
        if not self.global_batch_size:
            return at_once * self.gradient_accumulation_steps, self.gradient_accumulation_steps
        follows = math.ceil(self.global_batch_size / at_once)
        if self.gradient_accumulation_steps not in (1, follows):
            raise ValueError(
                f"global_batch_size={self.global_batch_size} over {self.world_size} processes of per_device_train_batch_size="
                f"{self.per_device_train_batch_size} makes {follows} micro-batches, and gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps} is given: leave it out, or set global_batch_size to 0"
            )
        return self.global_batch_size, follows


class PretrainingTrainer(FastTrainer):
    """``FastTrainer`` for masked-language models.

    train_dataset: ``TrainingBatches``, eval_dataset: ``EvaluationBatches``, of whole micro-batches. The loss is the mean over all
    predicted tokens of a step, whatever it is divided into; the log has the passes over the corpus as ``corpus_epoch``.
    """

    def get_train_dataloader(self) -> DataLoader:
        """Micro-batches in their order; each process takes every world-size-th one."""
        return self._loader(self.train_dataset, len(self.train_dataset))

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """As many micro-batches in each process: the first one stands in where they run out, with no weight."""
        dataset = eval_dataset or self.eval_dataset
        return self._loader(dataset, math.ceil(len(dataset) / self.args.world_size) * self.args.world_size)

    def _loader(self, dataset, count):
        from accelerate.data_loader import prepare_data_loader

        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            dataset,
            batch_sampler=_Numbers(range(self.args.process_index, count, self.args.world_size), len(dataset)),
            collate_fn=_only,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=lambda worker: seed_worker(worker, workers, self.args.process_index),
        )
        return prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0, put_on_device=True)

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"):
        """``eval_loss``, the mean over all predicted tokens of all processes, and ``eval_perplexity``, its exponential."""
        model = self._wrap_model(self.model, training=False)
        if not self.accelerator._models and model is self.model:  # not trained yet
            prepared = self.accelerator.prepare(model) if self.is_fsdp_enabled else None
            model = prepared or self.accelerator.prepare_model(model, evaluation_mode=True)
            if self.is_fsdp_enabled:
                self.model = model
            self.model_wrapped = model
        was_training = model.training
        model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        dataset, world = dataloader.dataset, self.args.world_size
        for step, inputs in enumerate(dataloader):
            counts = step * world + self.args.process_index < len(dataset)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = model(**self._prepare_inputs(inputs))["loss"]
            predicted = (inputs["labels"] != -100).sum()
            if counts:
                totals += torch.stack([loss.double() * predicted, predicted.double()])
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        summed, predicted = self.accelerator.reduce(totals).tolist()
        loss = summed / predicted
        metrics = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else float("inf"), "predicted_tokens": int(predicted)}
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=dataset.count,
        )

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Trainer's; ``warmup_stable_decay`` gets its parts from the number of steps."""
        if self.args.lr_scheduler_type == "warmup_stable_decay" and self.args.lr_decay_ratio:
            warmup = self.args.get_warmup_steps(num_training_steps)
            decay = min(round(num_training_steps * self.args.lr_decay_ratio), num_training_steps - warmup)
            self.args.lr_scheduler_kwargs = {
                "num_decay_steps": decay,
                "decay_type": "1-sqrt",
                "min_lr_ratio": self.args.min_lr_ratio,
                **(self.args.lr_scheduler_kwargs or {}),
            }
        return super().create_scheduler(num_training_steps, optimizer)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The names of parameters with weight decay: matrices, or all where the arguments say so."""
        if self.args.decay_all_parameters:
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """FastTrainer's, with the passes over the corpus, and the perplexity that the training loss is."""
        if "loss" in logs:
            logs["corpus_epoch"] = round(self.train_dataset.epoch(self.state.global_step), 4)
        super().log(logs, start_time)


class _Numbers(Sampler[list[int]]):
    """Each of ``numbers`` as a batch of its own, those behind the last as 0."""

    def __init__(self, numbers: range, count: int):
        self.numbers, self.count = numbers, count

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self):
        return ([number if number < self.count else 0] for number in self.numbers)


def _only(batches: list[dict]) -> dict:
    (batch,) = batches
    return batch
