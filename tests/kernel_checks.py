"""What a kernel must satisfy, as functions of its module.

test_triton.py calls them on the kernels, mutants.py on broken ones. The rule for every output and
gradient:

    ||ours - ref|| <= 2 ||torch - ref|| + 4 eps ||ref||

ref is the plain definition in fp64, torch the file's own reference in the kernel's dtype. Where a
gradient vanishes, ||ref|| is the norm of the terms that cancel. Memory that an operator allocates
holds NaN until it is written.
"""

# T tokens, D width, U ffn width, V vocab, H query heads, G key-value heads, E head size, C = E / 2,
# L tokens of one conversation

import contextlib
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@contextlib.contextmanager
def kernels_on(module):
    """Send this module's calls to Triton on whatever device, in memory full of NaN.

    On a CPU, Triton is the interpreter.
    """
    on_gpu = module.on_gpu
    module.on_gpu = lambda x: True
    # this is what fills fresh memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        module.on_gpu = on_gpu
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def as_on(module, name):
    """Launch as on this GPU: its row of the launch tables, its branches. Nothing else changes."""
    arch = module.arch
    module.arch = lambda x: name
    try:
        yield
    finally:
        module.arch = arch


def close(what, ours, plain, ref, scale=None):
    """The rule of this file's docstring for what = (name, dtype)."""
    ours = in_fp64(ours)
    plain = in_fp64(plain)
    ref = in_fp64(ref)
    error = (ours - ref).norm().item()
    theirs = (plain - ref).norm().item()
    if scale is None:
        scale = ref.norm().item()
    eps = torch.finfo(what[1]).eps
    bound = 2 * theirs + 4 * eps * scale
    assert error <= bound, (
        f"{what}: error {error:.3e} above {bound:.3e} (plain torch: {theirs:.3e})"
    )


def in_fp64(x):
    return x.detach().double().cpu()


def fresh(shape, dtype, seed, device, strided=False, scale=1.0):
    """Random values, the same on every device and in every dtype up to rounding.

    strided: every other column of a wider tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    *rows, columns = shape
    if strided:
        columns *= 2
    x = torch.randn(*rows, columns, generator=generator) * scale
    x = x.to(dtype).to(device)
    return x[..., ::2] if strided else x


def gradients(f, inputs, upstream):
    """Outputs of f, then the gradients of its inputs for these upstream gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = f(*inputs)
    if not isinstance(outputs, tuple):
        outputs = (outputs,)
    found = torch.autograd.grad(outputs, inputs, upstream)
    return [*(x.detach() for x in outputs), *found]


def same_bits(ours, again):
    for a, b in zip(ours, again, strict=True):
        assert torch.equal(a, b), "the same inputs gave other bits"


def compare(names, dtype, kernel, plain, exact, inputs, upstream, scales=None):
    """Outputs and gradients of the kernel against fp64, no worse than the plain version's.

    On a GPU also: the same bits twice. scales: {name: ||ref||} where a gradient vanishes.
    """
    ours = gradients(kernel, inputs, upstream)
    theirs = gradients(plain, inputs, upstream)
    if inputs[0].is_cuda:
        same_bits(ours, gradients(kernel, inputs, upstream))
    inputs64 = [x.double() for x in inputs]
    upstream64 = [x.double() for x in upstream]
    ref = gradients(exact, inputs64, upstream64)
    scales = scales or {}
    for name, a, b, c in zip(names, ours, theirs, ref, strict=True):
        close((name, dtype), a, b, c, scales.get(name))
    return ours


# ---- rows


def norm64(h_TD, w_D):
    return w_D * h_TD / (h_TD.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def rms_norm(m, dtype, T, D, residual=True, strided=False, seed=0, device="cpu"):
    x_TD = fresh((T, D), dtype, seed, device, strided)
    r_TD = fresh((T, D), dtype, seed + 1, device, strided)
    w_D = fresh((D,), dtype, seed + 2, device, strided)
    dy_TD = fresh((T, D), dtype, seed + 3, device, strided)
    dh_TD = fresh((T, D), dtype, seed + 4, device, strided)

    def exact(x, w, r=None):
        if r is None:
            return norm64(x, w)
        return norm64(x + r, w), x + r

    def ours(x, w, r=None):
        return m.rms_norm(x, w, 1e-5, r)

    def plain(x, w, r=None):
        return m.rms_norm_ref(x, w, 1e-5, r)

    names = ("y", "dx", "dw")
    inputs = (x_TD, w_D)
    upstream = [dy_TD]
    h_TD = x_TD
    if residual:
        names = ("y", "h", "dx", "dw", "dresidual")
        inputs = (x_TD, w_D, r_TD)
        upstream = [dy_TD, dh_TD]
        h_TD = x_TD + r_TD
    scales = {}
    # y = w sign(h) but for eps: dx is the difference of two numbers that are all but equal
    if D == 1:
        g_TD = w_D.double() * dy_TD.double()
        scales["dx"] = (g_TD / (h_TD.double().square() + 1e-5).sqrt()).norm().item()
        scales["dresidual"] = scales["dx"]
    return compare(names, dtype, ours, plain, exact, inputs, upstream, scales)


def rms_norm_as_on(m, name):
    """The programs of a GPU's backward pass, more than rows; fewer of them for wide rows."""
    with as_on(m, name):
        rms_norm(m, torch.float32, 5, 48)
        rms_norm(m, torch.bfloat16, 2, 4104, residual=False)


def swiglu64(gate_TU, up_TU):
    return gate_TU / (1 + (-gate_TU).exp()) * up_TU


def swiglu(m, dtype, T, U, strided=False, seed=0, device="cpu"):
    gate_TU = fresh((T, U), dtype, seed, device, strided, scale=3.0)
    up_TU = fresh((T, U), dtype, seed + 1, device, strided, scale=3.0)
    dy_TU = fresh((T, U), dtype, seed + 2, device, strided)
    names = ("y", "dgate", "dup")
    inputs = [gate_TU, up_TU]
    return compare(names, dtype, m.swiglu, m.swiglu_ref, swiglu64, inputs, [dy_TU])


# ---- attention


def packing(lengths, padding, E, device="cpu"):
    """(T, cos_TC, sin_TC, cu_seqlens) of conversations of these lengths, then rows of padding."""
    ends = [0, *itertools.accumulate(lengths)]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in (*lengths, padding)])
    wavelength = 10000 ** (torch.arange(0, E, 2).double() / E)
    angle_TC = positions[:, None].double() / wavelength
    cos_TC = angle_TC.cos().float().to(device)
    sin_TC = angle_TC.sin().float().to(device)
    return len(positions), cos_TC, sin_TC, cu_seqlens.to(device)


def plan(m, lengths, padding):
    """_plan's blocks of 32 rows: each once, the most work first, then the slots left over."""
    BM = 32
    T, _, _, cu_seqlens = packing(lengths, padding, 32)
    found = m._plan(cu_seqlens, T, BM).tolist()
    blocks = []
    for n, length in enumerate([*lengths, padding]):
        blocks += [[n, row] for row in range(0, length, BM)]
    blocks.sort(key=lambda block: (-block[1], block[0]))
    left_over = [[-1, 0]] * (len(found) - len(blocks))
    assert found == blocks + left_over, "plan"


def turn64(x_TAE, cos_TC, sin_TC):
    cos_T1C = cos_TC.double()[:, None]
    sin_T1C = sin_TC.double()[:, None]
    lo_TAC, hi_TAC = x_TAE.chunk(2, -1)
    turned_lo_TAC = lo_TAC * cos_T1C - hi_TAC * sin_T1C
    turned_hi_TAC = hi_TAC * cos_T1C + lo_TAC * sin_T1C
    return torch.cat([turned_lo_TAC, turned_hi_TAC], -1)


def attention64(q_THE, k_TGE, v_TGE, cos_TC, sin_TC, cu_seqlens):
    """The definition in fp64, a conversation at a time."""
    group = q_THE.shape[1] // k_TGE.shape[1]
    q_THE = turn64(q_THE, cos_TC, sin_TC)
    k_THE = turn64(k_TGE, cos_TC, sin_TC).repeat_interleave(group, 1)
    v_THE = v_TGE.repeat_interleave(group, 1)
    pieces = []
    ends = cu_seqlens.tolist()
    for a, b in zip(ends, ends[1:]):
        s_HLL = torch.einsum("ihe,jhe->hij", q_THE[a:b], k_THE[a:b]) / q_THE.shape[-1] ** 0.5
        later_LL = torch.ones(b - a, b - a, dtype=torch.bool, device=s_HLL.device).triu(1)
        p_HLL = s_HLL.masked_fill(later_LL, -torch.inf).softmax(-1)
        pieces.append(torch.einsum("hij,jhe->ihe", p_HLL, v_THE[a:b]))
    pieces.append(torch.zeros_like(q_THE[ends[-1] :]))
    return torch.cat(pieces)


def rotary_attention(
    m, dtype, lengths, padding, H, G, E, strided=False, seed=0, device="cpu", scale=1.0,
):  # fmt: skip
    T, *tables = packing(lengths, padding, E, device)
    q_THE = fresh((T, H, E), dtype, seed, device, strided, scale)
    k_TGE = fresh((T, G, E), dtype, seed + 1, device, strided, scale)
    v_TGE = fresh((T, G, E), dtype, seed + 2, device, strided)
    do_THE = fresh((T, H, E), dtype, seed + 3, device, strided)
    if strided:
        tables = [torch.stack([x, x], -1)[..., 0] for x in tables]
    scales = {}
    # one key: p = 1 and ds = dp - delta = 0, the difference of two equal numbers
    if max(lengths, default=1) == 1:
        v_THE = v_TGE.double().repeat_interleave(H // G, 1)
        k_THE = k_TGE.double().repeat_interleave(H // G, 1)
        dp_TH1 = (do_THE.double() * v_THE).sum(-1, keepdim=True) / E**0.5
        scales["dq"] = (dp_TH1 * k_THE).norm().item()
        scales["dk"] = (dp_TH1 * q_THE.double()).norm().item()

    def on_tables(f):
        return lambda q, k, v: f(q, k, v, *tables)

    ours = on_tables(m.rotary_attention)
    plain = on_tables(m.rotary_attention_ref)
    exact = on_tables(attention64)
    names = ("o", "dq", "dk", "dv")
    inputs = (q_THE, k_TGE, v_TGE)
    results = compare(names, dtype, ours, plain, exact, inputs, [do_THE], scales)
    for x in results:
        assert (x[T - padding :] == 0).all(), "a row of padding is not zero"
    return results


def attention_blindness(m, dtype, lengths, H, G, E, seed=0, device="cpu"):
    """Other values in one conversation: no bit changes in the others' outputs and gradients."""
    T, *tables = packing(lengths, 3, E, device)
    heads = (H, G, G, H)
    values = [fresh((T, A, E), dtype, seed + i, device) for i, A in enumerate(heads)]
    changed = [x.clone() for x in values]
    middle = len(lengths) // 2
    a = sum(lengths[:middle])
    b = a + lengths[middle]
    for i, x in enumerate(changed):
        x[a:b] = fresh((b - a, *x.shape[1:]), dtype, seed + 9 + i, device) * 30
        # and padding may hold anything
        x[T - 3 :] = torch.nan

    def run(q, k, v, do):
        return gradients(lambda *x: m.rotary_attention(*x, *tables), (q, k, v), [do])

    for before, after in zip(run(*values), run(*changed)):
        assert torch.equal(before[:a], after[:a]), "a conversation saw a later one"
        assert torch.equal(before[b:], after[b:]), "a conversation saw an earlier one"
        assert not torch.equal(before[a:b], after[a:b])


def rotation(m, A, device="cpu"):
    """_rotate of so many heads, by the programs that share a row, each with BA of them."""
    T, cos_TC, sin_TC, _ = packing([5], 2, 32, device)
    x_TAE = fresh((T, A, 32), torch.float32, 0, device)
    ours = m._rotate(x_TAE, cos_TC, sin_TC)
    plain = m.rotate(x_TAE, cos_TC, sin_TC)
    exact = turn64(x_TAE.double(), cos_TC, sin_TC)
    close(("rotated", torch.float32), ours, plain, exact)


def rotary_attention_as_on(m, name):
    """A GPU's tiles: conversations of several blocks, and the tiles of fp32 and of small heads."""
    with as_on(m, name):
        rotary_attention(m, torch.bfloat16, [150, 67], 5, 1, 1, 64)
        rotary_attention(m, torch.float32, [37], 3, 1, 1, 32)


def rotary_attention_with_other_tiles(m):
    """Three kernels, three sizes of block: no plan serves two of them."""
    name = "three sizes"
    tiles = ((64, 16, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1))
    m.LAUNCH[name] = tiles
    try:
        with as_on(m, name):
            rotary_attention(m, torch.bfloat16, [70, 33], 5, 1, 1, 64)
    finally:
        del m.LAUNCH[name]


def tiles_divide(m):
    """The rows read at a time divide the rows owned: the tiles before the diagonal have no mask."""
    for table in (*m.LAUNCH.values(), m.LAUNCH_FP32):
        for BM, BN, _warps, _stages in table:
            assert BM % BN == 0, f"{BN} rows read at a time, of {BM} owned"


# ---- the loss


def loss_inputs(dtype, T, D, V, weights, seed, device, scale=1.0, strided=False):
    """(hidden_TD, matrix_VD, labels_T, weights_T)."""
    hidden_TD = fresh((T, D), dtype, seed, device, strided, scale)
    matrix_VD = fresh((V, D), dtype, seed + 1, device, strided, D**-0.5 * 3)
    labels_T = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(seed + 2))
    labels_T = labels_T.to(device)
    # some are right
    logits_tV = hidden_TD[::3].double() @ matrix_VD.double().T
    labels_T[::3] = logits_tV.argmax(-1)
    if weights is None:
        which = torch.randint(0, 3, (T,), generator=torch.Generator().manual_seed(seed + 3))
        weights = torch.tensor([0.0, 0.1, 1.0])[which]
    return hidden_TD, matrix_VD, labels_T, weights.to(device)


def loss64(inputs, upstream):
    """[loss, nll_T, dhidden_TD, dmatrix_VD] in fp64, on the CPU: on a GPU several tests share the
    memory that these need."""
    hidden, matrix, labels_T, weights_T = inputs
    leaves = [x.detach().double().requires_grad_() for x in (hidden, matrix)]
    nll_T = F.cross_entropy(leaves[0] @ leaves[1].T, labels_T, reduction="none")
    rows = weights_T != 0
    loss = (weights_T.double() * nll_T)[rows].sum()
    upstream = torch.tensor(upstream, dtype=torch.double, device=loss.device)
    found = torch.autograd.grad(loss, leaves, upstream)
    return [in_fp64(x) for x in (loss, torch.where(rows, nll_T, 0), *found)]


def loss_of(f, inputs, upstream):
    """[loss, nll_T, correct_T, dhidden_TD, dmatrix_VD]."""
    hidden, matrix, labels_T, weights_T = inputs
    leaves = [x.detach().requires_grad_() for x in (hidden, matrix)]
    outputs = f(*leaves, labels_T, weights_T)
    upstream = torch.tensor(upstream, device=hidden.device)
    found = torch.autograd.grad(outputs[0], leaves, upstream)
    return [*(x.detach() for x in outputs), *found]


@contextlib.contextmanager
def chunks_of(m, rows, V, dtype):
    """Chunks of so many rows of logits, on every device; None leaves the module's own size."""
    keep = m.CHUNK_BYTES
    if rows:
        row_bytes = -(-V // 64) * 64 * dtype.itemsize
        m.CHUNK_BYTES = dict.fromkeys(keep, rows * row_bytes)
    try:
        yield
    finally:
        m.CHUNK_BYTES = keep


def linear_cross_entropy(
    m, dtype, T, D, V, weights=None, chunk_rows=None,
    upstream=0.37, scale=1.0, strided=False, seed=0, device="cpu",
):  # fmt: skip
    inputs = loss_inputs(dtype, T, D, V, weights, seed, device, scale, strided)
    ref = loss64(inputs, upstream)
    with chunks_of(m, chunk_rows, V, dtype):
        ours = loss_of(m.linear_cross_entropy, inputs, upstream)
        plain = loss_of(m.linear_cross_entropy_ref, inputs, upstream)
        # twice on a GPU: the same bits, also in the mode that training runs in
        if ours[0].is_cuda:
            torch.use_deterministic_algorithms(False, warn_only=True)
            same_bits(ours, loss_of(m.linear_cross_entropy, inputs, upstream))
            torch.use_deterministic_algorithms(True, warn_only=True)

    loss, nll_T, correct_T, dhidden_TD, dmatrix_VD = ours
    left_out = inputs[3] == 0
    assert all(x.isfinite().all() for x in ours), "not finite"
    assert (nll_T[left_out] == 0).all(), "a row without a weight has a loss"
    assert (dhidden_TD[left_out] == 0).all(), "a row without a weight has a gradient"
    plain_correct_T = plain.pop(2)
    # bf16: two logits of a row may round to one number
    most = 1 if dtype == torch.bfloat16 else 0
    assert correct_T.shape == plain_correct_T.shape
    assert (correct_T != plain_correct_T).sum() <= most, "correct differs"
    found = (loss, nll_T, dhidden_TD, dmatrix_VD)
    names = ("loss", "nll", "dhidden", "dmatrix")
    for name, a, b, c in zip(names, found, plain, ref, strict=True):
        close((name, dtype), a, b, c)
    return ours


def columns_beyond_the_vocabulary(m):
    """The softmax reads no logit beyond V, and leaves 0 there: the matmuls take all S columns.

    The logits are far below 0, where exp(0 - max) would be infinite.
    """
    V = 97
    z_rS = fresh((3, 128), torch.float32, 0, "cpu") - 200
    expected_rV = z_rS[:, :V].clone()
    z_rS[:, V:] = torch.nan
    labels_r = torch.tensor([0, 96, 50])
    weights_r = torch.tensor([1.0, 0.1, 2.0])
    # of what is masked afterwards
    with np.errstate(over="ignore"):
        nll_r, correct_r = m.softmax_gradient(z_rS, labels_r, weights_r, V)
    expected = m.softmax_gradient_ref(expected_rV, labels_r, weights_r, V)
    assert torch.allclose(nll_r, expected[0], rtol=1e-5)
    assert torch.equal(correct_r, expected[1])
    assert torch.allclose(z_rS[:, :V], expected_rV, rtol=1e-4, atol=1e-6)
    assert (z_rS[:, V:] == 0).all(), "a gradient beyond V"


def chunk_sizes(m):
    """The softmax sees a multiple of 128 rows, as many as the chunk's bytes hold but at least 128;
    at the end the rows that are left."""
    seen = []
    softmax = m.softmax_gradient

    def watched(z_rS, *rest):
        seen.append(tuple(z_rS.shape))
        return softmax(z_rS, *rest)

    inputs = loss_inputs(torch.float32, 300, 16, 97, torch.ones(300), 0, "cpu")
    m.softmax_gradient = watched
    try:
        for rows, expected in ((290, [256, 44]), (0.5, [128, 128, 44])):
            with chunks_of(m, rows, 97, torch.float32):
                m.linear_cross_entropy(*inputs)
            assert seen == [(chunk, 128) for chunk in expected]
            seen.clear()
    finally:
        m.softmax_gradient = softmax


def padded_matrix(m):
    """On a GPU M has a multiple of 64 rows, zeros behind its own; no copy where it has already."""
    matrix_VD = fresh((97, 8), torch.float32, 0, "cpu")
    matrix_WD = m._padded(matrix_VD)
    assert matrix_WD.shape == (128, 8)
    assert torch.equal(matrix_WD[:97], matrix_VD)
    assert (matrix_WD[97:] == 0).all()
    aligned = fresh((128, 8), torch.float32, 0, "cpu")
    assert m._padded(aligned) is aligned


class Products(TorchDispatchMode):
    """Notes every addmm under it: (operator, dtypes of the two matrices)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "addmm" in str(func):
            self.seen.append((str(func), args[1].dtype, args[2].dtype))
        return func(*args, **(kwargs or {}))


def add_product_on_a_gpu(m):
    """The lines of _add_product that only a GPU takes, on tensors without values: "meta" refuses
    shapes and dtypes as CUDA does. 16-bit matrices are multiplied as they are, summed in fp32."""
    for dtype in DTYPES.values():
        dmatrix_WD = torch.empty(128, 24, device="meta")
        # the logits' memory has more columns than are in use
        dz_rW = torch.empty(5, 192, dtype=dtype, device="meta")[:, :128]
        h_rD = torch.empty(5, 24, dtype=dtype, device="meta")
        with Products() as products:
            m._add_product(dmatrix_WD, dz_rW, h_rD)
        operator = "aten.addmm_.default" if dtype == torch.float32 else "aten.addmm.dtype_out"
        assert products.seen == [(operator, dtype, dtype)], products.seen
