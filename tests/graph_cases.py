"""Graphs without a GPU: a recording is a function that is called again on the same buffers."""

import contextlib
import copy
import threading

import pytest
import torch
from transformers import AutoModel

from roberta_fast import accelerate_model, restore_model
from roberta_fast.recorders import RECORDERS
from roberta_fast.testing import assert_close_as_torch, random_inputs, randomize, tiny_config


class CallAgain:
    """Records by keeping the function. Fails as a capture would, if told to, and where two turns meet."""

    error: Exception | None = None

    def __init__(self, device):
        self._turn = threading.Lock()

    def warm_up(self, compute):
        return compute()

    def record(self, compute):
        if self.error:
            raise self.error
        compute()
        return compute

    @contextlib.contextmanager
    def turn(self, *tensors):
        assert self._turn.acquire(blocking=False), "two replays share buffers at one time"
        yield
        self._turn.release()


@pytest.fixture
def recorder(monkeypatch):
    class Recorder(CallAgain):
        pass

    monkeypatch.setitem(RECORDERS, "cpu", Recorder)
    return Recorder


def stock_model(model_type="roberta", **overrides):
    return randomize(AutoModel.from_config(tiny_config(model_type, **overrides))).eval()


def fast_model(*args, **options):
    return accelerate_model(stock_model(*args), **options)


def graphs_of(model):
    return model.get_submodule("transformer" if model.config.model_type == "distilbert" else "encoder").graphs


@torch.no_grad()
def states(model, mask, seed=0):
    return model(**random_inputs(mask, model.config, seed)).last_hidden_state


def assert_as_eager(model, mask, seed=0):
    """By the error rule: eager calls on the same weights are held beside float64."""
    eager = restore_model(copy.deepcopy(model))
    double = states(copy.deepcopy(eager).double(), mask, seed)
    seen = mask.bool() | (torch.arange(mask.shape[1]) == 0)
    got = states(model, mask, seed)
    assert_close_as_torch(got[seen], states(eager, mask, seed)[seen], double[seen])
    assert not got[~seen].any(), "padding must come back as zeros"
