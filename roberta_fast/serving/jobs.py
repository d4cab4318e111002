"""What a task makes of a request: the sequences to compute, and the answer from their outputs.

Both halves run outside the event loop. Texts are checked here; what does not fit raises RequestError.
"""

import base64
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from roberta_fast.serving.engine import Engine, Feed
from roberta_fast.serving.errors import RequestError
from roberta_fast.tasks import question_answering, token_classification
from roberta_fast.tasks.windows import TooLong, Window, Windower, tokenize

MAX_MASKS = 16


class Job(NamedTuple):
    """feeds: the sequences. finish: the response, plain data, from an output for each of them."""

    feeds: list[Feed]
    finish: Callable[[list[np.ndarray]], Any]

    @property
    def tokens(self) -> int:
        """Tokens that are computed, special ones included."""
        return sum(len(feed.input_ids) for feed in self.feeds)


def answer_questions(engine: Engine, pairs: Sequence[tuple[str, str]], parameters) -> Job:
    """A list of answers to each (question, context), best first. parameters: ``schemas.QuestionAnsweringParameters``."""
    not_empty("question", [question for question, _ in pairs])
    not_empty("context", [context for _, context in pairs])
    max_length = _at_most(engine, "max_seq_len", parameters.max_seq_len, question_answering.MAX_LENGTH)
    stride = parameters.doc_stride if parameters.doc_stride is not None else min(question_answering.DOC_STRIDE, max_length // 4)
    questions, contexts = [question.strip() for question, _ in pairs], [context for _, context in pairs]
    if parameters.max_question_len is not None:
        questions = _cut_to(engine, questions, parameters.max_question_len)
    windower = Windower(engine.tokenizer, max_length, stride, engine.settings.max_request_tokens)
    windows = checked(windower.of_pairs, questions, contexts)

    def finish(outputs):
        answers = []
        for i, context in enumerate(contexts):
            mine = [(w, out) for w, out in zip(windows, outputs, strict=True) if w.example == i]
            prediction = question_answering.best_answers(
                context,
                [window for window, _ in mine],
                [out[0] for _, out in mine],
                [out[1] for _, out in mine],
                top_k=parameters.top_k,
                max_answer_length=parameters.max_answer_len,
                handle_impossible_answer=parameters.handle_impossible_answer,
                align_to_words=parameters.align_to_words,
            )
            answers.append([{"answer": a.answer, "score": a.score, "start": a.start, "end": a.end} for a in prediction.answers])
        return answers

    return Job(_feeds(windows), finish)


def classify(
    engine: Engine, texts: Sequence[tuple[str, ...]], truncation: str | None, function: str | None, top_k: int | None
) -> Job:
    """The labels of each text or pair with their scores, best first. truncation: as in ``Windower.one_each``.

    function: ``softmax``, ``sigmoid`` or ``none``; None takes what the model's config says.
    """
    windows = one_each(engine, texts, truncation)
    function, labels = function or function_of(engine.config), engine.config.id2label

    def finish(outputs):
        results = []
        for logits in outputs:
            scores = _scores(logits, function)
            ranked = np.argsort(-scores, kind="stable")[:top_k].tolist()
            results.append([{"label": labels[i], "score": float(scores[i])} for i in ranked])
        return results

    return Job(_feeds(windows), finish)


def rerank(engine: Engine, query: str, texts: Sequence[str], truncation: str | None, raw_scores: bool, return_text: bool) -> Job:
    """The texts by their score for ``query``, best first, by a classifier with a single label."""
    if engine.config.num_labels != 1:
        raise RequestError("backend", "model is not a re-ranker model")
    windows = one_each(engine, [(query, text) for text in texts], truncation)

    def finish(outputs):
        scores = [float(_scores(logits, "none" if raw_scores else "sigmoid")[0]) for logits in outputs]
        ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
        return [{"index": i, "score": scores[i]} | ({"text": texts[i]} if return_text else {}) for i in ranked]

    return Job(_feeds(windows), finish)


def find_entities(engine: Engine, texts: Sequence[str], parameters) -> Job:
    """The entities of each text, of any length. parameters: ``TokenClassificationParameters``."""
    not_empty("inputs", texts)
    stride = parameters.stride if parameters.stride is not None else engine.max_length // 4
    windower = Windower(engine.tokenizer, engine.max_length, stride, engine.settings.max_request_tokens)
    windows = checked(windower.of_texts, texts)
    key = "entity" if parameters.aggregation_strategy == "none" else "entity_group"

    def finish(outputs):
        results = []
        for i, text in enumerate(texts):
            mine = [(w, out) for w, out in zip(windows, outputs, strict=True) if w.example == i]
            tokens = token_classification.tags_of([window for window, _ in mine], [out for _, out in mine])
            found = token_classification.entities_of(
                text, tokens, engine.config.id2label, parameters.aggregation_strategy, parameters.ignore_labels
            )
            results.append([{key: e.label, "score": e.score, "word": e.word, "start": e.start, "end": e.end} for e in found])
        return results

    return Job(_feeds(windows), finish)


def embed(
    engine: Engine,
    texts: Sequence[str],
    truncation: str | None,
    normalize: bool = True,
    dimensions: int | None = None,
    prompt_name: str | None = None,
) -> Job:
    """An embedding of each text, float32 [C] or [dimensions]; the finished answer is the array [texts, C]."""
    name = prompt_name or engine.default_prompt
    if name is not None and name not in engine.prompts:
        raise RequestError("tokenizer", f"prompt_name must be one of {sorted(engine.prompts)}")
    size = engine.config.hidden_size
    if dimensions is not None and dimensions > size:
        raise RequestError("validation", f"dimensions must be at most {size}, got {dimensions}")
    windows = one_each(engine, [(engine.prompts.get(name, "") + text,) for text in texts], truncation)

    def finish(outputs):
        vectors = np.stack(outputs)[:, :dimensions]
        if normalize:
            # A vector at a time, so that its bits do not depend on the others.
            vectors = np.stack([vector / max(np.linalg.norm(vector), 1e-12) for vector in vectors])
        return vectors

    return Job(_feeds(windows), finish)


def openai_embeddings(engine: Engine, texts: Sequence[str], dimensions: int | None, encoding: str, model: str) -> Job:
    """As ``embed``, in OpenAI's form. encoding: ``float``, or ``base64`` of little-endian float32."""
    job = embed(engine, texts, None, dimensions=dimensions)

    def finish(outputs):
        vectors = job.finish(outputs)
        values = [_base64(vector) for vector in vectors] if encoding == "base64" else numbers(vectors)
        data = [{"object": "embedding", "embedding": value, "index": i} for i, value in enumerate(values)]
        usage = {"prompt_tokens": job.tokens, "total_tokens": job.tokens}
        return {"object": "list", "data": data, "model": model, "usage": usage}

    return Job(job.feeds, finish)


def numbers(vectors: np.ndarray) -> list[list[float]]:
    """Lists for JSON that read back as the same float32."""
    # As text a float32 has half the digits that the double of the same value has.
    return vectors.astype(str).astype(np.float64).tolist()


def fill_masks(engine: Engine, texts: Sequence[str], parameters) -> Job:
    """The likeliest words for each mask of each text: a list of words a mask. parameters: ``FillMaskParameters``."""
    windows = one_each(engine, [(text,) for text in texts], None)
    mask_id, tokenizer = engine.tokenizer.mask_token_id, engine.tokenizer
    targets = _target_ids(tokenizer, parameters.targets) if parameters.targets else None
    feeds = []
    for window in windows:
        masked = tuple(i for i, token in enumerate(window.input_ids) if token == mask_id)
        if not 1 <= len(masked) <= MAX_MASKS:
            raise RequestError("tokenizer", f"a text must hold 1 to {MAX_MASKS} times {tokenizer.mask_token}, got {len(masked)}")
        feeds.append(Feed(window.input_ids, window.token_type_ids, masked))

    def finish(outputs):
        pairs = zip(feeds, outputs, strict=True)
        return [[_words(feed, place, row) for place, row in zip(feed.masked, out, strict=True)] for feed, out in pairs]

    def _words(feed, place, logits):
        scores = _scores(logits, "softmax")
        allowed = np.arange(len(scores)) if targets is None else np.array(targets)
        words = []
        for token in allowed[np.argsort(-scores[allowed], kind="stable")[: parameters.top_k]].tolist():
            filled = [token if i == place else other for i, other in enumerate(feed.input_ids)]
            kept = [i for i in filled if i == mask_id or i not in tokenizer.all_special_ids]
            sequence = tokenizer.decode(kept)
            words.append(
                {"score": float(scores[token]), "token": token, "token_str": tokenizer.decode([token]), "sequence": sequence}
            )
        return words

    return Job(feeds, finish)


def function_of(config) -> str:
    """What makes scores of a classifier's logits, as Hugging Face's pipeline decides."""
    if config.problem_type == "regression":
        return "none"
    return "sigmoid" if config.problem_type == "multi_label_classification" or config.num_labels == 1 else "softmax"


def _scores(logits, function):
    """float64 scores of one row of logits."""
    logits = logits.astype(np.float64)
    if function == "softmax":
        powers = np.exp(logits - logits.max())
        return powers / powers.sum()
    # Of -|x| there is no overflow.
    small = np.exp(-np.abs(logits))
    return np.where(logits < 0, small, 1.0) / (1.0 + small) if function == "sigmoid" else logits


def _base64(vector):
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _feeds(windows: Sequence[Window]) -> list[Feed]:
    return [Feed(window.input_ids, window.token_type_ids) for window in windows]


def one_each(engine: Engine, texts: Sequence[tuple[str, ...]], truncation: str | None) -> list[Window]:
    """``Windower.one_each`` of texts that are not blank. Raises RequestError."""
    not_empty("inputs", [part for parts in texts for part in parts])
    return checked(Windower(engine.tokenizer, engine.max_length).one_each, texts, truncation)


def checked(make: Callable, *arguments) -> Any:
    """make(*arguments), whose complaints become RequestErrors."""
    try:
        return make(*arguments)
    except TooLong as error:
        raise RequestError("validation", str(error)) from None
    except ValueError as error:
        raise RequestError("tokenizer", str(error)) from None


def not_empty(name: str, texts: Sequence[str]) -> None:
    """Raises RequestError, empty, where there is no text or a blank one."""
    if not texts or not all(text.strip() for text in texts):
        raise RequestError("empty", f"`{name}` cannot be empty")


def _at_most(engine, name, value, default):
    if value is not None and value > engine.max_length:
        raise RequestError("validation", f"{name} must be at most {engine.max_length}, got {value}")
    return value or min(default, engine.max_length)


def _cut_to(engine, texts, tokens):
    """The texts without what is behind their first ``tokens`` tokens."""
    cut = checked(tokenize, engine.tokenizer, texts)
    return [text if len(t.ids) <= tokens else text[: t.offsets[tokens - 1][1]] for text, t in zip(texts, cut, strict=True)]


def _target_ids(tokenizer, targets):
    ids = [tokenizer.convert_tokens_to_ids(target) for target in targets]
    unknown = [i for i, (token, target) in enumerate(zip(ids, targets, strict=True)) if token in (None, tokenizer.unk_token_id)]
    if unknown:
        raise RequestError("tokenizer", f"targets[{unknown[0]}] is no token of the vocabulary")
    return list(dict.fromkeys(ids))
