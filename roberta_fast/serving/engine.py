"""A model, its tokenizer and its task: from a folder or a name to the outputs for sequences of tokens."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import cached_file

import roberta_fast
from roberta_fast import fp8
from roberta_fast.families import longest_sequence
from roberta_fast.quantized import FILE as QUANTIZED_FILE
from roberta_fast.serving.decoding import Continuation, Continued, Decoder
from roberta_fast.serving.settings import CUDA_GRAPHS, POOLINGS, TASKS, Settings
from roberta_fast.tasks.generation import TARGET_TOKENIZER, text_bounds

# How much larger than its real tokens a padded batch may be. An accelerated model pays for padding in the embeddings alone,
# about a fortieth of a token's whole cost on CPU; a stock one pays in full.
PADDING = {False: 3.0, True: 1.25}
# What a masked token's logits take, in tokens of a batch: their memory is that of some dozen hidden states.
MASKED_TOKEN_COST = 16
# On CPU a larger batch is no faster a token, and all of its texts wait for the last.
BATCH_TOKENS = {"cpu": 1024, "cuda": 16_384}
# Where tokens come one by one, each step reads all weights whatever the rows, and few rows need what they may come to.
GENERATION_BATCH_TOKENS = {"cpu": 8192, "cuda": 65_536}
DEFAULT_NEW_TOKENS = 100
_ENDINGS = {
    "ForQuestionAnswering": "question-answering",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    "EncoderDecoderModel": "translation",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "BertGenerationDecoder": "text-generation",
}
GENERATING = ("translation", "text-generation")


class Feed(NamedTuple):
    """One sequence to compute.

    masked: places whose words are asked for, in fill-mask; empty elsewhere. continuation: how it is continued, where it is.
    """

    input_ids: list[int]
    token_type_ids: list[int] | None
    masked: tuple[int, ...] = ()
    continuation: Continuation | None = None

    @property
    def cost(self) -> int:
        """Tokens that it counts in a batch; of a continuation, all that it may come to."""
        if self.continuation is not None:
            return (len(self.input_ids) + self.continuation.max_new_tokens) * self.continuation.num_beams
        return len(self.input_ids) + MASKED_TOKEN_COST * len(self.masked)


class Engine:
    """Loads what ``settings`` name and computes with it.

    task: a key of ``TASKS``. max_length: tokens that the model takes, special ones included. max_batch_tokens: a batch's budget.
    precision: ``int8`` or the dtype. prompts: what embedding models want before a text, by name. target_tokenizer: of what is
    generated. max_new_tokens: how many of it there may be; 0 in tasks that generate nothing.
    Raises ValueError naming the setting that does not fit.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        is_quantized = Path(settings.model, QUANTIZED_FILE).is_file()
        if is_quantized and settings.device == "cuda":
            raise ValueError(f"--model {settings.model} holds 8-bit weights for --device cpu, not cuda")
        self.device = settings.device or ("cuda" if torch.cuda.is_available() and not is_quantized else "cpu")
        self.options = self._options()
        self.config, self.task = task_of(settings)
        self.max_batch_tokens = (
            settings.max_batch_tokens or (GENERATION_BATCH_TOKENS if self.task in GENERATING else BATCH_TOKENS)[self.device]
        )
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.tokenizer = _loaded(AutoTokenizer, settings.model)
        if not self.tokenizer.is_fast:
            raise ValueError(f"--model {settings.model}: its tokenizer {type(self.tokenizer).__name__} is no fast one")
        self.prompts, self.default_prompt = {}, None
        self.precision = settings.precision or settings.dtype
        self.pooling, longest = self._pooling() if self.task == "embedding" else (None, None)
        self.model = self._model()
        self.max_length = min(length for length in (self._positions(), self.tokenizer.model_max_length, longest) if length)
        self.max_new_tokens = 0
        if self.task in GENERATING:
            self.target_tokenizer, self.decoder = self._generation()
            self.max_new_tokens = min(settings.max_new_tokens, self.decoder.max_length)
        self._warm_up()

    def compute(self, feeds: Sequence[Feed]) -> list[np.ndarray | Continued]:
        """The output for each sequence, float32 where it is an array.

        question-answering: [2, S], start and end logits. token-classification: [S, labels]. text-classification: [labels].
        embedding: [C], pooled. fill-mask: [masked, V]. Where texts are generated: ``Continued``.
        """
        outputs = dict(self.outputs(feeds))
        return [outputs[i] for i in range(len(feeds))]

    def outputs(self, feeds: Sequence[Feed]) -> Iterator[tuple[int, np.ndarray | Continued]]:
        """(number of a sequence, its output), each as soon as it is there."""
        compute = self._continued if self.task in GENERATING else self._computed
        with torch.inference_mode():
            for alike in _alike(feeds):
                for group in _groups([len(feeds[i].input_ids) for i in alike], PADDING[self.settings.stock]):
                    numbers = [alike[i] for i in group]
                    for place, output in compute([feeds[i] for i in numbers]):
                        yield numbers[place], output

    def explanation(self) -> str:
        """What runs on which backend."""
        return "stock Hugging Face" if self.settings.stock else str(roberta_fast.explain(self.model))

    def _continued(self, feeds):
        return self.decoder([feed.input_ids for feed in feeds], [feed.continuation for feed in feeds])

    def _computed(self, feeds):
        return enumerate(self._outputs(feeds))

    def _outputs(self, feeds):
        lengths = [len(feed.input_ids) for feed in feeds]
        batch = self._padded(feeds, lengths)
        if self.task == "question-answering":
            out = self.model(**batch)
            logits = torch.stack([out.start_logits, out.end_logits], dim=1).float().cpu().numpy()
            return [row[:, :length] for row, length in zip(logits, lengths, strict=True)]
        if self.task == "token-classification":
            logits = self.model(**batch).logits.float().cpu().numpy()
            return [row[:length] for row, length in zip(logits, lengths, strict=True)]
        if self.task == "text-classification":
            return list(self.model(**batch).logits.float().cpu().numpy())
        if self.task == "fill-mask":
            return self._masked_logits(feeds, batch)
        states = self.model(**batch).last_hidden_state
        # A text at a time: how a sum over rows is rounded may depend on their number, hence on a neighbour's padding.
        pooled = [_pool(states[i, :length].float(), self.pooling) for i, length in enumerate(lengths)]
        return list(torch.stack(pooled).cpu().numpy())

    def _padded(self, feeds, lengths):
        shape = (len(feeds), max(lengths))
        ids = torch.full(shape, self.tokenizer.pad_token_id or 0, dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.long)
        types = torch.zeros(shape, dtype=torch.long) if feeds[0].token_type_ids is not None else None
        for i, (feed, length) in enumerate(zip(feeds, lengths, strict=True)):
            ids[i, :length] = torch.tensor(feed.input_ids)
            mask[i, :length] = 1
            if types is not None:
                types[i, :length] = torch.tensor(feed.token_type_ids)
        batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        return {name: tensor.to(self.device) for name, tensor in batch.items() if tensor is not None}

    def _masked_logits(self, feeds, batch):
        """The head sees only the masked rows: over a whole vocabulary it costs as much a token as some layers do."""
        places = [(i, place) for i, feed in enumerate(feeds) for place in feed.masked]
        rows, columns = torch.tensor(places, device=self.device).reshape(-1, 2).unbind(1)

        def masked_only(module, arguments, output):
            output.last_hidden_state = output.last_hidden_state[rows, columns][None]
            return output

        hook = self.model.base_model.register_forward_hook(masked_only)
        try:
            logits = self.model(**batch).logits[0].float().cpu()
        finally:
            hook.remove()
        return [part.numpy() for part in logits.split([len(feed.masked) for feed in feeds])]

    def _model(self):
        settings = self.settings
        auto = getattr(transformers, TASKS[self.task])
        if Path(settings.model, QUANTIZED_FILE).is_file():
            if settings.stock or settings.prepack or settings.dtype != "float32":
                asked = "--stock" if settings.stock else "--prepack" if settings.prepack else f"--dtype {settings.dtype}"
                raise ValueError(f"--model {settings.model} holds 8-bit weights, which {asked} is not for")
            self.precision = "int8"
            return roberta_fast.load_quantized(settings.model, auto, deterministic=settings.deterministic)
        self._check_kind()
        model, info = _loaded(auto, settings.model, dtype=getattr(torch, settings.dtype), output_loading_info=True)
        missing = [name for name in info["missing_keys"] if "pooler" not in name or self.task == "text-classification"]
        if missing:
            names = ", ".join(sorted(missing)[:3])
            raise ValueError(f"--model {settings.model} has no weights for --task {self.task}: {names} would be random")
        model.eval().requires_grad_(False).to(self.device)
        if settings.stock:
            return model
        roberta_fast.accelerate_model(model, options=self.options)
        if settings.precision == "int8":
            roberta_fast.release_weights(model)
        return model

    def _options(self):
        """Raises ValueError naming a flag that this device or this package cannot follow, before anything is loaded."""
        settings = self.settings
        if settings.stock and (settings.precision or settings.deterministic or settings.prepack):
            raise ValueError("--stock serves plain Hugging Face, which has no --precision, no --deterministic and no --prepack")
        if settings.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda needs a CUDA device and a CUDA build of torch")
        chosen = {name: getattr(settings, name) for name in ("precision", "deterministic", "prepack")}
        if settings.cuda_graphs == "on" and (settings.stock or self.device != "cuda"):
            raise ValueError(f"--cuda-graphs on is for --device cuda, not {'--stock' if settings.stock else self.device}")
        options = roberta_fast.FastOptions(**chosen, cuda_graphs=CUDA_GRAPHS[settings.cuda_graphs])
        where = self.device, settings.dtype
        for flag, given in (("--precision int8", options.precision == "int8"), ("--prepack", options.prepack)):
            if given and where != ("cpu", "float32"):
                raise ValueError(f"{flag} is for --device cpu and --dtype float32, not {self.device} and {settings.dtype}")
        if options.prepack and options.precision:
            raise ValueError("--prepack is for weights in float32: --precision int8 packs its own")
        if options.precision == "fp8":
            fp8.check_device(torch.empty(0, device=self.device), options.backend)
        return options

    def _check_kind(self):
        crosses = self.config.model_type == "encoder-decoder"
        if crosses != (self.task == "translation"):
            raise ValueError(f"--model {self.settings.model} is {self.config.model_type}: not for --task {self.task}")
        if self.task == "text-generation" and not self.config.is_decoder:
            raise ValueError(f"--model {self.settings.model} looks ahead, as its config has no is_decoder: no --task {self.task}")

    def _positions(self):
        return longest_sequence(self.config.encoder if self.task == "translation" else self.config)

    def _generation(self):
        """(the tokenizer of what is generated, the decoder)."""
        tokenizer, generation = self.tokenizer, self.model.generation_config
        if self.task == "translation":
            if Path(self.settings.model, TARGET_TOKENIZER).is_dir():
                tokenizer = _loaded(AutoTokenizer, str(Path(self.settings.model, TARGET_TOKENIZER)))
            self.default_beams = generation.num_beams or 1
            self.default_new_tokens = generation.max_length or DEFAULT_NEW_TOKENS
            ends, start = generation.eos_token_id, generation.decoder_start_token_id
        else:
            self.default_beams, self.default_new_tokens = 1, DEFAULT_NEW_TOKENS
            ends, start = text_bounds(tokenizer)[1], None
        if ends is None or (self.task == "translation" and start is None):
            raise ValueError(f"--model {self.settings.model} does not say by which tokens its texts begin and end")
        ends = [ends] if isinstance(ends, int) else ends
        return tokenizer, Decoder(self.model, ends, tokenizer.pad_token_id or 0, start)

    def _pooling(self):
        """(how a text's embedding is made of its tokens', its longest length or None), as the folder of the model says."""
        modules = _json(self.settings.model, "modules.json") or []
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        if set(kinds) - {"Transformer", "Pooling", "Normalize"}:
            raise ValueError(
                f"--model {self.settings.model} is made of {', '.join(kinds)}: only Transformer, Pooling and Normalize"
            )
        prompts = _json(self.settings.model, "config_sentence_transformers.json") or {}
        self.prompts = prompts.get("prompts") or {}
        self.default_prompt = prompts.get("default_prompt_name")
        longest = (_json(self.settings.model, "sentence_bert_config.json") or {}).get("max_seq_length")
        if self.settings.pooling:
            return self.settings.pooling, longest
        place = next((module["path"] for module in modules if module["type"].endswith(".Pooling")), None)
        if place is None:
            return "mean", longest
        said = _json(self.settings.model, f"{place}/config.json") or {}
        names = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens"}
        chosen = [name for name, value in said.items() if name.startswith("pooling_mode_") and value is True]
        if said.get("pooling_mode") in POOLINGS:
            return said["pooling_mode"], longest
        pooling = next((name for name, key in names.items() if chosen == [key]), None)
        if pooling is None:
            raise ValueError(f"--model {self.settings.model} pools by {chosen or said}: give --pooling {'|'.join(POOLINGS)}")
        return pooling, longest

    def _warm_up(self):
        token = self.tokenizer.cls_token_id or 0
        how = Continuation(2) if self.task in GENERATING else None
        for length in (8, self.max_length - (how.max_new_tokens if self.task == "text-generation" else 0)):
            types = [0] * length if "token_type_ids" in self.tokenizer.model_input_names else None
            self.compute([Feed([token] * length, types, (0,) if self.task == "fill-mask" else (), how)])


def task_of(settings: Settings) -> tuple[transformers.PreTrainedConfig, str]:
    """The model's config and the task that is served: the setting, or what the config's architecture is made for."""
    config = _loaded(AutoConfig, settings.model)
    if settings.task is not None:
        return config, settings.task
    architecture = (config.architectures or [""])[0]
    task = next((task for ending, task in _ENDINGS.items() if architecture.endswith(ending)), None)
    if task is None and not architecture.endswith("Model"):
        raise ValueError(f"--model {settings.model} is of architectures {config.architectures}: give --task {'|'.join(TASKS)}")
    return config, task or "embedding"


def _alike(feeds) -> list[list[int]]:
    """Numbers of sequences, those together that one call can compute: all, but for beams of different numbers or lengths."""
    groups: dict = {}
    for i, feed in enumerate(feeds):
        how = feed.continuation
        groups.setdefault(None if how is None or how.num_beams == 1 else (how.num_beams, how.max_new_tokens), []).append(i)
    return list(groups.values())


def _groups(lengths: list[int], padding: float) -> list[list[int]]:
    """Numbers of sequences, those of a group padded to its longest without it growing to over ``padding`` times its tokens."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        group = groups[-1] if groups else []
        if group and lengths[group[0]] * (len(group) + 1) <= padding * (sum(lengths[j] for j in group) + lengths[i]):
            group.append(i)
        else:
            groups.append([i])
    return groups


def _pool(states, pooling):
    """[C] of a text's hidden states [S, C]."""
    if pooling == "cls":
        return states[0]
    return states.mean(0) if pooling == "mean" else states.max(0).values


def _loaded(auto, name, **options):
    try:
        return auto.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        if Path(name).is_absolute() and not Path(name).is_dir():
            raise ValueError(f"--model {name} cannot be loaded: there is no such folder") from error
        raise ValueError(f"--model {name} cannot be loaded: {str(error).splitlines()[0]}") from error


def _json(model, file):
    """What a JSON file of the model's folder holds, or None where there is none."""
    path = cached_file(model, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
