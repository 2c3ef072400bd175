"""From conversations to batches: packing.py, and its peers in paper/packing.py."""

import heapq
import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import packing
from data import PrepareConfig, Prepared, prepare
from packing import COST_7B, ahead, flat, pack, plan
from paper.cancel import ROWS, Corpus, pulls, shares
from paper.packing import CAPACITY, KINDS, lengths_of, multipack, sharegpt_like
from recipe import TrainConfig, all_steps


def real_file(assets, folder):
    """The real conversations, prepared."""
    names = ("mixed_quality.jsonl", "sharegpt_format.json")
    files = tuple(str(assets / "conversations" / name) for name in names)
    tokenizer = str(assets / "llama2" / "tokenizer.model")
    path = str(folder / "x.safetensors")
    prepare(PrepareConfig(files, tokenizer, path, "Model: GPT-4=GPT4:1.0,*=GPT3:0.1"))
    return Prepared(path)


# ---- plan


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 400), st.integers(1, 6), st.integers(0, 3))
def test_plan_uses_every_conversation_once_within_capacity(seed, n, M, epoch):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 101, n)
    class_ids = rng.integers(0, 3, n)
    args = lengths, class_ids, np.ones(n), seed, epoch, 250 * M + 3, 250, (1.0, 0.01)
    steps = plan(*args)
    assert sorted(flat(steps).tolist()) == list(range(n))
    assert all(len(step) <= M for step in steps)
    for micro_batch in micro_batches_of(steps):
        assert 0 < lengths[micro_batch].sum() <= 250

    # a second time it is the same
    again = plan(*args)
    assert [len(step) for step in steps] == [len(step) for step in again]
    for one, other in zip(micro_batches_of(steps), micro_batches_of(again)):
        assert np.array_equal(one, other)


def micro_batches_of(steps):
    return list(itertools.chain.from_iterable(steps))


def measured(steps, lengths, class_ids, weight_sums, M, cost):
    """How even the steps are: (tokens, FLOPs, sum of length^2, expert's share).

    The first three are [steps, M], of each micro-batch. The last is [steps]: the expert's share of
    the step's weight, relative to its share of all weight.
    """
    tokens = np.zeros((len(steps), M))
    square = np.zeros((len(steps), M))
    share = np.zeros(len(steps))
    for s, step in enumerate(steps):
        for m, micro_batch in enumerate(step):
            n = lengths[micro_batch].astype(np.float64)
            tokens[s, m] = n.sum()
            square[s, m] = (n**2).sum()
        conversations = flat([step])
        experts = conversations[class_ids[conversations] == 0]
        share[s] = weight_sums[experts].sum() / weight_sums[conversations].sum()
    in_all = weight_sums[class_ids == 0].sum() / weight_sums.sum()
    return tokens, cost[0] * tokens + cost[1] * square, square, share / in_all


def uneven(load):
    """[steps]: the largest micro-batch over the mean one."""
    return load.max(1) / load.mean(1)


def is_permutation(conversations, n):
    return np.array_equal(np.sort(conversations), np.arange(n))


# CPU seconds of `calibrate` on a quiet machine: AMD with AVX-512, 2026-11-28
QUIET = 0.105


def calibrate():
    """CPU seconds of work like the planner's: a heap, and sorts of numpy."""
    began = time.process_time()
    heap = list(range(1000))
    for i in range(200_000):
        heapq.heapreplace(heap, heap[0] + i)
    for seed in range(10):
        np.lexsort(np.random.default_rng(seed).random((2, 50_000)))
    return time.process_time() - began


def allowed(seconds):
    """So many CPU seconds, or more where this machine is slower than the quiet one just now."""
    return seconds * max(1, calibrate() / QUIET)


LONG = [
    pytest.param(*case, marks=pytest.mark.long) for case in itertools.product((8, 16), range(6))
]


@pytest.mark.parametrize("M, seed", [(8, 0), (16, 1), *LONG])
def test_plan_of_70000_sharegpt_like_conversations(M, seed):
    """In micro-batches of 16,384 tokens: at most 2 steps above the bound, every rank equally busy,
    every step with its experts."""
    lengths, class_ids, weight_sums = sharegpt_like(70_000, seed)
    began = time.process_time()
    steps = plan(lengths, class_ids, weight_sums, seed, 0, M * 16_384, 16_384, COST_7B)
    seconds = time.process_time() - began
    assert is_permutation(flat(steps), 70_000)
    assert len(steps) <= -(-lengths.sum() // (M * 16_384)) + 2

    tokens, flops, square, share = measured(steps, lengths, class_ids, weight_sums, M, COST_7B)
    assert tokens.max() <= 16_384
    assert uneven(flops).mean() <= 1.001
    assert uneven(flops).max() <= 1.003
    assert uneven(square).mean() <= 1.02
    assert uneven(square).max() <= 1.06
    assert 0.98 <= share.min()
    assert share.max() <= 1.02
    assert seconds < allowed(1.5)  # 0.15 to 0.7 s when nothing else runs


@pytest.mark.parametrize(
    "n, low, high, M, most",
    [
        (65, 2500, 2500, 2, 33),
        (1100, 2500, 2500, 2, 550),
        (2080, 2500, 2500, 32, 65),
        (5000, 2100, 3900, 16, 313),
        (32, 4096, 4096, 8, 4),
        (1000, 4096, 4096, 8, 125),
        (1, 7, 7, 3, 1),
    ],
)
def test_plan_of_conversations_that_leave_gaps(n, low, high, M, most):
    """All above half a micro-batch, one fits in each; or all as long as one.

    There is no step more than that takes.
    """
    lengths = np.random.default_rng(0).integers(low, high + 1, n)
    steps = plan(lengths, np.arange(n) % 3, np.ones(n), 0, 0, M * 4096, 4096)
    assert is_permutation(flat(steps), n)
    assert len(steps) <= most


def test_plan_of_very_many_short_conversations():
    """Thousands in a micro-batch: the swaps look at some of them, and memory stays small."""
    n = 100_001
    lengths = np.append(np.random.default_rng(0).integers(10, 31, n - 1), 16_384)
    began = time.process_time()
    steps = plan(lengths, np.zeros(n, int), np.ones(n), 0, 0, 262_144, 16_384)
    assert time.process_time() - began < allowed(5)
    assert len(flat(steps)) == n
    assert len(steps) <= -(-lengths.sum() // 262_144) + 1


def test_plan_of_tight_micro_batches():
    """As long as the longest conversation.

    Dealing to single steps would fill 97%. Ours are fuller, and their classes less even.
    """
    lengths, class_ids, weight_sums = sharegpt_like(70_000, 0)
    steps = plan(lengths, class_ids, weight_sums, 0, 0, 32 * 4096, 4096, COST_7B)
    assert is_permutation(flat(steps), 70_000)
    tokens, _, _, share = measured(steps, lengths, class_ids, weight_sums, 32, COST_7B)
    assert tokens.max() <= 4096
    assert lengths.sum() / (len(steps) * 32 * 4096) >= 0.98
    assert 0.95 < share.min()
    assert share.max() < 1.05


def test_plan_of_the_real_file_and_of_50_conversations(assets, tmp_path):
    """6 steps of 262,144 tokens, the experts in proportion; 50 conversations are 1 or 2 steps."""
    file = real_file(assets, tmp_path)
    whole = np.arange(len(file))
    few = np.arange(50) * 100
    for rows, batch_tokens, micro_tokens, most, even in (
        (whole, 262_144, 16_384, 6, 0.01),
        (few, 262_144, 16_384, 1, 0.01),
        (few, 8192, 4096, 2, 0.05),
    ):
        args = file.lengths[rows], file.class_ids[rows].astype(int), file.weight_sums[rows]
        steps = plan(*args, 0, 0, batch_tokens, micro_tokens)
        assert is_permutation(flat(steps), len(rows))
        assert len(steps) <= most
        M = max(1, batch_tokens // micro_tokens)
        tokens, flops, _, share = measured(steps, *args, M, COST_7B)
        assert tokens.max() <= micro_tokens
        assert abs(share - 1).max() < even
        if rows is whole:
            assert uneven(flops).max() < 1.003

    # The public multipack drops nothing of it: its last step fills all 8 bins.
    steps = multipack(file.lengths, 8)
    assert len(steps) == 12
    assert is_permutation(flat(steps), 6130)


@pytest.mark.parametrize(
    "kind, micro_tokens, steps_are, most_tries",
    [
        ("bimodal", 16_384, 1099, 1),
        ("bimodal, with gaps", 4096, 1097, 1),
        ("bimodal, with gaps", 16_384, 1097, 1),
        ("constant", 4096, 2188, 1),
        pytest.param("bimodal", 4096, 1110, 3, marks=pytest.mark.long),
    ],
)
def test_plan_of_70000_lengths_of_two_kinds_or_one_is_fast(
    monkeypatch, kind, micro_tokens, steps_are, most_tries
):
    """Steps too few for the long conversations are not tried, and a try takes half a second.

    These took 16 tries and up to 26 s.
    """
    tries = []
    for name in ("plan_steps", "plan_groups"):
        original = getattr(packing, name)
        monkeypatch.setattr(packing, name, counted(original, tries))
    lengths, class_ids, weight_sums = lengths_of(kind, 70_000)
    M = 131_072 // micro_tokens
    began = time.process_time()
    steps = plan(lengths, class_ids, weight_sums, 0, 0, 131_072, micro_tokens, COST_7B)
    seconds = time.process_time() - began

    assert len(tries) <= most_tries
    assert seconds < allowed(3)  # 0.3 to 0.9 s when nothing else runs
    assert is_permutation(flat(steps), 70_000)
    assert len(steps) == pytest.approx(steps_are, abs=2)
    tokens, flops, _, share = measured(steps, lengths, class_ids, weight_sums, M, COST_7B)
    assert tokens.max() <= micro_tokens
    assert uneven(flops).mean() <= 1.02

    # The experts are spread about as evenly as whole conversations can be: with 64 conversations a
    # step, as they come, this would be from 0.2 to 1.6. The last step may be smaller.
    assert 0.8 <= share[:-1].min()
    assert share[:-1].max() <= 1.1


def counted(function, calls):
    """The function, which also adds an entry to `calls` each time."""

    def also(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return also


def test_fewest_steps_is_never_more_than_a_plan_has():
    """By hand: of 7 conversations above half a micro-batch each needs one; of 9 above a third, two
    share one."""

    def fewest(lengths, M):
        lengths = np.array(lengths)
        ones = np.ones(len(lengths), np.int64)
        return packing.fewest_steps(packing.Problem(lengths, ones, ones, 0, 0, M, 100, COST_7B))

    assert fewest([51] * 7 + [1] * 20, 2) == 4
    assert fewest([50] * 7 + [1] * 20, 2) == 2
    assert fewest([34] * 9, 1) == 5
    assert fewest([34] * 9 + [100] * 2, 1) == 6
    assert fewest([33] * 9, 1) == 3
    assert fewest([1], 8) == 1


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_plan_of_a_million_conversations(kind):
    lengths, class_ids, weight_sums = lengths_of(kind, 1_000_000)
    began = time.process_time()
    steps = plan(lengths, class_ids, weight_sums, 0, 0, 131_072, 16_384, COST_7B)
    assert time.process_time() - began < allowed(25)  # 6 to 12 s when nothing else runs
    assert is_permutation(flat(steps), 1_000_000)


def test_a_run_of_too_many_epochs_is_refused_before_they_are_planned():
    """Ten million epochs would be planned for days."""
    data = lengths_of("constant", 100)
    everything = np.arange(100)
    sizes = {"batch_tokens": 65_536, "micro_tokens": 16_384}
    for flag, message in (
        ({"epochs": 10_000_000}, r"--epochs 10,000,000 .* 100 conv.* at most --epochs 32258 or"),
        ({"steps": 10**9}, r"--steps 1,000,000,000, which is 200,000,000 .* or --steps 161290$"),
    ):
        began = time.process_time()
        with pytest.raises(ValueError, match=message):
            all_steps(data, everything, TrainConfig(**sizes, **flag), COST_7B)
        assert time.process_time() - began < allowed(1)
    steps, ends = all_steps(data, everything, TrainConfig(**sizes, steps=12), COST_7B)
    assert len(steps) == 12
    assert ends == [5, 10, 15]


def test_each_epoch_has_other_steps():
    data = sharegpt_like(5000, 0)
    first_steps = []
    for epoch in (0, 1):
        steps = plan(*data, 0, epoch, 131_072, 16_384)
        first_steps.append(set(flat(steps[:1]).tolist()))
    one, other = first_steps
    assert len(one & other) < len(one) / 2


def test_plan_refuses_what_has_no_plan():
    one = np.array([5]), np.array([0])
    with pytest.raises(ValueError, match="does not fit"):
        plan(*one, np.ones(1), 0, 0, 100, 4)
    with pytest.raises(ValueError, match="all 0"):
        plan(*one, np.zeros(1), 0, 0, 100, 10)
    with pytest.raises(ValueError, match="no conversation"):
        none = np.array([], int)
        plan(none, none, np.array([]), 0, 0, 100, 10)


def test_the_multipack_we_compare_with_is_the_public_one():
    """Its published figures on these lengths: 809 steps, where 801 is the bound, 31 dropped."""
    lengths = sharegpt_like(70_000, 0)[0]
    steps = multipack(lengths, 8)
    assert len(steps) == 809
    assert 70_000 - len(flat(steps)) == 31


def test_multipack_keeps_a_last_step_that_fills_all_bins_and_drops_another():
    full = np.full(8, CAPACITY)
    assert [len(step) for step in multipack(full, 4)] == [4, 4]
    assert [len(step) for step in multipack(full[:7], 4)] == [4]
    # as in the public code, one that is too long ends the epoch
    assert multipack(np.append(full, CAPACITY + 1), 9) == []


# ---- what a weighted loss is divided by


def test_shares_by_what_the_loss_is_divided_by():
    """By hand: an expert of 2 tokens and another of 3 in one micro-batch, and one of 15."""
    corpus = Corpus(
        lengths=np.array([2, 3, 15]),
        is_expert=np.array([True, False, False]),
        weight_sums=np.array([2.0, 0.3, 1.5]),
        supervised=np.array([2, 3, 15]),
    )
    step = [np.array([0, 1]), np.array([2])]
    expected = {
        ("step", None): 2 / 3.8,
        ("micro-batch, by tokens", None): 2 / 2.3 * 5 / 20,
        # each conversation by itself: the weights have cancelled
        ("micro-batch, by tokens", 1): 2 / 20,
        ("micro-batch", None): 2 / 2.3 / 2,
        ("micro-batch", 1): 1 / 3,
        ("conversation", None): 1 / 1.2,
        ("tokens", None): 2 / 20,
    }
    for (way, size), share in expected.items():
        row = shares(way, size, [step], corpus)
        assert row["share"] == row["low"] == row["high"] == pytest.approx(share), way
    assert shares("step", None, [step], corpus)["counts_as"] == pytest.approx(0.1)
    assert shares("micro-batch, by tokens", 1, [step], corpus)["counts_as"] == pytest.approx(1)


def test_pulls_are_the_gradients_of_the_losses_as_they_are_written():
    """LLaMA-Factory's v1 trainer: each micro-batch's (w * nll).sum() / w.sum(), times its tokens,
    over the step's. And the others, each as a loss."""
    rng = np.random.default_rng(0)
    lengths = np.array([4, 7, 3, 9, 2])
    weights = np.array([1, 0.1, 0.1, 1, 0.1])
    corpus = Corpus(lengths, weights == 1, weights * lengths, lengths)
    step = [np.array([3, 1]), np.array([0, 2, 4])]
    losses = {
        "step": lambda micros: (
            sum((w * nll).sum() for nll, w, _ in micros) / sum(w.sum() for _, w, _ in micros)
        ),
        "micro-batch, by tokens": lambda micros: (
            sum((w * nll).sum() / w.sum() * len(w) for nll, w, _ in micros) / lengths.sum()
        ),
        "micro-batch": lambda micros: sum((w * nll).sum() / w.sum() for nll, w, _ in micros) / 2,
        "conversation": lambda micros: (
            sum((w * nll / n).sum() for nll, w, n in micros) / weights.sum()
        ),
        "tokens": lambda micros: sum(nll.sum() for nll, _, _ in micros) / lengths.sum(),
    }
    assert losses.keys() == {way for way, _ in ROWS}
    for way, loss in losses.items():
        micros = []
        for micro in step:
            nll = torch.tensor(rng.random(lengths[micro].sum()), requires_grad=True)
            w = torch.tensor(np.repeat(weights[micro], lengths[micro]))
            micros.append((nll, w, torch.tensor(np.repeat(lengths[micro], lengths[micro]))))
        loss(micros).backward()
        for (nll, _, _), micro, pull in zip(micros, step, pulls(way, step, corpus)):
            by_conversation = np.split(nll.grad.numpy(), np.cumsum(lengths[micro])[:-1])
            assert np.allclose([g.sum() for g in by_conversation], pull), way


# ---- batches


@given(st.lists(st.integers(2, 9), min_size=1, max_size=6))
def test_label_and_weight_of_a_row_belong_to_the_next_token_of_its_conversation(lengths):
    rng = np.random.default_rng(sum(lengths))
    talks = []
    for n in lengths:
        tokens = rng.integers(0, 99, n).astype(np.int32)
        weights = rng.random(n) * (rng.random(n) > 0.5)
        talks.append((tokens, weights.astype(np.float32)))
    class_ids = np.arange(len(lengths)) % 3
    batch = pack(talks, class_ids)

    class_of_row = dict(zip(batch.rows_R.tolist(), batch.class_R.tolist()))
    t = 0
    for class_id, (tokens, weights) in zip(class_ids, talks):
        # the last token of a conversation predicts nothing
        labels = [*tokens[1:], 0]
        label_weights = [*weights[1:], 0]
        for i in range(len(tokens)):
            assert batch.tokens_T[t] == tokens[i]
            assert batch.positions_T[t] == i
            assert batch.labels_T[t] == labels[i]
            assert batch.weights_T[t] == label_weights[i]
            if batch.weights_T[t]:
                assert class_of_row[t] == class_id
            t += 1
    assert t == len(batch.tokens_T)
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(lengths)]
    assert batch.max_seqlen == max(lengths)
    assert batch.rows_R.tolist() == batch.weights_T.nonzero()[:, 0].tolist()


def test_ranks_share_a_steps_micro_batches_and_idle_exactly(toy):
    """On 1, 2, 4 and 8 ranks the same conversations form each step.

    A rank without a micro-batch gets tokens of weight 0.
    """
    from train import my_batches, rounds

    def tokens_of(batch):
        return batch.tokens_T.tolist()

    file = Prepared(toy / "train.safetensors")
    some = slice(0, 300)
    steps = plan(file.lengths[some], file.class_ids[some], file.weight_sums[some], 0, 0, 1280, 256)
    expected = []
    for step in steps:
        expected.append(sorted(tokens_of(file.batch(micro_batch)) for micro_batch in step))
    for world in (1, 2, 4, 8):
        batches_of = [list(my_batches(file, steps, rank, world)) for rank in range(world)]
        # every rank joins every collective
        assert len({len(batches) for batches in batches_of}) == 1
        at = 0
        for step, micro_batches in zip(steps, expected):
            until = at + rounds(step, world)
            batches = []
            for batches_of_rank in batches_of:
                batches += batches_of_rank[at:until]
            at = until
            busy = [b for b in batches if b.weights_T.any()]
            idle = [b for b in batches if not b.weights_T.any()]
            assert sorted(map(tokens_of, busy)) == micro_batches
            assert all(len(b.rows_R) == 0 for b in idle)
            assert all(len(b.tokens_T) == 2 for b in idle)


def test_ahead_hands_on_every_batch_and_every_error():
    batch = pack([(np.arange(3), np.ones(3))])
    assert [b is batch for b in ahead(iter([batch] * 5), pin=False)] == [True] * 5

    def broken():
        yield batch
        raise ValueError("the disk is gone")

    with pytest.raises(ValueError, match="the disk is gone"):
        list(ahead(broken(), pin=False))
