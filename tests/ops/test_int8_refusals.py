"""What int8_linear and int8_feed_forward refuse, by the argument's name and its value."""

import pytest
import torch

from roberta_fast import dispatch
from roberta_fast.ops import int8_feed_forward, int8_linear, quantize_weight
from roberta_fast.ops.int8_linear import Int8Weight, pack_weight

GOOD, BACK = quantize_weight(torch.ones(3, 8)), quantize_weight(torch.ones(8, 3))


def both(weight_out, bias_out=None, gelu="none"):
    return int8_feed_forward(torch.zeros(2, 8), GOOD, None, weight_out, bias_out, gelu=gelu)


REFUSALS = {
    "x": (lambda: int8_linear(torch.zeros(2, 9), GOOD), r"x must be \[N, 8\], as the weight has 8, got 9 columns"),
    "bias": (lambda: int8_linear(torch.zeros(2, 8), GOOD, torch.zeros(4)), r"bias must be torch.float32 \[3\], got .* \(4,\)"),
    "gelu": (lambda: int8_linear(torch.zeros(2, 8), GOOD, gelu="erf"), "gelu must be None or one of .* got 'erf'"),
    "count": (lambda: int8_linear(torch.zeros(2, 8), GOOD, count=torch.zeros(1)), r"count must be int32 \[1\]"),
    "integers": (lambda: int8_linear(torch.zeros(2, 8, dtype=torch.int8), GOOD), "x must be a floating-point tensor"),
    "heads": (lambda: int8_linear(torch.zeros(2, 8), GOOD, heads=2), "heads must be a divisor of the weight's 3 rows, got 2"),
    "weight": (lambda: quantize_weight(torch.zeros(3)), r"weight must be floating \[M, K\], got torch.float32 \(3,\)"),
    "weight_out": (lambda: both(GOOD), r"weight_out must be of shape \[M, 3\], got of shape \(3, 8\)"),
    "bias_out": (lambda: both(BACK, torch.zeros(3)), r"bias_out must be torch.float32 \[8\], got .* \(3,\)"),
    "no gelu": (lambda: both(BACK, gelu=None), "gelu must be one of .* got None"),
    "infinite weight": (lambda: quantize_weight(torch.full((2, 3), torch.inf)), "weight must be finite"),
    "minus 128": (lambda: pack_weight(torch.full((2, 3), -128, dtype=torch.int8), torch.ones(2)), "from -127 to 127, got -128"),
    "scale": (lambda: pack_weight(torch.zeros(2, 3, dtype=torch.int8), torch.ones(3)), r"scale must be float32 \[2\], got"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_the_value(name):
    call, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(
    dispatch.load_cpp() is not None or not torch.ops.roberta_fast_cpp.int8_linear_is_fast(), reason="the kernel cannot run here"
)
@pytest.mark.parametrize(("change", "message"), [
    ({"packed": torch.zeros(1, 2, 64, 3, dtype=torch.int8)}, "packed must have shape"),
    ({"packed": torch.zeros(1, 2, 64, 4)}, "packed must be a contiguous int8"),
    ({"offset": torch.zeros(3)}, "offset must be a contiguous int32"),
    ({"offset": torch.zeros(4, dtype=torch.int32)}, "offset must have shape"),
], ids=["packed shape", "packed dtype", "offset dtype", "offset shape"])  # fmt: skip
def test_the_kernel_checks_what_it_reads(change, message):
    with pytest.raises(ValueError, match=message):
        int8_linear(torch.zeros(2, 8), Int8Weight(**{**GOOD._asdict(), **change}), backend="cpp")
