"""kernels/hopper_attention.py without a Hopper: its very source run by strict_gluon.py, the same
source with planted faults, and its machine code."""

# T tokens, H query heads, G key-value heads, E head size

import itertools
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
SOURCE = (ROOT / "kernels" / "hopper_attention.py").read_text()
E = 128
# as many as give every program several blocks of the small cases here
PROGRAMS = 3

if __name__ != "__main__":
    import kernel_checks as checks
    import strict_gluon
    from conftest import call
    from strict_gluon import Deadlock, Misaligned, OutOfBounds, Race

    from kernels import rotary_attention


def read(source=SOURCE, programs=PROGRAMS):
    module = strict_gluon.read(source)
    module._programs = lambda x: programs
    return module


@pytest.fixture(scope="module")
def hopper():
    return read()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    strict_gluon.programs_seed = 0


# ---- the numbers


def problem(lengths, padding, H, G, dtype=torch.bfloat16, seed=0):
    """Inputs, and the plan as rotary_attention.py makes it."""
    T, cos, sin, cu_seqlens = checks.packing(lengths, padding, E)
    heads = (H, G, G, H)
    q, k, v, do = (checks.fresh((T, n, E), dtype, seed + i, "cpu") for i, n in enumerate(heads))
    plan = rotary_attention._plan(cu_seqlens, T, 128)
    tables = (cos, sin, cu_seqlens, plan)
    return SimpleNamespace(q=q, k=k, v=v, do=do, tables=tables, end=sum(lengths))


def forward(module, p):
    """(o, lse)."""
    cos, sin = p.tables[:2]
    return module.forward(p.q, rotary_attention.rotate(p.k, cos, sin), p.v, p.tables)


def backward(module, p, o, lse):
    """(dk, dv)."""
    cos, sin = p.tables[:2]
    q, k = (rotary_attention.rotate(x, cos, sin) for x in (p.q, p.k))
    delta = (o.float() * p.do.float()).sum(-1).T.contiguous()
    return module.dkv(q, k, p.v, p.do, lse, delta, p.tables)


def run(module, p):
    """o, lse, dk, dv."""
    o, lse = forward(module, p)
    return (o, lse, *backward(module, p, o, lse))


def plain(f, p, dtype=None):
    """o, dk, dv of a plain form of rotary attention."""
    q, k, v, do = (x if dtype is None else x.to(dtype) for x in (p.q, p.k, p.v, p.do))
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    o = f(*inputs, *p.tables[:3])
    _dq, dk, dv = torch.autograd.grad(o, inputs, do)
    return o.detach(), dk, dv


def lse64(p):
    """In units of log 2; 0 in padding."""
    cos, sin, cu_seqlens = p.tables[:3]
    group = p.q.shape[1] // p.k.shape[1]
    q, k = (rotary_attention.rotate(x, cos, sin).double() for x in (p.q, p.k))
    lse = torch.zeros(q.shape[1], len(q), dtype=torch.double)
    ends = cu_seqlens.tolist()
    for a, b in itertools.pairwise(ends):
        s = torch.einsum("ihe,jhe->hij", q[a:b], k[a:b].repeat_interleave(group, 1)) / E**0.5
        later = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)
        lse[:, a:b] = s.masked_fill(later, -math.inf).logsumexp(-1) / math.log(2)
    return lse


def check(module, p):
    """All results against fp64, no worse than plain torch in this dtype; padding is zero."""
    o, lse, dk, dv = run(module, p)
    ours = {"o": o, "dk": dk, "dv": dv}
    theirs = plain(rotary_attention.rotary_attention_ref, p)
    exact = plain(checks.attention64, p, torch.double)
    for (name, x), y, z in zip(ours.items(), theirs, exact, strict=True):
        checks.close((name, p.q.dtype), x, y, z)
        assert (x[p.end :] == 0).all(), f"{name}: padding is not zero"
    assert (lse[:, p.end :] == 0).all()
    assert (lse - lse64(p)).abs().max() < 2e-3


CASES = {
    "many ends": ((1, 130, 0, 300), 3, 4, 2),
    "whole blocks, no padding": ((128, 256), 0, 2, 2),
    "a block of padding": ((64, 65), 200, 2, 1),
    "two keys, and one group of four": ((2, 191), 64, 4, 1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_numbers(hopper, case):
    check(hopper, problem(*case))


def test_numbers_in_fp16(hopper):
    check(hopper, problem((130, 63), 5, 2, 1, torch.float16))


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_numbers_do_not_depend_on_slots_programs_or_order(stages):
    p = problem((257, 70), 9, 2, 1)
    first = run(read(), p)
    module = read(programs=(1, 5, 132)[stages - 1])
    module.FWD_STAGES = stages
    module.DKV_STAGES = stages
    strict_gluon.programs_seed = stages
    for x, y in zip(first, run(module, p), strict=True):
        assert torch.equal(x, y)


def test_only_padding_and_an_empty_conversation(hopper):
    p = problem((0,), 70, 2, 1)
    for x in run(hopper, p):
        assert (x == 0).all()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_conversation_sees_no_other_not_even_nan(hopper, which):
    """Other values, then NaN, in one conversation and in padding: no bit changes in the others."""
    lengths = (70, 129, 64)
    p = problem(lengths, 40, 2, 1)
    before = run(hopper, p)
    a = sum(lengths[:which])
    b = a + lengths[which]
    for poison in (30.0, math.nan, math.inf):
        changed = SimpleNamespace(**vars(p))
        for name in ("q", "k", "v", "do"):
            x = getattr(p, name).clone()
            x[a:b] *= poison
            x[p.end :] = math.nan
            setattr(changed, name, x)
        others = [t for t in range(len(p.q)) if not a <= t < b]
        for i, (x, y) in enumerate(zip(before, run(hopper, changed), strict=True)):
            # lse is [H, T], all others begin with T
            x, y = (x.T, y.T) if i == 1 else (x, y)
            assert torch.equal(x[others], y[others])
            assert not torch.equal(x[a:b], y[a:b])


@pytest.mark.long
def test_numbers_of_many_shapes_and_orders():
    draw = torch.Generator().manual_seed(0)

    def pick(values):
        return values[int(torch.randint(len(values), (1,), generator=draw))]

    lengths = (0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 256, 400)
    for seed in range(60):
        module = read(programs=pick((1, 2, 3, 5, 132)))
        module.FWD_STAGES = pick((1, 2, 3))
        module.DKV_STAGES = pick((1, 2, 3))
        strict_gluon.programs_seed = seed
        conversations = [2, *(pick(lengths) for _ in range(pick((0, 1, 2, 3))))]
        dtype = pick((torch.bfloat16, torch.float16))
        H, G = pick(((1, 1), (2, 1), (4, 2)))
        check(module, problem(conversations, pick((0, 3, 64, 200)), H, G, dtype, seed))


# ---- planted faults: the source with one change each must raise an error or give other bits


def exchanged(spaces, first, second):
    """(old, new) words: two statements on lines after one another, in the other order."""
    between = "\n" + spaces * " "
    return first + between + second, second + between + first


WAIT_S = "b_s = warpgroup_mma_wait(1, deps=(b_s,))"
WAIT_O = "b_o = warpgroup_mma_wait(0, deps=(b_o,))"
WAIT_DK = "b_dv, b_dk = warpgroup_mma_wait(0, deps=(b_dv, b_dk))"
FREE_K = "mbarrier.arrive(k_free.index(slot), count=1)"
FREE_V = "mbarrier.arrive(v_free.index(before), count=1)"
FREE_STEP = "mbarrier.arrive(free.index(slot), count=1)"

# (what, the place: words after which the change is made, the old words, the new words)
FAULTS = (
    # forward: who waits for what
    ("no wait for free keys", "_fwd_producer", "mbarrier.wait(k_free", "(k_free"),
    ("no wait for free values", "_fwd_producer", "mbarrier.wait(v_free", "(v_free"),
    ("no wait for free queries", "_fwd_producer", "mbarrier.wait(q_free", "(q_free"),
    ("washed before it lands", "_fwd_producer", "mbarrier.wait(landed", "(landed"),
    ("no wait for q", "_fwd_consumer", "mbarrier.wait(q_full", "(q_full"),
    ("no wait for diagonal keys", "_attend", "mbarrier.wait(k_full", "(k_full"),
    ("no wait for keys", "# the others", "mbarrier.wait(k_full", "(k_full"),
    ("no wait for values", "# the others", "mbarrier.wait(v_full", "(v_full"),
    ("no wait for the last values", "last = step", "mbarrier.wait(v_full", "(v_full"),
    # phases
    (
        "keys free, other phase",
        "_fwd_producer",
        "k_free.index(slot), phase ^ 1",
        "k_free.index(slot), phase",
    ),
    (
        "values free, other phase",
        "_fwd_producer",
        "v_free.index(slot), phase ^ 1",
        "v_free.index(slot), phase",
    ),
    ("values, next phase", "# the others", "((i - 1) // STAGES)", "(i // STAGES)"),
    ("last values, next phase", "last = step", "(last // STAGES)", "((last + 1) // STAGES)"),
    ("q, first phase", "_fwd_consumer", "turn & 1", "0"),
    ("washed tiles not counted", "_fwd_producer", "washed += 1", "washed += 0"),
    ("steps forgotten by a consumer", "_fwd_consumer", "step += count", "step += 0"),
    ("blocks forgotten by the producer", "_fwd_producer", "turn += 1", "turn += 0"),
    # releases
    (
        "values free while they are read",
        "# the others",
        *exchanged(8, WAIT_O, FREE_V),
    ),
    (
        "q free while it is read",
        "_attend",
        "# the others",
        "mbarrier.arrive(q_free, count=1)\n    # the others",
    ),
    (
        "values of the loop never free",
        "# the others",
        FREE_V,
        "",
    ),
    ("last values never free", "last = step", "mbarrier.arrive(v_free.index(slot), count=1)", ""),
    ("diagonal keys never free", "_attend", FREE_K, ""),
    ("q never free", "# no product reads q", "mbarrier.arrive(q_free, count=1)", ""),
    (
        "keys free by one consumer",
        "_fwd_kernel",
        "k_free = _barriers(STAGES, 2)",
        "k_free = _barriers(STAGES, 1)",
    ),
    (
        "values free by one consumer",
        "_fwd_kernel",
        "v_free = _barriers(STAGES, 2)",
        "v_free = _barriers(STAGES, 1)",
    ),
    # products in flight
    (
        "scores used in flight",
        "# the others",
        "mma_wait(1, deps=(b_s,))",
        "mma_wait(2, deps=(b_s,))",
    ),
    (
        "diagonal scores used in flight",
        "_attend",
        "mma_wait(0, deps=(b_s,))",
        "mma_wait(1, deps=(b_s,))",
    ),
    ("output used in flight", "# the others", WAIT_O, ""),
    ("output stored in flight", "last = step", WAIT_O, ""),
    # stores before wgmma
    ("q: no fence", "_rotate", "fence_async_shared()", ""),
    ("q: no barrier", "_rotate", "part_barrier()", ""),
    (
        "q: barrier, then fence",
        "_rotate",
        *exchanged(4, "fence_async_shared()", "part_barrier()"),
    ),
    ("washed: no fence", "_hand_over", "fence_async_shared()", ""),
    ("washed: no barrier", "_hand_over", "part_barrier()", ""),
    # washing
    ("values not washed", "_fwd_producer", "_wash(", "("),
    ("values handed over unwashed", "_fwd_producer", "v_full.index(STAGES)", "v_full.index(slot)"),
    ("a row too few washed", "_wash", "range(valid, rows)", "range(valid + 1, rows)"),
    ("a row too many washed", "_wash", "range(valid, rows)", "range(valid - 1, rows)"),
    (
        "left halves alone washed",
        "_wash",
        "half_rows.index(rows + r).store",
        "half_rows.index(r).store",
    ),
    # what is copied, and which work is done
    ("half the bytes announced", "_fetch", "nbytes", "nbytes // 2"),
    (
        "keys from a column in mid-boundary",
        "_fwd_producer",
        "_fetch(d_k, row, column",
        "_fetch(d_k, row, column + 4",
    ),
    (
        "values a row late",
        "_fwd_producer",
        "_fetch(d_v, row, column, s_v.index(slot), v_full",
        "_fetch(d_v, row + 1, column, s_v.index(slot), v_full",
    ),
    ("one q for both consumers", "_fwd_consumer", "s_q = s_q.index(half)", "s_q = s_q.index(0)"),
    (
        "no mask on the diagonal",
        "_attend",
        "o_m[:, None] >= o_n[None, :]",
        "o_m[:, None] >= 0 * o_n[None, :]",
    ),
    ("padding not written", "_fwd_consumer", "if n == N:", "if n == N + 1:"),
    ("work left out", "_work", "programs - 1 - i", "i // 2"),
    # dk and dv: who waits for what
    ("no wait for a free step", "_dkv_producer", "mbarrier.wait(free", "(free"),
    ("no wait for free k and v", "_dkv_producer", "mbarrier.wait(kv_free", "(kv_free"),
    ("step washed before it lands", "_dkv_producer", "mbarrier.wait(lands", "(lands"),
    ("no wait for k and v", "_dkv_consumer", "mbarrier.wait(kv_full", "(kv_full"),
    ("no wait for a step", "_gather", "mbarrier.wait(full", "(full"),
    ("a step, other phase", "_gather", "(this // STAGES)", "((this + 1) // STAGES)"),
    ("k and v, first phase", "_dkv_consumer", "turn & 1", "0"),
    ("washed steps not counted", "_dkv_producer", "washed += 1", "washed += 0"),
    # releases
    (
        "a step free while it is read",
        "_gather",
        *exchanged(8, WAIT_DK, FREE_STEP),
    ),
    (
        "k and v free while they are read",
        "_dkv_consumer",
        "b_dk, b_dv =",
        "mbarrier.arrive(kv_free.index(half), count=1)\n            b_dk, b_dv =",
    ),
    ("k and v never free", "_dkv_consumer", "mbarrier.arrive(kv_free.index(half), count=1)", ""),
    (
        "a step free by one consumer",
        "_dkv_kernel",
        " free = _barriers(STAGES, 2)",
        " free = _barriers(STAGES, 1)",
    ),
    ("k alone waited for", "_dkv_kernel", "kv_full = _barriers(2, 2)", "kv_full = _barriers(2, 1)"),
    # products in flight
    (
        "dk used in flight",
        "_gather",
        "mma_wait(0, deps=(b_dv, b_dk))",
        "mma_wait(1, deps=(b_dv, b_dk))",
    ),
    (
        "dv used in flight",
        "_gather",
        "mma_wait(0, deps=(b_dv, b_dk))",
        "mma_wait(2, deps=(b_dv, b_dk))",
    ),
    ("dp used in flight", "_gather", "mma_wait(1, deps=(b_dp,))", "mma_wait(2, deps=(b_dp,))"),
    (
        "transposed scores used in flight",
        "_gather",
        "mma_wait(1, deps=(b_s,))",
        "mma_wait(2, deps=(b_s,))",
    ),
    # washing
    ("queries not washed", "_dkv_producer", "_wash(s_q", "(s_q"),
    ("do not washed", "_dkv_producer", "_wash(s_do", "(s_do"),
    ("a row too many of lse and delta", "_copy", "mask=o_x < length", "mask=o_x < length + 1"),
    (
        "lse and delta: no barrier",
        "_dkv_producer",
        "_hand_over(full.index(slot), 1)",
        "mbarrier.arrive(full.index(slot), count=1)",
    ),
    (
        "lse and delta: not waited for",
        "_dkv_kernel",
        "full = _barriers(STAGES + 1, 2)",
        "full = _barriers(STAGES + 1, 1)",
    ),
    ("a step handed over unwashed", "_dkv_producer", "STAGES if ragged else slot", "slot"),
    # what is copied, and which rows count
    ("half of a step's bytes announced", "_dkv_producer", "2 * d_q", "1 * d_q"),
    ("delta of the first head", "_dkv_producer", "delta + i_h", "delta + i_g"),
    ("second diagonal tile not masked", "_gather", "ahead < 64", "ahead < 0"),
    (
        "second head's diagonal not masked",
        "_gather",
        "ahead = -half * 64\n    return",
        "ahead = 64\n    return",
    ),
)
# changes that nothing can show, and why
EQUIVALENT = (
    (
        "keys free while they are read",
        "# the others",
        *exchanged(8, WAIT_S, FREE_K),
        "before the producer comes to this slot again it waits for a slot of values that both "
        "consumers leave later than that product",
    ),
)


def begin(place):
    """Where a function of that name begins, or where those words stand."""
    return SOURCE.index(f"def {place}(" if place.startswith("_") else place)


def planted(place, old, new):
    """The source with that one change."""
    at = SOURCE.index(old, begin(place))
    return SOURCE[:at] + new + SOURCE[at + len(old) :]


class Faults:
    """A case in which every wait, phase, row and head counts, with its right results."""

    def __init__(self):
        lengths = 260, 20, 130
        self.p = problem(lengths, 10, 2, 1)
        # the second conversation and padding are NaN, the others must not see it
        self.rows = [*range(260), *range(280, 410)]
        for x in (self.p.q, self.p.k, self.p.v, self.p.do):
            x[260:280] = math.nan
            x[410:] = math.nan
        self.rows += range(410, 420)
        self.results = run(read(programs=2), self.p)

    def caught(self, source, place):
        """What shows that the source is not the right one; None: nothing."""
        o, lse, dk, dv = self.results
        in_dkv = begin(place) > SOURCE.index("# ---- dk and dv")
        for seed in range(4):
            strict_gluon.programs_seed = seed
            module = read(source, programs=2)
            try:
                if in_dkv:
                    ours = backward(module, self.p, o, lse)
                else:
                    ours = forward(module, self.p)
            except (Race, Deadlock, OutOfBounds, Misaligned) as error:
                return f"{type(error).__name__}: {error}"
            if not in_dkv:
                ours = ours[0], ours[1].T
            right = (dk, dv) if in_dkv else (o, lse.T)
            for x, y in zip(ours, right, strict=True):
                if not torch.equal(x[self.rows], y[self.rows]):
                    return "other bits"
        return None


@pytest.fixture(scope="module")
def faults():
    torch.use_deterministic_algorithms(True, warn_only=True)
    return Faults()


def test_every_planted_fault_is_caught(faults):
    survived = []
    for what, place, old, new in FAULTS:
        if faults.caught(planted(place, old, new), place) is None:
            survived.append(what)
    assert survived == []


def test_what_is_called_equivalent_is(faults):
    for what, place, old, new, _reason in EQUIVALENT:
        assert faults.caught(planted(place, old, new), place) is None, what


# ---- the machine code, from an ahead-of-time compile in a process of its own: here Triton
# interprets


def compiled(dtype, H, G):
    """{kernel's name: the compiled kernel} for sm_90."""
    import triton

    from kernels import compile as ahead
    from kernels import hopper_attention as module

    done = {}
    launch = triton.JITFunction.run

    def divert(self, *args, grid, warmup, **kwargs):
        done[self.fn.__name__] = launch(self, *args, grid=grid, warmup=True, **kwargs)

    triton.runtime.driver.set_active(ahead._Driver("sm_90"))
    triton.JITFunction.run = divert
    module._programs = lambda x: 132
    T = 256
    q, do = (torch.zeros(T, H, E, dtype=dtype) for _ in range(2))
    k, v = (torch.zeros(T, G, E, dtype=dtype) for _ in range(2))
    cos, sin = (torch.zeros(T, E // 2) for _ in range(2))
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32)
    tables = (cos, sin, cu_seqlens, torch.zeros(4, 2, dtype=torch.int32))
    lse = torch.zeros(H, T)
    module.forward(q, k, v, tables)
    module.dkv(q, k, v, do, lse, lse, tables)
    return done


def innermost_loops(sass):
    """(all instructions, those of each loop that holds all of a consumer's products or a producer's
    copies, and not much more)."""
    instructions = []
    labels = {}
    for line in sass.splitlines():
        label = re.match(r"(\.L\w+):", line.strip())
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if label:
            labels[label[1]] = len(instructions)
        elif instruction:
            instructions.append(instruction[1])

    spans = []
    for end, text in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*`\((\.L\w+)\)", text)
        if branch and labels[branch[1]] <= end:
            body = instructions[labels[branch[1]] : end + 1]
            consumes = sum("HGMMA" in x for x in body) >= 16
            produces = any("UTMALDG" in x for x in body)
            if (consumes or produces) and len(body) < 600:
                spans.append((labels[branch[1]], end))

    def holds_another(span):
        return any(span != other and span[0] <= other[0] and other[1] <= span[1] for other in spans)

    return [instructions[a : b + 1] for a, b in spans if not holds_another((a, b))]


def early_releases(body):
    """How many slots a loop releases when not all threads have passed their last wait."""
    early = 0
    met = False
    for text in body:
        if "DEPBAR" in text:
            met = False
        if "BAR.SYNC" in text:
            met = True
        if "SYNCS.ARRIVE" in text and not met:
            early += 1
    return early


def facts(kernel):
    from kernels import compile as ahead

    registers, sass = ahead.disassemble(kernel.asm["cubin"])
    loops = []
    for body in innermost_loops(sass):
        loop = {"instructions": len(body)}
        loop["products"] = sum("HGMMA" in x for x in body)
        loop["copies"] = sum("UTMALDG" in x for x in body)
        loop["spills"] = sum(bool(re.search(r"\b(LDL|STL)\b", x)) for x in body)
        # a barrier of the 128 threads of a warpgroup names their number
        loop["wide barriers"] = sum("BAR.SYNC" in x and ", 0x80" not in x for x in body)
        loop["early releases"] = early_releases(body)
        loops.append(loop)
    hands_out_registers = "USETMAXREG" in sass
    return {
        "registers": registers,
        "hands out registers": hands_out_registers,
        "shared": kernel.metadata.shared,
        "loops": loops,
    }


SHAPES = [
    ("bfloat16", 4, 4),
    pytest.param("bfloat16", 4, 1, marks=pytest.mark.long),
    pytest.param("float16", 4, 2, marks=pytest.mark.long),
]


@pytest.mark.parametrize("dtype, H, G", SHAPES)
def test_machine_code(dtype, H, G):
    pytest.importorskip("triton.experimental.gluon")
    printed, _ = call("tests/test_hopper.py", dtype, H, G)
    for name, found in json.loads(printed).items():
        # 168 for all warps at the start; then they are handed out anew
        assert found["registers"] == 168 and found["hands out registers"]
        assert found["shared"] <= 227 * 1024

        consumers = [loop for loop in found["loops"] if loop["products"]]
        producers = [loop for loop in found["loops"] if loop["copies"]]
        assert len(consumers) == 2 and len(producers) >= 1
        forward = name == "_fwd_kernel"
        for loop in consumers:
            assert loop["products"] == (16 if forward else 24)
            assert loop["wide barriers"] == 0
            assert loop["early releases"] == 0
            # one or two numbers are put aside where dk, dv mask the diagonal: in one or two of a
            # head's tiles
            assert loop["spills"] <= (0 if forward else 4)
        assert all(loop["spills"] == 0 for loop in producers)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    dtype_name, H, G = sys.argv[1:]
    kernels = compiled(getattr(torch, dtype_name), int(H), int(G))
    print(json.dumps({name: facts(kernel) for name, kernel in kernels.items()}))
