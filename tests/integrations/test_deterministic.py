"""deterministic=True on CPU: a text has the same bits alone and in any batch, heads included; what cannot promise that raises."""

import copy
import functools
import importlib.resources
import importlib.util
import pickle
import random
from typing import NamedTuple

import pytest
import torch
import transformers
from model_trio import NO_DROPOUT, assert_same_gradients, gradients, tiny_inputs, tiny_model, trio
from torch import nn
from transformers import AutoModel, BertForSequenceClassification, RobertaForCausalLM, RobertaForSequenceClassification

from roberta_fast import (
    FastOptions,
    FastRobertaEncoder,
    accelerate_model,
    dispatch,
    explain,
    patch_transformers,
    restore_model,
)
from roberta_fast.deterministic import Linear
from roberta_fast.testing import MASKS, assert_close_as_torch, random_inputs, randomize, tiny_config

pytestmark = pytest.mark.skipif(dispatch.load_cpp() is not None, reason=str(dispatch.load_cpp()))

LENGTHS = (5, 40, 17, 1, 33, 2, 26, 9)
HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM")
NAMES = {"roberta": "Roberta", "bert": "Bert", "distilbert": "DistilBert", "electra": "Electra"}
CASES = [(t, head) for t in NAMES for head in HEADS] + [("roberta", "MultipleChoice"), ("distilbert", "MultipleChoice")]
CHOICES = 2
WIDE = {"hidden_size": 192, "intermediate_size": 768}


class Layout(NamedTuple):
    """How texts are batched: which, in this order, padded to ``seqlen`` on one side."""

    order: tuple[int, ...]
    seqlen: int
    left: bool = False


RIGHT = (
    Layout((0, 1, 2, 3, 4, 5, 6, 7), 40),
    Layout((6, 2, 7, 1, 0, 4, 5, 3), 57),
    Layout((3, 5, 0, 7), 9),
    Layout((4, 4, 2), 33),
    Layout((1, 1), 40),
)
LEFT = (Layout((2, 0, 3, 1, 5, 7), 41, left=True), Layout((7, 6, 1, 0, 2, 3), 50, left=True))


@pytest.fixture(autouse=True)
def same_number_of_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 120, (length,), generator=generator) for length in LENGTHS]


def head_model(model_type, head, **overrides):
    if model_type == "distilbert" and (size := overrides.pop("intermediate_size", None)):
        overrides["hidden_dim"] = size
    if model_type == "electra" and "hidden_size" in overrides:
        overrides["embedding_size"] = overrides["hidden_size"] // 2  # so that its projection takes part
    if "Base" in head:
        return randomize(AutoModel.from_config(tiny_config(model_type, **overrides))).eval()
    return randomize(getattr(transformers, f"{NAMES[model_type]}For{head}")(tiny_config(model_type, **overrides))).eval()


def batched(texts, layout, config):
    """Model inputs; on the left, positions are told, as most families count padding."""
    ids = torch.full((len(layout.order), layout.seqlen), config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(layout.order):
        columns = slice(layout.seqlen - len(texts[text]), None) if layout.left else slice(len(texts[text]))
        ids[row, columns], mask[row, columns] = texts[text], 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if layout.left and config.model_type != "roberta":
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return inputs


def differences(model, texts, layouts, threads=(1, 2, 3)):
    """(output, text, layout, threads) wherever a text's bits in a batch are not those that it has alone, unpadded, on one thread.

    Tensors [B, S, ...] are compared at the text's own tokens, others whole. MultipleChoice takes a row twice as its choices.
    """
    choice = "MultipleChoice" in type(model).__name__

    @torch.no_grad()
    def run(inputs):
        if choice:
            inputs = {name: t[:, None].repeat(1, CHOICES, 1) for name, t in inputs.items()}
        return {name: t for name, t in model(**inputs).items() if isinstance(t, torch.Tensor)}

    torch.set_num_threads(1)
    alone = [run({"input_ids": text[None]}) for text in texts]
    found = []
    for layout in layouts:
        inputs = batched(texts, layout, model.config)
        for count in threads:
            torch.set_num_threads(count)
            for name, result in run(inputs).items():
                for row, text in enumerate(layout.order):
                    a, b = result[row], alone[text][name][0]
                    real = inputs["attention_mask"][row].bool()
                    a = a[real] if a.dim() and a.shape[0] == layout.seqlen else a
                    assert a.shape == b.shape
                    if not torch.equal(a, b):
                        found.append((name, text, layout, count))
    return found


@pytest.mark.parametrize(("model_type", "head"), CASES)
def test_a_text_has_the_same_bits_in_any_batch(model_type, head, texts):
    model = accelerate_model(head_model(model_type, head), deterministic=True)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {Linear}
    assert differences(model, texts, RIGHT) == []
    assert explain(model).fallbacks == () and explain(model).stock_calls == {}


@pytest.mark.parametrize("head", HEADS[1:])
@pytest.mark.parametrize("model_type", NAMES)
def test_left_padding_does_not_change_a_bit(model_type, head, texts):
    model = accelerate_model(head_model(model_type, head), deterministic=True)
    assert differences(model, texts, LEFT) == []


def test_heads_that_read_a_padded_position_do_not_depend_on_the_batch_either(texts):
    """Position 0 of a text that is padded on the left has no counterpart in the text alone, but has one behind other padding."""
    model = accelerate_model(head_model("roberta", "SequenceClassification"), deterministic=True)
    with torch.no_grad():
        wide, narrow = (model(**batched(texts, layout, model.config)).logits for layout in LEFT)
        alone = model(**batched(texts, Layout((0,), 6, left=True), model.config)).logits
    for row, text in enumerate(LEFT[0].order):
        if text in LEFT[1].order:
            assert torch.equal(wide[row], narrow[LEFT[1].order.index(text)])
    assert torch.equal(alone[0], wide[LEFT[0].order.index(0)])


@pytest.mark.parametrize("model_type", NAMES)
def test_wide_models(model_type, texts):
    """Sizes at which PyTorch's products differ, see below."""
    for head in ("SequenceClassification", "MaskedLM"):
        model = accelerate_model(head_model(model_type, head, **WIDE), deterministic=True)
        assert differences(model, texts, (*RIGHT, *LEFT[: head == "MaskedLM"]), threads=(1, 2)) == []


def test_without_it_bits_do_differ(texts):
    """The comparison has teeth: the same models, accelerated without it or not at all, fail it."""
    for model in (head_model("roberta", head, **WIDE) for head in ("SequenceClassification", "MaskedLM")):
        assert differences(model, texts, RIGHT, threads=(1,)) != []
        assert differences(accelerate_model(model), texts, RIGHT, threads=(1,)) != []


def test_one_linear_layer_that_sees_its_batch_is_caught(texts):
    class Mutant(Linear):
        def forward(self, x):
            return super().forward(x) + 1e-6 * (x.shape[0] > 3)

    model = accelerate_model(head_model("roberta", "SequenceClassification"), deterministic=True)
    model.classifier.out_proj.__class__ = Mutant
    assert {(text, layout) for _, text, layout, _ in differences(model, texts, RIGHT, threads=(1,))} == {
        (text, layout) for layout in RIGHT if len(layout.order) > 3 for text in layout.order
    }


def test_hidden_states_and_an_encoder_of_ones_own(texts):
    """FastRobertaEncoder alone keeps the promise for what an encoder returns, and so do the states between its layers."""
    model = head_model("roberta", "Base", add_pooling_layer=False)
    model.encoder = FastRobertaEncoder.from_hf(model.encoder, FastOptions(deterministic=True))
    assert {type(m) for m in model.encoder.modules() if isinstance(m, nn.Linear)} == {Linear}
    layout = RIGHT[1]
    with torch.no_grad():
        batch = batched(texts, layout, model.config)
        for wish in ({}, {"output_hidden_states": True}):
            output = model(**batch, **wish)
            for row, text in enumerate(layout.order):
                alone, length = model(texts[text][None], **wish), len(texts[text])
                assert torch.equal(alone.last_hidden_state[0], output.last_hidden_state[row, :length])
                for a, b in zip(alone.hidden_states or (), output.hidden_states or (), strict=True):
                    assert torch.equal(a[0], b[row, :length])


def test_masks_with_holes_and_without_tokens(texts):
    """Beside a row with no token and one with holes a text has its bits, and the row with holes those that it has alone."""
    model = accelerate_model(head_model("roberta", "TokenClassification"), deterministic=True)
    inputs = batched(texts, Layout((2, 4, 6), 33), model.config)
    inputs["attention_mask"][0] = 0
    inputs["attention_mask"][2, 3:20:4] = 0
    with torch.no_grad():
        together, holes = model(**inputs).logits, model(**{name: t[2:] for name, t in inputs.items()}).logits
        assert torch.equal(together[1], model(texts[4][None]).logits[0])
    assert torch.equal(together[2], holes[0]) and together.isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("model_type", ["roberta", "electra"])
def test_a_training_step_repeats_bit_by_bit(model_type, threads):
    """Dropout and all, under one seed; under another it is another step."""
    torch.set_num_threads(threads)
    dropped = dict.fromkeys(NO_DROPOUT, 0.1)
    kind = getattr(transformers, f"{NAMES[model_type]}ForSequenceClassification")
    model = accelerate_model(tiny_model(kind, model_type, **WIDE, **dropped), deterministic=True).train()

    def step(seed):
        torch.manual_seed(seed)
        model.zero_grad()
        loss = model(**tiny_inputs(model)).loss
        loss.backward()
        return {"loss": loss.detach(), **{name: g.clone() for name, g in gradients(model).items()}}

    first, again, other = step(0), step(0), step(1)
    assert {name for name in first if not torch.equal(first[name], again[name])} == set()
    assert not torch.equal(first["loss"], other["loss"])


def test_outputs_and_gradients_are_those_of_the_stock_model():
    models = trio(tiny_model(BertForSequenceClassification, "bert", **WIDE), deterministic=True)
    inputs = tiny_inputs(models.stock)
    losses = [model(**inputs) for model in models]
    assert_close_as_torch(*(output.logits.detach() for output in losses), name="logits")
    for output in losses:
        output.loss.backward()
    assert_same_gradients(*(gradients(model) for model in models))


REFUSED = {
    "float16": (
        ValueError,
        "no backend can run linear on cpu float16 with deterministic=True.*not float16.*same bits in every batch",
    ),
    "float64": (ValueError, "linear on cpu float64.*computes float32 and bfloat16, not float64.*same bits in every batch"),
    "autocast": (
        ValueError,
        "no backend can run linear on cpu float16 with deterministic=True.*not float16.*same bits in every batch",
    ),
    "attentions": (NotImplementedError, "stock path would run, attentions are requested, which deterministic=True forbids"),
    "4D mask": (NotImplementedError, "stock path would run, a 4D attention mask, which deterministic=True forbids"),
    "4D mask, compiled": (NotImplementedError, "stock path would run, a 4D attention mask, which deterministic=True forbids"),
    "hook": (NotImplementedError, "stock layer would run, a hook on RobertaSelfAttention, which deterministic=True forbids"),
    "new projection": (
        NotImplementedError,
        r"value would run a Linear that acceleration did not replace \(accelerate_model does.*, which deterministic",
    ),
    "no extension": (ValueError, "can(not)? run linear on cpu float32.*C\\+\\+ extension is not built.*same bits in every batch"),
    "torch backend": (
        ValueError,
        "can(not)? run linear on cpu.*PyTorch's products do not have the same bits in every batch",
    ),
    "head dimension": (ValueError, "no backend can run attention on cpu float32.*head_dim=8 is outside 16..128"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_promise_it_raises_and_says_why(reason, monkeypatch):
    model = tiny_model(AutoModel.from_config, num_attention_heads=8 if reason == "head dimension" else 4).eval()
    inputs = random_inputs(torch.ones(2, 7, dtype=torch.int64), model.config)
    accelerate_model(model, deterministic=True)
    if reason in ("float16", "float64"):
        model.to(getattr(torch, reason))
    if reason == "attentions":
        model.set_attn_implementation("eager")
        accelerate_model(model, deterministic=True)
        inputs["output_attentions"] = True
    if reason.startswith("4D mask"):
        inputs["attention_mask"] = torch.ones(2, 1, 7, 7).tril().bool()
    if reason == "hook":
        model.encoder.layer[1].attention.self.register_forward_hook(lambda *_: None)
    if reason == "new projection":
        model.encoder.layer[1].attention.self.value = nn.Linear(64, 64)
    if reason == "no extension":
        missing = functools.cache(lambda: "the C++ extension is not built")
        monkeypatch.setattr(dispatch, "load_cpp", missing)
        dispatch.forget_choices()
    if reason == "torch backend":
        accelerate_model(model, deterministic=True, backend="torch")
    run = torch.compile(model, backend="eager") if reason.endswith("compiled") else model
    error, message = REFUSED[reason]
    try:
        with torch.autocast("cpu", torch.float16, enabled=reason == "autocast"), pytest.raises(error, match=message):
            run(**inputs)
    finally:
        monkeypatch.undo()
        dispatch.forget_choices()
        torch.compiler.reset()  # a frame that raised while it was traced would be left alone from now on
    accelerate_model(model, on_unsupported="ignore", backend="auto")
    with torch.no_grad():
        assert model(**inputs).last_hidden_state.isfinite().all(), "without it the same call is served"


@pytest.mark.parametrize("cached", [False, True], ids=["at once", "by steps"])
def test_a_decoder_gives_a_text_the_same_bits_in_any_batch(cached):
    model = accelerate_model(randomize(RobertaForCausalLM(tiny_config(is_decoder=True))).eval(), deterministic=True)
    batch = random_inputs(MASKS["left padding"], model.config)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0) + model.config.pad_token_id + 1

    @torch.no_grad()
    def logits(inputs, positions):
        if not cached:
            return model(**inputs, position_ids=positions).logits
        seqlen, steps, cache = positions.shape[1], [], None
        for end in range(1, seqlen + 1):
            ids, mask = inputs["input_ids"][:, end - 1 : end], inputs["attention_mask"][:, :end]
            output = model(ids, mask, position_ids=positions[:, end - 1 : end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        return torch.cat(steps, 1)

    together = logits(batch, positions)
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = logits({name: t[row : row + 1, -length:] for name, t in batch.items()}, positions[row : row + 1, -length:])
        assert torch.equal(together[row, -length:], alone[0])


def test_what_deterministic_cannot_be():
    model = randomize(RobertaForCausalLM(tiny_config(is_decoder=True))).eval()
    with pytest.raises(ValueError, match="reaches heads only through accelerate_model, not through patch_transformers"):
        patch_transformers(deterministic=True)
    with pytest.raises(ValueError, match="deterministic=1 is not True or False"):
        accelerate_model(model, deterministic=1)


def kinds(model):
    return {type(m) for m in model.modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("undo", [restore_model, accelerate_model], ids=["restore_model", "accelerate_model"])
def test_undone_linear_layers_are_stock(undo):
    model = tiny_model(RobertaForSequenceClassification).eval()
    inputs = tiny_inputs(model)
    stock, fast = model(**inputs).logits, accelerate_model(model)(**inputs).logits
    accelerate_model(model, deterministic=True)
    assert kinds(model) == {Linear}
    undo(model)
    assert kinds(model) == {nn.Linear}
    assert torch.equal(model(**inputs).logits, stock if undo is restore_model else fast)


def test_saving_and_copies(tmp_path):
    """Files and names are the stock model's; copies keep the promise and can be restored."""
    model = tiny_model(RobertaForSequenceClassification).eval()
    inputs, stock = tiny_inputs(model), model(**tiny_inputs(model)).logits
    keys = list(model.state_dict())
    model.save_pretrained(tmp_path / "stock")
    expected = accelerate_model(model, deterministic=True)(**inputs).logits
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "fast")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
    assert kinds(RobertaForSequenceClassification.from_pretrained(tmp_path / "fast")) == {nn.Linear}
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), again):
        assert kinds(copied) == {Linear}
        assert torch.equal(copied(**inputs).logits, expected)
        assert torch.equal(restore_model(copied)(**inputs).logits, stock)
        assert kinds(copied) == {nn.Linear}


def test_sentence_transformers(checkpoint):
    """The published MiniLM: a text's embedding, and its tokens', alone and in batches in any order; mean pooling keeps them."""
    st = pytest.importorskip("sentence_transformers", reason="the package sentence-transformers is not installed")
    model = st.SentenceTransformer(checkpoint, device="cpu")
    texts = (importlib.resources.files("roberta_fast") / "sentences.txt").read_text().splitlines()[:8]
    order = random.Random(0).sample(range(len(texts)), len(texts))

    def changed():
        count = 0
        for kind in ("sentence_embedding", "token_embeddings"):
            alone = [model.encode([text], output_value=kind, convert_to_tensor=True)[0] for text in texts]
            for some, size in ((order, 3), (order[::-1], len(texts))):
                batch = model.encode([texts[i] for i in some], batch_size=size, output_value=kind, convert_to_tensor=True)
                count += sum(not torch.equal(ours, alone[i]) for ours, i in zip(batch, some, strict=True))
        return count

    accelerate_model(model, deterministic=True)
    assert changed() == 0
    restore_model(model)
    assert changed() > 0
