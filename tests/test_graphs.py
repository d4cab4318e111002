"""Graphs of the forward pass, all but the capture itself: capacities, what makes a recording stale, who may have one, threads.

On the CPU a recording is a function that is called again on the same buffers. Real ones: ``test_graphs_gpu.py``.
"""

import contextlib
import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from roberta_fast import FastOptions, accelerate_model, explain, graphs, restore_model
from roberta_fast.recorders import RECORDERS
from roberta_fast.testing import MASKS, assert_close_as_torch, ragged_mask, random_inputs, randomize, tiny_config


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


@pytest.fixture(autouse=True)
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


class TestReplays:
    @pytest.mark.parametrize("model_type", ["roberta", "bert", "distilbert"])
    def test_one_recording_serves_every_mix_that_fits(self, model_type):
        model = fast_model(model_type)
        for seed, lengths in enumerate([(20, 3, 7, 1), (32, 32, 32, 32), (1, 1, 1, 1), (5, 31, 2), (9, 9, 9)]):
            assert_as_eager(model, ragged_mask(lengths), seed)
        assert (graphs_of(model).captures, graphs_of(model).replays) == (2, 5)  # capacities 4 and 3

    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
    def test_masks_of_every_kind(self, mask):
        model = fast_model()
        assert_as_eager(model, ragged_mask([mask.shape[1]] * mask.shape[0]))  # leaves tokens in all that a batch may not fill
        assert_as_eager(model, mask)
        assert graphs_of(model).captures == 1

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
    def test_a_mask_of_any_type_counts_where_it_is_not_zero(self, dtype):
        encoder, mask = fast_model().encoder, ragged_mask([9, 3])
        rows = torch.randn(2, 9, 64)
        with torch.no_grad():
            wanted = encoder(rows, mask)[0]
            assert torch.equal(encoder(rows, (mask * 0.5 if dtype.is_floating_point else mask).to(dtype))[0], wanted)

    def test_what_an_earlier_batch_left_is_not_seen(self):
        """Shorter and narrower batches than the one before, with and without a mask."""
        model = fast_model()
        for shape in ((4, 30), (4, 11), (3, 30), (3, 7), (4, 30)):
            assert_as_eager(model, torch.ones(shape, dtype=torch.int64))
            with torch.no_grad():
                ids = random_inputs(torch.ones(shape), model.config)["input_ids"]
                torch.testing.assert_close(model(input_ids=ids)[0], states(model, torch.ones(shape, dtype=torch.int64)))

    def test_results_are_the_callers_own(self):
        model, mask = fast_model(), ragged_mask([9, 32])
        first = states(model, mask)
        kept = first.clone()
        second = states(model, mask, seed=1)
        assert torch.equal(first, kept) and not torch.equal(first, second)
        buffers = {buffer.untyped_storage().data_ptr() for buffer in graphs_of(model)._buffers.values()}
        assert not {first.untyped_storage().data_ptr(), second.untyped_storage().data_ptr()} & buffers

    def test_deterministic_has_the_bits_of_eager_calls(self):
        eager, model = fast_model(deterministic=True, cuda_graphs=False), fast_model(deterministic=True)
        for lengths in ([9, 3, 17], [1], [33, 2]):
            mask = ragged_mask(lengths)
            assert torch.equal(states(model, mask), states(eager, mask))
        assert graphs_of(model).captures == 3 and graphs_of(eager).captures == 0

    def test_weights_written_in_place_are_seen(self):
        model, mask = fast_model(), MASKS["right padding"]
        before = states(model, mask)
        with torch.no_grad():
            for parameter in model.encoder.parameters():
                parameter.mul_(1.1)
        assert not torch.allclose(before, states(model, mask))
        assert_as_eager(model, mask)
        assert graphs_of(model).captures == 1

    def test_inference_mode_and_no_grad_take_turns(self):
        model, mask = fast_model(), MASKS["right padding"]
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with mode():
                assert model(**random_inputs(mask, model.config))[0].is_inference() == (mode is torch.inference_mode)
        assert graphs_of(model).captures == 1

    def test_autocast_has_recordings_of_its_own(self):
        model, mask = fast_model(), MASKS["right padding"]
        eager = fast_model(cuda_graphs=False)
        states(model, mask)
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
            warnings.simplefilter("ignore", RuntimeWarning)  # that bfloat16 has no kernel on the CPU
            got, wanted = states(model, mask), states(eager, mask)
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)
        assert graphs_of(model).captures == 2
        torch.testing.assert_close(states(model, mask), states(eager, mask), rtol=1e-4, atol=1e-5)
        assert graphs_of(model).captures == 2

    def test_threads_share_a_model(self):
        model = fast_model()
        masks = [ragged_mask(lengths) for lengths in ([9, 3], [2, 17], [32, 1], [40, 7])]
        wanted, wrong = [states(model, mask, i) for i, mask in enumerate(masks)], []

        def serve(i):
            for _ in range(10):
                if not torch.equal(states(model, masks[i], i), wanted[i]):
                    wrong.append(i)

        threads = [threading.Thread(target=serve, args=(i,)) for i in range(len(masks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and graphs_of(model).captures == 2 and graphs_of(model).replays == 44


class TestCapacities:
    @pytest.mark.parametrize(
        ("shape", "longest", "capacity"),
        [
            ((1, 1), None, (1, 32)),
            ((2, 32), None, (2, 32)),
            ((5, 33), None, (6, 48)),
            ((7, 49), None, (8, 64)),
            ((17, 512), 514, (24, 512)),
            ((3, 290), 300, (3, 300)),
            ((9, 20), 24, (12, 24)),
            ((1, 8192), 8194, (1, 8192)),
        ],
    )
    def test_rounding(self, shape, longest, capacity):
        assert graphs.capacity_for(*shape, longest) == capacity

    def test_rounding_wastes_less_than_half(self):
        for number in range(1, 2000):
            batch, places = graphs.capacity_for(number, number)
            assert number <= batch < max(1.5 * number, 2) and number <= places <= max(32, 1.5 * number)

    def test_auto_stops_where_launches_hide_themselves(self, monkeypatch):
        monkeypatch.setattr(graphs, "AUTO_ROWS", 64)
        for options, captured in (({}, 1), ({"cuda_graphs": True}, 2), ({"cuda_graphs": False}, 0)):
            model = fast_model(**options)
            for lengths in ([32, 3], [33, 3]):
                assert_as_eager(model, ragged_mask(lengths))
            assert graphs_of(model).captures == captured
        assert not explain(model).eager_calls and explain(model).cuda_graphs is None
        model = fast_model()
        states(model, ragged_mask([33, 3]))
        assert explain(model).eager_calls == {"a capacity above 64 rows": 1}

    def test_the_least_recently_used_goes_first(self, monkeypatch):
        monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
        monkeypatch.setattr(graphs, "PATIENCE", 0)
        model = fast_model()
        captures = []
        for rows in (1, 2, 1, 3, 1, 2):
            assert_as_eager(model, ragged_mask([9] * rows))
            captures.append(graphs_of(model).captures)
        assert captures == [1, 2, 2, 3, 3, 4] and len(graphs_of(model)) == 2

    def test_what_is_in_use_is_not_pushed_out(self, monkeypatch):
        monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
        monkeypatch.setattr(graphs, "PATIENCE", 3)
        model = fast_model()
        for rows in (1, 2, 3) * 4:
            assert_as_eager(model, ragged_mask([9] * rows))
        assert graphs_of(model).captures == 2
        assert explain(model).eager_calls == {"all 2 graphs are in use": 4}
        for _ in range(4):
            states(model, ragged_mask([9]))
        states(model, ragged_mask([9, 9, 9]))
        assert graphs_of(model).captures == 3

    def test_memory_follows_the_largest_capacity(self):
        model = fast_model()
        for rows in range(1, 13):
            states(model, ragged_mask([40] * rows))
        kept = {g.hidden_states.untyped_storage() for g in graphs_of(model)._graphs.values()}
        sizes = {storage.data_ptr(): storage.nbytes() for storage in kept}
        assert len(graphs_of(model)) == 7 and sum(sizes.values()) <= 4 * 12 * 48 * 64 * 4


def replace_a_parameter(model):
    linear = model.encoder.layer[1].output.dense
    linear.weight = nn.Parameter(linear.weight.detach() * 2)


def assign_a_state_dict(model):
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}, assign=True)


def put_data_elsewhere(model):
    bias = model.encoder.layer[0].attention.self.key.bias
    bias.data = bias.data + 1


def replace_a_module(model):
    model.encoder.layer[2].intermediate.dense = randomize(nn.Linear(64, 160), seed=5)


def change_an_epsilon(model):
    model.encoder.layer[0].output.LayerNorm.eps = 0.5


def drop_a_bias(model):
    model.encoder.layer[0].output.dense.bias = None


def drop_a_layer(model):
    del model.encoder.layer[2]


def change_the_activation(model):
    model.encoder.layer[1].intermediate.intermediate_act_fn = nn.ReLU()


def half_and_back(model):
    model.bfloat16().float()


STALE = (
    replace_a_parameter,
    assign_a_state_dict,
    put_data_elsewhere,
    replace_a_module,
    change_an_epsilon,
    drop_a_bias,
    drop_a_layer,
    change_the_activation,
    half_and_back,
)


class TestStale:
    @pytest.mark.parametrize("change", STALE, ids=lambda change: change.__name__)
    def test_recorded_anew(self, change):
        model, mask = fast_model(), MASKS["right padding"]
        states(model, mask)
        change(model)
        assert_as_eager(model, mask)
        assert_as_eager(model, mask)
        assert graphs_of(model).captures == 2 and len(graphs_of(model)) == 1

    def test_a_bias_that_was_not_there(self):
        model, mask = stock_model(), MASKS["right padding"]
        drop_a_bias(model)
        accelerate_model(model)
        states(model, mask)
        model.encoder.layer[0].output.dense.bias = nn.Parameter(torch.ones(64))
        assert_as_eager(model, mask)
        assert graphs_of(model).captures == 2

    def test_other_options(self):
        model, mask = fast_model(), MASKS["right padding"]
        states(model, mask)
        accelerate_model(model, backend="torch")
        assert_as_eager(model, mask)
        model.encoder.fast_options = FastOptions(deterministic=False, backend="auto")
        assert_as_eager(model, mask)
        assert graphs_of(model).captures == 2  # the first set went with its options

    def test_settings_of_the_process(self, monkeypatch):
        model, mask = fast_model(), MASKS["right padding"]
        states(model, mask)
        monkeypatch.setenv("ROBERTA_FAST_BACKEND", "torch")
        assert_as_eager(model, mask)
        monkeypatch.delenv("ROBERTA_FAST_BACKEND")
        states(model, mask)
        assert graphs_of(model).captures == 2

    def test_training_frees_them(self):
        model, mask = fast_model(), MASKS["right padding"]
        states(model, mask)
        model.train()
        assert len(graphs_of(model)) == 0 and not graphs_of(model)._buffers
        model(**random_inputs(mask, model.config))[0].sum().backward()
        model.eval()
        assert_as_eager(model, mask)
        assert graphs_of(model).captures == 2

    def test_copies_and_pickles_have_none(self):
        model, mask = fast_model(), MASKS["right padding"]
        wanted, keys = states(model, mask), list(model.state_dict())
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
            assert len(graphs_of(other)) == graphs_of(other).captures == 0
            assert torch.equal(states(other, mask), wanted) and graphs_of(other).captures == 1
        assert len(graphs_of(model)) == 1 and keys == list(model.state_dict()) == list(stock_model().state_dict())
        assert "graphs" not in restore_model(model).encoder.__dict__


class Adapter(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear, self.scale = linear, 1.0

    def forward(self, x):
        return self.linear(x) * self.scale


def hook_a_layer(model):
    model.encoder.layer[1].register_forward_hook(lambda *call: None)


def hook_a_module(model):
    model.encoder.layer[1].output.register_forward_pre_hook(lambda *call: None)


def adapt(model):
    model.encoder.layer[0].attention.self.query = Adapter(model.encoder.layer[0].attention.self.query)


def replace_a_forward(model):
    layer = model.encoder.layer[0]
    layer.output.forward = layer.output.forward


def parametrize(model):
    torch.nn.utils.parametrizations.weight_norm(model.encoder.layer[0].output.dense)


def drop_out(model):
    model.encoder.layer[0].output.dropout.train()


def another_activation(model):
    model.encoder.layer[0].intermediate.intermediate_act_fn = Adapter(nn.ReLU())


DECLINED = {
    hook_a_layer: "a hook on RobertaLayer",
    hook_a_module: "a hook on RobertaOutput",
    adapt: "query is called as a module",
    replace_a_forward: "a replaced forward of RobertaOutput",
    parametrize: "output is called as a module",
    drop_out: "a dropout is in training mode",
    another_activation: "the activation is a Adapter",
}


class TestDeclined:
    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    @pytest.mark.parametrize(("change", "reason"), DECLINED.items(), ids=[change.__name__ for change in DECLINED])
    def test_other_peoples_code(self, change, reason):
        """Before the first recording, and behind it."""
        for recorded in (0, 1):
            model, mask = fast_model(), MASKS["right padding"]
            if recorded:
                states(model, mask)
            change(model)
            torch.manual_seed(0)
            got = states(model, mask)
            assert graphs_of(model).captures == recorded and explain(model).eager_calls == {reason: 1}
            if change is not drop_out:
                torch.testing.assert_close(got, states(accelerate_model(model, cuda_graphs=False), mask))

    def test_what_a_call_wants(self):
        model, mask = fast_model(), MASKS["right padding"]
        inputs = random_inputs(mask, model.config)
        with torch.no_grad():
            assert len(model(**inputs, output_hidden_states=True).hidden_states) == 4
        model(**inputs)[0].sum().backward()
        with torch.no_grad(), FlopCounterMode(display=False):
            model(**inputs)
        assert graphs_of(model).captures == 0
        first, second, third = explain(model).eager_calls
        assert first == "hidden states are requested" and second.startswith("gradients are recorded")
        assert third.startswith("a mode of torch")
        states(model, mask)  # though Hugging Face's recording hooks are there now
        states(model, mask)
        assert graphs_of(model).captures == 1 and graphs_of(model).replays == 2

    def test_compiled_models_do_without(self):
        model, mask = fast_model(), MASKS["right padding"]
        wanted = states(fast_model(cuda_graphs=False), mask)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(**random_inputs(mask, model.config))[0], wanted, rtol=1e-4, atol=1e-5)
        assert graphs_of(model).captures == 0

    def test_an_empty_batch(self):
        model = fast_model()
        with torch.no_grad():
            assert model.encoder(torch.empty(0, 5, 64), torch.ones(0, 5))[0].shape == (0, 5, 64)
        assert not explain(model).eager_calls

    def test_asked_for_they_are_missed_aloud(self, monkeypatch):
        monkeypatch.delitem(RECORDERS, "cpu")
        mask = MASKS["right padding"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            states(fast_model(), mask)
        model = fast_model(cuda_graphs=True)
        with pytest.warns(RuntimeWarning, match="runs without a CUDA graph: hidden_states are on cpu"):
            states(model, mask)
        model = fast_model(cuda_graphs=True, on_unsupported="error")
        with pytest.raises(NotImplementedError, match="would run without a CUDA graph, hidden_states are on cpu"):
            states(model, mask)

    @pytest.mark.parametrize("value", ["on", 1, 0, None])
    def test_unknown_values_are_named(self, value):
        with pytest.raises(ValueError, match=rf"cuda_graphs={value!r} is not one of \('auto', True, False\)"):
            FastOptions(cuda_graphs=value)


class TestFailedCapture:
    def test_falls_back_and_says_so_once(self, recorder):
        recorder.error = torch.OutOfMemoryError("no 3 GiB left\nand more")
        model, mask = fast_model(), MASKS["right padding"]
        reason = "the capture failed: OutOfMemoryError: no 3 GiB left"
        with pytest.warns(RuntimeWarning, match=reason) as warned:
            assert_as_eager(model, mask)
            assert_as_eager(model, mask)
        assert len([w for w in warned if reason in str(w.message)]) == 1
        assert explain(model).eager_calls == {reason: 2} and f"2 call(s): {reason}" in str(explain(model))
        recorder.error = None
        states(model, mask)
        assert graphs_of(model).captures == 0, "what failed is not tried again"
        states(model, ragged_mask([40]))
        assert graphs_of(model).captures == 1, "another capacity is"

    def test_gives_up_where_all_fail(self, recorder):
        recorder.error = RuntimeError("no")
        model = fast_model(on_unsupported="ignore")
        for rows in (1, 2, 3):
            states(model, ragged_mask([9] * rows))
        recorder.error = None
        assert_as_eager(model, ragged_mask([9] * 4))
        assert graphs_of(model).captures == 0 and explain(model).eager_calls == {"the capture failed: RuntimeError: no": 4}
        drop_a_bias(model)
        assert_as_eager(model, ragged_mask([9] * 4))
        assert graphs_of(model).captures == 1

    def test_silence_and_errors_as_asked(self, recorder):
        recorder.error = RuntimeError("operation not permitted when stream is capturing")
        mask = MASKS["right padding"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_as_eager(fast_model(on_unsupported="ignore"), mask)
        with pytest.raises(NotImplementedError, match="the capture failed: RuntimeError: operation not permitted"):
            states(fast_model(cuda_graphs=True, on_unsupported="error"), mask)

    def test_what_is_wrong_in_eager_mode_too_raises_as_there(self):
        model = fast_model(on_unsupported="ignore")
        model.encoder.layer[1].double()
        with pytest.raises(ValueError, match=r"layer.1.* is torch.float64, but hidden_states are torch.float32"):
            states(model, MASKS["right padding"])
