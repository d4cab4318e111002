"""Fine-tuning an encoder-decoder on sentences in two languages; both halves start from an encoder's checkpoint.

Rothe et al., "Leveraging Pre-trained Checkpoints for Sequence Generation Tasks" (2020); only cross-attention is new.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import EvalPrediction, PredictionOutput

from roberta_fast.tasks.generation import TARGET_TOKENIZER, text_bounds
from roberta_fast.training import report
from roberta_fast.training.arguments import TranslationArguments, require_extra
from roberta_fast.training.bpe import byte_level_bpe
from roberta_fast.training.data import TABLES, Table, read_lines, read_parallel, read_table
from roberta_fast.training.fine_tuning import FineTuning
from roberta_fast.training.trainer import FastSeq2SeqTrainer

WORST = 50


class Translation(FineTuning):
    """``roberta-fast finetune translation``."""

    name = "translation"
    pipeline_tag = "translation"
    lora_task_type = "SEQ_2_SEQ_LM"
    data_class = TranslationArguments
    trainer_class = FastSeq2SeqTrainer
    metric = "bleu"
    highest = 100.0

    def read(self, path: str, split: str) -> Table:
        given = self.data_args
        if Path(path).suffix.lower() in TABLES:
            return self.from_hub(read_table(path), split)
        # train.en names train.en and train.de, and so does train.
        stem = Path(path).with_suffix("") if Path(path).suffix == f".{given.source_lang}" else Path(path)
        source, target = (Path(f"{stem}.{language}") for language in (given.source_lang, given.target_lang))
        if split == "test" and not target.is_file():
            lines = read_lines(source if source.is_file() else path)
            return Table(lines.path, {"source": lines.column("text")}, lines.lines)
        return read_parallel(source, target)

    def from_hub(self, table: Table | None, split: str) -> Table | None:
        if table is None:
            return None
        languages = self.data_args.source_lang, self.data_args.target_lang
        if "translation" not in table.columns:
            columns = [table.column(language) for language in (languages[:1] if split == "test" else languages)]
        else:
            columns = [[], []]
            for row, pair in enumerate(table.column("translation")):
                for side, language in zip(columns, languages, strict=True):
                    if not isinstance(pair, dict) or language not in pair:
                        raise table.error(row, f"translation has no {language!r}: {pair!r:.80}")
                    side.append(pair[language])
        for language, side in zip(languages, columns, strict=False):
            for row, text in enumerate(side):
                if not isinstance(text, str) or not text.strip():
                    raise table.error(row, f"{language} is no text: {text!r:.60}")
        return Table(table.path, dict(zip(("source", "target"), columns, strict=False)), table.lines, table.where)

    def prepare(self) -> None:
        require_extra("sacrebleu")
        given = self.data_args
        if given.num_beams < 1:
            raise ValueError(f"num_beams={given.num_beams} must be at least 1")
        self.is_trained = self.config.model_type == "encoder-decoder"
        if "train" not in self.tables and not self.is_trained:
            path = self.model_args.model_name_or_path
            raise ValueError(f"model_name_or_path={path!r} is no encoder-decoder yet: train_file is needed")
        self.target_tokenizer = self._target_tokenizer()
        whole = self.config
        for half, length, name in (
            ("encoder", given.max_source_length, "source"),
            ("decoder", given.max_target_length, "target"),
        ):
            self.config = getattr(whole, half) if self.is_trained else whole
            self.check_length(length, f"max_{name}_length")
        self.config = whole
        self.args.predict_with_generate = True
        self.args.generation_max_length, self.args.generation_num_beams = given.max_target_length, given.num_beams

    def _target_tokenizer(self) -> PreTrainedTokenizerBase:
        given = self.data_args
        beside = Path(self.model_args.model_name_or_path or "") / TARGET_TOKENIZER
        if given.decoder_tokenizer_name:
            return AutoTokenizer.from_pretrained(given.decoder_tokenizer_name, **self._where())
        if self.is_trained and beside.is_dir():
            return AutoTokenizer.from_pretrained(beside)
        if given.decoder_vocab_size:
            return byte_level_bpe(self.tables["train"].column("target"), given.decoder_vocab_size)
        return self.tokenizer

    def build_model(self) -> PreTrainedModel:
        if self.is_trained:
            return EncoderDecoderModel.from_pretrained(self.model_args.model_name_or_path, **self._where())
        source, target = self.model_args.model_name_or_path, self.data_args.decoder_name_or_path
        decoder = (
            AutoConfig.from_pretrained(target, **self._where()) if target else type(self.config).from_dict(self.config.to_dict())
        )
        decoder.is_decoder = decoder.add_cross_attention = True
        decoder.vocab_size = len(self.target_tokenizer)
        for name in ("bos", "eos", "pad"):
            setattr(decoder, f"{name}_token_id", getattr(self.target_tokenizer, f"{name}_token_id"))
        if source:
            # Embeddings for another tokenizer begin anew.
            model = EncoderDecoderModel.from_encoder_decoder_pretrained(
                source,
                target or source,
                encoder_config=self.config,
                decoder_config=decoder,
                decoder_ignore_mismatched_sizes=True,
            )
        else:
            model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(self.config, decoder))
        self._configure(model)
        return model

    def _configure(self, model):
        """What shifting labels and generation ask of the config."""
        tokenizer = self.target_tokenizer
        begin, end = text_bounds(tokenizer)
        if None in (begin, end, tokenizer.pad_token_id):
            raise ValueError("decoder_tokenizer_name: the target's tokenizer lacks a token for the begin, the end or padding")
        for config in (model.config, model.generation_config):
            config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = begin, end, tokenizer.pad_token_id
        model.config.vocab_size = model.config.decoder.vocab_size
        model.generation_config.bos_token_id = begin
        model.generation_config.max_length = self.data_args.max_target_length
        model.generation_config.num_beams = self.data_args.num_beams
        if self.data_args.num_beams > 1:  # without beams a config with either is not saved
            model.generation_config.length_penalty = self.data_args.length_penalty
        model.generation_config.early_stopping = self.data_args.num_beams > 1

    def encode(self, table: Table):
        from datasets import Dataset

        given = self.data_args
        encoded = dict(self.tokenizer(table.column("source"), truncation=True, max_length=given.max_source_length))
        lengths = [len(ids) for ids in encoded["input_ids"]]
        if "target" in table.columns:
            # Positions of the target begin with the token for the begin, which shifting puts in front.
            targets = self.target_tokenizer(table.column("target"), truncation=True, max_length=given.max_target_length)
            begin = self.target_tokenizer.bos_token_id or self.target_tokenizer.cls_token_id
            encoded["labels"] = [ids[1:] if ids[:1] == [begin] else ids for ids in targets["input_ids"]]
            lengths = [source + len(target) for source, target in zip(lengths, encoded["labels"], strict=True)]
        return Dataset.from_dict({**encoded, "length": lengths})

    def collator(self, model: PreTrainedModel):
        # Label smoothing takes the labels away, from which the model would make its decoder's inputs.
        return _Collator(self.tokenizer, model if self.args.label_smoothing_factor else None)

    def processing_class(self):
        """None: the config's special tokens are the target's. The collator's tokenizer, the source's, is saved."""

    def _texts(self, ids):
        ids = np.where(ids < 0, self.target_tokenizer.pad_token_id, ids)
        return [text.strip() for text in self.target_tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def metrics_of(self, prediction: EvalPrediction, table: Table) -> dict[str, float]:
        return translation_scores(self._texts(prediction.predictions), table.column("target"))

    def measured(self) -> list[str]:
        return list(translation_scores(["a"], ["a"]))

    def write_report(self, folder: Path, output: PredictionOutput, table: Table) -> None:
        import sacrebleu

        found, truth = self._texts(output.predictions), table.column("target")
        scores = [sacrebleu.sentence_chrf(text, [gold]).score for text, gold in zip(found, truth, strict=True)]
        metric = sacrebleu.BLEU()
        metric.corpus_score(found, [truth])
        rows = [
            (name, float(np.percentile(scores, p))) for name, p in (("lowest fifth", 20), ("median", 50), ("highest fifth", 80))
        ]
        text = report.text_table(("chrF of a sentence", "score"), rows) + f"\nBLEU: {metric.get_signature()}\n"
        report.write_text(folder / "report.txt", text)
        worst = np.argsort(scores)[:WORST]
        lines = [
            f"{table.where} {table.lines[i]}: chrF {scores[i]:.1f}\n    {table.column('source')[i]}\n    predicted {found[i]}\n"
            f"    true {truth[i]}"
            for i in worst
        ]
        report.write_text(folder / "mistakes.txt", "\n".join(lines) + "\n")

    def predictions_of(self, output: PredictionOutput, table: Table) -> Iterator[dict]:
        for source, text in zip(table.column("source"), self._texts(output.predictions), strict=True):
            yield {"source": source, "translation": text}

    def save_more(self, folder: Path) -> None:
        if self.target_tokenizer is not self.tokenizer:
            self.target_tokenizer.save_pretrained(folder / TARGET_TOKENIZER)

    def usage(self) -> str:
        return f"""from transformers import AutoTokenizer, EncoderDecoderModel

folder = "path/to/this/folder"
source = AutoTokenizer.from_pretrained(folder)
target = AutoTokenizer.from_pretrained(folder{f' + "/{TARGET_TOKENIZER}"' if self.target_tokenizer is not self.tokenizer else ""})
model = EncoderDecoderModel.from_pretrained(folder)
made = model.generate(**source("A sentence.", return_tensors="pt"))
print(target.batch_decode(made, skip_special_tokens=True))"""


class _Collator(DataCollatorForSeq2Seq):
    """Leaves out labels that are None, as Hugging Face's makes them of sentences without a translation."""

    def __call__(self, features, return_tensors=None):
        batch = super().__call__(features, return_tensors)
        return {name: value for name, value in batch.items() if value is not None}


def translation_scores(found: list[str], truth: list[str]) -> dict[str, float]:
    """BLEU and chrF of a corpus with one reference each, by sacreBLEU with its defaults."""
    import sacrebleu

    return {"bleu": sacrebleu.corpus_bleu(found, [truth]).score, "chrf": sacrebleu.corpus_chrf(found, [truth]).score}
