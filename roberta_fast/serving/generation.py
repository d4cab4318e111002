"""Translations and continuations: the jobs of tasks whose models generate, and the events of a stream."""

import json
import secrets
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from roberta_fast.serving.decoding import Continuation, Sampling
from roberta_fast.serving.engine import Engine, Feed
from roberta_fast.serving.errors import RequestError
from roberta_fast.serving.jobs import Job, checked, not_empty, one_each
from roberta_fast.tasks.generation import text_behind, text_bounds
from roberta_fast.tasks.windows import tokenize


def translate(engine: Engine, texts: Sequence[str], parameters) -> Job:
    """The translation of each text. parameters: ``schemas.TranslationParameters``."""
    given = parameters.generate_parameters or parameters
    truncation = None if parameters.truncation in (None, "do_not_truncate") else "right"
    windows = one_each(engine, [(text,) for text in texts], truncation)
    feeds = [Feed(w.input_ids, w.token_type_ids, (), _continuation(engine, given, engine.max_new_tokens)) for w in windows]
    decode, tidy = engine.target_tokenizer.decode, parameters.clean_up_tokenization_spaces

    def finish(outputs):
        texts = [decode(made.ids, skip_special_tokens=True, clean_up_tokenization_spaces=tidy) for made in outputs]
        return [{"translation_text": text} for text in texts]

    return Job(feeds, finish)


def generate(engine: Engine, texts: Sequence[str], parameters, send: Callable[[bytes], None] | None = None) -> Job:
    """What follows each text, in text-generation-inference's form. parameters: ``schemas.TextGenerationParameters``.

    send: called, by the model's thread, with each event of the only text's stream.
    """
    not_empty("inputs", texts)
    begin, _ = text_bounds(engine.tokenizer)
    feeds, writers = [], []
    for i, (text, tokens) in enumerate(zip(texts, checked(tokenize, engine.tokenizer, texts), strict=True)):
        kept = tokens.ids[-parameters.truncate :] if parameters.truncate is not None else tokens.ids
        prompt = kept if begin is None else [begin, *kept]
        room = engine.max_length - len(prompt)
        how = _continuation(engine, parameters, room)
        if room < (parameters.max_new_tokens or 1):
            limit = f"with what may follow, text {i} must have at most {engine.max_length} tokens, special ones included"
            raise RequestError("validation", f"{limit}, got {len(prompt)} + {parameters.max_new_tokens or 1}")
        before, stops = text if parameters.return_full_text else "", parameters.stop or ()
        writer = _Writer(engine.tokenizer, before, prompt, stops, how.sampling)
        how.is_ended = writer.is_ended if stops else None
        how.hear = None if send is None else lambda *heard, writer=writer: send(writer.event(*heard))
        feeds.append(Feed(prompt, None, (), how))
        writers.append(writer)

    def finish(outputs):
        return [writer.result(*made, details=parameters.details) for writer, made in zip(writers, outputs, strict=True)]

    return Job(feeds, finish)


def _continuation(engine, given, room):
    """How one sequence is continued. given: ``schemas.GenerateParameters``. room: tokens that there is place for."""
    if given.max_new_tokens is not None and given.max_new_tokens > engine.max_new_tokens:
        raise RequestError("validation", f"max_new_tokens must be at most {engine.max_new_tokens}, got {given.max_new_tokens}")
    length = given.max_new_tokens or min(engine.default_new_tokens, engine.max_new_tokens, room)
    if not given.samples:
        return Continuation(length, given.num_beams or engine.default_beams)
    seed = given.seed if given.seed is not None else secrets.randbits(63)
    return Continuation(length, 1, Sampling(seed, given.temperature or 1.0, given.top_k, given.top_p))


class _Writer:
    """The characters of one continuation, up to the first of the ``stops``, and the forms that they are sent in."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        before: str,
        prompt: Sequence[int],
        stops: Sequence[str],
        sampling: Sampling | None,
    ):
        self._tokenizer, self._before, self._prompt, self._stops = tokenizer, before, prompt, stops
        self._seed = None if sampling is None else sampling.seed
        self._sent = ""

    def is_ended(self, ids: list[int]) -> bool:
        """Whether the new tokens hold a stop."""
        text = text_behind(self._tokenizer, self._prompt, ids)
        return any(stop in text for stop in self._stops)

    def text(self, ids: list[int]) -> str:
        """The characters of the new tokens."""
        text = text_behind(self._tokenizer, self._prompt, ids)
        return text[: min((text.index(stop) + len(stop) for stop in self._stops if stop in text), default=None)]

    def result(self, ids: list[int], logprobs: Sequence[float], reason: str, details: bool | None) -> dict:
        """The answer that is no stream."""
        answer = {"generated_text": self._before + self.text(ids)}
        if details:
            places = range(1, len(ids) + 1)
            tokens = [self._token(ids[:n], float(logprobs[n - 1]), n == len(ids)) for n in places]
            answer["details"] = self._details(ids, reason) | {"prefill": [], "tokens": tokens}
        return answer

    def event(self, ids: list[int], logprob: float, reason: str | None) -> bytes:
        """The event of a stream for the last of the tokens, and with a ``reason``, for the last of all, the whole text."""
        token = self._token(ids, logprob, reason is not None)
        event = {"index": len(ids), "token": token, "generated_text": None, "details": None}
        if reason is not None:
            details = self._details(ids, reason) | {"input_length": len(self._prompt)}
            event |= {"generated_text": self._before + self.text(ids), "details": details}
        return sse(event)

    def _token(self, ids, logprob, is_last):
        """The last of the tokens; its text is what it adds to what those before it came to."""
        text = self.text(ids)
        if not is_last:
            text = text.rstrip("\ufffd")  # the rest of the character is still to come
        added = text[len(self._sent) :] if text.startswith(self._sent) else ""
        self._sent += added
        return {"id": ids[-1], "text": added, "logprob": logprob, "special": ids[-1] in self._tokenizer.all_special_ids}

    def _details(self, ids, reason):
        return {"finish_reason": reason, "generated_tokens": len(ids), "seed": self._seed}


def sse(event: dict) -> bytes:
    """A server-sent event."""
    # Only ASCII, as clients take more characters for the end of a line than the standard does.
    return b"data:" + json.dumps(event, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"
