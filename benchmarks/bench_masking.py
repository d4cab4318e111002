"""Masking of blocks on the host: tokens a second of one core, beside Hugging Face's collator and the numpy reference.

What a GPU takes in training, a few hundred thousand tokens a second at most for roberta-base, is what must be exceeded.
"""

import numpy as np
import pytest
import torch
from transformers import DataCollatorForLanguageModeling

from roberta_fast import dispatch
from roberta_fast.training.bpe import byte_level_bpe
from roberta_fast.training.pretraining.blocks import full_sentences, full_sentences_ref
from roberta_fast.training.pretraining.masking import mask, mask_ref, masking_rule

BLOCKS, LENGTH = 64, 512
SENTENCES = 100_000


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_bpe(["a few words are enough, as ids are drawn at random"] * 2, 300)


@pytest.fixture(scope="module")
def ids(tokenizer):
    """Blocks of ordinary tokens between <s> and </s>, int64 [BLOCKS, LENGTH]."""
    ids = np.random.default_rng(0).integers(4, tokenizer.mask_token_id, (BLOCKS, LENGTH))
    ids[:, 0], ids[:, -1] = tokenizer.bos_token_id, tokenizer.eos_token_id
    return ids


def tokens_per_second(benchmark, tokens):
    # Where benchmarks are off, functions run once and there is nothing to tell.
    if benchmark.stats is not None:
        benchmark.extra_info["tokens_per_second"] = round(tokens / benchmark.stats.stats.median)


@pytest.mark.parametrize("whole_words", [False, True], ids=["tokens", "whole words"])
@pytest.mark.parametrize("contender", ["roberta_fast cpp", "roberta_fast numpy", "huggingface"])
def test_masking(benchmark, contender, whole_words, tokenizer, ids):
    rule = masking_rule(tokenizer, whole_words=whole_words)
    torch.set_num_threads(1)
    if contender == "huggingface":
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, whole_word_mask=whole_words, seed=0)
        examples = [{"input_ids": torch.from_numpy(row)} for row in ids]
        if whole_words:  # it asks for where words are
            examples = [{**example, "offset_mapping": [(i, i + 1) for i in range(LENGTH)]} for example in examples]
        run = lambda: collator([dict(example) for example in examples])
    elif contender == "roberta_fast cpp":
        if dispatch.load_cpp():
            pytest.skip(dispatch.load_cpp())
        masked = mask(ids[0], rule, 0, 0, 0)
        assert all(np.array_equal(a, b) for a, b in zip(masked, mask_ref(ids[0], rule, 0, 0, 0), strict=True))
        run = lambda: [mask(row, rule, 0, 0, number) for number, row in enumerate(ids)]
    else:
        run = lambda: [mask_ref(row, rule, 0, 0, number) for number, row in enumerate(ids)]
    benchmark(run)
    tokens_per_second(benchmark, ids.size)


@pytest.mark.parametrize("contender", ["roberta_fast cpp", "roberta_fast python"])
def test_packing(benchmark, contender):
    """Bounds of blocks for 100,000 sentences in 10,000 documents."""
    lengths = np.random.default_rng(0).integers(1, 60, SENTENCES).astype(np.uint32)
    counts = np.full(SENTENCES // 10, 10, dtype=np.uint32)
    if contender == "roberta_fast cpp":
        if dispatch.load_cpp():
            pytest.skip(dispatch.load_cpp())
        run = lambda: full_sentences(lengths, counts, LENGTH)
    else:
        run = lambda: full_sentences_ref(lengths, counts, LENGTH, 0, 2)
    benchmark(run)
    tokens_per_second(benchmark, int(lengths.sum()))
