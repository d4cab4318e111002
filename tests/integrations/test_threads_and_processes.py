"""One accelerated model under several threads, in DataLoader workers, and handed to other processes."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.multiprocessing as mp
from model_trio import assert_same_gradients, gradients, tiny_inputs, tiny_model, trio
from torch.utils.data import DataLoader, Dataset
from transformers import RobertaForSequenceClassification

from roberta_fast import accelerate_model, explain
from roberta_fast.testing import ragged_mask

TIMEOUT = 120  # seconds


def batches(model, count=12):
    return [tiny_inputs(model, ragged_mask([1 + i, 20 - i, 7, 3 * i + 1]), seed=i) for i in range(count)]


def test_threads_share_a_model():
    """Some ask for hidden states, some for attention weights, which the others must not notice."""
    model = accelerate_model(tiny_model(RobertaForSequenceClassification, attn_implementation="eager"), on_unsupported="ignore")
    model.eval()
    calls = [
        (inputs, wish) for inputs in batches(model) for wish in ({}, {"output_hidden_states": True}, {"output_attentions": True})
    ]

    @torch.no_grad()
    def run(call):
        output = model(**call[0], **call[1])
        return output.logits, len(output.hidden_states or ()), len(output.attentions or ())

    alone = [run(call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, calls))
    layers = model.config.num_hidden_layers
    for (logits, *counts), (expected, *_), (_, wish) in zip(together, alone, calls, strict=True):
        assert torch.allclose(logits, expected, atol=1e-6)
        assert counts == [(layers + 1) * ("output_hidden_states" in wish), layers * ("output_attentions" in wish)]


def test_threads_differentiate_one_model():
    model = accelerate_model(tiny_model(RobertaForSequenceClassification))
    parameters = [model.get_submodule("roberta.encoder.layer.0.intermediate.dense").weight, model.classifier.out_proj.bias]

    def run(inputs):
        return torch.autograd.grad(model(**inputs).loss, parameters)

    alone = [run(inputs) for inputs in batches(model)]
    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(run, batches(model)), alone, strict=True):
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


class Embedded(Dataset):
    """Texts as a model in the worker embeds them, and what that model's stock path was taken for."""

    def __init__(self, model):
        self.model, self.inputs = model, batches(model, 4)

    def __len__(self):
        return len(self.inputs)

    @torch.no_grad()
    def __getitem__(self, i):
        return self.model(**self.inputs[i]).logits, explain(self.model).stock_calls, explain(self.model).fallbacks


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers_run_a_model(start):
    """A forked worker has none of the threads that the parent computed with, a spawned one nothing but a pickle."""
    data = Embedded(accelerate_model(tiny_model(RobertaForSequenceClassification)).eval())
    expected = [data[i] for i in range(len(data))]
    loader = DataLoader(data, None, num_workers=1, multiprocessing_context=start, timeout=TIMEOUT)
    for (logits, *report), (alone, *_) in zip(loader, expected, strict=True):
        assert torch.allclose(logits, alone, atol=1e-6)
        assert report == [{}, []], "the worker's model must be fast"


def train_a_step(model, inputs):
    model(**inputs).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert explain(model).stock_calls == {}


def test_a_spawned_process_trains_a_shared_model():
    """The child's step on parameters in shared memory is the parent's model after a step of its own."""
    models = trio(tiny_model(RobertaForSequenceClassification))
    inputs, shared = tiny_inputs(models.stock), copy.deepcopy(models.fast).share_memory()
    child = mp.get_context("spawn").Process(target=train_a_step, args=(shared, inputs))
    child.start()
    for model in models[1:]:
        model(**inputs).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    child.join(TIMEOUT)
    assert child.exitcode == 0
    assert_same_gradients(*({n: p.detach() for n, p in m.named_parameters()} for m in (shared, models.stock, models.exact)))
    assert gradients(shared) == {}, "gradients are the child's own"
