"""The references against fp64 and against what users know, and the loss's laws at the level of the kernel."""

import pytest
import torch
import torch.nn.functional as F

from kernels import cross_entropy
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from kernels.rms_norm import rms_norm
from kernels.rotary_attention import rotary_attention, rotate
from kernels.swiglu import swiglu


def off(ours, ref):
    return ((ours.double() - ref.double()).norm() / ref.double().norm()).item()


def rope_tables(T, E, positions=None):
    positions = torch.arange(T) if positions is None else positions
    angle = positions[:, None] / 10000 ** (torch.arange(0, E, 2) / E)
    return angle.cos().float(), angle.sin().float()


def test_rms_norm_and_residual():
    x, r, w = torch.randn(7, 33), torch.randn(7, 33), torch.randn(33)
    x64, r64, w64 = x.double(), r.double(), w.double()
    norm64 = lambda h: w64 * h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert off(rms_norm(x, w, 1e-5), norm64(x64)) < 1e-6
    y, h = rms_norm(x, w, 1e-5, r)
    assert off(y, norm64(x64 + r64)) < 1e-6 and off(h, x64 + r64) < 1e-6


def test_swiglu():
    g, u = torch.randn(5, 9), torch.randn(5, 9)
    assert off(swiglu(g, u), g.double() / (1 + (-g.double()).exp()) * u.double()) < 1e-6


def test_rotation_is_by_the_difference_of_positions():
    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    score = lambda i, j: (
        rotate(q, *rope_tables(1, 8, torch.tensor([i])))
        * rotate(k, *rope_tables(1, 8, torch.tensor([j])))
    ).sum()
    assert torch.allclose(score(9, 4), score(25, 20), atol=1e-5)
    assert not torch.allclose(score(9, 4), score(9, 5), atol=1e-3)


@pytest.mark.parametrize("H, G", [(4, 4), (4, 1), (8, 2)])
def test_attention_is_causal_within_each_conversation(H, G):
    lengths, E = [1, 5, 2, 17], 8
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    T = int(ends[-1]) + 3  # three rows of padding
    positions = torch.cat([*(torch.arange(n) for n in lengths), torch.arange(3)])
    q, k, v = (torch.randn(T, heads, E, requires_grad=True) for heads in (H, G, G))
    cos, sin = rope_tables(T, E, positions)
    out = rotary_attention(q, k, v, cos, sin, ends.int())
    # The definition, with the T x T mask that the kernel never builds, in fp64.
    conversation = torch.repeat_interleave(torch.arange(5), torch.tensor([*lengths, 3]))
    mask = (conversation[:, None] == conversation) & (torch.arange(T)[:, None] >= torch.arange(T))
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    turn = lambda x: torch.cat(
        [
            x[..., :4] * cos[:, None] - x[..., 4:] * sin[:, None],
            x[..., 4:] * cos[:, None] + x[..., :4] * sin[:, None],
        ],
        -1,
    )
    wide = lambda x: x.repeat_interleave(H // G, 1)
    scores = torch.einsum("ihe,jhe->hij", turn(q64), wide(turn(k64))) / E**0.5
    ref = torch.einsum("hij,jhe->ihe", scores.masked_fill(~mask, -torch.inf).softmax(-1), wide(v64))
    ref = torch.where((conversation < 4)[:, None, None], ref, 0)
    assert off(out, ref) < 1e-6 and (out[-3:] == 0).all()
    up = torch.randn_like(out)
    out.backward(up)
    ref.backward(up.double())
    for ours, theirs in ((q, q64), (k, k64), (v, v64)):
        assert off(ours.grad, theirs.grad) < 2e-6 and (ours.grad[-3:] == 0).all()


def problem(T=1300, D=24, V=97, dtype=torch.float32, weights=None):
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(T, D, dtype=dtype).requires_grad_(),
        (torch.randn(V, D, dtype=dtype) * 0.3).requires_grad_(),
    )
    labels = torch.randint(0, V, (T,))
    if weights is None:
        weights = torch.tensor([0.0, 0.1, 1.0])[torch.randint(0, 3, (T,))]
    return hidden, weight, labels, weights


def test_linear_cross_entropy_is_its_definition():
    hidden, weight, labels, weights = problem()
    h64, w64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    rows = weights > 0
    nll64 = F.cross_entropy(h64[rows] @ w64.T, labels[rows], reduction="none")
    loss, nll, correct = linear_cross_entropy(hidden, weight, labels, weights)
    assert abs(loss.item() / (weights[rows] * nll64).sum().item() - 1) < 1e-6
    assert off(nll[rows], nll64.detach()) < 1e-6 and (nll[~rows] == 0).all()
    assert torch.equal(correct.bool(), rows & ((hidden @ weight.T).argmax(-1) == labels))
    (loss * 0.37).backward()
    (weights[rows] * nll64).sum().mul(0.37).backward()
    assert off(hidden.grad, h64.grad) < 1e-6 and off(weight.grad, w64.grad) < 1e-6


def test_linear_cross_entropy_equals_its_reference_and_keeps_bf16():
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        hidden, weight, labels, weights = problem(dtype=dtype)
        loss, nll, correct = linear_cross_entropy(hidden, weight, labels, weights)
        loss.backward()
        ours = hidden.grad, weight.grad
        hidden.grad = weight.grad = None
        ref = linear_cross_entropy_ref(hidden, weight, labels, weights)
        ref[0].backward()
        assert loss.dtype == torch.float32 and ours[0].dtype == dtype
        assert abs(loss.item() / ref[0].item() - 1) < bound
        assert off(nll, ref[1]) < bound and torch.equal(correct, ref[2])
        assert off(ours[0], hidden.grad) < bound and off(ours[1], weight.grad) < bound


def test_rows_of_weight_zero_are_never_projected():
    hidden, weight, labels, weights = problem()
    with torch.no_grad():
        hidden[weights == 0] = torch.inf  # inf * 0 would be NaN: rows are selected, not multiplied
    loss, nll, _ = linear_cross_entropy(hidden, weight, labels, weights)
    loss.backward()
    assert (
        loss.isfinite()
        and nll.isfinite().all()
        and weight.grad.isfinite().all()
        and (hidden.grad[weights == 0] == 0).all()
    )


def test_no_row_with_a_weight_gives_zero():
    hidden, weight, labels, weights = problem(T=5, weights=torch.zeros(5))
    loss, _, _ = linear_cross_entropy(hidden, weight, labels, weights)
    loss.backward()
    assert loss == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_extreme_logits_and_weights_stay_finite():
    hidden, weight, labels, _ = problem(T=6)
    weights = torch.tensor([0.0, 1e-8, 1e4, 1.0, 0.1, 1.0])
    for scale in (0.0, 1e4):
        loss, nll, _ = linear_cross_entropy(hidden * scale, weight, labels, weights)
        assert loss.isfinite() and nll.isfinite().all()
    hidden.grad = None
    linear_cross_entropy(hidden * 1e4, weight, labels, weights)[0].backward()
    assert hidden.grad.isfinite().all()


def test_logits_exist_a_chunk_at_a_time(monkeypatch):
    """The softmax sees 128 rows at a time, whatever T, and all the rows with a weight."""
    seen, softmax = [], cross_entropy.softmax_gradient
    monkeypatch.setattr(
        cross_entropy,
        "softmax_gradient",
        lambda z_rS, *rest: seen.append(len(z_rS)) or softmax(z_rS, *rest),
    )
    # 128 rows of 97 columns, padded to 128, in fp32
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 128 * 128 * 4)
    inputs = problem()
    linear_cross_entropy(*inputs)[0].backward()
    assert max(seen) == 128 and sum(seen) == (inputs[3] > 0).sum()
