"""Two processes that share a batch compute what one computes: DDP, FSDP of both generations, wrapped by class name."""

import copy
import dataclasses
import re

import pytest
import torch
from model_trio import LABELS, MASK, assert_same_gradients, gradients, tiny_model, trio
from ranks import run_ranks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import RobertaForSequenceClassification

from roberta_fast import accelerate_model, explain, restore_model
from roberta_fast.packing import PackedBatch
from roberta_fast.testing import assert_close_as_torch, random_inputs, tiny_config

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
INPUTS = {**random_inputs(MASK, tiny_config()), "labels": LABELS}
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def fast_model(**options):
    return accelerate_model(tiny_model(RobertaForSequenceClassification), **options)


def step(model, rank):
    """The logits of every other text, after backward; so the two processes pack different numbers of tokens."""
    output = model(**{name: value[rank::2] for name, value in INPUTS.items()})
    output.loss.backward()
    return output.logits.detach()


def assert_as_in_one_process(results):
    """``[(logits, gradients)]`` of the ranks, against one process with the whole batch."""
    models = trio(tiny_model(RobertaForSequenceClassification))
    outputs = [model(**INPUTS) for model in models]
    for output in outputs:
        output.loss.backward()
    together = torch.stack([logits for logits, _ in results], 1).flatten(0, 1)
    assert_close_as_torch(together, *(output.logits.detach() for output in outputs[1:]), name="logits")
    for _, theirs in results:
        assert_same_gradients(theirs, *(gradients(model) for model in models[1:]))


def data_parallel(rank, settings, checkpointing):
    model = fast_model()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return step(DistributedDataParallel(model, **settings), rank), gradients(model)


@pytest.mark.parametrize(
    ("settings", "checkpointing"),
    [({}, False), ({"find_unused_parameters": True}, False), ({"static_graph": True}, True)],
    ids=["plain", "find unused parameters", "static graph and checkpointing"],
)
def test_ddp(settings, checkpointing, tmp_path):
    assert_as_in_one_process(run_ranks(data_parallel, tmp_path, settings, checkpointing))


def sharded(model, chosen=lambda module: type(module).__name__ == "RobertaLayer", **settings):
    """``fully_shard`` on the chosen modules, children first, then on the model."""
    for module in list(model.modules())[::-1]:
        if chosen(module):
            fully_shard(module, **settings)
    return fully_shard(model, **settings)


def whole_gradients(model):
    return {name: gradient.full_tensor() for name, gradient in gradients(model).items()}


def fully_sharded(rank):
    model, unpacked = sharded(fast_model()), []
    unpack = PackedBatch.unpack
    PackedBatch.unpack = lambda batch, rows: unpacked.append(rows.shape) or unpack(batch, rows)
    result = step(model, rank), whole_gradients(model)
    report = explain(model)
    assert not unpacked, "FSDP's hooks only manage parameters: rows must stay packed to the end, where one row a text is read"
    assert report.fallbacks == () and report.stock_calls == report.whole_calls == {}
    with pytest.raises(ValueError, match="a sharded module cannot be made stock again: FSDPRobertaLayer"):
        restore_model(model)
    accelerate_model(model, on_unsupported="error")
    assert type(model.roberta.encoder.layer[0]).__name__ == "FSDPRobertaLayer", "other options, the same classes"
    return result


def test_fully_shard(tmp_path):
    assert_as_in_one_process(run_ranks(fully_sharded, tmp_path))


def saved_and_loaded(rank):
    """The state dict of a sharded model after one step, and of another one that has loaded it."""
    model, other = sharded(fast_model()), sharded(accelerate_model(tiny_model(RobertaForSequenceClassification, seed=1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, rank)
    optimizer.step()
    states = get_model_state_dict(model, options=WHOLE)
    set_model_state_dict(other, copy.deepcopy(states), options=dataclasses.replace(WHOLE, broadcast_from_rank0=True))
    return states, get_model_state_dict(other, options=WHOLE)


def test_sharded_state_dict_round_trip(tmp_path):
    (states, again), (nothing, _) = run_ranks(saved_and_loaded, tmp_path)
    assert nothing == {}, "rank 0 alone gathers"
    assert states.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in states.items())
    stock = tiny_model(RobertaForSequenceClassification)
    stock(**INPUTS).loss.backward()
    torch.optim.SGD(stock.parameters(), lr=0.1).step()
    assert list(states) == list(stock.state_dict())
    for name, value in stock.state_dict().items():
        assert torch.allclose(states[name], value, atol=1e-5), name


def sharded_in_bfloat16(rank):
    """Logits of the fast and of the stock model, both sharded, computed in bfloat16."""
    settings = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    models = fast_model(backend="torch"), tiny_model(RobertaForSequenceClassification)
    return [(step(sharded(model, **settings), rank), whole_gradients(model)) for model in models]


def test_fully_shard_with_mixed_precision(tmp_path):
    exact = tiny_model(RobertaForSequenceClassification).double()
    output = exact(**INPUTS)
    output.loss.backward()
    for rank, ((fast, gradients_fast), (stock, gradients_stock)) in enumerate(run_ranks(sharded_in_bfloat16, tmp_path)):
        assert_close_as_torch(fast, stock, output.logits.detach()[rank::2], name="logits")
        assert_same_gradients(gradients_fast, gradients_stock, gradients(exact))


def wrapped_by_name(rank, version, checkpointing):
    """As accelerate's FSDP plugin wraps: the layers are found by the name of their class."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    model = fast_model()
    names = [f"roberta.encoder.layer.{i}" for i in range(len(model.roberta.encoder.layer))]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["RobertaLayer"],
        cpu_ram_efficient_loading=False,
    )
    chosen = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert [name for name, module in model.named_modules() if chosen(module)] == names
    if version == 2:
        if checkpointing:
            apply_activation_checkpointing(model, check_fn=chosen)
        logits, found = step(sharded(model, chosen), rank), whole_gradients(model)
    else:
        plugin.set_auto_wrap_policy(model)
        settings = {"auto_wrap_policy": plugin.auto_wrap_policy, "device_id": torch.device("cpu"), "use_orig_params": True}
        model = FullyShardedDataParallel(model, **settings)
        assert sum(isinstance(module, FullyShardedDataParallel) for module in model.modules()) == 1 + len(names)
        if checkpointing:
            apply_activation_checkpointing(model, auto_wrap_policy=plugin.auto_wrap_policy)
        logits = step(model, rank)
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            found = {name: gradient.clone() for name, gradient in gradients(model).items()}
    assert sum(isinstance(module, CheckpointWrapper) for module in model.modules()) == len(names) * checkpointing
    assert explain(model).fallbacks == () and explain(model).stock_calls == {}
    return logits, {re.sub(r"_(fsdp|checkpoint)_wrapped_module\.", "", name): gradient for name, gradient in found.items()}


@pytest.mark.parametrize("version", [1, 2], ids=["FSDP1", "FSDP2"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed layers"])
def test_layers_are_wrapped_by_their_class_name(version, checkpointing, tmp_path):
    pytest.importorskip("accelerate", reason="the package accelerate is not installed")
    assert_as_in_one_process(run_ranks(wrapped_by_name, tmp_path, version, checkpointing))
