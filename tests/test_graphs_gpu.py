"""CUDA graphs of the forward pass on a GPU: what they compute, what they keep, and that nothing waits for the host."""

import contextlib
import copy
import threading

import pytest
import torch
from transformers import AutoModel

from roberta_fast import FastOptions, accelerate_model, explain, graphs, restore_model
from roberta_fast.packing import PackedBatch
from roberta_fast.testing import assert_close_as_torch, ragged_mask, random_inputs, randomize, tiny_config

pytestmark = pytest.mark.gpu

POSITIONS = 600


def stock_model(**overrides):
    config = tiny_config(max_position_embeddings=POSITIONS, **overrides)
    return randomize(AutoModel.from_config(config), std=0.05).eval().to("cuda", torch.float16)


def fast_model(**options):
    return accelerate_model(stock_model(), **options)


def inputs_of(model, mask, seed=0):
    return {name: value.cuda() for name, value in random_inputs(mask, model.config, seed).items()}


@torch.no_grad()
def states(model, mask, seed=0):
    return model(**inputs_of(model, mask, seed)).last_hidden_state


def assert_as_stock(model, mask, seed=0):
    stock = restore_model(copy.deepcopy(model))
    real = mask.bool().cuda()
    wide = states(copy.deepcopy(stock).float(), mask, seed)[real]
    assert_close_as_torch(states(model, mask, seed)[real], states(stock, mask, seed)[real], wide)


@contextlib.contextmanager
def no_synchronization():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def drawn_masks(count, rows, longest):
    generator = torch.Generator().manual_seed(0)
    return [ragged_mask(torch.randint(1, longest + 1, (rows,), generator=generator).tolist(), longest) for _ in range(count)]


@pytest.mark.parametrize(("rows", "longest"), [(1, 32), (8, 128), (6, 512)])
def test_one_graph_serves_every_mix_of_lengths(rows, longest):
    model = fast_model()
    for seed, mask in enumerate(drawn_masks(8, rows, longest)):
        assert_as_stock(model, mask, seed)
    assert (model.encoder.graphs.captures, model.encoder.graphs.replays) == (1, 8)
    assert not explain(model).eager_calls


def test_bits_are_those_of_an_eager_call_at_the_capacity():
    model = fast_model()
    eager = accelerate_model(restore_model(copy.deepcopy(model)), unpad="device", cuda_graphs=False)
    for lengths in ([90, 7, 33, 1, 65], [96, 96, 2, 50, 80, 11], [70, 70, 70, 70, 70]):
        mask = ragged_mask(lengths).cuda()
        rows = torch.randn(*mask.shape, 64, device="cuda", dtype=torch.float16)
        capacity = graphs.capacity_for(*mask.shape, POSITIONS)
        short = [end for have, want in zip(mask.shape[::-1], capacity[::-1], strict=True) for end in (0, want - have)]
        wide_mask = torch.nn.functional.pad(mask, short)
        wide_rows = torch.nn.functional.pad(rows, (0, 0, *short))
        with torch.no_grad():
            got, wanted = model.encoder(rows, mask)[0], eager.encoder(wide_rows, wide_mask)[0]
        assert torch.equal(got, wanted[: mask.shape[0], : mask.shape[1]])
    assert model.encoder.graphs.captures == 1


def test_deterministic_has_the_bits_of_eager_calls():
    model = fast_model(deterministic=True)
    eager = accelerate_model(restore_model(copy.deepcopy(model)), deterministic=True, cuda_graphs=False)
    for seed, mask in enumerate(drawn_masks(4, 5, 200)):
        assert torch.equal(states(model, mask, seed), states(eager, mask, seed))
    assert model.encoder.graphs.captures == 1


@pytest.mark.parametrize("options", [{}, {"unpad": "device", "cuda_graphs": False}], ids=["graphs", "eager"])
def test_the_host_never_waits(options):
    model = fast_model(**options)
    for seed, mask in enumerate(drawn_masks(3, 4, 100)):
        inputs = inputs_of(model, mask, seed)
        if seed == 0:
            with torch.no_grad():
                model(**inputs)  # records, or compiles
        with no_synchronization(), torch.no_grad():
            model(**inputs)
    assert model.encoder.graphs.captures == (not options)


def test_memory_follows_the_largest_capacity():
    model = fast_model()
    states(model, ragged_mask([512] * 16))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for rows in (1, 2, 3, 4, 6, 8, 12, 16):
        for longest in (32, 64, 96, 256, 384):
            states(model, ragged_mask([longest] * rows))
    torch.cuda.synchronize()
    assert model.encoder.graphs.captures == 41
    assert torch.cuda.memory_allocated() - before < 1 << 20


def test_dropped_graphs_give_their_memory_back():
    model = fast_model()
    states(model, ragged_mask([5]))  # makes workspaces of libraries, which stay
    model.train().eval()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for rows in (1, 4, 16):
        states(model, ragged_mask([512] * rows))
    assert torch.cuda.memory_allocated() > before
    model.train()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_threads_on_streams_of_their_own():
    model = fast_model()
    masks = [ragged_mask(lengths) for lengths in ([90, 30, 7], [120, 1, 128], [3, 128, 128], [250, 17, 99])]
    inputs = [inputs_of(model, mask, i) for i, mask in enumerate(masks)]
    with torch.no_grad():
        wanted = [model(**given).last_hidden_state for given in inputs]
    torch.cuda.synchronize()
    wrong = []

    def serve(i):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            got = [model(**inputs[i]).last_hidden_state for _ in range(50)]
            torch.cuda.current_stream().synchronize()
        wrong.extend(i for result in got if not torch.equal(result, wanted[i]))

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(len(masks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and model.encoder.graphs.captures == 3 and model.encoder.graphs.replays == 204


def test_threads_that_record_while_others_compute():
    model, other = fast_model(), fast_model(cuda_graphs=False)
    wrong = []

    def compute(chosen, rows):
        for longest in (32, 64, 96, 128):
            mask = ragged_mask([longest, *[5] * (rows - 1)])
            got, again = states(chosen, mask), states(chosen, mask)
            torch.cuda.current_stream().synchronize()
            if not torch.equal(got, again):
                wrong.append((rows, longest))

    threads = [threading.Thread(target=compute, args=(chosen, rows)) for chosen, rows in ((model, 2), (other, 2), (model, 5))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and model.encoder.graphs.captures == 8 and not explain(model).eager_calls


def test_weights_written_in_place_are_seen_and_others_recorded_anew():
    model, mask = fast_model(), ragged_mask([60, 7, 33])
    states(model, mask)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(1.05)
    assert_as_stock(model, mask)
    assert model.encoder.graphs.captures == 1
    model.float()
    assert states(model, mask).dtype == torch.float32
    model.half()
    assert_as_stock(model, mask)
    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()}, assign=True)
    assert_as_stock(model, mask)
    assert model.encoder.graphs.captures == 4


def test_autocast_keeps_no_cast_of_a_weight():
    model, mask = fast_model().float(), ragged_mask([60, 7, 33])
    eager = accelerate_model(restore_model(copy.deepcopy(model)), cuda_graphs=False)
    for factor in (1.0, 1.2):
        with torch.no_grad():
            for chosen in (model, eager):
                for parameter in chosen.encoder.parameters():
                    parameter.mul_(factor)
        with torch.autocast("cuda", torch.float16):
            got, wanted = states(model, mask), states(eager, mask)
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
    assert model.encoder.graphs.captures == 1


def test_a_capture_that_fails_leaves_everything_in_order(monkeypatch):
    """A real failure: the host asks for the number of rows, which a warm-up allows and a capture does not."""
    model, mask = fast_model(), ragged_mask([60, 7, 33])
    pack = PackedBatch.of
    monkeypatch.setattr(PackedBatch, "of", lambda rows, mask, options: pack(rows, mask, FastOptions(unpad="host")))
    with pytest.warns(RuntimeWarning, match="runs without a CUDA graph: the capture failed"):
        assert_as_stock(model, mask)
    assert_as_stock(model, mask)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    monkeypatch.undo()
    assert_as_stock(model, ragged_mask([90, 7, 33]))
    assert (model.encoder.graphs.captures, model.encoder.graphs.replays) == (1, 1)


def test_a_graph_of_the_user_holds_none_of_ours():
    model, mask = fast_model(), ragged_mask([60, 7, 33])
    inputs = inputs_of(model, mask)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        model(**inputs)
        # A replay loads no kernel for these very sizes, and a capture may load none.
        accelerate_model(restore_model(copy.deepcopy(model)), unpad="device", cuda_graphs=False)(**inputs)
    torch.cuda.current_stream().wait_stream(side)
    ours = model.encoder.graphs.replays
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = model(**inputs).last_hidden_state
    assert model.encoder.graphs.replays == ours
    for seed, mask in enumerate(drawn_masks(3, 3, 60)):
        for name, value in inputs_of(model, mask, seed).items():
            inputs[name].copy_(value)
        graph.replay()
        torch.testing.assert_close(captured, states(model, mask, seed), rtol=1e-2, atol=1e-2)
