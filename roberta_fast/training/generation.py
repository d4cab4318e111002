"""Fine-tuning as a causal language model, whose attention looks back only: perplexity, and continuations of a prompt."""

import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, default_data_collator

from roberta_fast.families import position_ids
from roberta_fast.tasks.generation import text_bounds
from roberta_fast.training import report
from roberta_fast.training.arguments import GenerationArguments
from roberta_fast.training.data import TABLES, DataError, Table, read_lines, read_table
from roberta_fast.training.fine_tuning import FineTuning

TEXT_COLUMNS = ("text", "sentence")


class Generation(FineTuning):
    """``roberta-fast finetune generation``. The test data holds prompts."""

    name = "generation"
    pipeline_tag = "text-generation"
    lora_task_type = "CAUSAL_LM"
    data_class = GenerationArguments
    metric = "loss"
    greater_is_better = False

    def read(self, path: str, split: str) -> Table:
        return read_table(path) if Path(path).suffix.lower() in TABLES else read_lines(path)

    def _table(self, split):
        if split == "test" and self.data_args.prompt:
            return Table("prompt", {"text": [self.data_args.prompt]}, [1])
        return super()._table(split)

    def prepare(self) -> None:
        given = self.data_args
        self.config.is_decoder = True
        self.args.prediction_loss_only = True
        self.check_length(given.block_size, "block_size")
        if given.temperature <= 0:
            raise ValueError(f"temperature={given.temperature} must be above 0; --no-do-sample takes the likeliest token")
        if given.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={given.max_new_tokens} must be at least 1")
        if given.top_k < 0:
            raise ValueError(f"top_k={given.top_k} must be 0 or more")
        if not 0 < given.top_p <= 1:
            raise ValueError(f"top_p={given.top_p} must be above 0 and at most 1")
        self.begin, self.end = text_bounds(self.tokenizer)
        if None in (self.begin, self.end):
            raise ValueError(
                "the tokenizer lacks bos_token and cls_token, or eos_token and sep_token, by which texts are divided"
            )
        for table in self.tables.values():
            column = self._column(table)
            for row, text in enumerate(table.column(column)):
                if not isinstance(text, str):
                    raise table.error(row, f"{column} is no text: {text!r:.60}")
        if "test" in self.tables:
            for prompt in self.tables["test"].column(self._column(self.tables["test"])):
                self.check_length(len(self._prompt(prompt)) + given.max_new_tokens, "the prompt's tokens + max_new_tokens")

    def _column(self, table):
        return self.data_args.text_column_name or next((c for c in TEXT_COLUMNS if c in table.columns), "text")

    def build_model(self) -> PreTrainedModel:
        return self.load_model(AutoModelForCausalLM)

    def encode(self, table: Table):
        """Blocks of ``block_size`` tokens; the rest behind the last one is left out."""
        from datasets import Dataset

        if table is self.tables.get("test"):
            return None
        texts = self.tokenizer(table.column(self._column(table)), add_special_tokens=False, verbose=False)["input_ids"]
        tokens = list(chain.from_iterable([self.begin, *ids, self.end] for ids in texts))
        size = self.data_args.block_size
        blocks = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]
        if not blocks:
            raise DataError(f"{table.path}: {len(tokens)} tokens do not fill one block of block_size={size}")
        return Dataset.from_dict({"input_ids": blocks, "attention_mask": [[1] * size] * len(blocks), "labels": blocks})

    def collator(self, model: PreTrainedModel):
        return default_data_collator

    def measured(self) -> list[str]:
        return []  # the perplexity follows from the loss

    def evaluate(self, trainer, dataset, folder: Path) -> dict[str, float]:
        metrics = trainer.evaluate(dataset)
        return metrics | {"eval_perplexity": perplexity(metrics["eval_loss"]), "eval_samples": len(dataset)}

    def predict(self, trainer, dataset) -> tuple[dict[str, float], list[dict]]:
        table = self.tables["test"]
        rows = list(self._continuations(trainer.model, table.column(self._column(table))))
        folder = Path(trainer.args.output_dir)
        report.write_text(folder / "continuations.txt", "\n\n".join(row["prompt"] + row["continuation"] for row in rows) + "\n")
        return {}, rows

    def _prompt(self, text):
        return [self.begin, *self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    def _continuations(self, model, prompts) -> Iterator[dict]:
        """One by one: prompts of different lengths would have to be padded on the left."""
        given = self.data_args
        sampling = {"do_sample": False}
        if given.do_sample:
            sampling = {"do_sample": True, "temperature": given.temperature, "top_k": given.top_k, "top_p": given.top_p}
        model.eval()
        for prompt in prompts:
            ids = self._prompt(prompt)
            inputs = torch.tensor([ids], device=model.device)
            mask = torch.ones_like(inputs)
            made = model.generate(
                inputs,
                attention_mask=mask,
                position_ids=position_ids(model.config, mask),
                max_new_tokens=given.max_new_tokens,
                eos_token_id=self.end,
                pad_token_id=self.tokenizer.pad_token_id,
                **sampling,
            )
            text = self.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
            yield {"prompt": prompt, "continuation": text}


def perplexity(loss: float) -> float:
    """exp of the mean negative log-likelihood of a token; infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
