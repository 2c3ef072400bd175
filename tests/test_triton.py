"""The Triton kernels: in the strict interpreter on a CPU; with `pytest -m gpu` on a GPU, the same checks and larger shapes."""

import ast
import contextlib
import itertools
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import kernel_checks as checks
import mutants
import pytest
import torch
from conftest import ROOT, call
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import cross_entropy, rms_norm, rotary_attention, swiglu, tl, triton

MODULES = {m.__name__.split(".")[1]: m for m in (rms_norm, swiglu, rotary_attention, cross_entropy)}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import strict

gpu = pytest.mark.gpu
by_dtype = pytest.mark.parametrize("dtype", checks.DTYPES.values(), ids=checks.DTYPES)
few = settings(max_examples=6, deadline=None, derandomize=True)
many = settings(max_examples=150, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def on_triton():
    """Every call of this file goes to the kernels."""
    with contextlib.ExitStack() as stack:
        for module in MODULES.values():
            stack.enter_context(checks.kernels_on(module))
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=gpu)])
def device(request):
    return request.param


# ---- each kernel against fp64


@by_dtype
@pytest.mark.parametrize(
    "T, D, residual, strided",
    [
        (7, 48, True, False),
        (13, 97, False, True),
        (1, 4096, True, True),
        (3, 5120, True, False),
        (0, 64, True, False),
    ],
)
def test_rms_norm(dtype, T, D, residual, strided, device):
    checks.rms_norm(rms_norm, dtype, T, D, residual, strided, device=device)


@by_dtype
@pytest.mark.parametrize(
    "T, F, strided",
    [(5, 700, False), (3, 2048, True), (1, 1, False), (9, 11008 // 8, False), (0, 8, False)],
)
def test_swiglu(dtype, T, F, strided, device):
    checks.swiglu(swiglu, dtype, T, F, strided, device=device)


PACKINGS = [  # lengths, padding, H, G, E, strided
    ([1, 33, 0, 2, 70, 16], 5, 4, 2, 32, False),
    ([1, 1, 1], 0, 4, 1, 32, True),
    ([127, 128, 129], 0, 1, 1, 64, False),
    ([45], 0, 8, 1, 128, True),
    ([31, 32, 33, 15, 17], 64, 4, 2, 64, False),
]


@by_dtype
@pytest.mark.parametrize("lengths, padding, H, G, E, strided", PACKINGS)
def test_rotary_attention(dtype, lengths, padding, H, G, E, strided, device):
    checks.rotary_attention(
        rotary_attention, dtype, lengths, padding, H, G, E, strided, device=device
    )


def test_nothing_but_padding(device):
    T, *tables = checks.packing([0], 7, 32, device)
    inputs = [checks.fresh((T, heads, 32), torch.float32, 0, device) for heads in (2, 1, 1)]
    for x in checks.gradients(
        lambda q, k, v: rotary_attention.rotary_attention(q, k, v, *tables),
        inputs,
        [torch.ones_like(inputs[0])],
    ):
        assert (x == 0).all()


def test_hundreds_of_conversations(device):
    checks.rotary_attention(
        rotary_attention, torch.bfloat16, [1, 2] * 70, 9, 1, 1, 32, device=device
    )


@by_dtype
def test_conversations_are_blind_to_each_other(dtype, device):
    checks.attention_blindness(rotary_attention, dtype, [5, 40, 17], 2, 1, 32, device=device)


LOSSES = {  # T, D, V and the rest
    "chunks": (300, 24, 97, dict(chunk_rows=128)),
    "odd vocabulary": (9, 64, 32001, dict(strided=True)),
    "one supervised": (20, 24, 97, dict(weights=torch.eye(20)[7])),
    "none supervised": (5, 24, 97, dict(weights=torch.zeros(5))),
    "far apart weights": (6, 24, 4097, dict(weights=torch.tensor([0, 1e-8, 1e4, 1, 0.1, 1]))),
    "equal logits": (6, 24, 97, dict(scale=0.0)),
}


@by_dtype
@pytest.mark.parametrize("case", LOSSES)
def test_linear_cross_entropy(dtype, case, device):
    T, D, V, more = LOSSES[case]
    checks.linear_cross_entropy(cross_entropy, dtype, T, D, V, device=device, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_1e4(dtype, device):
    checks.linear_cross_entropy(cross_entropy, dtype, 6, 24, 97, scale=3e3, device=device)


LENGTHS = st.lists(
    st.one_of(st.integers(0, 40), st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 64, 65])),
    min_size=1,
    max_size=7,
)
PACKING = dict(
    lengths=LENGTHS,
    padding=st.integers(0, 20),
    heads=st.sampled_from([(1, 1), (4, 1), (8, 1), (6, 3), (8, 2)]),
    E=st.sampled_from([32, 64]),
    dtype=st.sampled_from(list(checks.DTYPES.values())),
    seed=st.integers(0, 2**20),
)


def any_packing(lengths, padding, heads, E, dtype, seed):
    checks.rotary_attention(rotary_attention, dtype, lengths, padding, *heads, E, seed=seed)


test_any_packing = few(given(**PACKING)(any_packing))
test_any_packing_at_length = pytest.mark.long(many(given(**PACKING)(any_packing)))

ROWS = dict(
    T=st.integers(1, 40),
    D=st.integers(1, 300),
    flag=st.booleans(),
    strided=st.booleans(),
    dtype=st.sampled_from(list(checks.DTYPES.values())),
    seed=st.integers(0, 2**20),
)


def any_rows(T, D, flag, strided, dtype, seed):
    checks.rms_norm(rms_norm, dtype, T, D, flag, strided, seed)
    checks.swiglu(swiglu, dtype, T, D, strided, seed)
    checks.linear_cross_entropy(
        cross_entropy, dtype, T, D, D + 1, chunk_rows=128, strided=strided, seed=seed
    )


test_any_rows = few(given(**ROWS)(any_rows))
test_any_rows_at_length = pytest.mark.long(many(given(**ROWS)(any_rows)))


@gpu
@by_dtype
@pytest.mark.parametrize("D", [4096, 5120, 8192])
def test_rows_at_full_width(dtype, D):
    checks.rms_norm(rms_norm, dtype, 4099, D, device="cuda")
    checks.swiglu(swiglu, dtype, 515, D * 43 // 16, device="cuda")
    checks.linear_cross_entropy(cross_entropy, dtype, 4099, D, 32001, device="cuda")


@gpu
@by_dtype
@pytest.mark.parametrize("E, H, G", [(128, 8, 8), (128, 16, 2), (64, 8, 1), (32, 3, 3)])
def test_attention_over_many_blocks(dtype, E, H, G):
    checks.rotary_attention(
        rotary_attention,
        dtype,
        [1, 127, 128, 129, 1000, 2049, 300, 0, 63],
        37,
        H,
        G,
        E,
        device="cuda",
    )
    checks.rotary_attention(rotary_attention, dtype, list(range(1, 90)), 5, H, G, E, device="cuda")
    checks.attention_blindness(rotary_attention, dtype, [200, 700, 300], H, G, E, device="cuda")


# ---- the schedule


@few
@given(lengths=st.lists(st.integers(0, 70), max_size=150), padding=st.integers(0, 50))
def test_plan_holds_every_block_once_most_work_first(lengths, padding):
    BM = 32
    T, _, _, cu_seqlens = checks.packing(lengths, padding, 32)
    plan = [tuple(block) for block in rotary_attention._plan(cu_seqlens, T, BM).tolist()]
    blocks = [
        (n, row) for n, length in enumerate([*lengths, padding]) for row in range(0, length, BM)
    ]
    assert plan[: len(blocks)] == sorted(blocks, key=lambda block: (-block[1], block[0]))
    assert all(n == -1 for n, _ in plan[len(blocks) :])


# ---- what only the interpreter can see


def test_program_order_changes_no_bit(monkeypatch):
    """In order twice, and shuffled twice: forward and backward, outputs and all gradients."""

    def run():
        return [
            *checks.rms_norm(rms_norm, torch.bfloat16, 9, 40),
            *checks.swiglu(swiglu, torch.bfloat16, 9, 700),
            *checks.rotary_attention(rotary_attention, torch.bfloat16, [20, 40, 3], 2, 2, 1, 32),
            *checks.linear_cross_entropy(cross_entropy, torch.bfloat16, 30, 16, 50),
        ]

    before = run()
    for seed in (None, 1, 2):
        monkeypatch.setattr(strict, "shuffle", seed)
        assert all(torch.equal(a, b) for a, b in zip(before, run()))


def at_the_end(x, rows):
    """x as the last rows of a tensor of so many: beyond 2^31 elements, in a sparse memory map."""
    big = strict.far((rows, *x.shape[1:]), x.dtype)
    big[rows - len(x) :] = x
    return big


def far_run(monkeypatch, kernel, grid, only, args, rest):
    """Run only these programs of the kernel's grid; `args` and `rest` are its arguments."""
    monkeypatch.setattr(strict, "only", only)
    kernel[grid](*args, **rest)
    monkeypatch.setattr(strict, "only", None)


def test_rms_norm_beyond_2_31_elements(monkeypatch):
    T, D = 2**15 + 3, 2**16
    x, w = (
        checks.fresh((1, D), torch.float16, 0, "cpu"),
        checks.fresh((D,), torch.float16, 1, "cpu"),
    )
    y, _, r = rms_norm.rms_norm_op(x, None, w, 1e-5)
    dx, dw = rms_norm.rms_norm_bwd_op(x, w, r, y, None)
    big, out, r_T = (
        at_the_end(x, T),
        strict.far((T, D), torch.float16),
        strict.far((T,), torch.float32),
    )
    far_run(
        monkeypatch,
        rms_norm._fwd_kernel,
        (T,),
        [(T - 1, 0, 0)],
        [big, None, w, out, None, r_T, 1e-5],
        dict(D=D, BD=D),
    )
    assert torch.equal(out[-1], y[0])
    grad, partial = strict.far((T, D), torch.float16), strict.far((T, D), torch.float32)
    far_run(
        monkeypatch,
        rms_norm._bwd_kernel,
        (T,),
        [(T - 1, 0, 0)],
        [big, w, r_T, out, None, grad, partial, T],
        dict(D=D, BD=D),
    )
    assert torch.equal(grad[-1], dx[0]) and torch.equal(partial[-1].half(), dw)


def test_swiglu_beyond_2_31_elements(monkeypatch):
    B = swiglu.BLOCK
    n = 2**31 + 3 * B
    last = [(n // B - 1, 0, 0)]
    g, u, dy = (checks.fresh((B,), torch.float16, i, "cpu") for i in range(3))
    far_g, far_u, far_dy = (at_the_end(x, n) for x in (g, u, dy))
    out = [strict.far((n,), torch.float16) for _ in range(3)]
    far_run(monkeypatch, swiglu._fwd_kernel, (n // B,), last, [far_g, far_u, out[0], n, B], {})
    far_run(
        monkeypatch,
        swiglu._bwd_kernel,
        (n // B,),
        last,
        [far_g, far_u, far_dy, out[1], out[2], n, B],
        {},
    )
    near = [swiglu.swiglu_op(g, u), *swiglu.swiglu_bwd_op(g, u, dy)]
    assert all(torch.equal(a[-B:], b) for a, b in zip(out, near))


def test_softmax_beyond_2_31_elements(monkeypatch):
    R, S, V = 2**16 + 9, 32064, 32001
    z = checks.fresh((1, S), torch.float16, 0, "cpu")
    labels, weights = torch.tensor([31999]), torch.tensor([0.5])
    big = at_the_end(z, R)
    args = [
        big,
        at_the_end(labels, R),
        at_the_end(weights, R),
        strict.far((R,), torch.float32),
        strict.far((R,), torch.float32),
    ]
    far_run(
        monkeypatch,
        cross_entropy._softmax_kernel,
        (R,),
        [(R - 1, 0, 0)],
        args,
        dict(S=S, V=V, BV=4096),
    )
    nll, correct = cross_entropy.softmax_gradient(z, labels, weights, V)
    assert (
        torch.equal(big[-1, :V], z[0, :V]) and args[3][-1] == nll[0] and args[4][-1] == correct[0]
    )


def test_attention_beyond_2_31_elements(monkeypatch):
    """A conversation at the end of 2^18 others' rows, 64 heads of 128: the bits of the same conversation alone."""
    H, E, length, before = 64, 128, 20, 2**18
    T, cos, sin, cu_near = checks.packing([length], 0, E)
    q, k, v, do = (checks.fresh((length, H, E), torch.float16, i, "cpu") for i in range(4))
    o, rotated, lse = rotary_attention.rotary_attention_op(q, k, v, cos, sin, cu_near)
    dq, dk, dv = rotary_attention.rotary_attention_bwd_op(
        q, rotated, v, cos, sin, cu_near, o, lse, do
    )
    rotated_q = rotary_attention._rotate(q, cos, sin)
    T, N = before + length, 2
    far_q, far_k, far_v, far_do, far_o, far_rotated, far_rotated_q = (
        at_the_end(x, T) for x in (q, k, v, do, o, rotated, rotated_q)
    )
    far_cos, far_sin = at_the_end(cos, T), at_the_end(sin, T)
    cu_seqlens, plan = (
        torch.tensor([0, before, T], dtype=torch.int32),
        torch.tensor([[1, 0]], dtype=torch.int32),
    )
    empty = lambda: strict.far((T, H, E), torch.float16)
    shapes, tiles, one = dict(H=H, G=H, E=E), dict(BM=32, BN=16), [(0, H - 1, 0)]
    norm = E**-0.5
    scale = norm * rotary_attention.LOG2E
    out = empty()
    far_run(
        monkeypatch,
        rotary_attention._rotate_kernel,
        (T // 32 + 1, H),
        [(T // 32, H - 1, 0)],
        [far_k, out, far_cos, far_sin, T, H, E, 32],
        {},
    )
    assert torch.equal(out[T // 32 * 32 :, -1], rotated[T // 32 * 32 - T :, -1])
    out, far_lse = empty(), strict.far((H, T), torch.float32)
    args = [
        far_q,
        far_rotated,
        far_v,
        far_cos,
        far_sin,
        cu_seqlens,
        plan,
        out,
        far_lse,
        scale,
        T,
        N,
    ]
    far_run(monkeypatch, rotary_attention._fwd_kernel, (1, H), one, args, shapes | tiles)
    assert torch.equal(out[-length:, -1], o[:, -1]) and torch.equal(far_lse[-1, -length:], lse[-1])
    delta = strict.far((H, T), torch.float32)
    far_run(
        monkeypatch,
        rotary_attention._delta_kernel,
        (T // 32 + 1, H),
        [(T // 32, H - 1, 0)],
        [far_o, far_do, delta, T, H, E, 32],
        {},
    )
    assert torch.allclose(
        delta[-1, T // 32 * 32 :],
        (o.float() * do.float()).sum(-1)[T // 32 * 32 - T :, -1],
        rtol=1e-4,
    )
    delta[-1, -length:] = (o.float() * do.float()).sum(-1)[:, -1]
    back = [
        far_rotated_q,
        far_rotated,
        far_v,
        far_do,
        far_lse,
        delta,
        far_cos,
        far_sin,
        cu_seqlens,
        plan,
    ]
    out = empty()
    far_run(
        monkeypatch,
        rotary_attention._dq_kernel,
        (1, H),
        one,
        [*back, out, scale, norm, T, N],
        shapes | tiles,
    )
    assert torch.allclose(out[-length:, -1].float(), dq[:, -1].float(), rtol=1e-2, atol=1e-3)
    out, other = empty(), empty()
    far_run(
        monkeypatch,
        rotary_attention._dkv_kernel,
        (1, H),
        one,
        [*back, out, other, scale, norm, T, N],
        shapes | dict(BM=16, BN=32),
    )
    assert torch.equal(other[-length:, -1], dv[:, -1]) and torch.allclose(
        out[-length:, -1].float(), dk[:, -1].float(), rtol=1e-2, atol=1e-3
    )


@triton.jit
def _bad_kernel(x, y, n, what: tl.constexpr):
    i = tl.program_id(0)
    if what == "bounds":
        tl.store(y + i, tl.load(x + i + n))
    if what == "race":
        tl.store(y, i.to(tl.float32))
    if what == "twice":
        tl.store(y + tl.arange(0, 2) // 2, 1.0)
    if what == "bf16":
        tl.store(y + i, tl.load(x + i) * tl.load(x))
    if what == "sum":
        tl.store(y, tl.sum(tl.load(x + tl.arange(0, 4)), 0))
    if what == "overflow":
        tl.store(y + i, tl.load(x + i * 2**30 * n))


@pytest.mark.parametrize(
    "what, error",
    [
        ("bounds", "OutOfBounds"),
        ("race", "Race"),
        ("twice", "Race"),
        ("bf16", "TypeError"),
        ("sum", "TypeError"),
        ("overflow", "AssertionError"),
    ],
)
def test_the_strict_interpreter_sees(what, error):
    x = torch.ones(4, dtype=torch.bfloat16 if what in ("bf16", "sum") else torch.float32)
    with pytest.raises(Exception) as caught:
        _bad_kernel[(4,)](x, torch.zeros(4), 4, what)
    assert type(caught.value).__name__ == error, caught.value


def test_the_strict_interpreter_rounds_bf16_to_nearest_even():
    x = torch.cat(
        [
            torch.randn(1000),
            torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, torch.inf, torch.nan, 0.0, 3.4e38]),
        ]
    )
    assert torch.equal(
        torch.from_numpy(strict._bits(x.numpy())).view(torch.bfloat16).nan_to_num(7),
        x.bfloat16().nan_to_num(7),
    )


# ---- PyTorch's side


def small_inputs(name, device):
    """(operator, its arguments) for every operator of a kernel file."""
    f = lambda *shape, grad=True: torch.randn(*shape, device=device, requires_grad=grad)
    if name == "rms_norm":
        yield rms_norm.rms_norm_op, (f(5, 24), None, f(24), 1e-5)
        yield rms_norm.rms_norm_op, (f(5, 24), f(5, 24), f(24), 1e-5)
        yield (
            rms_norm.rms_norm_bwd_op,
            (f(5, 24, grad=False), f(24, grad=False), f(5, grad=False), f(5, 24, grad=False), None),
        )
    if name == "swiglu":
        yield swiglu.swiglu_op, (f(5, 24), f(5, 24))
        yield swiglu.swiglu_bwd_op, tuple(f(5, 24, grad=False) for _ in range(3))
    if name == "rotary_attention":
        T, *tables = checks.packing([3, 5], 1, 32, device)
        q, k, v = f(T, 4, 32), f(T, 2, 32), f(T, 2, 32)
        yield rotary_attention.rotary_attention_op, (q, k, v, *tables)
        q, k, v = (x.detach() for x in (q, k, v))
        yield (
            rotary_attention.rotary_attention_bwd_op,
            (q, k, v, *tables, q, f(4, T, grad=False), q),
        )
    if name == "cross_entropy":
        labels, weights, rows = (
            torch.tensor([1, 2, 3], device=device),
            torch.tensor([1.0, 0, 0.1], device=device),
            torch.tensor([0, 2], device=device),
        )
        for grad in (True, False):
            yield (
                cross_entropy.linear_cross_entropy_op,
                (f(3, 8, grad=grad), f(20, 8, grad=grad), labels, weights, rows, grad),
            )
        yield (
            cross_entropy.linear_cross_entropy_bwd_op,
            (
                f(3, 8, grad=False),
                f(20, 8, grad=False),
                torch.tensor(0.5, device=device),
                torch.float32,
            ),
        )


@pytest.mark.parametrize("name", MODULES)
def test_opcheck(name, device):
    for op, args in small_inputs(name, device):
        torch.library.opcheck(op, args, rtol=1e-4, atol=1e-5)


def test_a_block_compiles_in_one_graph(device):
    """fullgraph=True, forward and backward, with every kind of recomputation: the same numbers as eager."""
    from model import RECOMPUTE, Block, Config

    torch.manual_seed(0)
    block = Block(Config(64, 96, 1, 2, 1))
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.2)
    block.to(device)
    T, *tables = checks.packing([3, 9], 1, 32, device)
    x = torch.randn(T, 64, device=device)
    results = []
    for recompute, compile_it in itertools.product(RECOMPUTE, (False, True)):
        block.recompute = recompute
        f = (
            torch.compile(
                block, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager"
            )
            if compile_it
            else block
        )
        leaf = x.clone().requires_grad_()
        y = f(leaf, *tables)
        block.zero_grad()
        y.square().sum().backward()
        results.append(
            [
                y.detach(),
                leaf.grad,
                block.self_attn.q_proj.weight.grad,
                block.post_attention_layernorm.weight.grad,
            ]
        )
        torch._dynamo.reset()
    for other in results[1:]:
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(results[0], other))


def test_model_on_kernels_equals_model_on_references(monkeypatch, device):
    """A whole forward and backward pass: every kernel in its place, with the arguments that model.py gives."""
    from model import Config, Model

    torch.manual_seed(0)
    model = Model(Config(64, 96, 2, 2, 1, vocab_size=50))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.to(device)
    T, _, _, cu_seqlens = checks.packing([3, 9, 20], 2, 32, device)
    tokens, weights = torch.arange(T, device=device) % 50, torch.rand(T, device=device)
    weights[-2:] = 0
    positions = torch.cat([torch.arange(n) for n in (3, 9, 20, 2)]).to(device)
    results = []
    for triton_runs in (True, False):
        for module in MODULES.values():
            monkeypatch.setattr(module, "on_gpu", lambda x: triton_runs)  # noqa: B023
        model.zero_grad()
        loss, _ = model(tokens, positions, cu_seqlens, tokens.roll(-1), weights)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_wrong_arguments_are_refused():
    x = torch.randn(4, 2, 32)
    T, cos, sin, cu_seqlens = checks.packing([4], 0, 32)
    for bad in (
        lambda: rms_norm.rms_norm(x[0], torch.ones(31)),
        lambda: rms_norm.rms_norm(x[0], torch.ones(32).half()),
        lambda: rms_norm.rms_norm(x[0], torch.ones(32), 1e-5, x[1, :1]),
        lambda: swiglu.swiglu(x, x[:1]),
        lambda: swiglu.swiglu(x, x.half()),
        lambda: rotary_attention.rotary_attention(x, x[:, :1], x, cos, sin, cu_seqlens),
        lambda: rotary_attention.rotary_attention(x, x, x, cos, sin[:, :3], cu_seqlens),
        lambda: rotary_attention.rotary_attention(x, x, x.half(), cos, sin, cu_seqlens),
        lambda: rotary_attention.rotary_attention(x, x, x, cos.half(), sin.half(), cu_seqlens),
        lambda: rotary_attention.rotary_attention(x, x, x, cos, sin, cu_seqlens.long()),
        lambda: cross_entropy.linear_cross_entropy(
            x[0], x[1, :, :5], torch.zeros(2), torch.ones(2)
        ),
        lambda: cross_entropy.linear_cross_entropy(
            x[0], x[1].half(), torch.zeros(2).long(), torch.ones(2)
        ),
        lambda: cross_entropy.linear_cross_entropy(
            x[0], x[1], torch.zeros(3).long(), torch.ones(3)
        ),
        lambda: cross_entropy.linear_cross_entropy(
            x[0], x[1], torch.zeros(2).long(), torch.ones(2).bfloat16()
        ),
    ):
        with pytest.raises(
            ValueError, match="^(rms_norm|swiglu|rotary_attention|linear_cross_entropy): "
        ):
            bad()


def test_another_head_size_takes_the_reference_and_says_so_once():
    q = torch.randn(4, 2, 48)
    T, *tables = checks.packing([4], 0, 48)
    with pytest.warns(UserWarning, match="head size 48") as warned:
        for _ in range(2):
            assert torch.equal(
                rotary_attention.rotary_attention(q, q, q, *tables),
                rotary_attention.rotary_attention_ref(q, q, q, *tables),
            )
    assert len(warned) == 1


# ---- ahead of time


@pytest.mark.parametrize("name", MODULES)
def test_every_dot_names_its_precision(name):
    dots = [
        n
        for n in ast.walk(ast.parse((ROOT / "kernels" / f"{name}.py").read_text()))
        if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "dot"
    ]
    assert len(dots) == (9 if name == "rotary_attention" else 0)
    for dot in dots:
        assert {k.arg: ast.literal_eval(k.value) for k in dot.keywords}.get("input_precision") in (
            "ieee",
            "tf32x3",
        ), ast.unparse(dot)


def compiled(*words):
    out, _ = call("-m", "kernels.compile", *words)
    lines = out.splitlines()
    assert lines[-1].endswith(" 0 failed"), out
    return lines[:-1]


def test_kernels_compile_ahead_of_time():
    """LLaMA-2 7B's shapes in bf16 for the four architectures; the whole table is in the long run."""
    lines = compiled("--dtype", "bf16", "--shapes", "1")
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert sum(line.startswith(arch) for line in lines) >= 12
        matmuls = [
            line
            for line in lines
            if line.startswith(arch)
            and any(f" {k} " in line for k in ("_fwd_kernel", "_dq_kernel", "_dkv_kernel"))
            and "rotary" in line
        ]
        assert len(matmuls) == 3 and all(int(line.split()[-2]) > 0 for line in matmuls)


@pytest.mark.long
def test_every_kernel_compiles_at_every_shape_class():
    assert len(compiled()) > 500


PROBE = """
import sys; sys.path.insert(0, {root!r})
import torch, triton, triton.language as tl
from kernels import compile as aot, rotary_attention
from kernels.cases.rotary_attention import launch

@triton.jit
def loop(x, y, n, stride, B: tl.constexpr):
    o = tl.arange(0, B)
    for i in range(n):
        o += i * stride
    tl.store(y + tl.arange(0, B), tl.load(x + o, mask=o < n, other=0.0))

@triton.jit
def branch(x, y, n, stride, B: tl.constexpr):
    o = 0
    if n > 5:
        o = n * stride
    for i in range(n):
        tl.store(y + i, tl.load(x + o + tl.arange(0, B)).to(tl.float32).sum() + i)

@triton.jit
def fine(x, y, n, stride, B: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * stride + tl.arange(0, B)
    for i in range(n * stride):
        o += i
    tl.store(y + tl.arange(0, B), tl.load(x + o, mask=o < n, other=0.0))

@triton.jit
def tf32(x, y, B: tl.constexpr):
    o = tl.arange(0, B)[:, None] * B + tl.arange(0, B)
    b = tl.load(x + o)
    tl.store(y + o, tl.dot(b, b, input_precision="tf32"))

x = torch.ones(32, 32)
for name, dtype, f in (("loop", "fp32", lambda d: loop[(1,)](x, x, 9, 33, 32)), ("branch", "fp32", lambda d: branch[(1,)](x, x, 9, 33, 32)),
                       ("fine", "fp32", lambda d: fine[(1,)](x, x, 9, 33, 32)), ("tf32", "fp32", lambda d: tf32[(1,)](x, x, 32)), ("spill", "bf16", None)):
    if f is None:
        rotary_attention.LAUNCH["sm_90"] = ((128, 64, 4, 2),) * 3
        f = lambda d: launch(d, 128, 1, 1)
    lines = aot.report(("sm_90", name, f, dtype, {{}}))
    print(name, "|".join(text for text, failed in lines if failed).replace(chr(10), " "))
"""


def test_the_report_fails_what_it_should(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE.format(root=str(ROOT)))
    out, _ = call(tmp_path / "probe.py")
    loop, branch, fine, tf32, spill = out.splitlines()
    assert (
        all("32-bit product reaches an address" in line for line in (loop, branch))
        and fine == "fine "
    )
    assert "plain TF32" in tf32 and " spills" in spill.partition("FAILED")[2]


# ---- the scripts, and the tests themselves


def test_bench_runs_every_case_and_times_nothing_without_a_gpu(tmp_path):
    out, _ = call("-m", "kernels.bench", "--check")
    lines = out.splitlines()
    assert (
        {line.split()[0] for line in lines} == set(MODULES)
        and len(lines) == 17
        and all("ours" in line and "WORSE" not in line for line in lines)
    ), out
    out, _ = call(
        "-m", "kernels.bench", "rms_norm", "--T", 64, "--D", 5120, "--out", tmp_path / "x.json"
    )
    assert out.startswith("no CUDA GPU here: nothing was timed") and not list(tmp_path.iterdir())
    for words, remedy in (
        (["--T", 64], "name the kernel first"),
        (["swiglu", "--D", 64], "goes with rms_norm"),
        (["swiglu", "--T", 0], "positive"),
        (["rotary_attention", "--lengths", "long"], "sharegpt, short or a number"),
        (["rotary_attention", "--H", 3, "--G", 2], "multiple of --G"),
        (["layer_norm"], "choose from"),
        (["--show", "no.json"], "no such file"),
    ):
        assert remedy in call("-m", "kernels.bench", *words, ok=False)[1]


def test_bench_table_renders_a_results_file(tmp_path):
    row = dict(
        kernel="rms_norm",
        shape=dict(T=4, D=8),
        direction="forward",
        implementation="ours",
        milliseconds=0.5,
        unit="bytes",
        rate=2e12,
        share=0.8,
        error=0.001,
        worse=False,
        peak_bytes=3e6,
    )
    results = dict(
        device="a GPU",
        torch="2",
        triton="3",
        command="python -m kernels.bench",
        absent={"Liger": "ImportError"},
        ceiling=dict(bytes=2.5e12, flops=7e14),
        rows=[row],
    )
    (tmp_path / "bench.json").write_text(json.dumps(results))
    out, _ = call("-m", "kernels.bench", "--show", tmp_path / "bench.json")
    assert out.splitlines()[-1] == "not run: Liger (ImportError)"
    assert (
        out.splitlines()[-2]
        == "| rms_norm | T=4 D=8 | forward | ours | 0.500 | 2.00 TB/s | 80% | 1.0e-03 | 3 |"
    )


def survivors(jobs):
    """Mutants of the kernels that no check notices and that nobody has shown to be equivalent."""
    with ProcessPoolExecutor(
        os.cpu_count(), get_context("spawn"), initializer=mutants.interpret
    ) as pool:
        assert all(killer is None for _, killer in pool.map(mutants.fate, mutants.controls())), (
            "the checks fail on the kernels themselves"
        )
        fates = list(pool.map(mutants.fate, jobs))
    return [
        f"{job[0]} {what}"
        for job, (what, killer) in zip(jobs, fates)
        if killer is None and f"{job[0]} {what}" not in mutants.EQUIVALENT
    ]


def test_a_sample_of_mutants_is_killed():
    jobs = mutants.all_jobs()
    assert len(jobs) >= 100
    assert not survivors(jobs[7::37])


@pytest.mark.long
def test_every_mutant_is_killed_or_equivalent():
    jobs = mutants.all_jobs()
    assert not survivors(jobs)
    assert set(mutants.EQUIVALENT) <= {f"{kernel} {what}" for kernel, _, what, _ in jobs}, (
        "an entry of EQUIVALENT names no mutant"
    )
