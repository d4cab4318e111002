"""Sequences continued token by token in one batch, each by its own rule of choice and up to its own end.

A row leaves the batch when it is finished, or when nobody waits for it any more; what is left is computed without it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedModel, StoppingCriteria
from transformers.modeling_outputs import BaseModelOutput

from roberta_fast.families import longest_sequence, position_ids


class Sampling(NamedTuple):
    """A token is drawn of softmax(logits / temperature), among the ``top_k`` likeliest of those that make up ``top_p`` of it."""

    seed: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def draw(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        """A token by logits [V] on CPU. As Hugging Face's warpers have it, the token that reaches ``top_p`` is kept."""
        scores, ids = logits.double().topk(min(self.top_k or len(logits), len(logits)))
        shares = (scores / self.temperature).softmax(0).cumsum(0)
        if self.top_p is not None:
            shares = shares[: int((shares < self.top_p).sum()) + 1]
        drawn = torch.rand((), generator=generator, dtype=torch.float64) * shares[-1]
        return int(ids[min(int((shares <= drawn).sum()), len(shares) - 1)])


@dataclass(eq=False)
class Continuation:
    """How one sequence is continued.

    num_beams: above 1, by Hugging Face's beam search. sampling: None takes the likeliest token. is_ended: whether the new tokens
    end by a text that was asked for. hear: called with the new tokens so far, the log-probability of the last and, if it is
    the last of all, the reason. abandoned: set by whoever waits no longer; nothing more is computed then.
    """

    max_new_tokens: int
    num_beams: int = 1
    sampling: Sampling | None = None
    is_ended: Callable[[list[int]], bool] | None = None
    hear: Callable[[list[int], float, str | None], Any] | None = None
    abandoned: bool = False
    was_heard: bool = False


class Continued(NamedTuple):
    """ids: the new tokens, with the one that ends a text. logprobs: float64, of each in the model's own softmax; none of beams.

    reason: ``eos_token``, ``length``, ``stop_sequence``, ``abandoned``, or ``not_finite``, as the last log-probability.
    """

    ids: list[int]
    logprobs: np.ndarray
    reason: str


class Decoder:
    """Continues sequences by ``model``, a causal language model or an encoder-decoder.

    ends: the tokens that end a text. pad: any token; what stands there is never seen. start: the first token of an
    encoder-decoder's output. max_length: tokens that the decoder takes.
    """

    def __init__(self, model: PreTrainedModel, ends: Sequence[int], pad: int, start: int | None = None):
        self.model, self.ends, self.pad, self.start = model, frozenset(ends), pad, start
        self.crosses = model.config.is_encoder_decoder
        self._config = model.config.decoder if self.crosses else model.config
        self.max_length = longest_sequence(self._config)
        # Hugging Face's own limit would be a second one beside max_new_tokens.
        model.generation_config.max_length = None

    def __call__(self, prompts: Sequence[Sequence[int]], how: Sequence[Continuation]) -> Iterator[tuple[int, Continued]]:
        """(number of a prompt, what follows it), each as soon as it is there.

        All have the same ``num_beams``, and with several the same ``max_new_tokens``.
        Raises RuntimeError for one that somebody heard before, and with several beams for logits that are not finite.
        """
        if any(one.was_heard for one in how):
            raise RuntimeError("what was heard cannot be taken back")
        inputs = self._inputs(prompts)
        return self._by_beams(inputs, how) if how[0].num_beams > 1 else self._by_tokens(inputs, how)

    def _by_tokens(self, inputs, how):
        rows = [_Row(i, one) for i, one in enumerate(how)]
        if self.crosses:
            inputs["encoder_outputs"] = self.model.encoder(inputs.pop("input_ids"), attention_mask=inputs["attention_mask"])
            starts = torch.full((len(rows), 1), self.start, device=self.model.device)
            inputs["decoder_input_ids"] = starts
        else:
            inputs["logits_to_keep"] = 1  # over a whole prompt they would be the largest tensor by far
        while True:
            output = self.model(**inputs, use_cache=True)
            tokens, logprobs = _chosen(output.logits[:, -1].float(), rows)
            kept = []
            for place, row in enumerate(rows):
                reason = row.take(int(tokens[place]), logprobs[place], self.ends)
                if reason is None:
                    kept.append(place)
                else:
                    yield row.number, Continued(row.ids, np.array(row.logprobs), reason)
            if not kept:
                return
            rows, places = [rows[place] for place in kept], torch.tensor(kept, device=self.model.device)
            inputs = self._next_inputs(inputs, output.past_key_values, tokens[:, None], places)

    def _next_inputs(self, inputs, cache, tokens, places):
        """What follows ``inputs`` once each row has its token [B, 1], for the rows at ``places``."""
        if len(places) < len(tokens):
            cache.batch_select_indices(places)
        mask, following = inputs["attention_mask"][places], {"past_key_values": cache}
        if self.crosses:
            states = BaseModelOutput(inputs["encoder_outputs"].last_hidden_state[places])
            return following | {"attention_mask": mask, "encoder_outputs": states, "decoder_input_ids": tokens[places]}
        positions = inputs["position_ids"][places, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(places), 1)], 1)
        return following | {"attention_mask": mask, "position_ids": positions, "input_ids": tokens[places], "logits_to_keep": 1}

    def _by_beams(self, inputs, how):
        generated = self.model.generate(
            **inputs,
            **({"decoder_start_token_id": self.start} if self.crosses else {}),
            num_beams=how[0].num_beams,
            max_new_tokens=how[0].max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(self.ends),
            pad_token_id=self.pad,
            logits_processor=[_Finite()],
            stopping_criteria=[_Abandoned(how)],
        )
        behind = 1 if self.crosses else inputs["input_ids"].shape[1]
        for i, (one, ids) in enumerate(zip(how, generated[:, behind:].tolist(), strict=True)):
            end = next((place for place, token in enumerate(ids) if token in self.ends), None)
            reason = "abandoned" if one.abandoned else "length" if end is None else "eos_token"
            yield i, Continued(ids if end is None else ids[: end + 1], np.empty(0), reason)

    def _inputs(self, prompts):
        """Padded where the other half of the model does not look: on the left before a continuation, else on the right."""
        shape = (len(prompts), max(map(len, prompts)))
        ids, mask = torch.full(shape, self.pad), torch.zeros(shape, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            place = slice(0, len(prompt)) if self.crosses else slice(shape[1] - len(prompt), None)
            ids[i, place], mask[i, place] = torch.tensor(prompt), 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if not self.crosses:
            inputs["position_ids"] = position_ids(self._config, mask)
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}


class _Row:
    """A sequence that is being continued."""

    def __init__(self, number: int, how: Continuation):
        self.number, self.how, self.ids, self.logprobs = number, how, [], []
        self.generator = None if how.sampling is None else torch.Generator().manual_seed(how.sampling.seed)

    def take(self, token, logprob, ends) -> str | None:
        """The reason why it is finished with this token, or None."""
        if self.how.abandoned:
            return "abandoned"
        self.ids.append(token)
        self.logprobs.append(logprob)
        reason = self._reason(ends)
        if self.how.hear is not None and math.isfinite(logprob):
            self.how.was_heard = True
            self.how.hear(self.ids, logprob, reason)
        return reason

    def _reason(self, ends):
        if not math.isfinite(self.logprobs[-1]):
            return "not_finite"
        if self.ids[-1] in ends:
            return "eos_token"
        if self.how.is_ended is not None and self.how.is_ended(self.ids):
            return "stop_sequence"
        return "length" if len(self.ids) >= self.how.max_new_tokens else None


def _chosen(logits, rows):
    """For each row of logits [B, V] a token, int64 [B], and its log-probability, a list."""
    tokens = logits.argmax(-1)
    for place, row in enumerate(rows):
        if row.generator is not None:
            tokens[place] = row.how.sampling.draw(logits[place].cpu(), row.generator)
    return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()


class _Finite(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if scores.isnan().any():
            raise RuntimeError("logits are not finite")
        return scores


class _Abandoned(StoppingCriteria):
    """Ends the beams of those for whom nobody waits any more."""

    def __init__(self, how):
        self.how = how

    def __call__(self, input_ids, scores, **_):
        abandoned = torch.tensor([one.abandoned for one in self.how], device=input_ids.device)
        return abandoned.repeat_interleave(len(input_ids) // len(self.how))
