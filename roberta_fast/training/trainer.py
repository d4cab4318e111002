"""Hugging Face's Trainer on the accelerated encoder, with batches by token budget and checkpoints that are whole.

Schedules, optimizers, weight-decay groups, mixed precision, DDP, FSDP and logging are Trainer's own.
"""

import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.trainer import PREFIX_CHECKPOINT_DIR, TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints, seed_worker

from roberta_fast.accelerate import accelerate_model
from roberta_fast.training.batching import TokenBatchSampler
from roberta_fast.training.checkpoints import STAGING, last_complete_checkpoint, publish, write_checksums
from roberta_fast.training.throughput import Throughput, peak_flops
from roberta_fast.training.token_dropout import UNITS, EpochOfDropout, TokenDropout
from roberta_fast.training.training_arguments import FastTrainingArguments


class CheckpointError(OSError):
    """A checkpoint that cannot be written."""


class NotFiniteError(FloatingPointError):
    """A loss or gradient that is no number."""


class UnknownMetricError(LookupError):
    """A metric to choose a model by that evaluation does not measure."""


class _FastTraining:
    """What ``FastTrainer`` and ``FastSeq2SeqTrainer`` add to Trainer.

    fast: accelerate the model's encoders. precision: as in ``FastOptions``, for evaluation and prediction alone.
    class_weights: the weight of each class in the cross-entropy, float [num_labels], for models with one label a text.
    dropped_token: the id that takes the place of tokens which ``token_dropout`` of the arguments drops, see ``TokenDropout``.
    """

    def __init__(
        self,
        model=None,
        args=None,
        *rest,
        fast: bool = True,
        precision: str | None = None,
        class_weights: Sequence[float] | None = None,
        dropped_token: int | None = None,
        **kwargs,
    ):
        args = args or FastTrainingArguments("trainer_output")
        self._precision, self._fast = precision, fast
        if fast and model is not None:
            accelerate_model(model, precision=precision)
        super().__init__(model, args, *rest, **kwargs)
        if class_weights is not None:
            self._weigh_classes(class_weights)
        self.dropped_token = dropped_token
        if dropped_token is not None:
            self.add_callback(EpochOfDropout())
        self.throughput, self._peak, self._rates, self._staging = None, None, {}, None

    def _weigh_classes(self, class_weights):
        classes = self.model.config.num_labels
        if len(class_weights) != classes:
            raise ValueError(f"class_weights has {len(class_weights)} weights for num_labels={classes}")
        weights = torch.tensor(class_weights, dtype=torch.float32, device=self.args.device)
        smoothing = self.args.label_smoothing_factor

        def loss(outputs, labels, num_items_in_batch=None):
            logits = outputs["logits"].float()
            return F.cross_entropy(logits.view(-1, classes), labels.view(-1), weights, label_smoothing=smoothing)

        self.compute_loss_func, self.loss_is_scaled_for_ga = loss, False

    def call_model_init(self, trial=None) -> nn.Module:
        """Trainer's, with a fast encoder in the new model."""
        model = super().call_model_init(trial)
        return accelerate_model(model, precision=self._precision) if self._fast else model

    def batch_sampler(self) -> Sampler[list[int]] | None:
        """Batches by token budget where the arguments ask for it; None for Trainer's own."""
        budget = getattr(self.args, "tokens_per_batch", 0)
        if not budget or self.train_dataset is None or not hasattr(self.train_dataset, "__len__"):
            return None
        return TokenBatchSampler(
            text_lengths(self.train_dataset),
            budget,
            seed=data_seed(self.args),
            num_replicas=self.args.world_size,
            rank=self.args.process_index,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Batches of ``batch_sampler`` where there is one, Trainer's else."""
        sampler = self.batch_sampler()
        if sampler is None:
            return super().get_train_dataloader()
        from accelerate.data_loader import prepare_data_loader

        dataset, collator = self.train_dataset, self.data_collator
        if hasattr(dataset, "column_names"):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="training")
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=self.args.process_index),
        )
        # The sampler deals the batches out itself, so that each process has as many.
        return prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0, put_on_device=True)

    def _remove_unused_columns(self, dataset, description=None):
        kept = super()._remove_unused_columns(dataset, description)
        if self.dropped_token is None or dataset is not self.train_dataset:
            return kept
        examples = dataset.select_columns(list({**dict.fromkeys(kept.column_names), UNITS: None}))
        return TokenDropout(examples, self.args.token_dropout, self.dropped_token, data_seed(self.args))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's, with a learning rate that falls from layer to layer where ``layer_lr_decay`` asks for it."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        decay = getattr(self.args, "layer_lr_decay", 1.0)
        if is_new and decay != 1.0:
            depths = layer_depths(self.model if model is None else model)
            optimizer.param_groups[:] = [g for group in optimizer.param_groups for g in _by_depth(group, depths, decay)]
        return optimizer

    def training_step(self, model, inputs, *args, **kwargs) -> torch.Tensor:
        """Trainer's; counts the batch."""
        if self.throughput is None:
            self.throughput = Throughput(self.accelerator.unwrap_model(model))
            self.throughput.start()
        self.throughput.add(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Trainer's, as the mean over all items of a step, in however many micro-batches they come.

        Many heads return the mean of their own batch, whatever they are told of the others, where Trainer takes it for their
        share of the sum: a loss that is too large by ``gradient_accumulation_steps``. So all are asked for their mean.
        """
        if num_items_in_batch is None or self.compute_loss_func is not None or self.args.n_gpu > 1:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.get("shift_labels", inputs["labels"][..., 1:] if self._shifts_labels() else inputs["labels"])
        items = labels.ne(-100).sum()
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        # Processes' gradients are averaged, and where items are counted in all of them, what is wanted is the sum.
        world = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        loss = torch.where(items > 0, loss * items / num_items_in_batch * world, 0.0)
        return (loss, outputs) if return_outputs else loss

    def _shifts_labels(self):
        return getattr(self, "_loss_shifts_labels", False)  # of newer Trainers, for causal language models

    def floating_point_ops(self, inputs) -> int:
        """0: operations are counted on the device, for real tokens, and read when something is logged or saved."""
        return 0

    def store_flos(self) -> None:
        """Reads the counts of tokens and operations since the last call."""
        if self.throughput is not None:
            tokens, flops, seconds = self.throughput.drain()
            everywhere = self.accelerator.reduce(torch.tensor(tokens, device=self.args.device)).item()
            self.current_flos += flops
            if self.args.include_num_input_tokens_seen == "no":
                self.state.num_input_tokens_seen += everywhere
            if seconds and tokens:
                if self._peak is None:
                    self._peak = peak_flops(self.args.device, self._compute_dtype())
                self._rates = {"tokens_per_second": round(everywhere / seconds), "mfu": round(flops / seconds / self._peak, 4)}
        super().store_flos()

    def _compute_dtype(self):
        return torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else next(self.model.parameters()).dtype

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with real tokens a second and model FLOPs utilization since the last line."""
        if "loss" in logs:
            logs |= self._rates
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs):
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self._stop_unless_finite(tr_loss, grad_norm)
        if self.state.global_step >= self.state.max_steps and self.args.logging_strategy != "no":
            self.control.should_log = True  # the last steps too
        if self.throughput is not None:
            self.throughput.stop()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        if self.throughput is not None:
            self.throughput.start()

    def _determine_best_metric(self, metrics, trial):
        require_metric(self.args.metric_for_best_model, metrics)
        return super()._determine_best_metric(metrics, trial)

    def _stop_unless_finite(self, tr_loss, grad_norm):
        """Raises NotFiniteError in all processes before anything is logged or saved of a model that has come apart."""
        values = [float(tr_loss)]
        if grad_norm is not None and not self.args.fp16:  # loss scaling finds its scale by overflows
            values.append(float(grad_norm))
        is_bad = torch.tensor(float(not all(map(math.isfinite, values))), device=self.args.device)
        if self.accelerator.reduce(is_bad).item():
            raise NotFiniteError(
                f"the loss or its gradient is not finite at step {self.state.global_step} (loss {values[0]}, gradient norm "
                f"{values[-1]}); {self._last_good_checkpoint(self.state.global_step - 1)}. "
                f"A lower learning_rate (now {self.args.learning_rate}), a longer warm-up or bf16 in place of fp16 may help"
            )

    def _last_good_checkpoint(self, before=math.inf):
        """before: a step whose weights have made no finite loss yet, so that a checkpoint of them may be as bad."""
        last = last_complete_checkpoint(self.args.output_dir, before)
        return f"the last good checkpoint is {last}" if last else "there is no good checkpoint yet"

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Trainer's; ``True`` resumes from the last complete checkpoint of the output folder, or begins where there is none."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                warnings.warn(f"there is no checkpoint in {self.args.output_dir}: training begins anew", stacklevel=2)
        self.throughput = None
        return super().train(resume_from_checkpoint, **kwargs)

    def _finalize_training(self, trial, num_train_samples, start_time):
        """Trainer's, by the texts that were seen: a batch of tokens holds no fixed number of them."""
        if self.throughput is not None:
            seen = torch.tensor(self.throughput.texts, device=self.args.device)
            num_train_samples = int(self.accelerator.reduce(seen).item())
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return folder if self._staging is None else self._staging

    def _save_checkpoint(self, model, trial):
        """Trainer's, under another name until all is written."""
        folder = Path(super()._get_output_dir(trial))
        staging, name = folder / STAGING, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        # torch and safetensors tell of a full disk in errors of their own.
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {self.state.global_step} cannot be written: {error}; {self._last_good_checkpoint()}"
            ) from error
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step:
            best = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best.name == name or best.exists():
                self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.save_to_json(os.path.join(staging, name, TRAINER_STATE_NAME))
            write_checksums(staging / name)
            publish(staging / name, folder / name)
            shutil.rmtree(staging, ignore_errors=True)
            rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(folder / name))

    def _push_from_checkpoint(self, checkpoint_folder):
        """Waits until the checkpoint is where it stays."""


class FastTrainer(_FastTraining, Trainer):
    """``transformers.Trainer`` on the accelerated encoder, with what ``FastTrainingArguments`` adds.

    The log holds ``tokens_per_second`` (real tokens, all processes) and ``mfu`` (of a matrix product measured on this device).
    Raises NotFiniteError where a loss or gradient is not finite, before it reaches a checkpoint.
    """


class FastSeq2SeqTrainer(_FastTraining, Seq2SeqTrainer):
    """The same for encoder-decoders, with generation in evaluation."""


def require_metric(name: str | None, metrics: Mapping[str, float]) -> None:
    """Raises UnknownMetricError where ``metrics`` of an evaluation lack the one of ``metric_for_best_model``."""
    if name is not None and f"eval_{name.removeprefix('eval_')}" not in metrics:
        raise UnknownMetricError(
            f"metric_for_best_model={name!r} is none of what is measured: "
            + ", ".join(key.removeprefix("eval_") for key in metrics if key.startswith("eval_"))
        )


def data_seed(args: TrainingArguments) -> int:
    """What the order of the training data, and what token dropout hides of it, are drawn by."""
    return args.seed if args.data_seed is None else args.data_seed


def text_lengths(dataset) -> list[int]:
    """The tokens of each text of ``dataset``: its column ``length``, or the lengths of ``input_ids``."""
    columns = getattr(dataset, "column_names", ())
    if "length" in columns:
        return list(dataset["length"])
    if "input_ids" in columns:
        return [len(ids) for ids in dataset["input_ids"]]
    return [len(example["input_ids"]) for example in dataset]


def layer_depths(model: nn.Module) -> dict[nn.Parameter, int]:
    """How many layers lie above each parameter, 0 for heads; embeddings lie one below the first layer."""
    found = [(p, re.search(r"\.(?:layer|layers|h)\.(\d+)\.", name), name) for name, p in model.named_parameters()]
    count = 1 + max((int(match[1]) for _, match, _ in found if match), default=-1)

    def depth(match, name):
        if match:
            return count - int(match[1])
        return count + 1 if "embeddings" in name.lower() else 0

    return {parameter: depth(match, name) for parameter, match, name in found}


def _by_depth(group, depths, decay):
    """A parameter group as one for each depth, with the learning rate that it has there."""
    by_depth = {}
    for parameter in group["params"]:
        by_depth.setdefault(depths.get(parameter, 0), []).append(parameter)
    return [{**group, "params": params, "lr": group["lr"] * decay**depth} for depth, params in sorted(by_depth.items())]
