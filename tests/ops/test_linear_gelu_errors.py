"""linear_gelu refuses what does not fit, by name and value."""

import pytest
import torch

from roberta_fast.ops import linear_gelu

ROWS = torch.zeros(4, 3)
BAD_ARGUMENTS = {
    "x of three dimensions": ({"x": torch.zeros(1, 4, 3)}, r"x must be a packed \[N, C\] tensor, got shape \(1, 4, 3\)"),
    "integer x": ({"x": ROWS.int()}, "x must be a floating-point tensor, got torch.int32"),
    "weight of another width": ({"weight": torch.zeros(5, 2)}, r"weight must be \[M, 3\], got shape \(5, 2\)"),
    "weight of another dtype": ({"weight": torch.zeros(5, 3).half()}, "weight must be of x's dtype .* got torch.float16"),
    "bias of another length": ({"bias": torch.zeros(4)}, r"bias must be \[5\], got shape \(4,\)"),
    "unknown form": ({"approximate": "erf"}, r"approximate must be one of \('none', 'tanh'\), got 'erf'"),
    "count of int64": ({"count": torch.tensor([4])}, r"count must be int32 \[1\], got torch.int64 \(1,\)"),
    "unknown backend": ({"backend": "cudnn"}, "backend='cudnn' is not one of"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_errors_name_argument_and_value(name):
    change, message = BAD_ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        linear_gelu(**{"x": ROWS, "weight": torch.zeros(5, 3), "bias": torch.zeros(5), **change})
