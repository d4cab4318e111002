"""RoBERTa's kind of tokenizer, learned from texts (Radford et al. 2019, section 2.2)."""

import json
from collections.abc import Iterable

from transformers import AddedToken, PreTrainedTokenizerBase, RobertaTokenizer

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"


def byte_level_bpe(texts: Iterable[str], vocab_size: int, max_length: int = 512) -> PreTrainedTokenizerBase:
    """A byte-level BPE of at most ``vocab_size`` tokens in RoBERTa's layout.

    ``<s> <pad> </s> <unk>`` are 0 to 3, ``<mask>`` is the last. Merges that occur once are not made, so small
    texts give fewer tokens. max_length: tokens of a text, specials included.
    Raises ValueError for a vocabulary without room for the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = 256 + len(SPECIALS) + 1
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} is below {smallest}, the bytes and the special tokens")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # <mask> comes behind
        min_frequency=2,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    vocabulary = {**model["vocab"], MASK: len(model["vocab"])}
    merges = [tuple(merge) for merge in model["merges"]]
    return roberta_tokenizer(vocabulary, merges, max_length)


def roberta_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]], max_length: int) -> PreTrainedTokenizerBase:
    """RoBERTa's tokenizer of a vocabulary. Its mask stands for a word with the space before it, else it could fill in none."""
    mask = AddedToken(MASK, lstrip=True, special=True)
    return RobertaTokenizer(vocab=vocab, merges=merges, mask_token=mask, model_max_length=max_length)
