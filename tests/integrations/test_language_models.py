"""Language models in training: loss and gradients from the labelled rows, and everything else as it was."""

import copy
import inspect
import pickle

import pytest
import torch
from model_trio import NO_DROPOUT, Trio, assert_same_gradients, gradients, trio
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from roberta_fast import accelerate_model, check_parity, explain, restore_model
from roberta_fast.demo import read_sentences
from roberta_fast.families import FAMILIES, LANGUAGE_MODELS
from roberta_fast.heads import FastLanguageModel
from roberta_fast.testing import MASKS, assert_close_as_torch, random_inputs, randomize, tiny_config

MASKED, CAUSAL = ([f.model_types[0] for f in FAMILIES if getattr(f, role)] for role in LANGUAGE_MODELS)


def models(model_type="roberta", dtype=torch.float32, causal=False, **options):
    """(fast, stock, stock in float64) in training mode, of the same parameters."""
    config = tiny_config(model_type, **NO_DROPOUT, dropout=0.0, attention_dropout=0.0, vocab_size=500, is_decoder=causal)
    kind = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    stock = randomize(kind.from_config(config), std=0.1).train()
    exact = copy.deepcopy(stock).double()
    return Trio(accelerate_model(copy.deepcopy(stock).to(dtype), **options), stock.to(dtype), exact)


def labelled(model, mask=MASKS["right padding"], share=0.3):
    """Inputs with labels at about ``share`` of the real tokens."""
    inputs = random_inputs(mask, model.config)
    generator = torch.Generator().manual_seed(1)
    chosen = (torch.rand(mask.shape, generator=generator) < share) & mask.bool()
    chosen[0, 0] = True
    return inputs | {"labels": torch.where(chosen, torch.randint(5, 100, mask.shape, generator=generator), -100)}


def step(model, inputs, **more):
    outputs = model(**inputs, **more)
    outputs.loss.backward()
    return outputs


class Shapes(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returns."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else [result]
        self.most = max([self.most, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return result


@pytest.mark.parametrize("mask", ["right padding", "left padding", "all ones"])
@pytest.mark.parametrize("model_type", MASKED)
def test_loss_and_every_gradient(model_type, mask):
    trio = models(model_type)
    inputs = labelled(trio.stock, MASKS[mask])
    fast, stock, exact = (step(model, inputs).loss for model in trio)
    assert abs(fast - exact) <= 2 * abs(stock - exact) + 1e-6 * exact
    assert_same_gradients(*(gradients(model) for model in trio))


@pytest.mark.parametrize("items", [None, 100, torch.tensor(100)], ids=["mean", "by a number", "by a tensor"])
@pytest.mark.parametrize("model_type", CAUSAL)
def test_causal_loss_and_every_gradient(model_type, items):
    trio = models(model_type, causal=True)
    inputs = labelled(trio.stock, share=0.7) | ({} if items is None else {"num_items_in_batch": items})
    outputs = [step(model, inputs) for model in trio]
    fast, stock, exact = (output.loss for output in outputs)
    assert abs(fast - exact) <= 2 * abs(stock - exact) + 1e-6 * exact
    assert_same_gradients(*(gradients(model) for model in trio))
    assert outputs[0].logits is None and outputs[0].past_key_values is None


OWN_LOSSES = ["a loss_function of its own", "logits_to_keep", "shift_labels for the loss"]


@pytest.mark.parametrize("reason", OWN_LOSSES)
def test_another_causal_loss_is_computed_from_all_logits(reason):
    fast, stock, _ = models(causal=True)
    inputs = labelled(stock, torch.ones(3, 12, dtype=torch.int64))
    if reason == "a loss_function of its own":
        for model in (fast, stock):
            model.loss_function = lambda logits, labels, **options: logits.square().mean()
    elif reason == "logits_to_keep":
        inputs |= {"logits_to_keep": 8, "labels": inputs["labels"][:, -8:]}
    else:
        inputs["shift_labels"] = inputs["labels"]
    with pytest.warns(RuntimeWarning, match=f"RobertaForCausalLM computes all logits: {reason}"):
        outputs = fast(**inputs)
    torch.testing.assert_close(outputs.loss, stock(**inputs).loss)
    torch.testing.assert_close(outputs.logits, stock(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_half_types(dtype):
    trio = models(dtype=dtype)
    inputs = labelled(trio.stock)
    fast, stock, exact = (step(model, inputs).loss for model in trio)
    assert abs(fast - exact) <= 2 * abs(stock - exact) + torch.finfo(dtype).eps * exact
    assert_same_gradients(*(gradients(model) for model in trio))


def test_logits_of_all_rows_are_not_made():
    fast, stock, _ = models()
    inputs = labelled(stock, torch.ones(8, 32, dtype=torch.int64), share=0.1)
    with Shapes() as made:
        outputs = step(fast, inputs)
    assert outputs.logits is None
    assert made.most < inputs["labels"].numel() * stock.config.vocab_size
    with Shapes() as made:
        assert step(accelerate_model(fast, fuse_lm_head=False), inputs).logits.shape == (8, 32, stock.config.vocab_size)
    assert made.most == inputs["labels"].numel() * stock.config.vocab_size, "the measure sees full logits"


def test_other_calls_are_stock():
    fast, stock, _ = models()
    inputs = labelled(stock)
    real = inputs["attention_mask"].bool()
    ours, theirs = (model(**inputs | {"labels": None}).logits[real] for model in (fast, stock))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    ours, theirs = (model.eval()(**inputs) for model in (fast, stock))
    torch.testing.assert_close(ours.logits[real], theirs.logits[real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert check_parity(fast, inputs).max_abs_difference < 1e-4


def test_as_a_tuple_with_states_and_by_position():
    fast, stock, _ = models()
    inputs = labelled(stock)
    outputs = fast(**inputs, output_hidden_states=True)
    assert len(outputs.hidden_states) == stock.config.num_hidden_layers + 1
    loss, states = fast(**inputs, output_hidden_states=True, return_dict=False)
    assert torch.equal(loss, outputs.loss)
    assert torch.equal(states[-1], outputs.hidden_states[-1])
    names = list(inspect.signature(stock.forward).parameters)
    by_position = [inputs.get(name) for name in names[: names.index("labels") + 1]]
    assert torch.equal(fast(*by_position).loss, outputs.loss)


def test_without_any_label_the_loss_is_nan():
    fast, stock, _ = models()
    inputs = labelled(stock) | {"labels": torch.full((4, 17), -100)}
    assert stock(**inputs).loss.isnan()
    assert fast(**inputs).loss.isnan()


@pytest.mark.parametrize("causal", [False, True], ids=["masked", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool], ids=str)
def test_labels_of_another_dtype_are_named(dtype, causal):
    """PyTorch's loss takes int64 alone, and that of floating labels of another shape is another one."""
    fast, stock, _ = models(causal=causal)
    inputs = labelled(stock)
    inputs["labels"] = inputs["labels"].to(dtype)
    with pytest.raises((RuntimeError, NotImplementedError)):
        stock(**inputs)
    with pytest.raises(ValueError, match=rf"labels must be int64 \[B, S\], .* at each token, got {dtype} \(4, 17\)"):
        fast(**inputs)


@pytest.mark.parametrize("causal", [False, True], ids=["masked", "causal"])
def test_label_smoothing_by_the_trainer(causal, tmp_path):
    """Trainer keeps the labels from a model whose loss it smooths itself, and finds a causal one by its name."""
    trio = models(causal=causal)
    inputs = labelled(trio.stock)
    data = [{name: t[i % len(t)] for name, t in inputs.items()} for i in range(8)]
    losses, plain = [], []
    for model in trio:
        for smoothing, found in ((0.2, losses), (0.0, plain)):
            arguments = TrainingArguments(
                str(tmp_path), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3,
                logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=0,
                label_smoothing_factor=smoothing,
            )  # fmt: skip
            trainer = Trainer(copy.deepcopy(model), arguments, train_dataset=data)
            trainer.train()
            found.append(torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    fast, stock, exact = losses
    assert len(fast) == 4 and (fast - exact).abs().max() <= 3 * (stock - exact).abs().max() + 1e-5 * exact.max()
    assert (fast - plain[0]).abs().min() > 1e-3, "the loss must be a smoothed one"


def test_bad_labels_are_named():
    fast = models().fast
    inputs = labelled(fast)
    with pytest.raises(ValueError, match=r"labels must be \[B, S\] = \(4, 17\), got \(4, 16\)"):
        fast(**inputs | {"labels": inputs["labels"][:, 1:]})
    with pytest.raises(ValueError, match="labels must be classes from 0 to 499 or ignore_index=-100, got 500"):
        fast(**inputs | {"labels": torch.full((4, 17), 500)})


def test_token_counts_on_the_device():
    trio = models(unpad="device")
    inputs = labelled(trio.stock)
    fast, stock, _ = (step(model, inputs).loss for model in trio)
    torch.testing.assert_close(fast, stock)
    assert_same_gradients(*(gradients(model) for model in trio))


def test_what_a_hook_or_an_adapter_changes_is_computed_in_full():
    fast, stock, _ = models()
    inputs = labelled(stock)
    for model in (stock, fast):
        model.lm_head.dense.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.warns(RuntimeWarning, match="RobertaForMaskedLM computes all logits: a hook on Linear"):
        outputs = fast(**inputs)
    torch.testing.assert_close(outputs.loss, stock(**inputs).loss)
    assert explain(fast).fallbacks == ("the head computes all logits: a hook on Linear",)
    assert explain(fast).stock_calls == {"a hook on Linear": 1}
    with pytest.raises(NotImplementedError, match="all logits would be computed, a hook on Linear, and on_unsupported='error'"):
        accelerate_model(fast, on_unsupported="error")(**inputs)


def test_names_signature_pickle_and_restoring():
    fast, stock, _ = models()
    assert isinstance(fast, FastLanguageModel)
    assert type(fast).__name__ == "RobertaForMaskedLM"
    assert inspect.signature(fast.forward) == inspect.signature(stock.forward)
    assert fast.state_dict().keys() == stock.state_dict().keys()
    inputs = labelled(stock)
    again = pickle.loads(pickle.dumps(fast))
    assert torch.equal(again(**inputs).loss, fast(**inputs).loss)
    restored = restore_model(fast)
    assert type(restored) is type(stock)
    assert restored(**inputs).logits is not None
    assert restored.__dict__.keys() == stock.__dict__.keys()


def test_gradients_on_trained_weights_and_real_text(checkpoint):
    """Of every parameter but those that have rounding noise alone: a key's bias, which moves all scores of a row at once."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    torch.manual_seed(0)  # of the head, which the checkpoint lacks
    models = trio(AutoModelForMaskedLM.from_pretrained(checkpoint, **NO_DROPOUT).train())
    batch = tokenizer(read_sentences(None)[:24], padding=True, return_tensors="pt")
    chosen = batch["attention_mask"].bool() & (torch.arange(batch["input_ids"].shape[1]) % 4 == 1)
    batch["labels"] = torch.where(chosen, batch["input_ids"], -100)
    for model in models:
        model(**batch).loss.backward()
    fast, stock, exact = map(gradients, models)
    assert fast.keys() == exact.keys()
    for name in exact:
        if not name.endswith("key.bias"):
            assert_close_as_torch(fast[name], stock[name], exact[name], factor=3.0, name=name)


def test_trainer_follows_the_stock_loss(tmp_path, checkpoint):
    """On real text and real weights, with Trainer's own collator; 200 steps are in test_loss_curve.py."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    data = [tokenizer(line) for line in read_sentences(None)[:64]]
    losses = []
    for fast in (False, True):
        torch.manual_seed(0)
        model = AutoModelForMaskedLM.from_pretrained(checkpoint, **NO_DROPOUT)
        model = accelerate_model(model) if fast else model
        arguments = TrainingArguments(
            str(tmp_path), max_steps=6, per_device_train_batch_size=8, learning_rate=5e-4, logging_steps=1,
            save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=0)
        trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator)
        trainer.train()
        losses.append(torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    stock, fast = losses
    torch.testing.assert_close(fast, stock, rtol=1e-3, atol=0)
    assert stock[-5:].mean() < 0.9 * stock[:2].mean()
