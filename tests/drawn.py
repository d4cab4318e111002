"""What the drawn cases of operations and of models share."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from roberta_fast import dispatch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WITHOUT_CPP = pytest.mark.skipif(dispatch.load_cpp() is not None, reason=str(dispatch.load_cpp()))


def cases(number):
    """So many drawn cases; ``--slow`` takes 33 times as many, other ones each time (see conftest.py)."""
    return settings(max_examples=number * settings.default.max_examples // 100, suppress_health_check=[HealthCheck.too_slow])


def sizes(most, least=1):
    """Mostly small ones, as that is where edges are, but up to ``most``."""
    return st.integers(least, min(most, 9)) | st.integers(least, most)


# In narrower rows LayerNorm may hang on the rounding of the mean alone, which its own tests allow for.
NARROWEST = 16
values = st.integers(0, 99)


def last_bits_changed(tensors, eps, seed):
    """The tensors in float64, each element up or down by ``2 * eps`` of itself."""
    generator = torch.Generator().manual_seed(seed)
    signs = {name: t if t is None else torch.randint(0, 2, t.shape, generator=generator) * 2 - 1 for name, t in tensors.items()}
    return {name: t if t is None else t.double() * (1 + 2 * eps * signs[name]) for name, t in tensors.items()}


@st.composite
def masks(draw):
    """[B, S]: rows padded on the right, on the left, with holes, full, or without a token."""
    seqlen = draw(sizes(40))
    length = st.integers(1, seqlen)
    row = st.one_of(
        st.just([1] * seqlen),
        length.map(lambda n: [1] * n + [0] * (seqlen - n)),
        length.map(lambda n: [0] * (seqlen - n) + [1] * n),
        st.lists(st.integers(0, 1), min_size=seqlen, max_size=seqlen),
        st.just([0] * seqlen),
    )
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=5)))
