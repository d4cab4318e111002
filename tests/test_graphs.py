"""Graphs of the forward pass, all but the capture itself: results, capacities, memory, threads."""

import copy
import threading
import warnings

import pytest
import torch
from graph_cases import assert_as_eager, fast_model, graphs_of, recorder, states, stock_model
from transformers import RobertaForSequenceClassification

from roberta_fast import FastRobertaEncoder, accelerate_model, explain, graphs
from roberta_fast.testing import MASKS, ragged_mask, random_inputs, randomize, tiny_config

__all__ = ["recorder"]
pytestmark = pytest.mark.usefixtures("recorder")


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
        kept = {t.untyped_storage() for g in graphs_of(model)._graphs.values() for t in (*g.inputs.values(), g.states)}
        sizes = {storage.data_ptr(): storage.nbytes() for storage in kept}
        assert len(graphs_of(model)) == 7 and sum(sizes.values()) <= 4 * 12 * 48 * 64 * 4


class TestWhatIsRecorded:
    """From ids where a base model embeds packed rows, of first rows alone where a head reads no others."""

    def inputs_of(self, model):
        return tuple(next(iter(graphs_of(model)._graphs.values())).inputs)

    def test_a_base_model_is_recorded_from_its_ids(self):
        model, mask = fast_model(), MASKS["left padding"]
        positions = ((mask.cumsum(1) - 1).clamp(min=0) + 2).expand(mask.shape)
        with torch.no_grad():
            for given in ({}, {"position_ids": positions}, {"token_type_ids": torch.zeros_like(mask)}):
                inputs = {**random_inputs(mask, model.config), **given}
                got, eager = (m(**inputs).last_hidden_state for m in (model, fast_model(cuda_graphs=False)))
                torch.testing.assert_close(got, eager)
        assert self.inputs_of(model) == ("input_ids",) and graphs_of(model).captures == 3

    def test_an_encoder_by_hand_is_recorded_from_its_hidden_states(self):
        model = stock_model()
        model.encoder = FastRobertaEncoder.from_hf(model.encoder)
        for name in ("right padding", "holes"):
            states(model, MASKS[name])
        assert self.inputs_of(model) == ("hidden_states",) and graphs_of(model).replays == 2

    @pytest.mark.parametrize("options", [{}, {"precision": "fp8", "backend": "torch"}], ids=["float32", "fp8"])
    def test_heads_of_the_first_token(self, options):
        stock = randomize(RobertaForSequenceClassification(tiny_config()), std=0.1).eval()
        model, eager = (accelerate_model(copy.deepcopy(stock), cuda_graphs=g, **options) for g in ("auto", False))
        with torch.no_grad():
            for name in ("right padding", "one sequence", "left padding", "right padding"):
                inputs = random_inputs(MASKS[name], stock.config)
                torch.testing.assert_close(model(**inputs).logits, eager(**inputs).logits)
        graphs = graphs_of(model.roberta)
        assert graphs.replays == 4 and all(graph.states.dim() == 2 for graph in graphs._graphs.values())

    def test_copies_that_are_dropped_record_anew(self):
        model = fast_model(precision="fp8", backend="torch")
        before = states(model, MASKS["holes"])
        model.encoder.layer[0].output.LayerNorm = torch.nn.LayerNorm(64)
        with pytest.warns(RuntimeWarning, match="a replaced output_norm"):
            assert not torch.equal(states(model, MASKS["holes"]), before)

    def test_a_hook_on_the_embeddings_is_heard(self):
        model, heard = fast_model(), []
        states(model, MASKS["holes"])
        model.embeddings.word_embeddings.register_forward_hook(lambda *_: heard.append(1))
        states(model, MASKS["holes"])
        assert heard == [1]
