"""What csrc/cuda adds to the operations: a linear with a residual by cuBLASLt, and indices and order of a mask in one launch."""

import pytest
import torch
import torch.nn.functional as F
from test_linear import Case
from test_pack import ALL_MASKS, DTYPES, check_indices, dtype_name

from roberta_fast import dispatch
from roberta_fast.ops import linear, pack_indices
from roberta_fast.ops.linear import CUDA_DTYPES, linear_ref
from roberta_fast.testing import assert_close_as_torch

on_gpu = pytest.mark.gpu
kernels = torch.ops.roberta_fast_cpp


@pytest.fixture
def cuda():
    """The device, where the extension has kernels for it."""
    reason = dispatch.load_cpp_for_cuda()
    if reason:
        pytest.skip(reason)
    return "cuda"


@pytest.fixture
def without_cuda_kernels(monkeypatch):
    """Choices as in an install whose extension was built without CUDA."""
    dispatch._choose.cache_clear()
    monkeypatch.setattr(dispatch, "load_cpp_for_cuda", lambda: "built without CUDA")
    yield
    dispatch._choose.cache_clear()


@pytest.fixture
def with_cuda_kernels(monkeypatch):
    """Choices as in an install whose extension has them."""
    dispatch._choose.cache_clear()
    monkeypatch.setattr(dispatch, "load_cpp_for_cuda", lambda: None)
    if dispatch.load_cpp():
        pytest.skip(dispatch.load_cpp())
    yield
    dispatch._choose.cache_clear()


FACTS = dispatch.Facts("cuda", "bfloat16")
CHOICES = {
    "rows known to the host": ("linear", FACTS, "cpp"),
    "rows known to the device": ("linear", FACTS._replace(device_rows=True), "triton"),
    "deterministic": ("linear", FACTS._replace(deterministic=True), "triton"),
    "a mask": ("pack_indices", FACTS._replace(dtype="int64"), "cpp"),
    "on the CPU": ("linear", dispatch.Facts("cpu", "float32"), "cpp"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_what_serves_with_them(name, with_cuda_kernels):
    op, facts, backend = CHOICES[name]
    choice = dispatch.choose(op, facts)
    assert choice.backend == backend and not choice.skipped


@pytest.mark.parametrize("name", list(CHOICES)[:-1])
def test_what_serves_without_them(name, without_cuda_kernels):
    """Triton, without a word; by name they are refused with the reason."""
    op, facts, _ = CHOICES[name]
    choice = dispatch.choose(op, facts)
    assert choice.backend == "triton" and not choice.skipped
    with pytest.raises(ValueError, match="cpp: built without CUDA"):
        dispatch.choose(op, facts, "cpp")


CASES = {
    "base": Case(1000, 768, 768, residual=True),
    "wide": Case(777, 3072, 768, residual=True),
    "without bias": Case(100, 768, 3072, bias=False, residual=True),
    "without residual": Case(100, 96, 768),
    "odd sizes": Case(133, 37, 129, residual=True),
    "strided": Case(70, 64, 40, residual=True, strided=True),
    "one row": Case(1, 70, 9, residual=True),
    "one of each": Case(1, 1, 1, residual=True),
}


@on_gpu
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", CASES)
def test_linear(name, dtype, cuda):
    case = CASES[name]
    inputs = [t if t is None else t.to(dtype) for t in case.inputs(cuda)[0]]
    y = kernels.linear_fwd(*inputs)
    assert y.dtype == dtype and y.is_contiguous()
    exact = linear_ref(*(t if t is None else t.double() for t in inputs))
    assert_close_as_torch(y, linear_ref(*inputs), exact)
    assert torch.equal(y, kernels.linear_fwd(*inputs)), "the remembered algorithm gives other bits"


@on_gpu
@pytest.mark.parametrize("sizes", [(0, 8, 8), (5, 0, 8), (5, 8, 0)], ids=str)
def test_empty_linear(sizes, cuda):
    inputs, _ = Case(*sizes, residual=True).inputs(cuda)
    assert torch.equal(kernels.linear_fwd(*inputs), linear_ref(*inputs))


@on_gpu
def test_slices_and_odd_addresses(cuda):
    """Rows farther apart than they are long, and operands at addresses of their element's alignment alone."""
    (x, weight, bias, residual), _ = Case(70, 64, 72, residual=True, dtype=torch.bfloat16).inputs(cuda)
    wanted = linear_ref(*(t.double() for t in (x, weight, bias, residual)))
    for left in (8, 1):
        sliced = [F.pad(t, (left, 8), value=torch.nan)[..., left:-8] for t in (x, weight, bias, residual)]
        assert_close_as_torch(kernels.linear_fwd(*sliced), linear_ref(x, weight, bias, residual), wanted)


@on_gpu
def test_linear_takes_it_in_inference_alone(cuda):
    """With a residual; nobody who records gradients or autocasts meets it, and the residual is left as it is."""
    (x, weight, bias, residual), _ = Case(70, 64, 72, residual=True, dtype=torch.bfloat16).inputs(cuda)
    before = residual.clone()
    ours = linear(x, weight, bias, residual=residual)
    assert torch.equal(ours, kernels.linear_fwd(x, weight, bias, residual)) and torch.equal(residual, before)
    assert linear(x, weight.clone().requires_grad_(), bias, residual=residual).grad_fn is not None
    with torch.autocast("cuda", torch.float16):
        assert linear(x.float(), weight.float(), bias.float()).dtype == torch.float16


@on_gpu
@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_tf32_where_torch_allows_it(setting, cuda):
    (x, weight, bias, residual), _ = Case(300, 256, 1024, residual=True).inputs(cuda)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = setting
        error = kernels.linear_fwd(x, weight, bias, residual) - linear_ref(*(t.double() for t in (x, weight, bias, residual)))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert (error.abs().max() > 1e-3) == (setting == "tf32")


BAD = {
    "count": ({"count": torch.tensor([3], dtype=torch.int32)}, "count must be None"),
    "deterministic": ({"deterministic": True}, "deterministic must be False"),
    "residual": ({"residual": torch.zeros(2, 2)}, r"residual must have shape \[4, 5\]"),
}


@on_gpu
@pytest.mark.parametrize("name", BAD)
def test_what_it_cannot_do_is_named(name, cuda):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        options = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
        kernels.linear_fwd(torch.zeros(4, 3, device=cuda), torch.zeros(5, 3, device=cuda), **options)


@on_gpu
@pytest.mark.parametrize("name", ALL_MASKS)
def test_pack(name, cuda):
    mask = ALL_MASKS[name]
    tokens = int((mask.bool() | (torch.arange(mask.shape[1]) == 0)).sum())
    for capacity in (None, tokens, tokens + 7):
        check_indices(kernels.pack_indices_and_order(mask.to(cuda), capacity), mask, capacity)


@on_gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8, torch.int16, torch.int32], ids=dtype_name)
def test_masks_of_every_type(dtype, cuda):
    """Nonzero is real: NaN and minus one too, minus zero not; also in a slice and transposed."""
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).to(dtype)
    if dtype.is_floating_point or dtype.is_complex:
        mask[0, 0], mask[0, 1], mask[2, 0] = torch.nan, -0.0, -1e-3
    for given in (mask.to(cuda), mask.to(cuda).mT.contiguous().mT, mask.to(cuda).repeat(1, 2)[:, :4]):
        check_indices(pack_indices(given, backend="cpp"), mask != 0)


@on_gpu
@pytest.mark.parametrize(("batch", "seqlen"), [(4096, 100), (3, 8192), (1000, 257), (1, 1)], ids=str)
def test_pack_at_size(batch, seqlen, cuda):
    """More sequences than blocks fit the device, and longer ones than a block has threads."""
    generator = torch.Generator().manual_seed(batch)
    lengths = torch.randint(0, seqlen + 1, (batch, 1), generator=generator)
    mask = (torch.arange(seqlen) < lengths).long()
    check_indices(kernels.pack_indices_and_order(mask.to(cuda), mask.numel()), mask, mask.numel())


@on_gpu
def test_one_graph_serves_every_mask_and_batch(cuda):
    """Both kernels, captured on a stream of their own without a host sync, and replayed on other data."""
    mask = torch.ones(64, 128, dtype=torch.int64, device=cuda)
    (x, weight, bias, residual), _ = Case(200, 256, 128, residual=True, dtype=torch.bfloat16).inputs(cuda)

    def both():
        return kernels.pack_indices_and_order(mask, 64 * 128), linear(x, weight, bias, residual=residual)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda.set_sync_debug_mode("error")
        both()
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        new = torch.randint(0, 2, (64, 128), generator=generator)
        mask.copy_(new)
        x.normal_()
        graph.replay()
        results, y = captured
        check_indices(results, new, 64 * 128)
        assert torch.equal(y, kernels.linear_fwd(x, weight, bias, residual))


@on_gpu
def test_runs_on_the_tensors_device(cuda):
    """Not on the current one, where they differ."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs, _ = Case(70, 64, 72, residual=True).inputs("cuda:1")
    assert_close_as_torch(kernels.linear_fwd(*inputs), linear_ref(*inputs), linear_ref(*(t.double() for t in inputs)))
    mask = ALL_MASKS["holes"]
    check_indices(pack_indices(mask.to("cuda:1"), backend="cpp"), mask)
