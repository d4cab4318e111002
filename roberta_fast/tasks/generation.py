"""Texts that a model generates: the tokens that bound them, and the characters that tokens come to."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

TARGET_TOKENIZER = "decoder_tokenizer"  # the folder in a translation model's, where its two tokenizers differ
_CONTEXT = 8  # tokens before a continuation that may change how its first one is spelled


def text_bounds(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int | None]:
    """The tokens before and behind each text of a language model: bos and eos, or what encoders have in their place."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return begin, end


def text_behind(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The characters that ``ids`` add behind ``prompt``, the space between them included; special tokens have none.

    WordPiece has a space before every word but the first, so that tokens alone do not say whether they begin with one.
    """

    def decoded(tokens):
        return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    before = list(prompt[-_CONTEXT:])
    head, whole = decoded(before), decoded([*before, *ids])
    return whole[len(head) :] if whole.startswith(head) else decoded(ids)
