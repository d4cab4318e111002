"""Models that have nothing but the 8-bit weights of their layers: without the fp32 ones, in files, and loaded from them.

A saved folder holds ``config.json`` and ``model.int8.safetensors``: every parameter and buffer of the model under its own
name. The weights of the six linear modules of a layer are int8 [M, K], which the formula in ``ops/int8_linear.py`` calls Q, with
their scales u, float32 [M], as ``<name>_scale``; everything else is as it was. The file's name keeps ``from_pretrained`` from
taking rotated integers for weights.
"""

import contextlib
import copy
import os
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from roberta_fast.accelerate import accelerate_model, fast_encoders
from roberta_fast.copies import copies_of, refuse_training
from roberta_fast.families import layer_parts, unwrapped
from roberta_fast.int8 import Int8Linears, ReleasedWeight
from roberta_fast.parts import LINEARS

FILE = "model.int8.safetensors"
FORMAT, VERSION = "roberta_fast int8, rotated by Hadamard matrices of 64", "1"


def release_weights(model: nn.Module) -> nn.Module:
    """Frees the fp32 weights that the 8-bit copies of ``model`` stand for, in place, and returns it.

    What is left serves inference alone: no parameter asks for gradients any more, and ``train()``, ``state_dict()``,
    ``save_pretrained``, ``restore_model`` and calls that would compute in fp32 raise, naming the cause. ``save_quantized`` works.
    Raises ValueError, with nothing changed, where a layer has no copies: see ``accelerate_model`` and ``precision="int8"``.
    """
    layers = _int8_layers(model)
    for layer in layers:
        parts = layer_parts(layer)
        _set_released(parts)
        layer.copies = layer.copies.stands_for(parts)
    refuse_training(model)
    return model.requires_grad_(False)


def save_quantized(model: PreTrainedModel, folder: str | Path) -> None:
    """Writes ``config.json`` and the weights of ``model``, those of its layers in 8 bits, into ``folder``; other files stay.

    Each file is written under another name first and then takes its place at once. A tokenizer saves itself.
    Raises ValueError, with nothing written, where a layer has no copies, or ``model`` is no model of Hugging Face's.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model must be a Hugging Face model (of a SentenceTransformer: model[0].auto_model), got {type(model).__name__}"
        )
    if Path(folder).exists() and not Path(folder).is_dir():
        raise ValueError(f"folder {str(folder)!r} is a file")
    tensors = {name: tensor.detach() for name, tensor in _named_tensors(model) if not isinstance(tensor, ReleasedWeight)}
    names = {module: name for name, module in model.named_modules()}
    for layer in _int8_layers(model):
        parts = layer_parts(layer)
        for linear, (integers, scale, bias) in layer.copies.quantized().items():
            name = names[getattr(parts, linear)]
            tensors |= {f"{name}.weight": integers, f"{name}.weight_scale": scale}
            if bias is not None and f"{name}.bias" in tensors:
                tensors[f"{name}.bias"] = bias
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Clones, as the file's writer takes no two tensors of one storage.
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    with _in_place_of(folder / FILE) as temporary:
        save_file(own, temporary, metadata={"format": FORMAT, "version": VERSION})
    with _in_place_of(folder / "config.json") as temporary:
        temporary.write_text(config.to_json_string(), encoding="utf-8")


def load_quantized(folder: str | Path, model_class: type | None = None, **overrides) -> PreTrainedModel:
    """The model that ``save_quantized`` wrote into ``folder``, in evaluation mode: the same outputs, bit for bit.

    It is what ``release_weights`` leaves of a model; at no time are there fp32 weights of its layers.
    model_class: by default the class that was saved. overrides: fields of ``FastOptions``, as for ``accelerate_model``.
    Raises ValueError naming what is wrong with the folder, its files or the class.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise ValueError(f"folder must be a path, got {folder!r}")
    folder = Path(folder)
    for name in (FILE, "config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{str(folder)!r} holds no {name}; save_quantized writes it")
    tensors = _read(folder / FILE)
    config = AutoConfig.from_pretrained(folder)
    if model_class is None:
        model_class = getattr(transformers, (config.architectures or ["nothing"])[0], None)
        if model_class is None:
            raise ValueError(
                f"{str(folder)!r} is of architectures {config.architectures}, which transformers lacks: give model_class"
            )
    with torch.device("meta"):
        model = model_class.from_config(config) if hasattr(model_class, "from_config") else model_class(config)
    model.tie_weights()
    accelerate_model(model.eval(), **{**overrides, "precision": "int8"})
    names = {module: name for name, module in model.named_modules()}
    layers = [unwrapped(layer) for encoder in fast_encoders(model) for layer in encoder.layer]
    for layer in layers:
        _fill(layer, tensors, names, folder)
    _fill_rest(model, tensors, folder)
    for layer in layers:
        layer.copies = layer.copies.stands_for(layer_parts(layer))
    refuse_training(model)
    return model.requires_grad_(False)


def _int8_layers(model):
    """The fast layers of ``model``. Raises ValueError where one does not compute in 8 bits."""
    encoders = fast_encoders(model)
    if not encoders:
        raise ValueError(f"model {type(model).__name__} is not accelerated: call accelerate_model(model, precision='int8') first")
    layers = [unwrapped(layer) for encoder in encoders for layer in encoder.layer]
    for layer in layers:
        if copies_of(layer, layer_parts(layer)) is None:
            raise ValueError(f"a layer of {type(model).__name__} has no 8-bit weights: {layer.copies}")
        if layer.copies.precision != "int8":
            raise ValueError(f"a layer of {type(model).__name__} has no 8-bit integers, but {layer.copies.precision}")
    return layers


def _set_released(parts):
    for name in LINEARS:
        linear = getattr(parts, name)
        linear._parameters["weight"] = ReleasedWeight(linear.weight.shape)


def _named_tensors(model):
    """(name, tensor) of every parameter and buffer once, those included that no state_dict has."""
    yield from model.named_parameters()
    yield from model.named_buffers()


@contextlib.contextmanager
def _in_place_of(path):
    """A file beside ``path`` that takes its place when all went well, and is removed else."""
    handle, name = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # a temporary file is its owner's alone
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _read(path):
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
                wanted, got = (FORMAT, VERSION), (metadata.get("format"), metadata.get("version"))
                raise ValueError(f"{path} is of format and version {got}, and this roberta_fast reads {wanted}")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from None


def _fill(layer, tensors, names, folder):
    """Gives ``layer`` its 8-bit weights; takes them out of ``tensors``, biases excepted."""
    parts, quantized = layer_parts(layer), {}
    for name in LINEARS:
        linear = getattr(parts, name)
        place = f"{names[linear]}.weight"
        for key, dtype, shape in (
            (place, torch.int8, linear.weight.shape),
            (f"{place}_scale", torch.float32, linear.weight.shape[:1]),
        ):
            _check(tensors, key, dtype, shape, folder)
        quantized[name] = (tensors.pop(place), tensors.pop(f"{place}_scale"))
        if linear.bias is not None:
            _check(tensors, f"{names[linear]}.bias", torch.float32, linear.bias.shape, folder)
            linear.bias = nn.Parameter(tensors[f"{names[linear]}.bias"].clone(), requires_grad=False)
    _set_released(parts)
    layer.copies = Int8Linears.of(parts, quantized)


def _fill_rest(model, tensors, folder):
    """Gives ``model`` every other parameter and buffer; a tied one under each of its names."""
    loaded = {}  # {id: (its value, the empty tensor itself, which keeps the id its own)}
    for module_name, module in model.named_modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is None or isinstance(tensor, ReleasedWeight):
                    continue
                key = f"{module_name}.{name}".removeprefix(".")
                if id(tensor) not in loaded:
                    _check(tensors, key, tensor.dtype, tensor.shape, folder)
                    value = tensors.pop(key).clone()  # no longer a map of the file
                    if kind is module._parameters:
                        value = nn.Parameter(value, requires_grad=False)
                    loaded[id(tensor)] = (value, tensor)
                kind[name] = loaded[id(tensor)][0]
    if tensors:
        raise ValueError(f"{str(folder)!r} holds tensors that {type(model).__name__} does not: {', '.join(sorted(tensors)[:5])}")


def _check(tensors, key, dtype, shape, folder):
    found = tensors.get(key)
    if found is None or (found.dtype, found.shape) != (dtype, shape):
        got = "none" if found is None else f"{found.dtype} {tuple(found.shape)}"
        raise ValueError(f"{str(folder)!r} needs {key} as {dtype} {tuple(shape)} for this config, and holds {got}")
