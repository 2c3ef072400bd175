"""Many conversations: the plan of the steps, the packed batch, batches made ahead."""

import bisect
import collections
import dataclasses
import heapq
import math
import queue
import threading
from dataclasses import dataclass

import numpy as np
import torch


def flat(steps):
    """All conversations of these steps, int64."""
    return np.concatenate([micro for step in steps for micro in step])


def deal(lengths, class_ids, weight_sums, groups, rng):
    """[N] the group of each conversation: class by class, the heaviest first, to the group that has least of the class.

    The largest class comes last and goes by tokens of all classes, so that the groups end equally long.
    """
    home, load = np.empty(len(lengths), np.int64), np.zeros(groups)
    classes = np.argsort(np.bincount(class_ids), kind="stable")
    for c in classes:
        mine = np.flatnonzero(class_ids == c)
        size, start = (lengths, load) if c == classes[-1] else (weight_sums, np.zeros(groups))
        # sizes within 2% count as equal, so that each epoch deals anew
        bucket = np.floor(np.log(np.maximum(size[mine], 1e-9)) * 50)
        mine = mine[np.lexsort((rng.random(len(mine)), -bucket))]
        heap = list(zip(start.tolist(), rng.permutation(groups).tolist(), range(groups)))
        heapq.heapify(heap)
        for i, x in zip(mine.tolist(), size[mine].tolist()):
            filled, tie, g = heap[0]
            heapq.heapreplace(heap, (filled + x, tie, g))
            home[i] = g
        load += np.bincount(home[mine], lengths[mine], groups)
    return home


def by_group(lengths, home, groups):
    """[groups, K] the conversations of each group, longest first, -1 behind them."""
    order, count = np.lexsort((-lengths, home)), np.bincount(home, minlength=groups)
    table = np.full((groups, count.max()), -1)
    table[home[order], np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)] = order
    return table


def emptiest_first(lengths, home, groups, bins):
    """[N] a bin for each conversation, the longest first, each to its group's emptiest; may overfill. All groups at once."""
    i_GK = by_group(lengths, home, groups)
    length_GK, load_GB, bin_GK = (
        np.where(i_GK >= 0, lengths[i_GK], 0),
        np.zeros((groups, bins)),
        np.empty_like(i_GK),
    )
    for k in range(i_GK.shape[1]):
        bin_GK[:, k] = load_GB.argmin(1)
        load_GB[np.arange(groups), bin_GK[:, k]] += length_GK[:, k]
    result = np.empty(len(lengths), np.int64)
    result[i_GK[i_GK >= 0]] = bin_GK[i_GK >= 0]
    return result


def best_fit(lengths, home, groups, bins, capacity):
    """[N] a bin for each conversation, the longest first, each to its group's fullest with room; None where one has none."""
    result = np.empty(len(lengths), np.int64)
    for members in by_group(lengths, home, groups).tolist():
        rooms = [(capacity, b) for b in range(bins)]  # ascending
        for i in members:
            if i >= 0:
                at = bisect.bisect_left(rooms, (lengths[i], -1))
                if at == len(rooms):
                    return None
                room, result[i] = rooms.pop(at)
                bisect.insort(rooms, (room - lengths[i], result[i]))
    return result


def spread(home, bins, class_ids, weight_sums, groups, group, M):
    """(step, micro-batch) of each conversation: a group's bins dealt to its steps, M each, so that classes end in proportion."""
    classes = class_ids.max() + 1
    weight_GBC = np.zeros((groups, group * M, classes))
    np.add.at(weight_GBC, (home, bins, class_ids), weight_sums)
    # shares of the group's class, so that rare ones count
    weight_GBC /= np.maximum(weight_GBC.sum(1, keepdims=True), 1e-30)
    order_GB, rows = np.argsort(-weight_GBC.max(2), axis=1), np.arange(groups)
    load_GSC, count_GS = np.zeros((groups, group, classes)), np.zeros((groups, group), np.int64)
    step_GB, micro_GB = np.empty_like(order_GB), np.empty_like(order_GB)
    for b in order_GB.T:
        uneven_GS = ((load_GSC + weight_GBC[rows, b][:, None]) ** 2 - load_GSC**2).sum(2)
        s = np.where(count_GS < M, uneven_GS, np.inf).argmin(1)
        step_GB[rows, b], micro_GB[rows, b] = s, count_GS[rows, s]
        load_GSC[rows, s] += weight_GBC[rows, b]
        count_GS[rows, s] += 1
    return home * group + step_GB[home, bins], micro_GB[home, bins]


def balance(lengths, step, micro, steps, M, capacity, cost):
    """[N] the micro-batches after swaps within each step that even out their cost and their sum(length^2).

    A round looks, in every step at once, at one micro-batch that is off and one that is off the other way, and makes the best
    of all swaps of a conversation (or an empty slot) of one with one of the other. Overfull micro-batches are mended first.
    """
    if M == 1:
        return micro
    i_SMQ = by_group(lengths, step * M + micro, steps * M).reshape(steps, M, -1)
    i_SMQ = np.concatenate([i_SMQ, np.full((steps, M, 1), -1)], 2)
    Q, rows = i_SMQ.shape[2], np.arange(steps)
    length_SMQ = np.where(i_SMQ >= 0, lengths[i_SMQ], 0).astype(np.float64)
    tokens_SM, square_SM = length_SMQ.sum(2), (length_SMQ**2).sum(2)
    mean_tokens, mean_square = np.maximum(tokens_SM.mean(1), 1), np.maximum(square_SM.mean(1), 1)
    mean_cost = cost[0] * mean_tokens + cost[1] * mean_square

    def badness(tokens, square):
        shape = (-1,) + (1,) * (tokens.ndim - 1)
        over = np.maximum(tokens / capacity - 1, 0)
        off_cost = (cost[0] * tokens + cost[1] * square) / mean_cost.reshape(shape) - 1
        off_square = square / mean_square.reshape(shape) - 1
        return 400 * off_cost**2 + off_square**2 + 1e6 * over

    for r in range(min(5 * M + 10, 400)):
        bad_SM = badness(tokens_SM, square_SM)
        tokens_off, square_off = (
            tokens_SM / mean_tokens[:, None] - 1,
            square_SM / mean_square[:, None] - 1,
        )
        a = bad_SM.argmax(1) if r % 3 else np.abs(tokens_off).argmax(1)
        opposite = (20 * tokens_off + square_off) * np.sign(tokens_off[rows, a])[:, None]
        b = opposite.argmin(1) if r % 2 else (a + 1 + r // 2 % (M - 1)) % M
        b = np.where(a == b, (b + 1) % M, b)
        # of many, some, by turns
        take = (
            np.unique(np.append((np.arange(48) * Q // 48 + r) % Q, Q - 1))
            if Q > 48
            else np.arange(Q)
        )
        l_a, l_b = length_SMQ[rows, a][:, take, None], length_SMQ[rows, b][:, None, take]
        give, give2 = l_a - l_b, l_a**2 - l_b**2  # [S, Q, Q]: what a loses to b by each swap
        at = lambda x_SM, m: x_SM[rows, m][:, None, None]
        after = badness(at(tokens_SM, a) - give, at(square_SM, a) - give2) + badness(
            at(tokens_SM, b) + give, at(square_SM, b) + give2
        )
        best = after.reshape(steps, -1).argmin(1)
        better = after.reshape(steps, -1)[rows, best] < bad_SM[rows, a] + bad_SM[rows, b] - 1e-12
        s, a, b, qa, qb = (
            rows[better],
            a[better],
            b[better],
            best[better] // len(take),
            best[better] % len(take),
        )
        for x_SM, g in ((tokens_SM, give), (square_SM, give2)):
            x_SM[s, a] -= g[s, qa, qb]
            x_SM[s, b] += g[s, qa, qb]
        qa, qb = take[qa], take[qb]
        for x in (i_SMQ, length_SMQ):
            x[s, a, qa], x[s, b, qb] = x[s, b, qb], x[s, a, qa]
    result, place = np.empty(len(lengths), np.int64), np.broadcast_to(np.arange(M)[:, None], (M, Q))
    result[i_SMQ[i_SMQ >= 0]] = np.broadcast_to(place, i_SMQ.shape)[i_SMQ >= 0]
    return result


def try_plan(lengths, class_ids, weight_sums, seed, epoch, groups, group, tight, M, capacity, cost):
    """The plan in `groups` groups of `group` steps, filled best fit if tight; None where the conversations do not fit."""
    home = deal(lengths, class_ids, weight_sums, groups, np.random.default_rng([seed, epoch]))
    if not tight:
        step, micro = home, emptiest_first(lengths, home, groups, M)
    else:
        micro = best_fit(lengths, home, groups, group * M, capacity)
        if micro is None:
            return None
        step, micro = spread(home, micro, class_ids, weight_sums, groups, group, M)
    micro = balance(lengths, step, micro, groups * group, M, capacity, cost)
    key = step * M + micro
    if np.bincount(key, lengths).max() > capacity:
        return None
    order, result = np.argsort(key, kind="stable"), collections.defaultdict(list)
    for m in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
        result[step[m[0]]].append(m)
    if any(weight_sums[np.concatenate(r)].sum() == 0 for r in result.values()):
        raise ValueError(
            "a step whose weights are all 0 has no loss; give some answers a weight above 0"
        )
    return list(result.values())


# training FLOPs of LLaMA-2-7B: per token, and per squared length of a conversation
COST_7B = 6 * 6.607e9, 6 * 32 * 4096


def plan(lengths, class_ids, weight_sums, seed, epoch, batch_tokens, micro_tokens, cost=COST_7B):
    """[step], step = [micro-batch], micro-batch = int64 array of conversations: each conversation once, none cut.

    A step is M = max(1, batch_tokens // micro_tokens) micro-batches of at most micro_tokens tokens and nearly equal cost,
    linear * tokens + quadratic * sum(length^2). It does not know the number of ranks: they take a step's micro-batches in
    turn, so the same conversations form step k on 1 GPU or 64.

    Every step holds the classes in proportion. Its loss is divided by its own weight sum, a ratio: a step poor in experts
    would scale its few rewards up and cancel them. So classes are dealt to the steps first (`deal`), and the micro-batches
    of a step are balanced second (`balance`). Where micro-batches are hardly longer than the longest conversations, a
    step's own conversations do not fill its micro-batches well. If that would cost 2% more steps, conversations are dealt
    to groups of 2, 4, .. steps instead, a group's micro-batches are filled best fit and then dealt to its steps (`spread`):
    fuller, for classes that are a little less even.
    """
    lengths, class_ids, weight_sums = (
        np.asarray(lengths, np.int64),
        np.asarray(class_ids, np.int64),
        np.asarray(weight_sums, np.float64),
    )
    capacity, M = min(micro_tokens, batch_tokens), max(1, batch_tokens // micro_tokens)
    if len(lengths) == 0:
        raise ValueError("no conversation to plan")
    if lengths.max() > capacity:
        raise ValueError(
            f"a conversation of {lengths.max()} tokens does not fit a micro-batch of {capacity}; raise --micro_tokens and --batch_tokens"
        )
    full, group = lengths.sum() / (M * capacity), 1  # full: steps, if nothing stayed empty
    fills = (1.0, 0.999, 0.9975, 0.99, 0.98)
    if full > 200:
        fills = fills[1:]  # one step more is nothing to many, and a try costs time
    while group == 1 or group < full:
        for steps in sorted({math.ceil(full / fill) for fill in fills}):
            groups = -(-steps // group)
            if groups * group <= math.ceil(full / fills[-1]):
                found = try_plan(
                    lengths,
                    class_ids,
                    weight_sums,
                    seed,
                    epoch,
                    groups,
                    group,
                    group > 1,
                    M,
                    capacity,
                    cost,
                )
                if found:
                    return found
        group *= 2
    # Conversations that leave gaps wherever they go (all just above half a micro-batch, say): one
    # group, of what best fit takes.
    bins = best_fit(lengths, np.zeros(len(lengths), np.int64), 1, len(lengths), capacity)
    return try_plan(
        lengths,
        class_ids,
        weight_sums,
        seed,
        epoch,
        1,
        -(-(int(bins.max()) + 1) // M),
        True,
        M,
        capacity,
        cost,
    )


@dataclass
class Batch:
    """One micro-batch, flat: row t holds token t of the packed row and learns to predict labels_T[t], counting weights_T[t]."""

    tokens_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64, from 0 in each conversation
    # int64: the next token of the same conversation (0 at its end, where the weight is 0)
    labels_T: torch.Tensor
    weights_T: torch.Tensor  # fp32
    cu_seqlens: torch.Tensor  # int32 [N + 1]
    max_seqlen: int
    rows_R: torch.Tensor  # int64, the rows with a weight
    class_R: torch.Tensor  # int64, their classes

    def map(self, f):
        """The batch with f applied to its tensors."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Batch(*(f(x) if torch.is_tensor(x) else x for x in values))

    def to(self, device):
        """On the device; from pinned memory (`ahead`) the copy does not wait."""
        return self.map(lambda x: x.to(device, non_blocking=True))


def pack(conversations, class_ids=None):
    """[(tokens, weights)] -> Batch. Weights move one row up: row t is judged by what it says about token t + 1."""
    lengths = np.array([len(tokens) for tokens, _ in conversations])
    class_ids = (
        np.zeros(len(lengths), np.int64) if class_ids is None else np.asarray(class_ids, np.int64)
    )
    ends = np.cumsum(lengths)
    tokens_T = np.concatenate([tokens for tokens, _ in conversations]).astype(np.int64)
    weights_T = np.concatenate([*(weights for _, weights in conversations), [0.0]]).astype(
        np.float32
    )[1:]
    labels_T = np.append(tokens_T[1:], 0)
    # the last token of a conversation predicts nothing
    labels_T[ends - 1], weights_T[ends - 1] = 0, 0.0
    rows_R = np.flatnonzero(weights_T)
    arrays = dict(
        tokens_T=tokens_T,
        positions_T=np.arange(len(tokens_T)) - np.repeat(ends - lengths, lengths),
        labels_T=labels_T,
        weights_T=weights_T,
        cu_seqlens=np.append(0, ends).astype(np.int32),
        rows_R=rows_R,
        class_R=np.repeat(class_ids, lengths)[rows_R],
    )
    return Batch(
        max_seqlen=int(lengths.max()), **{key: torch.from_numpy(x) for key, x in arrays.items()}
    )


def ahead(batches, pin):
    """The same batches, the next two assembled (and pinned for a GPU's copy) by a thread while the caller computes."""
    ready, done = queue.Queue(2), object()

    def assemble():
        try:
            for batch in batches:
                ready.put(batch.map(torch.Tensor.pin_memory) if pin else batch)
            ready.put(done)
        except BaseException as error:  # handed over, to be raised where the batch is missed
            ready.put(error)

    threading.Thread(target=assemble, daemon=True).start()
    while (batch := ready.get()) is not done:
        if isinstance(batch, BaseException):
            raise batch
        yield batch
