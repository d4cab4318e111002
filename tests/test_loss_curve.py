"""The loss of an accelerated model follows that of stock ones, and the measure of that tells a model that does not."""

import copy
import json
import random

import pytest
import torch
from transformers import AutoTokenizer

from roberta_fast import accelerate_model
from roberta_fast.benchmarks import loss_curve, plots, report, shapes
from roberta_fast.training.bpe import byte_level_bpe


def drawn(seed, shift=0.0, tail=0.0, steps=200):
    """A falling curve with noise, shifted, and with a tail that rises."""
    noise = random.Random(seed)
    return [10 - 0.02 * i + noise.gauss(0, 0.1) + shift + tail * max(0, i - 150) for i in range(steps)]


def test_distance_is_small_by_chance_alone():
    distances = [loss_curve.distance([drawn(4 * i + j) for j in range(3)], drawn(4 * i + 3)) for i in range(200)]
    assert 0.9 < (sum(d * d for d in distances) / len(distances)) ** 0.5 < 1.3
    assert sum(d > loss_curve.LIMIT for d in distances) <= 2


@pytest.mark.parametrize("change", [{"shift": 0.1}, {"shift": -0.1}, {"tail": 0.01}], ids=str)
def test_distance_tells_another_curve(change):
    assert loss_curve.distance([drawn(seed) for seed in range(3)], drawn(9, **change)) > loss_curve.LIMIT


@pytest.fixture(scope="module")
def tiny():
    """A small model, and 50 batches of sentences for it."""
    model, texts = shapes.build_model("tiny", mode="mlm"), loss_curve.lines_of(loss_curve.SENTENCES)
    tokenizer = byte_level_bpe(texts, model.config.vocab_size)
    return model, loss_curve.masked_batches(texts, tokenizer, 50, 4, 32, "cpu")


def test_a_fast_model_follows_and_a_wrong_one_does_not(tiny):
    model, batches = tiny
    result = loss_curve.compare(model, batches, "float32", 3, 2e-3)
    assert result["follows"], result["distance"]
    stock = result["curves"]["stock"]
    assert len({tuple(curve) for curve in stock}) == 3, "dropout must differ"
    assert sum(stock[0][-10:]) < 0.97 * sum(stock[0][:10]), "it must learn"
    assert loss_curve.distance(stock, loss_curve.train(copy.deepcopy(model), batches, "float32", 0, 1.5e-3)) > loss_curve.LIMIT
    frozen = accelerate_model(copy.deepcopy(model))
    frozen.roberta.embeddings.requires_grad_(False)
    assert loss_curve.distance(stock, loss_curve.train(frozen, batches, "float32", 0, 2e-3)) > loss_curve.LIMIT


@pytest.mark.filterwarnings("ignore::RuntimeWarning:roberta_fast")
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 1e-2), ("float16", 2e-3)])
def test_without_dropout_the_curves_are_equal_but_for_rounding(tiny, precision, tolerance):
    """In float16 with a gradient scaler; fused AdamW in all."""
    _, batches = tiny
    model = shapes.build_model("tiny", mode="mlm", dropout=0)
    fast = accelerate_model(copy.deepcopy(model))
    curves = [torch.tensor(loss_curve.train(m, batches[:12], precision, 0, 1e-3)) for m in (model, fast)]
    torch.testing.assert_close(curves[1], curves[0], rtol=tolerance, atol=0)
    assert curves[0][-3:].mean() < 0.99 * curves[0][:3].mean()


def test_batches_are_the_same_each_time(tiny):
    _, batches = tiny
    texts = loss_curve.lines_of(loss_curve.SENTENCES)
    again = loss_curve.masked_batches(texts, byte_level_bpe(texts, 1000), 50, 4, 32, "cpu")
    assert all(torch.equal(a[name], b[name]) for a, b in zip(batches, again, strict=True) for name in a)
    labelled = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert 0.1 < labelled / sum(int(batch["attention_mask"].sum()) for batch in batches) < 0.2


def test_the_command_saves_what_it_prints(tmp_path, capsys):
    path = tmp_path / "curves.json"
    arguments = ["--model", "tiny", "--device", "cpu", "--steps", "50", "--batch-size", "2", "--seeds", "2", "--json", str(path)]
    assert loss_curve.main([*arguments, "--precisions", "float32"]) in (0, 1)
    (run,) = json.loads(path.read_text())["runs"]
    assert {name: len(curves) for name, curves in run["curves"].items()} == {"stock": 2, "roberta_fast": 1}
    assert report.section(run) in capsys.readouterr().out and list(plots.figures([run])) == ["cpu-losses.png"]
    pytest.importorskip("matplotlib")
    plots.draw([run], tmp_path)
    assert plots.stale([run], tmp_path) == []


BAD = {
    "argument --precisions: 'fp8' is not one of": ["--precisions", "fp8"],
    "argument --steps: a multiple of 25": ["--steps", "30"],
    "argument --seeds: at least 2": ["--seeds", "1"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message, capsys):
    with pytest.raises(SystemExit) as exit_:
        loss_curve.main(BAD[message])
    assert exit_.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning:roberta_fast")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_200_steps_of_a_published_model(checkpoint, precision):
    model, texts = shapes.build_model(checkpoint, mode="mlm"), loss_curve.lines_of(loss_curve.SENTENCES)
    batches = loss_curve.masked_batches(texts, AutoTokenizer.from_pretrained(checkpoint), 200, 4, 48, "cpu")
    result = loss_curve.compare(model, batches, precision, 3, 3e-4)
    assert result["follows"], result["distance"]
