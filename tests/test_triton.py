"""The Triton kernels: in the strict interpreter on a CPU, with `pytest -m gpu` on a GPU.

On a GPU the same checks run, and larger shapes.
"""

# T tokens, D width, U ffn width, V vocab, H query heads, G key-value heads, E head size, S columns
# of the logits' memory

import ast
import contextlib
import json
import os
import subprocess
import sys
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import kernel_checks as checks
import mutants
import pytest
import torch
from conftest import ROOT, call

from kernels import compile as aot
from kernels import cross_entropy, rms_norm, rotary_attention, swiglu
from kernels.cases import cases
from kernels.timing import Clock, Times
from model import RECOMPUTE

MODULES = {
    "rms_norm": rms_norm,
    "swiglu": swiglu,
    "rotary_attention": rotary_attention,
    "cross_entropy": cross_entropy,
}
assert set(MODULES) == set(cases()), "a kernel with cases and without tests, or without cases"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import strict

bf16 = torch.bfloat16
fp16 = torch.float16
fp32 = torch.float32
gpu = pytest.mark.gpu
by_dtype = pytest.mark.parametrize("dtype", checks.DTYPES.values(), ids=checks.DTYPES)


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

NORMS = [  # T, D, residual, strided
    (7, 48, True, False),
    (13, 97, False, True),
    (1, 4096, True, True),
    (3, 5120, True, False),
    (0, 64, True, False),
]


@by_dtype
@pytest.mark.parametrize("T, D, residual, strided", NORMS)
def test_rms_norm(dtype, T, D, residual, strided, device):
    checks.rms_norm(rms_norm, dtype, T, D, residual, strided, device=device)


GATES = [  # T, U, strided
    (5, 700, False),
    (3, 2048, True),
    (1, 1, False),
    (9, 11008 // 8, False),
    (0, 8, False),
]


@by_dtype
@pytest.mark.parametrize("T, U, strided", GATES)
def test_swiglu(dtype, T, U, strided, device):
    checks.swiglu(swiglu, dtype, T, U, strided, device=device)


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


@pytest.mark.parametrize("heads", [1, 3, 40, 64])
def test_rotation_of_any_number_of_heads(heads, device):
    checks.rotation(rotary_attention, heads, device)


def test_nothing_but_padding(device):
    T, *tables = checks.packing([0], 7, 32, device)
    inputs = [checks.fresh((T, heads, 32), fp32, 0, device) for heads in (2, 1, 1)]
    upstream = [torch.ones_like(inputs[0])]

    def attention(q, k, v):
        return rotary_attention.rotary_attention(q, k, v, *tables)

    for x in checks.gradients(attention, inputs, upstream):
        assert (x == 0).all()


def test_hundreds_of_conversations(device):
    lengths = [1, 2] * 70
    checks.rotary_attention(rotary_attention, bf16, lengths, 9, 1, 1, 32, device=device)


@by_dtype
def test_scores_of_hundreds(dtype, device):
    """Without the right maximum, exp of them is infinite or 0."""
    checks.rotary_attention(rotary_attention, dtype, [40], 3, 2, 1, 32, device=device, scale=8.0)


@by_dtype
def test_conversations_are_blind_to_each_other(dtype, device):
    checks.attention_blindness(rotary_attention, dtype, [5, 40, 17], 2, 1, 32, device=device)


LOSSES = {  # T, D, V and the rest
    "chunks": (300, 24, 97, {"chunk_rows": 128}),
    "odd vocabulary": (9, 64, 32001, {"strided": True}),
    "one supervised": (20, 24, 97, {"weights": torch.eye(20)[7]}),
    "none supervised": (5, 24, 97, {"weights": torch.zeros(5)}),
    "far apart weights": (6, 24, 4097, {"weights": torch.tensor([0, 1e-8, 1e4, 1, 0.1, 1])}),
    "equal logits": (6, 24, 97, {"scale": 0.0}),
}


@by_dtype
@pytest.mark.parametrize("case", LOSSES)
def test_linear_cross_entropy(dtype, case, device):
    T, D, V, more = LOSSES[case]
    checks.linear_cross_entropy(cross_entropy, dtype, T, D, V, device=device, **more)


@pytest.mark.parametrize("dtype", [fp32, bf16])
def test_logits_of_1e4(dtype, device):
    checks.linear_cross_entropy(cross_entropy, dtype, 6, 24, 97, scale=3e3, device=device)


def test_no_logit_beyond_the_vocabulary_counts():
    checks.columns_beyond_the_vocabulary(cross_entropy)


@gpu
@by_dtype
@pytest.mark.parametrize("D", [4096, 5120, 8192])
def test_rows_at_full_width(dtype, D):
    checks.rms_norm(rms_norm, dtype, 4099, D, device="cuda")
    checks.swiglu(swiglu, dtype, 515, D * 43 // 16, device="cuda")


# Chunks of the module's own size, and wider rows in chunks of fewer: several tests share a GPU's
# memory, and the fp64 logits of 4,099 rows would be a gigabyte in each of three places.
@gpu
@by_dtype
@pytest.mark.parametrize(
    "T, D, chunk_rows", [(4099, 4096, None), (1031, 5120, 256), (1031, 8192, 256)]
)
def test_loss_at_full_width(dtype, T, D, chunk_rows):
    checks.linear_cross_entropy(
        cross_entropy, dtype, T, D, 32001, chunk_rows=chunk_rows, device="cuda"
    )
    torch.cuda.empty_cache()


@gpu
@by_dtype
@pytest.mark.parametrize("E, H, G", [(128, 8, 8), (128, 16, 2), (64, 8, 1), (32, 3, 3)])
def test_attention_over_many_blocks(dtype, E, H, G):
    uneven = [1, 127, 128, 129, 1000, 2049, 300, 0, 63]
    growing = list(range(1, 90))
    for lengths, padding in ((uneven, 37), (growing, 5)):
        checks.rotary_attention(rotary_attention, dtype, lengths, padding, H, G, E, device="cuda")
    checks.attention_blindness(rotary_attention, dtype, [200, 700, 300], H, G, E, device="cuda")


# ---- what only the interpreter can see


def test_program_order_changes_no_bit(monkeypatch):
    """In order twice, and shuffled twice: forward and backward, outputs and all gradients."""

    def run():
        return [
            *checks.rms_norm(rms_norm, bf16, 9, 40),
            *checks.swiglu(swiglu, bf16, 9, 700),
            *checks.rotary_attention(rotary_attention, bf16, [20, 40, 3], 2, 2, 1, 32),
            *checks.linear_cross_entropy(cross_entropy, bf16, 30, 16, 50),
        ]

    before = run()
    for seed in (None, 1, 2):
        monkeypatch.setattr(strict, "shuffle", seed)
        checks.same_bits(before, run())


def at_the_end(x, rows):
    """x as the last rows of a tensor of so many: beyond 2^31 elements, in a sparse memory map."""
    big = strict.far((rows, *x.shape[1:]), x.dtype)
    big[rows - len(x) :] = x
    return big


@pytest.fixture
def far_run(monkeypatch):
    """far_run(kernel, grid, last, arguments, ..): only this program of the kernel's grid."""

    def run(kernel, grid, last, arguments, **constants):
        monkeypatch.setattr(strict, "only", [last])
        kernel[grid](*arguments, **constants)
        monkeypatch.setattr(strict, "only", None)

    return run


def test_rms_norm_beyond_2_31_elements(far_run):
    T, D = 2**15 + 3, 2**16
    x = checks.fresh((1, D), fp16, 0, "cpu")
    w = checks.fresh((D,), fp16, 1, "cpu")
    y, _, r = rms_norm.rms_norm_op(x, None, w, 1e-5)
    dx, dw = rms_norm.rms_norm_bwd_op(x, w, r, y, None)

    last = (T - 1, 0, 0)
    far_x = at_the_end(x, T)
    far_y = strict.far((T, D), fp16)
    far_r = strict.far((T,), fp32)
    arguments = [far_x, None, w, far_y, None, far_r, 1e-5]
    far_run(rms_norm._fwd_kernel, (T,), last, arguments, D=D, BD=D)
    assert torch.equal(far_y[-1], y[0])

    far_dx = strict.far((T, D), fp16)
    partial = strict.far((T, D), fp32)
    arguments = [far_x, w, far_r, far_y, None, far_dx, partial, T]
    far_run(rms_norm._bwd_kernel, (T,), last, arguments, D=D, BD=D)
    assert torch.equal(far_dx[-1], dx[0])
    assert torch.equal(partial[-1].half(), dw)


def test_swiglu_beyond_2_31_elements(far_run):
    B = swiglu.BLOCK
    n = 2**31 + 3 * B
    grid = (n // B,)
    last = (n // B - 1, 0, 0)
    near = [checks.fresh((B,), fp16, i, "cpu") for i in range(3)]
    g, u, dy = near
    far_g, far_u, far_dy = (at_the_end(x, n) for x in near)
    far_y, far_dg, far_du = (strict.far((n,), fp16) for _ in range(3))
    far_run(swiglu._fwd_kernel, grid, last, [far_g, far_u, far_y, n, B])
    far_run(swiglu._bwd_kernel, grid, last, [far_g, far_u, far_dy, far_dg, far_du, n, B])

    dg, du = swiglu.swiglu_bwd_op(g, u, dy)
    assert torch.equal(far_y[-B:], swiglu.swiglu_op(g, u))
    assert torch.equal(far_dg[-B:], dg)
    assert torch.equal(far_du[-B:], du)


def test_softmax_beyond_2_31_elements(far_run):
    R, S, V = 2**16 + 9, 32064, 32001
    z = checks.fresh((1, S), fp16, 0, "cpu")
    labels = torch.tensor([31999])
    weights = torch.tensor([0.5])
    far_z, far_labels, far_weights = (at_the_end(x, R) for x in (z, labels, weights))
    far_nll = strict.far((R,), fp32)
    far_correct = strict.far((R,), fp32)
    arguments = [far_z, far_labels, far_weights, far_nll, far_correct]
    kernel = cross_entropy._softmax_kernel
    far_run(kernel, (R,), (R - 1, 0, 0), arguments, S=S, V=V, BV=4096)

    nll, correct = cross_entropy.softmax_gradient(z, labels, weights, V)
    assert torch.equal(far_z[-1, :V], z[0, :V])
    assert far_nll[-1] == nll[0]
    assert far_correct[-1] == correct[0]


def test_attention_beyond_2_31_elements(far_run):
    """A conversation at the end of 2^18 others' rows, 64 heads of 128: the bits of the same
    conversation alone."""
    H, E, length, before = 64, 128, 20, 2**18
    _, cos, sin, cu_near = checks.packing([length], 0, E)
    q, k, v, do = (checks.fresh((length, H, E), fp16, i, "cpu") for i in range(4))
    o, rotated, lse = rotary_attention.rotary_attention_op(q, k, v, cos, sin, cu_near)
    saved = (q, rotated, v, cos, sin, cu_near, o, lse)
    dq, dk, dv = rotary_attention.rotary_attention_bwd_op(*saved, do)
    rotated_q = rotary_attention._rotate(q, cos, sin)

    T = before + length
    far_q, far_k, far_v, far_do = (at_the_end(x, T) for x in (q, k, v, do))
    far_o, far_rotated, far_rotated_q = (at_the_end(x, T) for x in (o, rotated, rotated_q))
    far_cos, far_sin = (at_the_end(x, T) for x in (cos, sin))
    tables = [far_cos, far_sin, torch.tensor([0, before, T]).int()]
    plan = torch.tensor([[1, 0]], dtype=torch.int32)
    norm = E**-0.5
    scale = norm * rotary_attention.LOG2E
    sizes = [T, 2, H, H, E]
    last_head = (0, H - 1, 0)

    out = strict.far((T, H, E), fp16)
    last_row = (T - 1, H // 32 - 1, 0)
    arguments = [far_k, out, far_cos, far_sin, H, E, 32]
    far_run(rotary_attention._rotate_kernel, (T, H // 32), last_row, arguments)
    assert torch.equal(out[-1, -32:], rotated[-1, -32:])

    out = strict.far((T, H, E), fp16)
    far_lse = strict.far((H, T), fp32)
    arguments = [far_q, far_rotated, far_v, *tables, plan, out, far_lse, scale, *sizes]
    far_run(rotary_attention._fwd_kernel, (1, H), last_head, arguments, BM=32, BN=16)
    assert torch.equal(out[-length:, -1], o[:, -1])
    assert torch.equal(far_lse[-1, -length:], lse[-1])

    out = strict.far((T, H, E), fp16)
    delta = strict.far((H, T), fp32)
    inputs = [far_rotated_q, far_rotated, far_v, far_o, far_do, far_lse, delta, *tables]
    arguments = [*inputs, plan, out, scale, norm, *sizes]
    far_run(rotary_attention._dq_kernel, (1, H), last_head, arguments, BM=32, BN=16)
    assert torch.allclose(out[-length:, -1].float(), dq[:, -1].float(), rtol=1e-2, atol=1e-3)
    exact_delta = (o.float() * do.float()).sum(-1)[:, -1]
    assert torch.allclose(delta[-1, -length:], exact_delta, rtol=1e-4)

    out = strict.far((T, H, E), fp16)
    other = strict.far((T, H, E), fp16)
    inputs = [far_rotated_q, far_rotated, far_v, far_do, far_lse, delta, *tables]
    arguments = [*inputs, plan, out, other, scale, norm, *sizes]
    far_run(rotary_attention._dkv_kernel, (1, H), last_head, arguments, BM=16, BN=32)
    assert torch.equal(other[-length:, -1], dv[:, -1])
    assert torch.allclose(out[-length:, -1].float(), dk[:, -1].float(), rtol=1e-2, atol=1e-3)


# ---- what only a GPU takes: its launch tables, its branches, its matmul


GPUS = "sm_80", "sm_90", "sm_100", "gfx942"


@pytest.mark.parametrize("name", GPUS)
def test_the_launch_tables_of_gpus_give_the_same_numbers(name):
    checks.rms_norm_as_on(rms_norm, name)
    checks.rotary_attention_as_on(rotary_attention, name)


def test_tiles_of_any_size_belong_together():
    checks.tiles_divide(rotary_attention)
    checks.rotary_attention_with_other_tiles(rotary_attention)


def test_the_matmul_of_a_gpu_takes_its_operands_as_they_are():
    checks.add_product_on_a_gpu(cross_entropy)
    checks.padded_matrix(cross_entropy)


CAPABILITIES = {
    (8, 0): "sm_80",
    (8, 6): "sm_80",
    (8, 9): "sm_80",
    (9, 0): "sm_90",
    (10, 0): "sm_100",
    (12, 0): "sm_80",
}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_gpu_has_a_row_of_the_launch_tables(capability, monkeypatch):
    import kernels

    on_second = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    asked = []

    def of_device(device):
        asked.append(device)
        return capability

    monkeypatch.setattr(torch.cuda, "get_device_capability", of_device)
    monkeypatch.setattr(torch.version, "hip", None)
    name = kernels.arch(on_second)
    assert name == CAPABILITIES[capability]
    assert name in rotary_attention.LAUNCH
    assert name in rms_norm.PROGRAMS
    assert asked == [on_second.device]
    monkeypatch.setattr(torch.version, "hip", "6")
    assert kernels.arch(on_second) == "gfx942"


def test_a_kernel_starts_on_the_gpu_that_holds_its_tensors(monkeypatch):
    import kernels

    entered = []

    @contextlib.contextmanager
    def device(which):
        entered.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    on_second = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    with kernels.on_device_of(on_second):
        assert entered == [on_second.device]
    with kernels.on_device_of(torch.zeros(1)):
        assert entered == [on_second.device]


# Faults that only a GPU's path shows: (kernel file, what stands there, what is put there, check).
PLANTED = {
    "more keys read at a time than queries owned": (
        "rotary_attention",
        '"sm_90": ((64, 64, 4, 3)',
        '"sm_90": ((64, 128, 8, 2)',
        lambda m: checks.rotary_attention_as_on(m, "sm_90"),
    ),
    "a plan that serves blocks of another size": (
        "rotary_attention",
        "if BN != BM:",
        "if BN == 0:",
        checks.rotary_attention_with_other_tiles,
    ),
    "a matrix that is not transposed": (
        "cross_entropy",
        "torch.addmm(dmatrix_WD, dz_rW.t(),",
        "torch.addmm(dmatrix_WD, dz_rW,",
        checks.add_product_on_a_gpu,
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_on_a_gpus_path_is_seen_on_a_cpu(fault):
    kernel, before, after, check = PLANTED[fault]
    source = mutants.source_of(kernel)
    assert source.count(before) == 1
    name = "planted_" + "_".join(fault.split())
    module, path = mutants.load(source.replace(before, after), name)
    os.unlink(path)
    with checks.kernels_on(module), pytest.raises((AssertionError, IndexError, RuntimeError)):
        check(module)


# ---- PyTorch's side


def small_inputs(name, device):
    """[(operator, its arguments)] for every operator of a kernel file."""

    def leaf(*shape):
        return torch.randn(*shape, device=device, requires_grad=True)

    def value(*shape):
        return torch.randn(*shape, device=device)

    if name == "rms_norm":
        return [
            (rms_norm.rms_norm_op, (leaf(5, 24), None, leaf(24), 1e-5)),
            (rms_norm.rms_norm_op, (leaf(5, 24), leaf(5, 24), leaf(24), 1e-5)),
            (rms_norm.rms_norm_bwd_op, (value(5, 24), value(24), value(5), value(5, 24), None)),
        ]
    if name == "swiglu":
        return [
            (swiglu.swiglu_op, (leaf(5, 24), leaf(5, 24))),
            (swiglu.swiglu_bwd_op, (value(5, 24), value(5, 24), value(5, 24))),
        ]
    if name == "rotary_attention":
        T, *tables = checks.packing([3, 5], 1, 32, device)
        inputs = (leaf(T, 4, 32), leaf(T, 2, 32), leaf(T, 2, 32))
        q, k, v = (x.detach() for x in inputs)
        return [
            (rotary_attention.rotary_attention_op, (*inputs, *tables)),
            (rotary_attention.rotary_attention_bwd_op, (q, k, v, *tables, q, value(4, T), q)),
        ]
    assert name == "cross_entropy", f"no inputs of {name}"
    labels = torch.tensor([1, 2, 3], device=device)
    weights = torch.tensor([1.0, 0, 0.1], device=device)
    rows = torch.tensor([0, 2], device=device)
    operator = cross_entropy.linear_cross_entropy_op
    backward = cross_entropy.linear_cross_entropy_bwd_op
    dloss = torch.tensor(0.5, device=device)
    return [
        (operator, (leaf(3, 8), leaf(20, 8), labels, weights, rows, True)),
        (operator, (value(3, 8), value(20, 8), labels, weights, rows, False)),
        (backward, (value(3, 8), value(20, 8), dloss, fp32)),
    ]


@pytest.mark.parametrize("name", MODULES)
def test_opcheck(name, device):
    for op, args in small_inputs(name, device):
        torch.library.opcheck(op, args, rtol=1e-4, atol=1e-5)


def small_block(device):
    """A block of the model, one head of 32, with random parameters."""
    from model import Block, Config

    torch.manual_seed(0)
    block = Block(Config(64, 96, 1, 2, 1))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return block.to(device)


def test_six_packings_make_one_graph():
    """Other numbers of tokens and conversations in every batch: the compiler takes neither for a
    constant, forward and backward."""
    from torch._dynamo.utils import counters

    block = small_block("cpu")
    torch._dynamo.reset()
    counters.clear()
    f = torch.compile(block.compute, dynamic=True, fullgraph=True, backend="aot_eager")
    for lengths in ([3, 9], [5, 9], [7, 20], [1, 30, 4], [11, 2], [6, 6, 6, 6]):
        T, *tables = checks.packing(lengths, 1, 32)
        x = torch.randn(T, 64, requires_grad=True)
        f(x, *tables).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_ten_blocks_share_one_graph(recompute, monkeypatch):
    """As `train.py --compile` builds them: torch would give up on the ninth of as many graphs."""
    from torch._dynamo.utils import counters

    from model import Config
    from recipe import TrainConfig
    from train import build

    compile_as_ever = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, dynamic: compile_as_ever(f, dynamic=dynamic, backend="eager")
    )
    run = TrainConfig(dtype="float32", recompute=recompute, compile=True, lr=1e-3)
    config = Config(64, 96, 10, 2, 1, vocab_size=50)
    model, _, _ = build(run, config, torch.device("cpu"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)

    torch._dynamo.reset()
    counters.clear()
    for lengths in ([3, 9], [5, 9]):
        T, *tables = checks.packing(lengths, 1, 32)
        x = torch.randn(T, 64, requires_grad=True)
        for block in model.model.layers:
            x = block(x, *tables)
        x.sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_a_block_compiles_in_one_graph(device):
    """fullgraph=True, forward and backward, with every kind of recomputation: the same numbers as
    eager."""
    block = small_block(device)
    T, *tables = checks.packing([3, 9], 1, 32, device)
    x = torch.randn(T, 64, device=device)
    backend = "inductor" if device == "cuda" else "aot_eager"

    def run(f):
        leaf = x.clone().requires_grad_()
        y = f(leaf, *tables)
        block.zero_grad()
        y.square().sum().backward()
        q_grad = block.self_attn.q_proj.weight.grad
        norm_grad = block.post_attention_layernorm.weight.grad
        return [y.detach(), leaf.grad, q_grad, norm_grad]

    results = []
    for recompute in RECOMPUTE:
        block.recompute = recompute
        results.append(run(block))
        results.append(run(torch.compile(block, fullgraph=True, backend=backend)))
        torch._dynamo.reset()
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_model_on_kernels_equals_model_on_references(monkeypatch, device):
    """A whole forward and backward pass: every kernel in its place, with the arguments that
    model.py gives."""
    from model import Config, Model

    torch.manual_seed(0)
    model = Model(Config(64, 96, 2, 2, 1, vocab_size=50))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.to(device)
    T, _, _, cu_seqlens = checks.packing([3, 9, 20], 2, 32, device)
    tokens = torch.arange(T, device=device) % 50
    weights = torch.rand(T, device=device)
    weights[-2:] = 0
    positions = torch.cat([torch.arange(n) for n in (3, 9, 20, 2)]).to(device)

    def run():
        model.zero_grad()
        loss, *_ = model(tokens, positions, cu_seqlens, tokens.roll(-1), weights)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    on_kernels = run()
    for module in MODULES.values():
        monkeypatch.setattr(module, "on_gpu", lambda x: False)
    on_references = run()
    for a, b in zip(on_kernels, on_references, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_wrong_arguments_are_refused():
    x = torch.randn(4, 2, 32)
    hidden = x[0]
    matrix = x[1]
    labels = torch.zeros(2).long()
    weights = torch.ones(2)
    _, cos, sin, cu_seqlens = checks.packing([4], 0, 32)
    wrong = [
        (rms_norm.rms_norm, (hidden, torch.ones(31))),
        (rms_norm.rms_norm, (hidden, torch.ones(32).half())),
        (rms_norm.rms_norm, (hidden, torch.ones(32), 1e-5, x[1, :1])),
        (swiglu.swiglu, (x, x[:1])),
        (swiglu.swiglu, (x, x.half())),
        (rotary_attention.rotary_attention, (x, x[:, :1], x, cos, sin, cu_seqlens)),
        (rotary_attention.rotary_attention, (x, x, x, cos, sin[:, :3], cu_seqlens)),
        (rotary_attention.rotary_attention, (x, x, x.half(), cos, sin, cu_seqlens)),
        (rotary_attention.rotary_attention, (x, x, x, cos.half(), sin.half(), cu_seqlens)),
        (rotary_attention.rotary_attention, (x, x, x, cos, sin, cu_seqlens.long())),
        (cross_entropy.linear_cross_entropy, (hidden, matrix[:, :5], torch.zeros(2), weights)),
        (cross_entropy.linear_cross_entropy, (hidden, matrix.half(), labels, weights)),
        (cross_entropy.linear_cross_entropy, (hidden, matrix, labels[[0, 0, 0]], torch.ones(3))),
        (cross_entropy.linear_cross_entropy, (hidden, matrix, labels, weights.bfloat16())),
    ]
    names = "^(rms_norm|swiglu|rotary_attention|linear_cross_entropy): "
    for function, arguments in wrong:
        with pytest.raises(ValueError, match=names):
            function(*arguments)


def test_another_head_size_takes_the_reference_and_says_so_once():
    q = torch.randn(4, 2, 48)
    _, *tables = checks.packing([4], 0, 48)
    reference = rotary_attention.rotary_attention_ref(q, q, q, *tables)
    with pytest.warns(UserWarning, match="head size 48") as warned:
        for _ in range(2):
            o = rotary_attention.rotary_attention(q, q, q, *tables)
            assert torch.equal(o, reference)
    assert len(warned) == 1


# ---- ahead of time


@pytest.mark.parametrize("name", MODULES)
def test_every_dot_names_its_precision(name):
    tree = ast.parse((ROOT / "kernels" / f"{name}.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    dots = [node for node in calls if getattr(node.func, "attr", "") == "dot"]
    assert len(dots) == (9 if name == "rotary_attention" else 0)
    for dot in dots:
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in dot.keywords}
        assert named.get("input_precision") in ("ieee", "tf32x3"), ast.unparse(dot)


def compiled(*words):
    out, _ = call("-m", "kernels.compile", *words)
    lines = out.splitlines()
    assert lines[-1].endswith(" 0 failed"), out
    return lines[:-1]


def test_kernels_compile_ahead_of_time():
    """LLaMA-2 7B's shapes in bf16 for the four architectures; the whole table is in the long
    run."""
    lines = compiled("--dtype", "bf16", "--shapes", "1")
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        of_arch = [line for line in lines if line.startswith(arch)]
        assert len(of_arch) >= 12
        attention = [line for line in of_arch if "rotary" in line]
        matmuls = [line for line in attention if re.search(" _(fwd|dq|dkv)_kernel ", line)]
        assert len(matmuls) == 3
        for line in matmuls:
            tensor_core_instructions = int(line.split()[-2])
            assert tensor_core_instructions > 0


@pytest.mark.long
def test_every_kernel_compiles_at_every_shape_class():
    assert len(compiled()) > 500


def test_the_report_fails_what_it_should():
    out, _ = call("tests/compile_probe.py")
    loop, branch, fine, hint, tf32, spill = out.splitlines()
    for line in (loop, branch):
        assert "32-bit product reaches an address" in line
    assert fine == "fine "
    assert hint == "hint "
    assert "plain TF32" in tf32
    assert " spills" in spill.partition("FAILED")[2]


def machine_code(*words):
    """Labels, branches ("b:.L" goes to .L) and so many other instructions, as nvdisasm prints them
    and as LLVM does."""
    nvidia = []
    amd = []
    for word in words:
        if isinstance(word, int):
            nvidia += ["        /*0a30*/                   FADD R2, R2, R3 ;"] * word
            amd += ["        v_add_f32_e32 v2, v2, v3"] * word
        elif word.startswith("b:"):
            nvidia += [f"        /*0a40*/              @!P0 BRA `({word[2:]}) ;"]
            amd += [f"        s_cbranch_vccnz {word[2:]}"]
        else:
            nvidia += [f"{word}:"]
            amd += [f"{word}:                                 ; %.lr.ph"]
    return "\n".join(nvidia), "\n".join(["; a comment", ".p2align 8", *amd])


def test_the_report_counts_instructions_of_inner_loops():
    waits = (".L_w", 1, "b:.L_w")
    outer = (".L_a", 10, ".L_b", 20, "b:.L_x", *waits, 19, "b:.L_b", 5, "b:.L_a", ".L_x")
    for code in machine_code(3, *outer, ".L_c", 30, "b:.L_c", ".L_e", "b:.L_e"):
        assert aot.instructions(code) == (94, [43, 31])
    for code in machine_code(7):
        assert aot.instructions(code) == (7, [])


# ---- the scripts, and the tests themselves


def test_bench_runs_every_case_on_a_cpu():
    out, _ = call("-m", "kernels.bench", "--check")
    lines = out.splitlines()
    assert {line.split()[0] for line in lines} == set(MODULES), out
    assert len(lines) == sum(len(case.SHAPES) for case in cases().values()), out
    for line in lines:
        assert "ours" in line, out
        assert "WORSE" not in line, out


def test_bench_times_nothing_without_a_gpu(tmp_path):
    sizes = ("--T", 64, "--D", 5120)
    out, _ = call("-m", "kernels.bench", "rms_norm", *sizes, "--out", tmp_path / "x.json")
    assert out.startswith("no CUDA GPU here: nothing was timed")
    assert not list(tmp_path.iterdir())


WRONG_FLAGS = (
    (["--T", 64], "name the kernel first"),
    (["swiglu", "--D", 64], "goes with rms_norm"),
    (["swiglu", "--T", 0], "positive"),
    (["rotary_attention", "--lengths", "long"], "sharegpt, short or a number"),
    (["rotary_attention", "--lengths", "00"], "sharegpt, short or a number"),
    (["rotary_attention", "--H", 3, "--G", 2], "multiple of --G"),
    (["layer_norm"], "choose from"),
    (["--show", "no.json"], "no such file"),
)


def test_bench_refuses_flags_that_do_not_belong_together(monkeypatch, capsys):
    from kernels import bench

    # the first as a user would, the others in this process: each start takes two seconds
    words, remedy = WRONG_FLAGS[0]
    _, error = call("-m", "kernels.bench", *words, ok=False)
    assert remedy in error
    for words, remedy in WRONG_FLAGS:
        monkeypatch.setattr(sys, "argv", ["kernels.bench", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            bench.main()
        assert stop.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert remedy in lines[0]


def test_bench_table_renders_a_results_file(tmp_path):
    row = {
        "kernel": "rms_norm",
        "shape": {"T": 4, "D": 8},
        "direction": "forward",
        "implementation": "ours",
        "milliseconds": 0.5,
        "unit": "bytes",
        "rate": 2e12,
        "share": 0.8,
        "error": 0.001,
        "worse": False,
        "peak_bytes": 3e6,
    }
    results = {
        "device": "a GPU",
        "torch": "2",
        "triton": "3",
        "command": "python -m kernels.bench",
        "absent": {"Liger": "ImportError"},
        "ceiling": {"bytes": 2.5e12, "flops": 7e14},
        "rows": [row],
    }
    (tmp_path / "bench.json").write_text(json.dumps(results))
    out, _ = call("-m", "kernels.bench", "--show", tmp_path / "bench.json")
    *_, shown, absent = out.splitlines()
    assert absent == "not run: Liger (ImportError)"
    cells = "| rms_norm | T=4 D=8 | forward | ours | 0.500 | 2.00 TB/s | 80% | 1.0e-03 | 3 |"
    assert shown == cells


def test_bench_says_so_where_it_cannot_draw(monkeypatch, tmp_path, capsys):
    from kernels import bench

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    bench.draw({"rows": []}, tmp_path / "bench.png")
    assert capsys.readouterr().out == "no picture: pip install matplotlib\n"
    # nor where --minutes were over before the first case
    monkeypatch.undo()
    bench.draw({"rows": []}, tmp_path / "bench.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ours", "torch"])
def test_head_and_loss_are_timed_on_a_cpu(name):
    """What --cpu does in a process of its own, at a small size."""
    from kernels import bench

    row = bench.cpu_loss((name, 0.6, (64, 32, 97)))
    assert row["seconds"] > 0
    assert row["peak_bytes"] >= 0


def test_nothing_is_begun_that_would_not_end_in_time(monkeypatch):
    now = 100.0
    monkeypatch.setattr("kernels.timing.time", SimpleNamespace(monotonic=lambda: now))
    clock = Clock(minutes=1)
    begun = []
    # the second piece takes 30 s, and after 45 s there is no time for another one as long
    for seconds in (10, 30, 5, 5):
        begun.append(clock.has_time())
        now += seconds
    assert begun == [True, True, False, False]
    assert clock.left == 10


def test_tune_tries_every_value_and_goes_on_where_none_runs(tmp_path, monkeypatch):
    out, _ = call("-m", "kernels.tune", "--check", "--out", tmp_path / "x.json")
    for case in cases().values():
        for knob in case.KNOBS:
            for value in knob.values:
                assert re.search(rf"{re.escape(knob.name)} +{re.escape(str(value))} +error", out), (
                    out
                )
    assert not list(tmp_path.iterdir())

    from kernels import tune

    def refuses(*_):
        raise RuntimeError("out of shared memory")

    case = tune.case_for(cases()["swiglu"], "cpu")
    monkeypatch.setattr(tune, "timed", refuses)
    rows = tune.tune_knob(case, cases()["swiglu"].KNOBS[0], 1, "cpu")
    assert {row["why_not"] for row in rows} == {"RuntimeError: out of shared memory"}
    assert not any(row.get("best") for row in rows)


def test_a_value_with_a_larger_error_is_not_the_best(monkeypatch):
    """However fast it is."""
    from kernels import tune

    case = tune.case_for(cases()["swiglu"], "cpu")
    knob = cases()["swiglu"].KNOBS[0]
    errors = iter([1e-3, 0.5, 1e-3, 1e-3, 1e-3])
    times = iter([3.0, 1.0, 2.0, 4.0, 5.0])
    monkeypatch.setattr(tune, "errors_of", lambda *_: [next(errors)])

    def seconds_of(functions, runs, device):
        return {name: Times(x, x, x) for name, x in zip(functions, [next(times), 0.0])}

    monkeypatch.setattr(tune, "seconds_of", seconds_of)
    rows = tune.tune_knob(case, knob, 1, "cpu")
    assert [row.get("best", False) for row in rows] == [False, False, True, False, False]
    assert rows[1]["why_not"] == "error 5.0e-01"


def test_a_knob_reads_what_it_turns():
    """On the rows of every GPU; and what is to be pasted names it."""
    for case in cases().values():
        for knob in case.KNOBS:
            for arch in ("sm_80", "sm_90", "sm_100"):
                before = knob.read(arch)
                for value in knob.values:
                    knob.turn(arch, value)
                    assert knob.read(arch) == value
                knob.turn(arch, before)
                module = sys.modules[case.__name__.replace(".cases", "")]
                assert eval(knob.place(arch), vars(module)) == before


def test_make_gpu_tries_its_four_parts_without_a_result():
    words = ["make", "-n", "gpu_check", "gpu_bench", "gpu_tune", "gpu_step", "CHECK=1", "VENV="]
    printed = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    lines = printed.replace("\\\n", " ").splitlines()
    # under `make test` make also says into which folder it goes
    commands = [line for line in lines if " -m " in line]
    assert len(commands) == 4
    assert all(command.endswith("--check") for command in commands), printed


def survivors(jobs):
    """Mutants of the kernels that no check notices and that nobody has shown to be equivalent."""
    spawn = get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn, initializer=mutants.interpret) as pool:
        on_kernels = list(pool.map(mutants.fate, mutants.controls()))
        assert on_kernels == [None] * len(on_kernels), "the checks fail on the kernels themselves"
        killers = list(pool.map(mutants.fate, jobs))
    alive = [mutant.name for mutant, killer in zip(jobs, killers, strict=True) if killer is None]
    return [name for name in alive if name not in mutants.EQUIVALENT]


def test_a_sample_of_mutants_is_killed():
    jobs = mutants.all_mutants()
    assert len(jobs) >= 100
    assert not survivors(jobs[7::87])


@pytest.mark.long
def test_every_mutant_is_killed_or_equivalent():
    jobs = mutants.all_mutants()
    assert not survivors(jobs)
    names = {mutant.name for mutant in jobs}
    assert set(mutants.EQUIVALENT) <= names, "an entry of EQUIVALENT names no mutant"
