"""``roberta-fast convert``: a fairseq RoBERTa checkpoint into a Hugging Face model, without fairseq.

Both keep the same arithmetic under other names; fairseq's are in its ``fairseq/models/roberta/model.py`` and
``fairseq/modules/transformer_sentence_encoder.py`` (later ``transformer_layer.py``).
"""

import argparse
import pickle
import re
import sys
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

_FIRST_SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>")
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "gelu_accurate": "gelu_new", "gelu_fast": "gelu_new"}
_EMBEDDINGS = {
    "embed_tokens.weight": "word_embeddings.weight",
    "embed_positions.weight": "position_embeddings.weight",
    "emb_layer_norm": "LayerNorm",
    "layernorm_embedding": "LayerNorm",
}
_LAYER = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}
_HEAD = {"lm_head.weight": "lm_head.decoder.weight", "lm_head.bias": "lm_head.bias"}
_NOT_PARAMETERS = re.compile(r"(^|\.)(version|_float_tensor)$|^classification_heads\.")


def from_fairseq(checkpoint: str | Path) -> RobertaForMaskedLM:
    """The masked-language model of a fairseq RoBERTa ``checkpoint`` file, float32, in evaluation mode.

    Fine-tuned classification heads are left out. Raises ValueError naming what the file holds that no RoBERTa of Hugging Face
    has, an activation or a parameter (a pre-LayerNorm encoder's, say); and for a pickle that could run code, which is not loaded.
    """
    state, args = _read(Path(checkpoint))
    config = _config(state, args)
    model = RobertaForMaskedLM(config).eval()
    renamed = dict(_renamed(state))
    renamed["roberta.embeddings.token_type_embeddings.weight"] = torch.zeros(1, config.hidden_size)
    renamed["lm_head.decoder.bias"] = renamed["lm_head.bias"]
    expected = model.state_dict()
    wrong = sorted(expected.keys() ^ renamed.keys()) or [n for n in expected if expected[n].shape != renamed[n].shape]
    if wrong:
        raise ValueError(f"{checkpoint} is no RoBERTa of config {_shape_of(config)}: {', '.join(wrong)} does not fit")
    model.load_state_dict(renamed)
    return model


def tokenizer_of(dictionary: str | Path, max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of a fairseq ``dict.txt``: text is split at white space, as fairseq does where no BPE is named.

    max_length: tokens, specials included. Raises ValueError naming a line that is not ``symbol count``.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    symbols = list(_FIRST_SYMBOLS)
    for number, line in enumerate(Path(dictionary).read_text(encoding="utf-8").splitlines(), 1):
        symbol, _, count = line.removesuffix(" #fairseq:overwrite").rpartition(" ")
        if not symbol or not count.isdigit():
            raise ValueError(f"{dictionary}, line {number}, is not 'symbol count': {line!r}")
        symbols.append(symbol)
    vocabulary = {symbol: index for index, symbol in enumerate([*symbols, "<mask>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=False, add_prefix_space=False)
    names = {"bos": "<s>", "eos": "</s>", "cls": "<s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    specials = {f"{role}_token": symbol for role, symbol in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=max_length, **specials)


def _read(path):
    """(the model's state, its arguments) of a checkpoint, by torch's loader of tensors and plain data alone."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        held = f"{found[1]}, which could run code" if found else "something that is no tensor and no plain data"
        raise ValueError(f"{path} holds {held}: it is not loaded") from None
    except Exception as error:  # an unpickler fails in any way on bytes that are no pickle
        raise ValueError(f"{path} is no checkpoint that torch can read: {error!r:.100}") from None
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        raise ValueError(f"{path} is no fairseq checkpoint: it has no 'model'")
    args = saved.get("args") or (saved.get("cfg") or {}).get("model")
    if args is None:
        raise ValueError(f"{path} is no fairseq checkpoint: it has neither 'args' nor 'cfg'")
    return saved["model"], args if isinstance(args, dict) else vars(args)


def _config(state, args):
    """Sizes are read off the tensors; ``args`` says what no tensor shows."""
    activation = args.get("activation_fn", "gelu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation_fn={activation!r} is not one of {tuple(_ACTIVATIONS)}")

    def shape(ending):
        return next((tuple(t.shape) for name, t in state.items() if name.endswith(ending)), None)

    words, positions, wide = shape("embed_tokens.weight"), shape("embed_positions.weight"), shape("layers.0.fc1.weight")
    if None in (words, positions, wide, args.get("encoder_attention_heads")):
        needed = "embed_tokens, embed_positions, layers.0.fc1 or the argument encoder_attention_heads"
        raise ValueError(f"the checkpoint is no RoBERTa: it lacks {needed}")
    return RobertaConfig(
        vocab_size=words[0],
        hidden_size=words[1],
        num_hidden_layers=1 + max(int(n) for name in state for n in re.findall(r"\.layers\.(\d+)\.", name)),
        num_attention_heads=args["encoder_attention_heads"],
        intermediate_size=wide[0],
        max_position_embeddings=positions[0],
        type_vocab_size=1,
        hidden_act=_ACTIVATIONS[activation],
        hidden_dropout_prob=args.get("dropout", 0.1),
        attention_probs_dropout_prob=args.get("attention_dropout", 0.1),
        layer_norm_eps=1e-5,
        tie_word_embeddings=not args.get("untie_weights_roberta", False),
    )


def _shape_of(config):
    return f"{config.num_hidden_layers} layers × {config.hidden_size}"


def _renamed(state):
    """(Hugging Face's name, tensor) of every parameter. Raises ValueError naming one that it does not know."""
    for name, tensor in state.items():
        tensor = tensor.float() if isinstance(tensor, torch.Tensor) else tensor
        inner = re.sub(r"^(decoder|encoder)\.", "", name)
        if _NOT_PARAMETERS.search(inner):
            continue
        if inner.startswith("lm_head."):
            yield _HEAD.get(inner, inner), tensor
            continue
        inner = re.sub(r"^sentence_encoder\.", "", inner)
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", inner)
        joined = re.fullmatch(r"layers\.(\d+)\.self_attn\.in_proj_(weight|bias)", inner)
        stem, _, kind = inner.rpartition(".")
        if layer and layer[2] in _LAYER:
            yield f"roberta.encoder.layer.{layer[1]}.{_LAYER[layer[2]]}.{layer[3]}", tensor
        elif joined:
            for role, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                yield f"roberta.encoder.layer.{joined[1]}.attention.self.{role}.{joined[2]}", part.clone()
        elif inner in _EMBEDDINGS:
            yield f"roberta.embeddings.{_EMBEDDINGS[inner]}", tensor
        elif stem in _EMBEDDINGS:
            yield f"roberta.embeddings.{_EMBEDDINGS[stem]}.{kind}", tensor
        else:
            raise ValueError(f"the parameter {name} is in no RoBERTa of Hugging Face")


def run(argv: list[str]) -> int:
    """Runs the command. Returns 0 with the folder written, 1 with a reason and nothing written."""
    parser = argparse.ArgumentParser(prog="roberta-fast convert", description=__doc__.split("\n")[0].replace("`", ""))
    parser.add_argument("checkpoint", type=Path, help="fairseq's .pt file")
    parser.add_argument("folder", type=Path, help="where Hugging Face's files go; it must not hold a model yet")
    parser.add_argument("--dict", type=Path, help="its dictionary (default: dict.txt beside the checkpoint, where there is one)")
    arguments = parser.parse_args(argv)
    beside = arguments.checkpoint.parent / "dict.txt"
    dictionary = arguments.dict or (beside if beside.is_file() else None)
    try:
        if not arguments.checkpoint.is_file():
            raise ValueError(f"{str(arguments.checkpoint)!r} is no file")
        if arguments.dict and not arguments.dict.is_file():
            raise ValueError(f"argument --dict: {str(arguments.dict)!r} is no file")
        if (arguments.folder / "config.json").exists():
            raise ValueError(f"{str(arguments.folder)!r} holds a model already")
        model = from_fairseq(arguments.checkpoint)
        # Two positions are fairseq's padding offset.
        tokenizer = dictionary and tokenizer_of(dictionary, model.config.max_position_embeddings - 2)
        if tokenizer and len(tokenizer) != model.config.vocab_size:
            raise ValueError(f"{dictionary} has {len(tokenizer)} symbols, and the model {model.config.vocab_size}")
        arguments.folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"roberta-fast convert: {error}", file=sys.stderr)
        return 1
    model.save_pretrained(arguments.folder)
    if tokenizer:
        tokenizer.save_pretrained(arguments.folder)
    print(f"{arguments.folder}: RobertaForMaskedLM, {_shape_of(model.config)}, {'with' if tokenizer else 'without'} a tokenizer")
    return 0
