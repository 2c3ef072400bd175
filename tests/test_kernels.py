"""The references against fp64 and against what users know, and the loss's laws at its kernel."""

# T packed tokens, H query heads, G key-value heads, E head size, C = E / 2

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import norm64, swiglu64, turn64

from kernels import cross_entropy
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from kernels.rms_norm import rms_norm
from kernels.rotary_attention import rotary_attention, rotate
from kernels.swiglu import swiglu


def off(ours, ref):
    """The relative error by norm."""
    ref = ref.double()
    return ((ours.double() - ref).norm() / ref.norm()).item()


def rope_tables(positions, E):
    angle_TC = positions[:, None] / 10000 ** (torch.arange(0, E, 2) / E)
    return angle_TC.cos().float(), angle_TC.sin().float()


def test_rms_norm_and_residual():
    x = torch.randn(7, 33)
    r = torch.randn(7, 33)
    w = torch.randn(33)
    assert off(rms_norm(x, w, 1e-5), norm64(x.double(), w.double())) < 1e-6
    y, h = rms_norm(x, w, 1e-5, r)
    h64 = x.double() + r.double()
    assert off(y, norm64(h64, w.double())) < 1e-6
    assert off(h, h64) < 1e-6


def test_swiglu():
    g = torch.randn(5, 9)
    u = torch.randn(5, 9)
    assert off(swiglu(g, u), swiglu64(g.double(), u.double())) < 1e-6


def test_rotation_is_by_the_difference_of_positions():
    # of one head alone two scores may be alike by chance
    q = torch.randn(1, 64, 8)
    k = torch.randn(1, 64, 8)

    def score(i, j):
        turned_q = rotate(q, *rope_tables(torch.tensor([i]), 8))
        turned_k = rotate(k, *rope_tables(torch.tensor([j]), 8))
        return (turned_q * turned_k).sum(-1)

    assert torch.allclose(score(9, 4), score(25, 20), atol=1e-5)
    assert not torch.allclose(score(9, 4), score(9, 5), atol=1e-3)


def attention_over_all_pairs(q, k, v, tables, mask_TT):
    """The definition, with the T x T mask that the kernel never builds, in fp64."""
    group = q.shape[1] // k.shape[1]
    q_THE = turn64(q, *tables)
    k_THE = turn64(k, *tables).repeat_interleave(group, 1)
    v_THE = v.repeat_interleave(group, 1)
    s_HTT = torch.einsum("ihe,jhe->hij", q_THE, k_THE) / q.shape[-1] ** 0.5
    p_HTT = s_HTT.masked_fill(~mask_TT, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhe->ihe", p_HTT, v_THE)


@pytest.mark.parametrize("H, G", [(4, 4), (4, 1), (8, 2)])
def test_attention_is_causal_within_each_conversation(H, G):
    E = 8
    # the last is padding
    lengths = [1, 5, 2, 17, 3]
    T = sum(lengths)
    ends = torch.tensor([0, *lengths[:-1]]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths])
    q, k, v = (torch.randn(T, heads, E, requires_grad=True) for heads in (H, G, G))
    tables = rope_tables(positions, E)
    out = rotary_attention(q, k, v, *tables, ends)

    conversation = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    rows = torch.arange(T)
    mask_TT = (conversation[:, None] == conversation) & (rows[:, None] >= rows)
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    ref = attention_over_all_pairs(q64, k64, v64, tables, mask_TT)
    ref = torch.where((conversation < 4)[:, None, None], ref, 0)
    assert off(out, ref) < 1e-6
    assert (out[-3:] == 0).all()

    up = torch.randn_like(out)
    out.backward(up)
    ref.backward(up.double())
    for ours, theirs in ((q, q64), (k, k64), (v, v64)):
        assert off(ours.grad, theirs.grad) < 2e-6
        assert (ours.grad[-3:] == 0).all()


def problem(T=1300, D=24, V=97, dtype=torch.float32, weights=None):
    torch.manual_seed(0)
    hidden = torch.randn(T, D, dtype=dtype).requires_grad_()
    matrix = (torch.randn(V, D, dtype=dtype) * 0.3).requires_grad_()
    labels = torch.randint(0, V, (T,))
    if weights is None:
        weights = torch.tensor([0.0, 0.1, 1.0])[torch.randint(0, 3, (T,))]
    return hidden, matrix, labels, weights


def test_linear_cross_entropy_is_its_definition():
    hidden, matrix, labels, weights = problem()
    h64 = hidden.detach().double().requires_grad_()
    m64 = matrix.detach().double().requires_grad_()
    rows = weights > 0
    nll64 = F.cross_entropy(h64[rows] @ m64.T, labels[rows], reduction="none")
    loss64 = (weights[rows] * nll64).sum()
    loss, nll, correct = linear_cross_entropy(hidden, matrix, labels, weights)
    assert abs(loss.item() / loss64.item() - 1) < 1e-6
    assert off(nll[rows], nll64.detach()) < 1e-6
    assert (nll[~rows] == 0).all()
    right = (hidden @ matrix.T).argmax(-1) == labels
    assert torch.equal(correct.bool(), rows & right)

    (loss * 0.37).backward()
    (loss64 * 0.37).backward()
    assert off(hidden.grad, h64.grad) < 1e-6
    assert off(matrix.grad, m64.grad) < 1e-6


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_linear_cross_entropy_equals_its_reference_and_keeps_its_dtype(dtype, bound):
    hidden, matrix, labels, weights = problem(dtype=dtype)
    loss, nll, correct = linear_cross_entropy(hidden, matrix, labels, weights)
    loss.backward()
    ours = hidden.grad, matrix.grad
    hidden.grad = None
    matrix.grad = None
    ref_loss, ref_nll, ref_correct = linear_cross_entropy_ref(hidden, matrix, labels, weights)
    ref_loss.backward()
    assert loss.dtype == torch.float32
    assert ours[0].dtype == dtype
    assert abs(loss.item() / ref_loss.item() - 1) < bound
    assert off(nll, ref_nll) < bound
    assert torch.equal(correct, ref_correct)
    assert off(ours[0], hidden.grad) < bound
    assert off(ours[1], matrix.grad) < bound


def test_rows_of_weight_zero_are_never_projected():
    hidden, matrix, labels, weights = problem()
    left_out = weights == 0
    # inf * 0 would be NaN: rows are selected, not multiplied
    with torch.no_grad():
        hidden[left_out] = torch.inf
    loss, nll, _ = linear_cross_entropy(hidden, matrix, labels, weights)
    loss.backward()
    assert loss.isfinite()
    assert nll.isfinite().all()
    assert matrix.grad.isfinite().all()
    assert (hidden.grad[left_out] == 0).all()


def test_no_row_with_a_weight_gives_zero():
    hidden, matrix, labels, weights = problem(T=5, weights=torch.zeros(5))
    loss, _, _ = linear_cross_entropy(hidden, matrix, labels, weights)
    loss.backward()
    assert loss == 0
    assert (hidden.grad == 0).all()
    assert (matrix.grad == 0).all()


def test_extreme_logits_and_weights_stay_finite():
    hidden, matrix, labels, _ = problem(T=6)
    weights = torch.tensor([0.0, 1e-8, 1e4, 1.0, 0.1, 1.0])
    for scale in (0.0, 1e4):
        loss, nll, _ = linear_cross_entropy(hidden * scale, matrix, labels, weights)
        assert loss.isfinite()
        assert nll.isfinite().all()
    hidden.grad = None
    loss, _, _ = linear_cross_entropy(hidden * 1e4, matrix, labels, weights)
    loss.backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("V", [95, 96, 97])
def test_memory_that_nobody_wrote_gets_into_no_gradient(monkeypatch, V):
    """oneDNN's bf16 matmul reads beside a view; what it finds there may be NaN."""

    def poisoned(self, *size, new_empty=torch.Tensor.new_empty, **how):
        fresh = new_empty(self, *size, **how)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    hidden = torch.randn(300, 64).bfloat16().requires_grad_()
    matrix = torch.randn(V, 64).bfloat16().requires_grad_()
    loss, *_ = linear_cross_entropy(hidden, matrix, torch.randint(0, V, (300,)), torch.ones(300))
    loss.backward()
    assert hidden.grad.isfinite().all()
    assert matrix.grad.isfinite().all()


def test_logits_exist_a_chunk_at_a_time(monkeypatch):
    """The softmax sees 128 rows at a time, whatever T, and all the rows with a weight."""
    seen = []
    softmax = cross_entropy.softmax_gradient

    def watched(z_rS, *rest):
        seen.append(len(z_rS))
        return softmax(z_rS, *rest)

    monkeypatch.setattr(cross_entropy, "softmax_gradient", watched)
    # 128 rows of 97 columns, padded to 128, in fp32
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 128 * 128 * 4)
    inputs = problem()
    loss, _, _ = linear_cross_entropy(*inputs)
    loss.backward()
    assert max(seen) == 128
    assert sum(seen) == (inputs[3] > 0).sum()
