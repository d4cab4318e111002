"""precision="fp8": close to the model on real weights, eight bits handed on from LayerNorm to product, refused by name elsewhere.

Here the reference composition stands for a GPU's products (backend="torch"), or Triton's interpreter for its kernels.
"""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModel, AutoTokenizer, BertModel, RobertaForSequenceClassification

from roberta_fast import FastRobertaEncoder, accelerate_model, check_parity, explain, ops, restore_model, save_quantized
from roberta_fast.demo import embed_all, read_sentences, tokenize
from roberta_fast.options import FastOptions
from roberta_fast.testing import MASKS, random_inputs, randomize, tiny_config

MASK = MASKS["right padding"]


@pytest.fixture
def stock():
    return randomize(RobertaForSequenceClassification(tiny_config()), std=0.1).eval()


@pytest.fixture
def inputs(stock):
    return random_inputs(MASK, stock.config)


@torch.inference_mode()
def logits(model, inputs):
    return model(**inputs).logits


def fp8(model, backend="torch", **options):
    return accelerate_model(copy.deepcopy(model), precision="fp8", backend=backend, **options)


def test_a_real_model_stays_close(checkpoint):
    """As close as three bits of mantissa in both factors leave it: on sentences, cosines of at least 0.99, 0.997 in the mean."""
    tokenizer, stock = AutoTokenizer.from_pretrained(checkpoint), AutoModel.from_pretrained(checkpoint).eval()
    batches = tokenize(tokenizer, stock.config, read_sentences(None), 34, "cpu")
    with torch.inference_mode():
        exact, ours = embed_all(stock, batches), embed_all(fp8(stock), batches)
    cosines = torch.cosine_similarity(ours, exact)
    assert cosines.min() > 0.99 and 0.9965 < cosines.mean() < 0.9995


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_are_the_models(stock, inputs, dtype):
    model = fp8(stock.to(dtype))
    ours, theirs = logits(model, inputs), logits(stock, inputs)
    assert ours.dtype == dtype and 0 < (ours - theirs).abs().max() < 0.2 * theirs.abs().max()
    assert explain(model).precision == "fp8 linear layers in 3 of 3 layers" and not explain(model).fallbacks
    assert check_parity(model, inputs).cosine > 0.99
    assert torch.equal(logits(restore_model(model), inputs), theirs)


def test_kernels_compute_what_the_reference_does(stock, inputs, triton_device):
    stock, inputs = stock.to(triton_device), {name: value.to(triton_device) for name, value in inputs.items()}
    both = [logits(fp8(stock, backend), inputs) for backend in ("triton", "torch")]
    assert (both[0] - both[1]).abs().max() < 0.05 * both[1].abs().max()  # where float32's sums differ, a rounding may


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(stock, mask):
    inputs = random_inputs(MASKS[mask], stock.config)
    assert check_parity(fp8(stock), inputs).cosine > 0.99
    counted = fp8(stock, unpad="device")
    assert torch.equal(logits(counted, inputs), logits(fp8(stock), inputs))


def test_rows_are_rounded_once(stock, inputs, monkeypatch):
    """By what makes them, a LayerNorm or attention; what enters the first layer has nobody to do it."""
    rounded, quantize = [], ops.fp8_quantize
    monkeypatch.setattr(ops, "fp8_quantize", lambda x, *given, **how: rounded.append(x.shape[1]) or quantize(x, *given, **how))
    logits(fp8(stock), inputs)
    assert rounded == [64]


DROPS = {
    "train": lambda model: model.train().eval(),
    "weights": lambda model: model.load_state_dict(model.state_dict()),
    "dtype": lambda model: model.double().float(),
}


@pytest.mark.parametrize("cause", DROPS)
def test_what_drops_the_copies(stock, inputs, cause):
    model = fp8(stock)
    DROPS[cause](model)
    with pytest.warns(RuntimeWarning, match="does not compute in 8 bits: 8-bit weights: .* dropped them"):
        assert torch.equal(logits(model, inputs), logits(accelerate_model(stock, backend="torch"), inputs))


def test_a_replaced_norm_drops_its_layers_copies(stock, inputs):
    model = fp8(stock)
    model.roberta.encoder.layer[1].output.LayerNorm = torch.nn.LayerNorm(64)
    with pytest.warns(RuntimeWarning, match="another LayerNorm before the layer dropped them"):
        logits(model, inputs)
    assert explain(model).precision == "fp8 linear layers in 1 of 3 layers"
    assert "a replaced output_norm (LayerNorm) dropped them" in str(explain(model))


def test_layers_behind_another_norm_do_without(stock, inputs):
    """Their scales would be those of what no longer comes in, and the row that comes in 8 bits would be scaled by others."""
    layers = stock.roberta.encoder.layer
    for layer, wide in zip(layers, (slice(0, 32), slice(32, 64)), strict=False):
        layer.output.LayerNorm.weight.data[wide] *= 50
    for missing in (0, 1):
        shorter = copy.deepcopy(stock)
        del shorter.roberta.encoder.layer[missing]
        model = fp8(stock)
        del model.roberta.encoder.layer[missing]
        with pytest.warns(RuntimeWarning, match="another LayerNorm before the layer dropped them"):
            ours = logits(model, inputs)
        theirs = logits(shorter, inputs)
        assert (ours - theirs).abs().max() < 0.2 * theirs.abs().max()


def test_a_conversion_to_the_dtype_that_it_has_keeps_the_copies(stock, inputs):
    model = fp8(stock.bfloat16())
    model.to(torch.bfloat16)
    assert explain(model).precision == "fp8 linear layers in 3 of 3 layers"


def test_calls_that_compute_in_the_models_own_precision(stock, inputs):
    model, plain = fp8(stock), logits(accelerate_model(copy.deepcopy(stock), backend="torch"), inputs)
    with pytest.warns(RuntimeWarning, match="does not compute in 8 bits: gradients are recorded"):
        assert torch.equal(model(**inputs).logits.detach(), plain)
    seen = model.roberta.encoder.layer[0].register_forward_hook(lambda module, given, output: output * 1)
    with pytest.warns(RuntimeWarning, match="might change them, and fp8 relies on their bounds"):
        logits(model, inputs)
    seen.remove()
    assert not torch.equal(logits(model, inputs), plain)


def test_compiles_into_one_graph(stock, inputs):
    counter = CompileCounterWithBackend("aot_eager")
    model = fp8(stock)
    expected = logits(model, inputs)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    assert torch.equal(logits(compiled, inputs), expected)
    graphs = counter.frame_count
    logits(compiled, random_inputs(MASKS["left padding"], stock.config))
    assert counter.frame_count == graphs


def cross_attending():
    return BertModel(tiny_config("bert", is_decoder=True, add_cross_attention=True))


REASONS = {
    "sizes": (lambda: BertModel(tiny_config("bert", intermediate_size=150)), "both multiples of 16, got torch.float32 (150, 64)"),
    "activation": (lambda: BertModel(tiny_config("bert", hidden_act="relu")), "the activation is a ReLU"),
    "decoder": (cross_attending, "the layer attends to an encoder"),
}


@pytest.mark.parametrize("name", REASONS)
def test_layers_without_copies_say_why(name):
    make, reason = REASONS[name]
    assert any(reason in fallback for fallback in explain(fp8(make().eval())).fallbacks)


def test_an_encoder_alone_does_not_know_what_bounds_its_input(stock, inputs):
    stock.roberta.encoder = FastRobertaEncoder.from_hf(stock.roberta.encoder, FastOptions(precision="fp8", backend="torch"))
    with pytest.warns(RuntimeWarning, match="the LayerNorm before the first layer is not known"):
        logits(stock, inputs)
    explanation = explain(stock)
    assert explanation.precision == "fp8 linear layers in 2 of 3 layers"
    assert "the LayerNorm before the first layer is not known" in str(explanation)


def test_refusals_name_the_device(stock):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"8\.9 or later, and the model is on cpu; backend='torch'"):
            accelerate_model(stock, precision="fp8")
        assert type(stock.roberta.encoder).__module__.startswith("transformers.")
    with pytest.raises(ValueError, match="has no 8-bit integers"):
        save_quantized(fp8(stock), "nowhere")


@pytest.mark.gpu
def test_on_the_gpu(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    stock = AutoModel.from_pretrained(checkpoint, dtype=torch.bfloat16).eval().cuda()
    if torch.cuda.get_device_capability() < (8, 9):
        with pytest.raises(ValueError, match=torch.cuda.get_device_name()):
            accelerate_model(stock, precision="fp8")
        return
    batch = tokenizer(read_sentences(None)[:32], padding=True, return_tensors="pt").to("cuda")
    model = accelerate_model(copy.deepcopy(stock), precision="fp8")
    assert check_parity(model, batch).cosine > 0.95 and "triton" in str(explain(model).backends["fp8_linear"])
    with torch.inference_mode():
        ours, reference = model(**batch)[0], fp8(stock, "torch")(**batch)[0]
    mask = batch["attention_mask"].bool()
    assert torch.cosine_similarity(ours[mask].float(), reference[mask].float()).min() > 0.99
