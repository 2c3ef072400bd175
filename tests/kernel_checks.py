"""What a kernel must satisfy, as functions of its module: test_kernels.py calls them on the kernels, mutants.py on broken ones.

The rule for every output and gradient: ||ours - ref|| <= 2 ||torch - ref|| + 4 eps ||ref||, ref the plain definition in fp64 and
torch the file's own reference in the kernel's dtype. Where a gradient vanishes, ||ref|| is the norm of the terms that cancel.
Memory that an operator allocates holds NaN until it is written.
"""

import contextlib

import torch
import torch.nn.functional as F

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@contextlib.contextmanager
def kernels_on(module):
    """Send this module's calls to Triton on whatever device (on a CPU that is the interpreter), in memory full of NaN."""
    on_gpu, module.on_gpu = module.on_gpu, lambda x: True
    torch.use_deterministic_algorithms(True, warn_only=True)  # this is what fills fresh memory
    try:
        yield
    finally:
        module.on_gpu = on_gpu
        torch.use_deterministic_algorithms(False)


def close(what, ours, plain, ref, scale=None):
    ours, plain, ref = (
        ours.detach().double().cpu(),
        plain.detach().double().cpu(),
        ref.detach().double().cpu(),
    )
    eps = torch.finfo(what[1]).eps
    error, theirs = (ours - ref).norm().item(), (plain - ref).norm().item()
    bound = 2 * theirs + 4 * eps * (ref.norm().item() if scale is None else scale)
    assert error <= bound, (
        f"{what}: error {error:.3e} above {bound:.3e} (plain torch: {theirs:.3e})"
    )


def fresh(shape, dtype, seed, device, strided=False, scale=1.0):
    """Random values, the same on every device and in every dtype up to rounding; strided: every other column of a wider tensor."""
    g = torch.Generator().manual_seed(seed)
    x = (
        (torch.randn(*shape[:-1], shape[-1] * (1 + strided), generator=g) * scale)
        .to(dtype)
        .to(device)
    )
    return x[..., ::2] if strided else x


def gradients(f, inputs, upstream):
    """Outputs of f, then the gradients of its inputs for these upstream gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = f(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, inputs, upstream)]


def compare(names, dtype, kernel, plain, exact, inputs, upstream, scales=None):
    """Outputs and gradients of the kernel against fp64, no worse than the plain version's; on a GPU, the same bits twice."""
    ours, theirs = gradients(kernel, inputs, upstream), gradients(plain, inputs, upstream)
    if inputs[0].is_cuda:
        assert all(torch.equal(a, b) for a, b in zip(ours, gradients(kernel, inputs, upstream))), (
            "the same inputs gave other bits"
        )
    ref = gradients(exact, [x.double() for x in inputs], [u.double() for u in upstream])
    for name, a, b, c in zip(names, ours, theirs, ref, strict=True):
        close((name, dtype), a, b, c, (scales or {}).get(name))
    return ours


def rms_norm(m, dtype, T, D, residual=True, strided=False, seed=0, device="cpu"):
    x, r = (fresh((T, D), dtype, seed + i, device, strided) for i in (0, 1))
    w = fresh((D,), dtype, seed + 2, device, strided)
    upstream = [fresh((T, D), dtype, seed + 3 + i, device, strided) for i in range(1 + residual)]
    norm64 = lambda h, w: w * h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    if residual:
        names, inputs = ("y", "h", "dx", "dw", "dresidual"), (x, w, r)
        exact = lambda x, w, r: (norm64(x + r, w), x + r)
        call = lambda f: lambda x, w, r: f(x, w, 1e-5, r)
    else:
        names, inputs, exact = ("y", "dx", "dw"), (x, w), norm64
        call = lambda f: lambda x, w: f(x, w, 1e-5)
    scales = {}
    # y = w sign(h) but for eps: dx is the difference of two numbers that are all but equal
    if D == 1:
        h = (x + r if residual else x).double()
        scales["dx"] = (
            (w.double() * upstream[0].double() / (h.square() + 1e-5).sqrt()).norm().item()
        )
        scales["dresidual"] = scales["dx"]
    return compare(
        names, dtype, call(m.rms_norm), call(m.rms_norm_ref), exact, inputs, upstream, scales
    )


def swiglu(m, dtype, T, F, strided=False, seed=0, device="cpu"):
    inputs = [fresh((T, F), dtype, seed + i, device, strided, scale=3.0) for i in (0, 1)]
    exact = lambda g, u: g / (1 + (-g).exp()) * u
    return compare(
        ("y", "dgate", "dup"),
        dtype,
        m.swiglu,
        m.swiglu_ref,
        exact,
        inputs,
        [fresh((T, F), dtype, seed + 2, device, strided)],
    )


def packing(lengths, padding, E, device="cpu"):
    """(T, cos_TC, sin_TC, cu_seqlens) of conversations of these lengths and rows of padding after them."""
    cu_seqlens = torch.tensor(
        [0, *torch.tensor(lengths, dtype=torch.long).cumsum(0).tolist()], dtype=torch.int32
    )
    positions = torch.cat([torch.arange(n) for n in (*lengths, padding)])
    angle = positions[:, None].double() / 10000 ** (torch.arange(0, E, 2).double() / E)
    return (
        len(positions),
        angle.cos().float().to(device),
        angle.sin().float().to(device),
        cu_seqlens.to(device),
    )


def attention64(q_THE, k_TGE, v_TGE, cos_TC, sin_TC, cu_seqlens):
    """The definition in fp64, a conversation at a time."""
    C = q_THE.shape[-1] // 2
    cos, sin = cos_TC.double()[:, None], sin_TC.double()[:, None]
    turn = lambda x: torch.cat(
        [x[..., :C] * cos - x[..., C:] * sin, x[..., C:] * cos + x[..., :C] * sin], -1
    )
    group = q_THE.shape[1] // k_TGE.shape[1]
    q, k, v = (
        turn(q_THE),
        turn(k_TGE).repeat_interleave(group, 1),
        v_TGE.repeat_interleave(group, 1),
    )
    pieces, ends = [], cu_seqlens.tolist()
    for a, b in zip(ends, ends[1:]):
        s = torch.einsum("ihe,jhe->hij", q[a:b], k[a:b]) / q.shape[-1] ** 0.5
        s = s.masked_fill(
            torch.ones(b - a, b - a, dtype=torch.bool, device=s.device).triu(1), -torch.inf
        )
        pieces.append(torch.einsum("hij,jhe->ihe", s.softmax(-1), v[a:b]))
    return torch.cat([*pieces, torch.zeros_like(q[ends[-1] :])])


def rotary_attention(m, dtype, lengths, padding, H, G, E, strided=False, seed=0, device="cpu"):
    T, *tables = packing(lengths, padding, E, device)
    q, k, v = (
        fresh((T, heads, E), dtype, seed + i, device, strided) for i, heads in enumerate((H, G, G))
    )
    do = fresh((T, H, E), dtype, seed + 3, device, strided)
    if strided:
        tables = [torch.stack([x, x], -1)[..., 0] for x in tables]
    scales = {}
    # one key: p = 1 and ds = dp - delta = 0, the difference of two equal numbers
    if max(lengths, default=1) == 1:
        dp = (do.double() * v.double().repeat_interleave(H // G, 1)).sum(-1, keepdim=True) / E**0.5
        scales = {
            "dq": (dp * k.double().repeat_interleave(H // G, 1)).norm().item(),
            "dk": (dp * q.double()).norm().item(),
        }
    call = lambda f: lambda q, k, v: f(q, k, v, *tables)
    results = compare(
        ("o", "dq", "dk", "dv"),
        dtype,
        call(m.rotary_attention),
        call(m.rotary_attention_ref),
        call(attention64),
        (q, k, v),
        [do],
        scales,
    )
    for x in results:
        assert (x[T - padding :] == 0).all(), "a row of padding is not zero"
    return results


def attention_blindness(m, dtype, lengths, H, G, E, seed=0, device="cpu"):
    """Other values in one conversation: no bit changes in the others' outputs and gradients."""
    T, *tables = packing(lengths, 3, E, device)
    values = [fresh((T, heads, E), dtype, seed + i, device) for i, heads in enumerate((H, G, G, H))]
    changed = [x.clone() for x in values]
    a = sum(lengths[: len(lengths) // 2])
    b = a + lengths[len(lengths) // 2]
    for i, x in enumerate(changed):
        x[a:b] = fresh((b - a, *x.shape[1:]), dtype, seed + 9 + i, device) * 30
        x[T - 3 :] = torch.nan  # and padding may hold anything
    run = lambda q, k, v, do: gradients(lambda *x: m.rotary_attention(*x, *tables), (q, k, v), [do])
    for before, after in zip(run(*values), run(*changed)):
        assert torch.equal(before[:a], after[:a]) and torch.equal(before[b:], after[b:]), (
            "a conversation saw another"
        )
        assert not torch.equal(before[a:b], after[a:b])


def loss_inputs(dtype, T, D, V, weights, seed, device, scale=1.0, strided=False):
    hidden = fresh((T, D), dtype, seed, device, strided, scale)
    weight = fresh((V, D), dtype, seed + 1, device, strided, D**-0.5 * 3)
    labels = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(seed + 2)).to(device)
    labels[::3] = (hidden.double() @ weight.double().T).argmax(-1)[::3]  # some are right
    if weights is None:
        weights = torch.tensor([0.0, 0.1, 1.0])[
            torch.randint(0, 3, (T,), generator=torch.Generator().manual_seed(seed + 3))
        ]
    return hidden, weight, labels, weights.to(device)


def linear_cross_entropy(
    m,
    dtype,
    T,
    D,
    V,
    weights=None,
    chunk_rows=None,
    upstream=0.37,
    scale=1.0,
    strided=False,
    seed=0,
    device="cpu",
):
    hidden, weight, labels, weights = loss_inputs(
        dtype, T, D, V, weights, seed, device, scale, strided
    )
    rows = weights != 0
    ref = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    nll64 = F.cross_entropy(ref[0] @ ref[1].T, labels, reduction="none")
    loss64 = (weights.double() * nll64)[rows].sum()
    grads64 = torch.autograd.grad(
        loss64, ref, torch.tensor(upstream, dtype=torch.double, device=device)
    )
    results = []
    keep = m.CHUNK_BYTES
    # twice on a GPU: the same bits, also in the mode that training runs in
    again = [m.linear_cross_entropy] * hidden.is_cuda
    for f in (m.linear_cross_entropy, m.linear_cross_entropy_ref, *again):
        torch.use_deterministic_algorithms(len(results) < 2, warn_only=True)
        if chunk_rows:
            m.CHUNK_BYTES = dict.fromkeys(keep, chunk_rows * (-(-V // 64) * 64) * dtype.itemsize)
        inputs = [x.detach().requires_grad_() for x in (hidden, weight)]
        loss, nll, correct = f(*inputs, labels, weights)
        m.CHUNK_BYTES = keep
        results.append(
            (
                loss,
                nll,
                correct,
                *torch.autograd.grad(loss, inputs, torch.tensor(upstream, device=device)),
            )
        )
    torch.use_deterministic_algorithms(True, warn_only=True)
    ours, plain = results[:2]
    assert all(torch.equal(a, b) for more in results[2:] for a, b in zip(ours, more)), (
        "the same inputs gave other bits"
    )
    assert all(x.isfinite().all() for x in ours), "not finite"
    assert (ours[1][~rows] == 0).all() and (ours[3][~rows] == 0).all(), (
        "a row without a weight has a loss or a gradient"
    )
    assert (
        torch.equal(ours[2], plain[2])
        or dtype == torch.bfloat16
        and (ours[2] != plain[2]).sum() <= 1
    ), "correct differs"
    for name, a, b, c in zip(
        ("loss", "nll", "dhidden", "dweight"),
        ours[:2] + ours[3:],
        plain[:2] + plain[3:],
        (loss64, torch.where(rows, nll64, 0), *grads64),
    ):
        close((name, dtype), a, b, c)
    return [x.detach() for x in ours]
