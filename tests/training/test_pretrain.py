"""`roberta-fast pretrain`: what the model is fed, that it learns from real text, and that stock Hugging Face loads the result."""

import copy
import itertools
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import FLAGS, TINY, command
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoTokenizer, RobertaForMaskedLM, pipeline

from roberta_fast import accelerate_model, explain
from roberta_fast.cli import main
from roberta_fast.training.pretraining import recipes
from roberta_fast.training.pretraining.arguments import CorpusArguments, RunArguments
from roberta_fast.training.pretraining.corpus import Corpus, read_index
from roberta_fast.training.pretraining.run import batches_of, build_model, corpus_tokenizer
from roberta_fast.training.pretraining.schedule import Stage, StepSchedule, length_stages
from roberta_fast.training.pretraining.trainer import PretrainingArguments, PretrainingTrainer

NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}


def pieces(corpus, tmp_path, position=2, max_seq_length=64, training=None, **flags):
    """(model, training batches, evaluation batches) as the command makes them."""
    settings = {name: FLAGS[name] for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "use_cpu")}
    data = CorpusArguments(data=str(corpus), max_seq_length=max_seq_length, **flags)
    args = PretrainingArguments(str(tmp_path), **{**settings, "max_steps": 40, **(training or {})})
    tokenizer = corpus_tokenizer(corpus)
    torch.manual_seed(0)
    model = build_model(RunArguments(config_name="tiny", config_overrides=TINY, **NO_DROPOUT), tokenizer, max_seq_length)
    return model, *batches_of(data, args, tokenizer, position), args


def bounds(batch):
    return itertools.pairwise(batch["cu_seq_lens_q"].tolist())


@pytest.mark.parametrize("across", [False, True], ids=["apart", "across"])
def test_loss_and_gradients_are_those_of_the_documents_alone(corpus, tmp_path, across):
    """A packed micro-batch on the fast encoder, against the stock model on each sequence by itself."""
    stock, batches, _, _ = pieces(corpus, tmp_path, attend_across_documents=across)
    batch, fast = batches[3], accelerate_model(copy.deepcopy(stock), on_unsupported="error")
    loss = fast(**batch).loss
    loss.backward()
    summed, predicted = 0.0, 0
    for first, last in bounds(batch):
        labels = batch["labels"][0, first:last]
        logits = stock(input_ids=batch["input_ids"][:, first:last]).logits[0]
        summed = summed + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        predicted += (labels != -100).sum()
    (summed / predicted).backward()
    torch.testing.assert_close(loss, summed / predicted, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(fast.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert explain(fast).stock_calls == {}
    sequences = len(batch["cu_seq_lens_q"]) - 1
    assert sequences == 8 if across else sequences > 8


def test_what_a_batch_holds(corpus, tmp_path):
    """Every sequence is a document's piece between <s> and </s>, its positions from 2 on; unmasked, it is the corpus's text."""
    _, batches, _, _ = pieces(corpus, tmp_path)
    batch, (bos, eos) = batches[0], (0, 2)
    tokens = Corpus(corpus)
    text = tokens.tokens(0, len(tokens)).astype(np.int64)
    places = {tuple(text[i : i + 8].tolist()): i for i in range(len(text) - 8)}
    original = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])[0]
    found = 0
    for first, last in bounds(batch):
        ids, positions = original[first:last].tolist(), batch["position_ids"][0, first:last].tolist()
        assert (ids[0], ids[-1]) == (bos, eos) and positions == list(range(2, 2 + last - first))
        assert not {bos, eos, 1} & set(ids[1:-1])
        place = places.get(tuple(ids[1:9]))
        if place is not None and len(ids) > 20:
            found += ids[1:-1] == text[place : place + len(ids) - 2].tolist()
    assert found > 3
    assert (batch["labels"] != -100).sum() > 0.1 * batch["labels"].numel()
    assert batch["max_length_q"] <= 64 and batch["input_ids"].shape == batch["position_ids"].shape == batch["labels"].shape


def test_across_documents_there_is_one_separator_between(corpus, tmp_path):
    _, batches, _, _ = pieces(corpus, tmp_path, attend_across_documents=True)
    batch = batches[0]
    original = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])[0]
    for first, last in bounds(batch):
        ids = original[first:last]
        assert ids[0] == 0 and (ids[1:] != 0).all() and ids[-1] == 2
        assert not ((ids[1:] == 2) & (ids[:-1] == 2)).any()


def test_an_epoch_sees_every_block_once_and_each_epoch_is_another(corpus, tmp_path):
    _, batches, _, _ = pieces(corpus, tmp_path)
    blocks = len(batches.readers[0])
    per_batch = 8
    seen = []
    for number in range(2 * blocks // per_batch):
        _, first, last = batches.schedule.blocks(number, 0)
        seen += [(place // blocks, int(batches._order(0, place // blocks)[place % blocks])) for place in range(first, last)]
    for turn in (0, 1):
        of_turn = [block for t, block in seen if t == turn]
        assert len(set(of_turn)) == len(of_turn) >= blocks - per_batch
    orders = [[b for t, b in seen if t == turn] for turn in (0, 1)]
    assert orders[0][:50] != orders[1][:50] and orders[0] != sorted(orders[0])
    both = batches[blocks // per_batch]  # of the end of one pass and the beginning of the next
    assert blocks % per_batch and both["cu_seq_lens_q"][-1] == both["input_ids"].shape[1] == both["labels"].shape[1]


def test_the_division_into_micro_batches_does_not_matter(corpus, tmp_path):
    """Two processes with one micro-batch, or one with two: a step's tokens and labels are the same."""
    one = pieces(corpus, tmp_path, training={"global_batch_size": 16, "per_device_train_batch_size": 16})[1]
    two = pieces(corpus, tmp_path, training={"global_batch_size": 16, "per_device_train_batch_size": 8})[1]
    assert (one.schedule.parts, two.schedule.parts) == (1, 2)
    for step in (0, 7):
        whole, halves = one[step], [two[2 * step], two[2 * step + 1]]
        for name in ("input_ids", "labels", "position_ids"):
            assert torch.equal(whole[name], torch.cat([half[name] for half in halves], 1))


def test_warm_up_of_lengths_and_batches(corpus, tmp_path):
    training = {
        "global_batch_size": 32,
        "batch_size_warmup_steps": 20,
        "batch_size_warmup_start": 8,
        "length_warmup_steps": 8,
        "length_warmup_start": 16,
        "max_steps": 30,
    }
    _, batches, _, _ = pieces(corpus, tmp_path, training=training)
    schedule = batches.schedule
    assert schedule.stages == [Stage(0, 16), Stage(4, 32), Stage(8, 64)] and schedule.parts == 4
    sizes = []
    for step in range(30):
        parts = [schedule.blocks(step, part) for part in range(4)]
        assert all(b[1] == a[2] for a, b in itertools.pairwise(parts)), "parts of a step are gapless"
        if step and parts[0][0] == schedule.blocks(step - 1, 0)[0]:
            assert parts[0][1] == schedule.blocks(step - 1, 3)[2], "and so are steps"
        sizes.append((schedule.stages[parts[0][0]].length, parts[-1][2] - parts[0][1]))
    assert sizes[0] == (16, 32) and sizes[4] == (32, 26) and sizes[8] == (64, 18) and sizes[20:] == [(64, 32)] * 10
    tokens = [length * size for length, size in sizes]
    assert tokens == sorted(tokens), "a batch never has fewer tokens than the one before"
    for number in (0, 17, 119):
        batch = batches[number]
        assert batch["max_length_q"] <= sizes[number // 4][0]
    shares = np.cumsum([size / len(batches.readers[schedule.stage(step)]) for step, (_, size) in enumerate(sizes)])
    assert [batches.epoch(step) for step in (1, 6, 30)] == pytest.approx([shares[0], shares[5], shares[29]])


def documented():
    """The commands of the documentation."""
    page = (Path(__file__).parents[2] / "docs" / "pretraining.md").read_text()
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.M | re.S)
    lines = [line for language, block in fenced if not language for line in block.splitlines()]
    return [shlex.split(line.partition("roberta-fast ")[2]) for line in lines if "roberta-fast pretrain" in line]


def test_documented_commands_have_flags_that_exist(tmp_path, monkeypatch, capsys):
    """Run where there is no data, each gets as far as to say so."""
    monkeypatch.chdir(tmp_path)
    assert len(documented()) >= 4
    for argv in documented():
        # The machine may have no such number format; that is not what is asked here.
        argv = [part for i, part in enumerate(argv) if part != "--bf16" and argv[i - 1] != "--bf16"]
        assert main(argv) == 1
        said = capsys.readouterr().err
        assert "corpus holds no index.json" in said or "'text/*.txt' is no file" in said, said


@pytest.mark.parametrize("epochs", [0.3, 1.0, 2.5])
def test_steps_for_epochs(epochs):
    for schedule in (
        StepSchedule([Stage(0, 64)], 8, 1),
        StepSchedule(length_stages(64, 12, 16), 8, 2, warmup_steps=30, first_batch_size=2),
    ):
        blocks = [700 // (64 // stage.length) for stage in schedule.stages]
        steps = schedule.steps_for(epochs, blocks)

        def seen(step, schedule=schedule, blocks=blocks):
            sizes = (schedule.blocks(s, schedule.parts - 1)[2] - schedule.blocks(s, 0)[1] for s in range(step))
            return sum(size / blocks[schedule.stage(s)] for s, size in enumerate(sizes))

        assert seen(steps - 1) < epochs <= seen(steps) + 1e-6


def test_it_learns_and_stock_hugging_face_loads_it(corpus, tmp_path, capsys):
    """On real text, in blocks so short that a tiny model learns in seconds: well under the unigram entropy, on other text too."""
    output = tmp_path / "model"
    flags = {"max_seq_length": 8, "per_device_train_batch_size": 96, "max_steps": 300, "warmup_steps": 30, "logging_steps": 100}
    flags |= {"config_overrides": f"{TINY},num_hidden_layers=1,num_attention_heads=4,intermediate_size=256"}
    flags |= {"learning_rate": 4e-3, "lr_scheduler_type": "constant_with_warmup", "adam_beta2": 0.98}
    assert main(command(corpus, output, report_to="tensorboard", mask_replace_prob=0.9, **flags, **NO_DROPOUT)) == 0
    entropy = read_index(corpus)["splits"]["train"]["unigram_entropy"]
    assert f"unigram entropy: {entropy:.4f} nats" in capsys.readouterr().out
    record = json.loads((output / "metrics.json").read_text())
    metrics, history = record["metrics"], record["log_history"]
    assert metrics["eval_loss"] < entropy - 0.6
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.6
    logged = next(entry for entry in history if "loss" in entry)
    assert logged["tokens_per_second"] > 0 and 0 < logged["mfu"] < 2 and logged["corpus_epoch"] > 0
    assert (output / "curves.png").stat().st_size > 1000 and list(output.rglob("events.out.tfevents*"))

    stock, tokenizer = AutoModelForMaskedLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert type(stock) is RobertaForMaskedLM and stock.config.max_position_embeddings == 10
    tokens = Corpus(corpus, "validation").tokens(0, 6000).astype(np.int64)
    # Windows of six tokens, the fourth of each masked: nothing of the answer is left in what the model sees.
    rows = torch.from_numpy(tokens.reshape(-1, 6))
    wanted = rows[:, 3].clone()
    rows[:, 3] = tokenizer.mask_token_id
    ends = torch.tensor([[0], [2]]).expand(2, len(rows))
    with torch.no_grad():
        logits = stock(torch.cat([ends[0, :, None], rows, ends[1, :, None]], 1)).logits[:, 4]
    assert F.cross_entropy(logits, wanted) < entropy - 0.4
    most_frequent = np.bincount(tokens).max() / len(tokens)
    assert (logits.argmax(-1) == wanted).float().mean() > 1.25 * most_frequent
    (filled, *_) = pipeline("fill-mask", str(output), device=-1)(f"val{tokenizer.mask_token}e")
    assert filled["sequence"].startswith("val") and filled["sequence"].endswith("e")
    assert tokenizer.model_max_length == 8


def test_the_loss_is_the_mean_over_a_steps_predictions(corpus, tmp_path):
    """Micro-batches weigh by their labels; the mean of their means is another number."""
    model, batches, _, args = pieces(
        corpus,
        tmp_path,
        training={"global_batch_size": 3, "per_device_train_batch_size": 1, "max_steps": 1, "learning_rate": 0.0},
    )
    counts = [int((batches[part]["labels"] != -100).sum()) for part in range(3)]
    fast = accelerate_model(copy.deepcopy(model))
    with torch.no_grad():
        means = [float(fast(**batches[part]).loss) for part in range(3)]
    trainer = PretrainingTrainer(model, args, train_dataset=batches)
    loss = trainer.train().training_loss
    assert loss == pytest.approx(np.average(means, weights=counts), rel=1e-5)
    assert abs(loss - np.mean(means)) > 1e-4


def test_evaluation_is_the_mean_over_all_predictions(corpus, tmp_path):
    model, train_batches, eval_batches, args = pieces(corpus, tmp_path, max_eval_samples=21)
    trainer = PretrainingTrainer(model, args, train_dataset=train_batches, eval_dataset=eval_batches)
    metrics = trainer.evaluate()
    assert len(eval_batches) == 2 and trainer.evaluate()["eval_loss"] == metrics["eval_loss"], "the same masks each time"
    with torch.no_grad():
        parts = [(model(**eval_batches[i]).loss, (eval_batches[i]["labels"] != -100).sum()) for i in range(2)]
    assert metrics["eval_loss"] == pytest.approx(float(sum(m * n for m, n in parts) / sum(n for _, n in parts)), rel=1e-5)
    assert metrics["eval_predicted_tokens"] == sum(int(n) for _, n in parts)


def test_early_stopping(corpus, tmp_path, capsys):
    """At a learning rate of zero no evaluation is better than the first."""
    flags = {"learning_rate": 0.0, "max_steps": 50, "early_stopping_patience": 2, "eval_strategy": "steps", "eval_steps": 2}
    assert main(command(corpus, tmp_path / "out", max_eval_samples=8, **flags)) == 0
    history = json.loads((tmp_path / "out" / "metrics.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry][:3] == [2, 4, 6]
    assert max(entry["step"] for entry in history) == 6


def trained_with(corpus, tmp_path, recipe, **flags):
    from roberta_fast.training.arguments import parse
    from roberta_fast.training.pretraining.command import _recipe

    argv = ["--data", str(corpus), "--output_dir", str(tmp_path), "--recipe", recipe]
    argv += [str(x) for name, value in flags.items() for x in (f"--{name}", value)]
    where = "roberta_fast.training.pretraining.trainer:PretrainingArguments"
    return parse("pretrain", "", argv, RunArguments, CorpusArguments, training=where, presets=_recipe)


@pytest.mark.parametrize(("config", "learning_rate", "warmup"), [("base", 6e-4, 24000), ("large", 4e-4, 30000)])
def test_the_recipe_of_the_paper(corpus, tmp_path, config, learning_rate, warmup):
    """Liu et al. 2019, table 9."""
    _, data, args = trained_with(corpus, tmp_path, "roberta", config_name=config, per_device_train_batch_size=32)
    assert (args.learning_rate, args.warmup_steps, args.max_steps) == (learning_rate, warmup, 500_000)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.weight_decay) == (0.9, 0.98, 1e-6, 0.01)
    assert args.global_batch_size == 8192 and args.gradient_accumulation_steps == 256 and args.max_grad_norm == 0.0
    assert args.lr_scheduler_type == "linear" and args.decay_all_parameters
    assert (data.max_seq_length, data.mlm_probability, data.attend_across_documents) == (512, 0.15, True)
    config = recipes.config_of(config, None, 50265, 512, {"bos": 0, "eos": 2, "pad": 1})
    shape = (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads)
    assert shape == ((12, 768, 3072, 12) if learning_rate == 6e-4 else (24, 1024, 4096, 16))
    assert config.max_position_embeddings == 514 and config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.1


def test_flags_override_a_recipe(corpus, tmp_path):
    (tmp_path / "flags.yaml").write_text("weight_decay: 0.5\nmlm_probability: 0.4\n")
    run, data, args = trained_with(
        corpus, tmp_path, "modern", config=tmp_path / "flags.yaml", mlm_probability=0.25, global_batch_size=0
    )
    assert (args.weight_decay, data.mlm_probability, args.global_batch_size) == (0.5, 0.25, 8)
    assert run.attention_dropout == 0.0 and not data.attend_across_documents


def test_the_modern_schedule(corpus, tmp_path):
    """A trapezoid: 6% up, then level, the last fifth down to 2%; biases and norms do not decay."""
    model, batches, _, args = pieces(corpus, tmp_path, training={
        "max_steps": 100, "lr_scheduler_type": "warmup_stable_decay", "lr_decay_ratio": 0.2, "min_lr_ratio": 0.02,
        "warmup_steps": 0.06, "learning_rate": 1.0, "weight_decay": 0.1,
    })  # fmt: skip
    trainer = PretrainingTrainer(model, args, train_dataset=batches)
    trainer.create_optimizer_and_scheduler(100)
    rates = []
    for _ in range(101):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[6] == 1.0 and rates[3] < 0.6 and set(rates[6:81]) == {1.0}
    assert rates[85] == pytest.approx(0.02 + 0.98 * (1 - math.sqrt(0.25)), abs=1e-6) and rates[100] == pytest.approx(0.02)
    names = {id(p): name for name, p in model.named_parameters()}
    still = {names[id(p)] for g in trainer.optimizer.param_groups if g["weight_decay"] == 0.0 for p in g["params"]}
    assert still == {name for name in names.values() if name.endswith("bias") or "norm" in name.lower()}
    args.decay_all_parameters = True
    assert set(PretrainingTrainer(model, args).get_decay_parameter_names(model)) == set(names.values())


def test_on_from_a_checkpoint(corpus, tmp_path, capsys):
    """Of Hugging Face; and what does not fit the corpus is named."""
    model, _, _, _ = pieces(corpus, tmp_path)
    model.save_pretrained(tmp_path / "before")
    flags = {"config_name": None, "config_overrides": None, "max_steps": 1, "learning_rate": 1e-9, "max_eval_samples": 8}
    assert main(command(corpus, tmp_path / "after", model_name_or_path=tmp_path / "before", **flags)) == 0
    after = AutoModelForMaskedLM.from_pretrained(tmp_path / "after")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value, rtol=0, atol=1e-6)
    capsys.readouterr()
    flags |= {"model_name_or_path": tmp_path / "before", "max_seq_length": 65}
    assert main(command(corpus, tmp_path / "other", **flags)) == 1
    assert "--max_seq_length 65 is beyond the model's 64 positions" in capsys.readouterr().err


def test_on_from_fairseq(tmp_path, capsys):
    """A real fairseq checkpoint, on sequences in its own vocabulary: its loss is low from the first step."""
    import importlib.util

    spec = importlib.util.find_spec("sapiens")
    if spec is None:
        pytest.skip("not installed: sapiens, which carries fairseq checkpoints")
    folder = Path(spec.origin).parent / "models" / "v1"
    assert main(["convert", str(folder / "checkpoint_vh.pt"), str(tmp_path / "converted")]) == 0
    sequence = " ".join("EVQLLESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK")
    (tmp_path / "text.txt").write_text("\n".join([sequence] * 30))
    prepare = ["--input", str(tmp_path / "text.txt"), "--document_separator", "line", "--num_proc", "1"]
    output = ["--tokenizer", str(tmp_path / "converted"), "--output", str(tmp_path / "corpus")]
    assert main(["pretrain", "prepare", *prepare, *output]) == 0
    flags = {"config_name": None, "config_overrides": None, "max_seq_length": 128, "max_steps": 2, "logging_steps": 1}
    flags |= {"model_name_or_path": folder / "checkpoint_vh.pt", "learning_rate": 1e-5}
    assert main(command(tmp_path / "corpus", tmp_path / "out", **flags)) == 0
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert record["log_history"][0]["loss"] < 1.0 < record["unigram_entropy"]["train"]


@pytest.mark.parametrize(("flags", "message"), [
    ({"data": "nowhere"}, "nowhere holds no index.json: it is no prepared corpus"),
    ({"data": None}, "--data is needed"),
    ({"config_name": "./nowhere"}, "--config_name ./nowhere is none of tiny, mini"),
    ({"config_overrides": "hidden_sise=3"}, "--config_overrides 'hidden_sise=3'"),
    ({"config_overrides": "hidden_size=63"}, "hidden_size=63 is no multiple of num_attention_heads=2"),
    ({"mlm_probability": 1.5}, "mlm_probability must be between 0 and 1, got 1.5"),
    ({"max_seq_length": 2}, "--max_seq_length 2 leaves no room"),
    ({"global_batch_size": 64, "gradient_accumulation_steps": 3}, "makes 8 micro-batches, and gradient_accumulation_steps=3"),
    ({"deterministic": True, "bf16": True}, "deterministic=True computes in float32"),
    ({"recipe": "bert"}, "--recipe 'bert' is not one of roberta, modern"),
    ({"length_warmup_steps": 10, "length_warmup_start": 64}, "length_warmup_start=64 must be at least 8 and below"),
    ({"model_name_or_path": "x.pt", "config_name": None, "config_overrides": None}, "--model_name_or_path x.pt is no file"),
    ({"resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint nowhere: there is no such folder"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")  # fmt: skip
def test_wrong_flags_are_named(corpus, tmp_path, flags, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(command(flags.pop("data", corpus), tmp_path / "out", **{"max_steps": 1, **flags}))
    except SystemExit as error:
        status, said = 1, f"{error}"
    else:
        said = capsys.readouterr().err
    assert status and message in said, said
    assert not list(tmp_path.rglob("*.safetensors"))
