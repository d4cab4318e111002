"""embedding: each element in ulps, the gradients of tables and norm, dropout that packing does not change, and mutants."""

import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from roberta_fast.ops import dropout, embedding, pack_indices
from roberta_fast.ops.embedding import embedding_backward_ref, embedding_ref, positions_behind
from roberta_fast.testing import MASKS, assert_close_as_torch, ragged_mask, ulp_error

operator = torch.ops.roberta_fast.embedding.default
backward_operator = torch.ops.roberta_fast.embedding_backward.default
SEED = 20240229
EPS32 = torch.finfo(torch.float32).eps
HALF, SINGLE = torch.float16, torch.float32
PAD = 1


@dataclass(frozen=True)
class Case:
    """Tokens under a ``mask`` [B, S], embedded in C = ``hidden`` columns.

    positions: ``"arange"``, ``"roberta"`` or ``"given"``. types: ``"zero"``, ``"given"`` or None, where there is no such table.
    behind: rows behind the count, None: no count. packed: whether there are indices.
    """

    mask: torch.Tensor
    hidden: int = 40
    positions: str = "arange"
    types: str | None = "given"
    dropout_p: float = 0.0
    packed: bool = True
    behind: int | None = None
    ids: torch.dtype = torch.int64
    tables: torch.dtype = SINGLE
    norm: torch.dtype = SINGLE
    padding_idx: int | None = PAD
    eps: float = 1e-5

    def inputs(self, device="cpu"):
        """(ids, position ids, token type ids, indices, count) and the five parameters, seeded; pads within the text too."""
        generator = torch.Generator().manual_seed(self.mask.numel() + 31 * self.hidden)

        def draw(high):
            return torch.randint(2, high, self.mask.shape, generator=generator).to(self.ids)

        def random(*shape, dtype, mean=0.0):
            return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(device, dtype)

        ids = torch.where(self.mask != 0, draw(23), PAD).to(self.ids)
        ids[:, -1] = PAD
        positions = {"arange": None, "roberta": positions_behind(ids, PAD), "given": draw(50)}[self.positions]
        types = draw(5) - 2 if self.types == "given" else None
        indices, count = None, None
        if self.packed:
            capacity = None if self.behind is None else int((self.mask != 0).sum()) + self.behind + len(self.mask)
            indices, _, count, *_ = pack_indices(self.mask, capacity, backend="torch")
        count = count if self.behind is not None else None
        tables = [random(rows, self.hidden, dtype=self.tables) for rows in (23, 50, 3)]
        tables[2] = None if self.types is None else tables[2]
        norm = random(self.hidden, dtype=self.norm, mean=1.0), random(self.hidden, dtype=self.norm)
        moved = [t if t is None else t.to(device) for t in (ids, positions, types, indices, count)]
        return moved, (*tables, *norm)


RAGGED = ragged_mask([9, 3, 17, 1])
CASES = {
    "BERT": Case(RAGGED),
    "RoBERTa": Case(RAGGED, positions="roberta", types="zero"),
    "DistilBERT": Case(RAGGED, types=None),
    "given positions": Case(RAGGED, positions="given"),
    "left padding": Case(MASKS["left padding"], positions="roberta"),
    "holes": Case(MASKS["holes"]),
    "not packed": Case(RAGGED, packed=False),
    "int32 ids": Case(RAGGED, positions="given", ids=torch.int32),
    "base width": Case(MASKS["holes"], 768),
    "odd width": Case(RAGGED, 29),
    "width of two": Case(RAGGED, 2),
    "beyond a power of two": Case(MASKS["one sequence"], 1100),
    "no sequence": Case(torch.ones(0, 4)),
    "one token": Case(MASKS["one token"]),
    "no padding_idx": Case(RAGGED, padding_idx=None),
    "count": Case(RAGGED, behind=40),
    "count of all": Case(torch.ones(2, 4), behind=-2),
    "dropout": Case(RAGGED, dropout_p=0.3),
    "dropout, odd width, count": Case(RAGGED, 29, dropout_p=0.3, behind=9, positions="roberta"),
    "dropout, not packed": Case(RAGGED, dropout_p=0.1, packed=False),
    "float16": Case(RAGGED, tables=HALF, norm=HALF),
    "float16, dropout, float32 norm": Case(RAGGED, 768, tables=HALF, dropout_p=0.3),
}
RESULTS = ("y", "dword", "dposition", "dtoken_type", "dweight", "dbias")


def number_of_rows(case, indices, count):
    return case.mask.numel() if indices is None else int(count) if count is not None else len(indices)


def gradient_for(case, rows, device="cpu"):
    return torch.randn(rows, case.hidden, generator=torch.Generator().manual_seed(rows)).to(device, case.tables)


def padding(case):
    """(padding_idx, position_padding_idx) as the operator takes them; RoBERTa's positions have one as well."""
    return -1 if case.padding_idx is None else case.padding_idx, PAD if case.positions == "roberta" else -1


def run(case, backend, device="cpu"):
    """y and the gradients of the operator on ``backend``; real rows only. What lies behind them gets a gradient of NaN."""
    (*ids, count), parameters = case.inputs(device)
    leaves = [t if t is None else t.requires_grad_() for t in parameters]
    seed = torch.tensor([SEED], device=device) if case.dropout_p else None
    y, *_ = operator(*ids, *leaves, case.eps, *padding(case), case.dropout_p, seed, count, backend)
    rows = number_of_rows(case, ids[3], count)
    dy = torch.full_like(y, torch.nan)
    dy[:rows] = gradient_for(case, rows, device)
    gradients = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy))
    results = [y.detach()[:rows], *(None if t is None else next(gradients) for t in leaves)]
    return dict(zip(RESULTS, results, strict=True))


def composed(case, device="cpu", p=None, positions=None, types=True):
    """The same by PyTorch's embedding and layer_norm in float64. p: another rescaling by dropout; positions: others."""
    (ids, position_ids, token_type_ids, indices, count), parameters = case.inputs(device)
    word, position, token_type, weight, bias = (None if t is None else t.detach().double().requires_grad_() for t in parameters)
    if position_ids is None:
        position_ids = torch.arange(ids.shape[1], device=device).expand(ids.shape)
    position_ids = position_ids if positions is None else positions(ids)
    padding_idx, position_padding_idx = (None if i < 0 else i for i in padding(case))
    z = F.embedding(ids, word, padding_idx) + F.embedding(position_ids, position, position_padding_idx)
    if token_type is not None:
        z = z + F.embedding(torch.zeros_like(ids) if token_type_ids is None else token_type_ids, token_type) * types
    y = F.layer_norm(z, z.shape[-1:], weight, bias, case.eps).flatten(0, 1)
    if case.dropout_p:
        places = torch.arange(len(y), device=device)
        keep = dropout.keep_mask(torch.tensor([SEED], device=device), case.dropout_p, places, case.hidden)
        y = y * keep * dropout.scale(case.dropout_p if p is None else p)
    rows = number_of_rows(case, indices, count)
    y, size = (t if indices is None else t[indices[:rows]] for t in (y, z.detach().flatten(0, 1)))
    leaves = [t for t in (word, position, token_type, weight, bias) if t is not None]
    gradients = iter(torch.autograd.grad(y, leaves, gradient_for(case, rows, device).double()))
    results = y.detach(), *(None if t is None else next(gradients) for t in (word, position, token_type, weight, bias))
    return dict(zip(RESULTS, results, strict=True)) | {"z": size, "weight": weight.detach(), "bias": bias.detach()}


def slack(case, exact):
    """What float32 arithmetic may do to each element of y before it is rounded: a few ulps in the sum, its mean and its rstd."""
    z, weight, bias = exact["z"], exact["weight"], exact["bias"]
    size = z.abs() + 4  # of the three terms, each of deviation one
    centered = z - z.mean(-1, keepdim=True)
    rstd = (centered.square().mean(-1, keepdim=True) + case.eps).rsqrt()
    normalized, rounding = centered * rstd, 2 * EPS32
    rstd_error = rounding * (1 + size.square().mean(-1, keepdim=True).sqrt() * rstd)
    error = rounding * rstd * (size + size.mean(-1, keepdim=True)) + normalized.abs() * rstd_error
    factor = dropout.scale(case.dropout_p)
    return factor * (error * weight.abs() + rounding * ((normalized * weight).abs() + bias.abs()))


def check(case, fast, device="cpu"):
    """Holds y to half an ulp beyond float32's errors, element by element, and the gradients to the max-norm rule."""
    exact, torch_result = composed(case, device), run(replace(case, behind=None), "torch", device)
    error = (fast["y"].double() - exact["y"]).abs()
    assert error.isfinite().all(), "y: not finite"
    if error.numel():
        beyond = ulp_error(fast["y"], exact["y"]) * (error - slack(case, exact)).clamp(min=0) / error.clamp(min=1e-300)
        assert beyond.max() <= 0.501, f"y: {beyond.max():.3g} ulps beyond what float32 does"
    for name in RESULTS[1:]:
        assert (fast[name] is None) == (exact[name] is None), name
        if exact[name] is not None:
            assert_close_as_torch(fast[name], torch_result[name], exact[name], factor=3.0, name=name)


@pytest.mark.parametrize("name", CASES)
def test_kernels_match_the_reference(name, backend):
    case = backend.fitted(CASES[name])
    check(case, run(case, backend.name, backend.device), backend.device)


BF16 = torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("case", [
    Case(ragged_mask([512, 100, 388] * 8), 768, "roberta", "zero", 0.1, behind=64, tables=BF16, norm=BF16),
    Case(ragged_mask([128] * 9), 1024, "arange", "given", tables=BF16, norm=BF16),
    Case(ragged_mask([30, 100] * 9), 384, "arange", "given", 0.1, tables=BF16),
    Case(ragged_mask([30, 100] * 9), 768, "roberta", "zero", 0.1),
], ids=["base", "large", "MiniLM, float32 norm", "float32"])  # fmt: skip
def test_model_sizes(case):
    position_rows = 50
    case = replace(case, mask=case.mask[:, : position_rows - 2]) if case.positions != "given" else case
    check(case, run(case, "triton", "cuda"), "cuda")


@pytest.mark.gpu
def test_an_id_out_of_range_fails_on_the_device():
    """In a process of its own: the device takes no more work from one where an assertion has failed."""
    program = (
        "import torch; from roberta_fast import ops\n"
        "word, position = torch.randn(2, 9, 64, device='cuda')\n"
        "norm = torch.ones(2, 64, device='cuda')\n"
        "ids = torch.tensor([[3, 9]], device='cuda')\n"
        "ops.embedding(ids, word, position, None, *norm, 1e-5, backend='triton')\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "out of range" in done.stderr + done.stdout


@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "DistilBERT", "dropout", "count"])
def test_reference_is_the_composition(name):
    """Forward and what LayerNorm's backward starts from, in float64."""
    case = CASES[name]
    (*ids, count), parameters = case.inputs()
    tables = [t if t is None else t.double() for t in parameters]
    seed, wanted = torch.tensor([SEED]), composed(case)
    rows = len(wanted["y"])
    y, _, rstd = embedding_ref(*ids, *tables, case.eps, case.dropout_p, seed, count)
    torch.testing.assert_close(y[:rows], wanted["y"], atol=1e-13, rtol=0)
    z, through = embedding_backward_ref(y, *ids, *tables[:3], case.dropout_p, seed, count)
    torch.testing.assert_close(z[:rows], wanted["z"], atol=1e-13, rtol=0)
    torch.testing.assert_close(rstd[:rows], (wanted["z"].var(-1, correction=0) + case.eps).rsqrt(), atol=1e-13, rtol=0)
    if case.dropout_p:
        torch.testing.assert_close(through, y * dropout.scale(case.dropout_p), atol=1e-13, rtol=0)


MUTANTS = {
    "positions from 0 on": ("y", "RoBERTa", lambda case: composed(case, positions=lambda ids: torch.arange(17).expand_as(ids))),
    "positions that count pads": (
        "y", "left padding", lambda case: composed(case, positions=lambda ids: torch.arange(2, 19).expand_as(ids)),
    ),
    "no token types": ("y", "BERT", lambda case: composed(case, types=False)),
    "dropout does not rescale": ("y", "dropout", lambda case: composed(case, p=0.0)),
    "dropout rescales too much": ("y", "dropout", lambda case: composed(case, p=0.302)),
    "eps of another model": ("y", "BERT", lambda case: composed(replace(case, eps=1e-12))),
    "the pad learns": ("dword", "BERT", lambda case: composed(replace(case, padding_idx=None))),
    "tokens learn from one place": (
        "dposition", "BERT", lambda case: {"dposition": composed(case)["dposition"] / 4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_rules_catch_mutants(name):
    caught_in, case, mutate = MUTANTS[name]
    case = CASES[case]
    right = run(case, "torch")
    check(case, right)
    with pytest.raises(AssertionError, match=f"{caught_in}: "):
        check(case, right | {caught_in: mutate(case)[caught_in].to(right[caught_in].dtype)})


def test_roberta_positions_are_those_of_hugging_face():
    from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

    ids = torch.tensor([[5, 6, PAD, 7, PAD], [PAD, PAD, 5, 5, 5], [PAD] * 5])
    assert torch.equal(positions_behind(ids, PAD), RobertaEmbeddings.create_position_ids_from_input_ids(ids, PAD))


def test_dropout_follows_seed_and_place(backend):
    """Packed or not, with a count or not, a token loses the same elements, forward and backward, a share of 0.3 in all."""
    packed, padded, counted = (
        run(replace(CASES["dropout"], **change), backend.name, backend.device)
        for change in ({}, {"packed": False}, {"behind": 9})
    )
    rows = pack_indices(RAGGED, backend="torch")[0].to(backend.device)
    assert torch.equal(packed["y"], padded["y"][rows]) and torch.equal(packed["y"], counted["y"])
    assert 0.25 < (packed["y"] == 0).float().mean() < 0.35
    (*ids, _), parameters = CASES["dropout"].inputs(backend.device)

    def with_seed(seed):
        seed = torch.tensor([seed], device=backend.device)
        return operator(*ids, *parameters, 1e-5, PAD, -1, 0.3, seed, None, backend.name)[0]

    assert torch.equal(with_seed(SEED), packed["y"])
    assert not torch.equal(with_seed(SEED), with_seed(SEED + 1))
    y = with_seed(SEED)
    _, through = backward_operator(torch.ones_like(y), *ids, *parameters[:3], 0.3, torch.tensor([SEED]).to(y.device), None,
                                   backend.name)  # fmt: skip
    assert torch.equal(through != 0, y != 0)


def test_gradients_repeat_bitwise(backend):
    first, second = (run(CASES["dropout"], backend.name, backend.device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in RESULTS)


def test_frozen_tables_get_no_gradient():
    (*ids, _), (word, *others) = CASES["BERT"].inputs()
    others = [t.requires_grad_() for t in others]
    embedding(ids[0], word, *others, 1e-5, token_type_ids=ids[2], indices=ids[3]).sum().backward()
    assert word.grad is None and all(t.grad is not None for t in others)


def test_autocast_as_torch(triton_device):
    (*ids, _), parameters = CASES["float16"].inputs(triton_device)
    with torch.autocast(triton_device, dtype=HALF):
        got = embedding(ids[0], *parameters, 1e-5, indices=ids[3], backend="triton")
        like = F.layer_norm(torch.ones(1, 4, dtype=HALF, device=triton_device), (4,))
    assert got.dtype == like.dtype


@pytest.mark.parametrize("name", ["BERT", "DistilBERT", "dropout", "count"])
def test_opcheck(name, backend):
    case = replace(CASES[name], mask=MASKS["holes"], hidden=8)
    (*ids, count), parameters = case.inputs(backend.device)
    leaves = [t if t is None else t.requires_grad_() for t in parameters]
    seed = torch.tensor([SEED], device=backend.device) if case.dropout_p else None
    rest = case.dropout_p, seed, count, backend.name
    # What lies behind the count is arbitrary, so that two runs of the whole differ there.
    checks = "ALL" if count is None else ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, (*ids, *leaves, case.eps, *padding(case), *rest), test_utils=checks)
    dy = torch.ones(number_of_rows(case, ids[3], None), 8, device=backend.device)
    frozen = [t if t is None else t.detach() for t in parameters[:3]]
    torch.library.opcheck(backward_operator, (dy, *ids, *frozen, *rest), test_utils=checks)


def test_ids_in_no_table_raise():
    """On the CPU with the name and the id; as in torch where it is torch that looks up."""
    (*ids, _), parameters = CASES["BERT"].inputs()
    ids[0][2, 3] = 23
    with pytest.raises(IndexError, match="input_ids holds 23, which is out of range for a table of 23 rows"):
        embedding(ids[0], *parameters, 1e-5, indices=ids[3], backend="cpp")
    with pytest.raises(IndexError, match="out of range"):
        embedding(ids[0], *parameters, 1e-5, indices=ids[3], backend="torch")


IDS, TABLE, ROW = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 3), torch.zeros(3)
BAD_ARGUMENTS = {
    "ids of one dimension": ({"input_ids": IDS[0]}, r"input_ids must be \[B, S\] with S >= 1, got shape \(3,\)"),
    "ids that are floats": ({"input_ids": TABLE}, "input_ids must be int64 or int32, got torch.float32"),
    "positions of another shape": (
        {"position_ids": IDS[:1]}, r"position_ids must be of input_ids' shape \(2, 3\), got shape \(1, 3\)"
    ),
    "types without a table": ({"token_type": None, "token_type_ids": IDS}, "token_type_ids must be None"),
    "integer table": ({"word": TABLE.long()}, r"word must be a floating-point table \[V, C\], got torch.int64"),
    "tables of two dtypes": ({"position": TABLE.half()}, "position must be a torch.float32 table of C=3"),
    "weight of another length": ({"weight": ROW[1:]}, r"weight must be \[C\] with C=3, got shape \(2,\)"),
    "indices of int32": ({"indices": IDS[0].int()}, r"indices must be int64 \[N\], got torch.int32 \(3,\)"),
    "count without indices": ({"count": IDS[0, :1].int()}, r"count must be int32 \[1\], beside indices"),
    "dropout without seed": ({"dropout_p": 0.1}, "seed must be .* dropout_p=0.1, got None"),
    "unknown backend": ({"backend": "cudnn"}, "backend='cudnn' is not one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_errors_name_argument_and_value(name):
    change, message = BAD_ARGUMENTS[name]
    arguments = {"input_ids": IDS, "word": TABLE, "position": TABLE, "token_type": TABLE, "weight": ROW, "bias": ROW, "eps": 1e-5}
    with pytest.raises(ValueError, match=message):
        embedding(**{**arguments, **change})
