"""When a graph may not be replayed: what makes a recording stale, who may have none, and captures that fail."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from graph_cases import assert_as_eager, fast_model, graphs_of, recorder, states, stock_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from roberta_fast import FastOptions, accelerate_model, explain, restore_model
from roberta_fast.recorders import RECORDERS
from roberta_fast.testing import MASKS, ragged_mask, random_inputs, randomize

__all__ = ["recorder"]
pytestmark = pytest.mark.usefixtures("recorder")


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

    @pytest.mark.parametrize("owner", [torch.backends, torch.backends.cuda.matmul], ids=["all", "CUDA"])
    def test_float32_by_torchs_newer_setting(self, owner):
        """Beside which torch.get_float32_matmul_precision() raises."""
        model, mask, before = fast_model(), MASKS["right padding"], owner.fp32_precision
        try:
            for precision in ("ieee", "tf32", "ieee"):
                owner.fp32_precision = precision
                assert_as_eager(model, mask)
        finally:
            owner.fp32_precision = before
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


def replace_a_layers_forward(model):
    layer = model.encoder.layer[1]
    layer.forward = layer.forward


def hook_deep_inside(model):
    model.encoder.layer[0].intermediate.intermediate_act_fn = nn.Sequential(nn.ReLU())
    model.encoder.layer[0].intermediate.intermediate_act_fn[0].register_forward_hook(lambda *call: None)


def compile_a_layer(model):
    model.encoder.layer[1].compile(backend="eager")
    model.encoder.graphs.clear()


def drop_out(model):
    model.encoder.layer[0].output.dropout.train()


def another_activation(model):
    model.encoder.layer[0].intermediate.intermediate_act_fn = Adapter(nn.ReLU())


DECLINED = {
    hook_a_layer: "a hook on RobertaLayer",
    hook_a_module: "a hook on RobertaOutput",
    adapt: "query is called as a module",
    replace_a_forward: "a replaced forward of RobertaOutput",
    replace_a_layers_forward: "a replaced forward of RobertaLayer",
    hook_deep_inside: "a hook or a replaced forward somewhere inside a layer",
    compile_a_layer: "a RobertaLayer is compiled by itself",
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

    def test_replicas_leave_the_graphs_alone(self):
        """As ``nn.DataParallel`` makes them for a call: copies that share all attributes but the parameters."""
        model, mask = fast_model(), MASKS["right padding"]
        states(model, mask)
        replica = model.encoder._replicate_for_data_parallel()
        with torch.no_grad():
            replica(torch.randn(*mask.shape, 64), mask)
        assert replica.graphs is graphs_of(model) and len(graphs_of(model)) == graphs_of(model).captures == 1
        assert explain(model).eager_calls == {"a replica of DataParallel": 1}

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
        with pytest.warns(RuntimeWarning, match="runs without a CUDA graph: input_ids are on cpu"):
            states(model, mask)
        model = fast_model(cuda_graphs=True, on_unsupported="error")
        with pytest.raises(NotImplementedError, match="would run without a CUDA graph, input_ids are on cpu"):
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
