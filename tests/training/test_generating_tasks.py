"""Translation and generation: tiny models that learn, scores, tokenizers of both sides, loading in stock Hugging Face."""

import math
from pathlib import Path

import pytest
from tiny_tasks import ENGLISH, GOOD, QUICK, jsonl_file, run_card, translations
from transformers import AutoModelForCausalLM, AutoTokenizer, EncoderDecoderModel

from roberta_fast.training import DataError, finetune, predict
from roberta_fast.training.bpe import byte_level_bpe
from roberta_fast.training.generation import perplexity
from roberta_fast.training.translation import translation_scores

# Decoders take the stock path where no kernel serves them, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:roberta_fast.*decoder mode:RuntimeWarning")
BEAMS = {"num_beams": 2, "max_target_length": 8, "max_source_length": 8}


def translate(folder, checkpoint, train, validation, **flags):
    quick = {k: v for k, v in QUICK.items() if k != "max_seq_length"} | BEAMS | {"num_train_epochs": 10}
    files = {"train_file": train, "validation_file": validation, "output_dir": str(folder / "out")}
    return finetune("translation", **{**quick, **flags}, model_name_or_path=checkpoint, **files)


@pytest.fixture(scope="module")
def translator(tmp_path_factory, tiny_checkpoint):
    folder = tmp_path_factory.mktemp("translation")
    train, validation = translations(folder / "train", 80), translations(folder / "val", 8, seed=1)
    return translate(
        folder,
        tiny_checkpoint,
        train,
        validation,
        decoder_vocab_size=300,
        eval_strategy="no",
        load_best_model_at_end=False,
        seed=1,
    )


def test_translation_learns_and_loads_in_stock_hugging_face(translator):
    assert translator.metrics["eval_chrf"] > 30
    folder = Path(translator.output_dir)
    assert "BLEU: nrefs:1|case:mixed" in (folder / "report.txt").read_text()
    model = EncoderDecoderModel.from_pretrained(folder)
    source, target = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder / "decoder_tokenizer")
    assert model.config.pad_token_id == target.pad_token_id and model.config.decoder.vocab_size == len(target) != len(source)
    made = model.generate(**source("red", return_tensors="pt"))
    assert run_card(folder)["made"].shape[0] == 1
    assert set(target.decode(made[0], skip_special_tokens=True).split()) <= set(ENGLISH.values())


def test_translation_of_new_sentences(translator, tmp_path):
    (tmp_path / "new.en").write_text("red\ntwo three\n")
    rows = predict(translator.output_dir, tmp_path / "new.en", use_cpu=True, disable_tqdm=True)
    assert [row["source"] for row in rows] == ["red", "two three"] and all(row["translation"] for row in rows)


def test_translation_with_one_tokenizer_smoothing_and_json(tmp_path, tiny_checkpoint):
    rows = [{"translation": {"en": a, "de": b}} for a, b in ENGLISH.items()]
    train = jsonl_file(tmp_path / "a.jsonl", rows)
    result = translate(tmp_path, tiny_checkpoint, train, train, num_train_epochs=1, label_smoothing_factor=0.1)
    assert math.isfinite(result.metrics["eval_bleu"]) and not (Path(result.output_dir) / "decoder_tokenizer").exists()


def test_scores_are_sacrebleus():
    perfect = ["ein Mann geht nach Hause .", "zwei Hunde laufen am Strand ."]
    assert translation_scores(perfect, perfect) == {"bleu": pytest.approx(100.0), "chrf": pytest.approx(100.0)}
    assert translation_scores(["nichts"] * 2, perfect)["bleu"] < 5


def test_without_beams_a_length_penalty_has_no_effect(tmp_path, tiny_checkpoint):
    """Together they made a generation config that cannot be saved, as was seen at the first checkpoint."""
    train = translations(tmp_path / "t", 8)
    result = translate(tmp_path, tiny_checkpoint, train, None, num_beams=1, length_penalty=2.0, max_steps=1)
    assert EncoderDecoderModel.from_pretrained(result.output_dir).generation_config.num_beams == 1


def test_translation_stops_before_training(tmp_path, tiny_checkpoint):
    row = {"translation": {"en": "one"}}
    with pytest.raises(DataError, match="line 1: translation has no 'de'"):
        translate(tmp_path, tiny_checkpoint, jsonl_file(tmp_path / "a.jsonl", [row]), None)
    with pytest.raises(ValueError, match="vocab_size=100 is below 261"):
        byte_level_bpe(["a"], 100)
    with pytest.raises(ValueError, match="max_target_length=600, but the model has 128 positions"):
        translate(tmp_path, tiny_checkpoint, translations(tmp_path / "t", 4), None, max_target_length=600)
    for side in ("en", "de"):
        (tmp_path / f"a.{side}").write_text("a\n")
    with pytest.raises(ValueError, match="num_beams=0 must be at least 1"):
        translate(tmp_path, tiny_checkpoint, str(tmp_path / "a"), None, num_beams=0)


def generate(folder, checkpoint, **flags):
    quick = {k: v for k, v in QUICK.items() if k != "max_seq_length"} | {"num_train_epochs": 12, "block_size": 16}
    return finetune("generation", **{**quick, **flags}, model_name_or_path=checkpoint, output_dir=str(folder / "out"))


def test_generation_learns_continues_and_loads_in_stock_hugging_face(tmp_path, tiny_checkpoint):
    (tmp_path / "train.txt").write_text((GOOD[0] + "\n") * 60)
    train = str(tmp_path / "train.txt")
    result = generate(
        tmp_path, tiny_checkpoint, train_file=train, validation_file=train, prompt="a warm", do_sample=False, max_new_tokens=20
    )
    assert result.metrics["eval_perplexity"] == pytest.approx(math.exp(result.metrics["eval_loss"]))
    assert result.metrics["eval_perplexity"] < 3
    assert result.predictions == [{"prompt": "a warm", "continuation": GOOD[0].removeprefix("a warm")}]
    model = AutoModelForCausalLM.from_pretrained(result.output_dir)
    assert model.config.is_decoder
    assert run_card(result.output_dir)["predict"]("a warm", max_new_tokens=3)[0]["generated_text"].startswith("a warm")
    (tmp_path / "prompts.txt").write_text("a\na warm and\n")
    assert len(predict(result.output_dir, tmp_path / "prompts.txt", use_cpu=True, disable_tqdm=True, max_new_tokens=5)) == 2


def test_generation_looks_back_only(tmp_path, tiny_checkpoint):
    """A model that saw the next token would fall to a perplexity of 1 on tokens that nothing foretells."""
    import random

    drawn = random.Random(0)
    lines = [" ".join(drawn.choice(list(ENGLISH)) for _ in range(10)) for _ in range(40)]
    for name, part in (("train.txt", lines[:30]), ("val.txt", lines[30:])):
        (tmp_path / name).write_text("\n".join(part))
    files = {"train_file": str(tmp_path / "train.txt"), "validation_file": str(tmp_path / "val.txt")}
    assert generate(tmp_path, tiny_checkpoint, **files, num_train_epochs=6).metrics["eval_perplexity"] > 1.5


def test_generation_stops_before_training(tmp_path, tiny_checkpoint):
    (tmp_path / "a.txt").write_text("a\n")
    file = str(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"a.txt: \d+ tokens do not fill one block of block_size=16"):
        generate(tmp_path, tiny_checkpoint, train_file=file)
    for flag, value, message in (
        ("temperature", 0, "must be above 0"),
        ("max_new_tokens", 0, "must be at least 1"),
        ("top_p", 7.0, "must be above 0 and at most 1"),
        ("top_k", -1, "must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=f"{flag}={value} {message}"):
            generate(tmp_path, tiny_checkpoint, train_file=file, **{flag: value})
    (tmp_path / "b.txt").write_text("a dull film\n" * 9)
    with pytest.raises(ValueError, match=r"the prompt's tokens \+ max_new_tokens=\d+, but the model has 128 positions"):
        generate(tmp_path, tiny_checkpoint, train_file=str(tmp_path / "b.txt"), prompt="a " * 100)
    assert not (tmp_path / "out").exists()


def test_perplexity_overflows_to_infinity():
    assert perplexity(1e4) == math.inf and perplexity(0.0) == 1.0
