"""Many conversations: which of them form a training step (`plan`), and how a micro-batch of them
becomes one sequence of tokens (`pack`).

What a step must be. Its loss is divided by the weights of the step itself:

    loss = sum(weight * nll) / sum(weight)        both over all tokens of the step

Take experts of weight 1 and others of weight 0.1. A step without any expert divides 0.1 * nll by
0.1: there the others count in full, as if they were experts, and the reward has no effect. So every
step must hold the classes in the proportion that they have in all data. Besides this,

- each conversation is used once in an epoch, and none is cut;
- the micro-batches of a step cost nearly the same, since the GPUs that compute them wait for one
  another;
- the micro-batches are nearly full, so that there are few steps;
- the steps do not depend on the number of GPUs. Step k has the same conversations on 1 GPU and on
  64, so a run can stop on 1 and resume on 64.

Words:

    micro-batch   what one GPU computes at once: at most `capacity` tokens
    step          M micro-batches, then one update. The ranks take its micro-batches in turn.
    room          how many more tokens a micro-batch can take
    slot          what holds one conversation of a micro-batch, or none: then the slot is EMPTY
    group         some steps that share their conversations, so that their micro-batches fill better
    bin           a micro-batch of a group, before it is known to which of its steps it goes

i is a conversation: `step_of[i]`, `group_of[i]`, .. say where it goes. Other names end in their
axes: x_SM has the shape [S, M]. An axis of size 1 is a 1.

    N conversations    S steps               M micro-batches of a step
    G groups           P steps of a group    B bins of a group
    C classes          T tokens of a micro-batch, R of them with a weight
    Q columns of a table of conversations (`members_of`); for a micro-batch they are its slots
"""

import bisect
import collections
import dataclasses
import heapq
import itertools
import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

# [step][micro-batch]: int64 array of the conversations in it
Steps = list[list[np.ndarray]]

# Stands in a table of conversations where there is none.
EMPTY = -1

# What training on a conversation costs, in FLOPs: (for each token, for length^2). These are
# LLaMA-2-7B's. Each token costs 6 for each of its 6.607e9 weights in matmuls: a multiplication and
# an addition, in the forward pass once and in the backward pass twice. Attention costs length^2,
# times 6 (2 matmuls x 2, halved since it is causal, x 3 for forward and backward), in 32 layers of
# width 4,096. Only the ratio of the two numbers matters.
COST_7B = 6 * 6.607e9, 6 * 32 * 4096

# How full the steps are to be: `plan` tries 100%, then a little less, down to 98%. If even that
# fails, steps are grouped (`plan_groups`): then they are fuller, but the classes are less even.
FILLS = (1.0, 0.999, 0.9975, 0.99, 0.98)

# With more steps than this, 100% is not tried: it could save 0.1% of the steps, and hardly ever
# succeeds (70,000 ShareGPT-like lengths: the same 803 steps, after 1.4 times the time).
MANY_STEPS = 200

# of a step, at most: something is kept for each pair of them (no_use_SMM)
MOST_MICRO_BATCHES = 4096


def micro_batches_of(batch_tokens: int, micro_tokens: int) -> int:
    """How many micro-batches a step has."""
    return max(1, batch_tokens // micro_tokens)


def plan(
    lengths: np.ndarray,
    class_ids: np.ndarray,
    weight_sums: np.ndarray,
    seed: int,
    epoch: int,
    batch_tokens: int,
    micro_tokens: int,
    cost: tuple[float, float] = COST_7B,
) -> Steps:
    """The steps of an epoch: [step][micro-batch], an int64 array of conversations each.

    lengths [N] tokens, class_ids [N], weight_sums [N]: the sum of a conversation's loss weights.
    A step is M = max(1, batch_tokens // micro_tokens) micro-batches, or fewer where a step has few
    conversations. Each has at most micro_tokens tokens, and at most batch_tokens. Within a step
    their costs, cost[0] * tokens + cost[1] * sum(length^2), are nearly equal. The same arguments
    give the same steps; another epoch gives others.

    First each class is dealt to the steps, and then each step's conversations to its micro-batches.
    The other way round, filling micro-batches and making steps of them, leaves it to chance how
    many experts a step has.

    ValueError: no conversation, one longer than a micro-batch, more than MOST_MICRO_BATCHES, or a
    step whose weights are all 0.
    """
    problem = Problem(
        lengths=np.asarray(lengths, np.int64),
        class_ids=np.asarray(class_ids, np.int64),
        weight_sums=np.asarray(weight_sums, np.float64),
        seed=seed,
        epoch=epoch,
        M=micro_batches_of(batch_tokens, micro_tokens),
        capacity=min(micro_tokens, batch_tokens),
        cost=cost,
    )
    problem.check()

    # As many steps as it takes if all of them are full, and then a few more. Where it is certain
    # that so few have no room for all, they are not tried.
    full_steps = problem.lengths.sum() / (problem.M * problem.capacity)
    counts = step_counts(full_steps)
    fewest = fewest_steps(problem)

    # The usual case: classes are dealt to single steps, which is as even as it gets.
    for steps in counts:
        if steps < fewest:
            continue
        found = plan_steps(problem, steps)
        if found is not None:
            return found

    # Where a micro-batch is hardly longer than the longest conversations, the conversations of a
    # single step do not fill its micro-batches well. The more steps share their conversations, the
    # better the micro-batches fill.
    for groups, steps_per_group in groupings(full_steps, counts):
        if groups * steps_per_group < fewest:
            continue
        found = plan_groups(problem, groups, steps_per_group)
        if found is not None:
            return found

    # The worst case: conversations that leave much room unused wherever they go, as when all are a
    # little longer than half a micro-batch. All steps form one group, and there are as many as
    # `best_fit` needs. With a bin for each conversation it always finds room; then we know how many
    # bins it has used.
    conversations = len(problem.lengths)
    one_group = np.zeros(conversations, np.int64)
    bin_of = best_fit(problem, one_group, groups=1, bins=conversations)
    bins = int(bin_of.max()) + 1
    found = plan_groups(problem, groups=1, steps_per_group=math.ceil(bins / problem.M))
    # best_fit places all as it just did. That the swaps of balance overfill no bin is not proven,
    # but seen: OVERFULL weighs more than what a swap can gain, in 300 problems of this kind.
    assert found is not None, "the swaps of balance have overfilled a micro-batch"
    return found


@dataclass(frozen=True)
class Problem:
    """What `plan` was asked for; the docstring of `plan` explains the fields."""

    lengths: np.ndarray  # int64 [N]
    class_ids: np.ndarray  # int64 [N]
    weight_sums: np.ndarray  # fp64 [N]
    seed: int
    epoch: int
    M: int  # micro-batches of a step
    capacity: int  # tokens of a micro-batch, at most
    cost: tuple[float, float]

    def check(self) -> None:
        """ValueError where no plan exists."""
        if len(self.lengths) == 0:
            raise ValueError("no conversation to plan")
        if self.M > MOST_MICRO_BATCHES:
            raise ValueError(
                f"a step of {self.M:,} micro-batches, of {self.capacity:,} tokens each; at most "
                f"{MOST_MICRO_BATCHES:,}: lower --batch_tokens or raise --micro_tokens"
            )
        longest = self.lengths.max()
        if longest > self.capacity:
            raise ValueError(
                f"a conversation of {longest} tokens does not fit a micro-batch of "
                f"{self.capacity}; raise --micro_tokens and --batch_tokens"
            )


def step_counts(full_steps: float) -> list[int]:
    """The numbers of steps that `plan` tries, fewest first."""
    fills = FILLS[1:] if full_steps > MANY_STEPS else FILLS
    return sorted({math.ceil(full_steps / fill) for fill in fills})


def fewest_steps(problem: Problem) -> int:
    """A number of steps that no plan can have fewer of: long conversations leave gaps.

    A micro-batch has room for k conversations longer than capacity / (k + 1), and not for one more.
    So those conversations take at least their number / k micro-batches. That holds for every k.
    """
    lengths = np.sort(problem.lengths)
    # beyond the last k no conversation is any shorter
    k = np.arange(1, problem.capacity // max(lengths[0], 1) + 1)
    longer = len(lengths) - np.searchsorted(lengths, problem.capacity // (k + 1), "right")
    micro_batches = np.ceil(longer / k).max()
    return math.ceil(micro_batches / problem.M)


def groupings(full_steps: float, counts: list[int]) -> Iterator[tuple[int, int]]:
    """(groups, steps per group), as `plan` tries them: groups of 2 steps, of 4, of 8, ..

    All groups have equally many steps, so the steps may be more than one of the counts: 51 steps in
    groups of 2 become 26 groups, 52 steps. They are never more than the largest count.
    """
    steps_per_group = 2
    while steps_per_group < full_steps:
        # a set, since two counts may become the same number of groups
        group_counts = {math.ceil(steps / steps_per_group) for steps in counts}
        for groups in sorted(group_counts):
            if groups * steps_per_group <= counts[-1]:
                yield groups, steps_per_group
        steps_per_group *= 2


# ---- the usual case: conversations are dealt to single steps


def plan_steps(problem: Problem, steps: int) -> Steps | None:
    """The plan in so many steps; None if a micro-batch would be too full."""
    step_of = deal(problem, steps)
    micro_of = longest_to_emptiest(problem, step_of, steps)
    return finish(problem, step_of, micro_of, steps)


# `deal` takes sizes in the same bucket as equal. From a size to e times that size there are 50
# buckets, so sizes in the same bucket differ by about 2% at most.
BUCKETS = 50


def deal(problem: Problem, groups: int) -> np.ndarray:
    """int64 [N], the group of each conversation, so that all groups hold the classes in proportion.

    Class by class, and in a class the conversation of the largest loss weight first, each goes to
    the group that has the least weight of this class so far. Only the largest class, which comes
    last, is dealt by tokens: each to the group that has the fewest tokens in all. Here a group may
    be a single step.
    """
    rng = np.random.default_rng([problem.seed, problem.epoch])
    group_of = np.empty(len(problem.lengths), np.int64)
    tokens = np.zeros(groups)

    smallest_class_first = np.argsort(np.bincount(problem.class_ids), kind="stable")
    for class_id in smallest_class_first:
        members = np.flatnonzero(problem.class_ids == class_id)
        if class_id != smallest_class_first[-1]:
            size = problem.weight_sums
            load = np.zeros(groups)
        else:
            # Now all groups shall end with equally many tokens. The other classes take about
            # equally many of each group. So about equally many are left for this class in each,
            # and its many conversations make its loss weight nearly even, too.
            size = problem.lengths
            load = tokens

        # Equal sizes are shuffled: each epoch deals differently, though the largest come first.
        # The 1e-9 is for a caller whose conversation weighs 0: 0 has no logarithm.
        bucket = np.floor(np.log(np.maximum(size[members], 1e-9)) * BUCKETS)
        shuffle = rng.random(len(members))
        members = members[np.lexsort((shuffle, -bucket))]

        # of groups with the same load a random one gets the next, not always the first
        ties = rng.permutation(groups)
        group_of[members] = to_the_emptiest(size[members], load, ties)
        tokens += np.bincount(group_of[members], problem.lengths[members], groups)
    return group_of


def to_the_emptiest(sizes: np.ndarray, load: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """int64 [len(sizes)]: the group of each size. In their order, each goes to the group with the
    least load so far, and adds to it.

    load [groups] is what the groups start with. ties, a permutation of the groups, says which of
    several groups with the same load is taken: that of the smallest number.
    """
    # The first entry of a heap is its smallest. So the emptiest group is found without a search,
    # and n sizes take a time of n * log(groups).
    emptiest = list(zip(load.tolist(), ties.tolist(), range(len(load))))
    heapq.heapify(emptiest)
    chosen = []
    for size in sizes.tolist():
        filled, tie, group = emptiest[0]
        heapq.heapreplace(emptiest, (filled + size, tie, group))
        chosen.append(group)
    return np.array(chosen, np.int64)


def longest_to_emptiest(problem: Problem, step_of: np.ndarray, steps: int) -> np.ndarray:
    """int64 [N], the micro-batch of each conversation: the longest conversation first, each to the
    emptiest micro-batch of its step.

    A micro-batch may get too full. `balance` often repairs that; if it cannot, `finish` returns
    None.
    """
    i_SQ = members_of(problem.lengths, step_of, steps)
    used_SQ = i_SQ != EMPTY
    length_SQ = np.where(used_SQ, problem.lengths[i_SQ], 0)
    tokens_SM = np.zeros((steps, problem.M))
    micro_SQ = np.empty_like(i_SQ)

    # Each turn of the loop takes one conversation of every step: Q turns instead of N.
    all_steps = np.arange(steps)
    for q in range(i_SQ.shape[1]):
        emptiest_S = tokens_SM.argmin(1)
        micro_SQ[:, q] = emptiest_S
        tokens_SM[all_steps, emptiest_S] += length_SQ[:, q]

    micro_of = np.empty(len(step_of), np.int64)
    micro_of[i_SQ[used_SQ]] = micro_SQ[used_SQ]
    return micro_of


def members_of(lengths: np.ndarray, row_of: np.ndarray, rows: int) -> np.ndarray:
    """int64 [rows, Q], a table: each row has its conversations, the longest first, then EMPTY.

    A row stands for a step, a group or a micro-batch. row_of [N] says to which row each
    conversation belongs.
    """
    # all conversations: those of row 0, then those of row 1, ..; in each row the longest first
    order = np.lexsort((-lengths, row_of))
    count = np.bincount(row_of, minlength=rows)
    # a conversation's column: how many of its row come before it in that order
    first = np.cumsum(count) - count
    column = np.arange(len(order)) - np.repeat(first, count)

    table = np.full((rows, count.max()), EMPTY)
    table[row_of[order], column] = order
    return table


# ---- where single steps do not fill well: groups of steps share their conversations


def plan_groups(problem: Problem, groups: int, steps_per_group: int) -> Steps | None:
    """The plan in so many groups; None if the conversations of some group do not fit its bins.

    Classes are dealt to the groups. In each group the bins are filled as full as can be. Then each
    step of the group gets M of the bins, so that it has the classes nearly in proportion, though
    less exactly than in `plan_steps`.
    """
    group_of = deal(problem, groups)
    bins = steps_per_group * problem.M
    bin_of = best_fit(problem, group_of, groups, bins)
    if bin_of is None:
        return None
    share_GBC = class_shares(problem, group_of, bin_of, groups, bins)
    way = spread if bins <= MANY_BINS else spread_in_rounds
    step_GB, micro_GB = way(share_GBC, problem.M)
    step_of = group_of * steps_per_group + step_GB[group_of, bin_of]
    micro_of = micro_GB[group_of, bin_of]
    return finish(problem, step_of, micro_of, groups * steps_per_group)


def best_fit(problem: Problem, group_of: np.ndarray, groups: int, bins: int) -> np.ndarray | None:
    """int64 [N], the bin of each conversation: the longest conversation first, each to its group's
    fullest bin that has room for it. None where some conversation finds no such bin.
    """
    lengths = problem.lengths
    bin_of = np.empty(len(lengths), np.int64)
    for members in members_of(lengths, group_of, groups).tolist():
        # {room: the bins with so much room, the smallest number first}, and those rooms, rising.
        # Many bins have the same room, so the search is among few.
        bins_with = {problem.capacity: list(range(bins))}
        rooms = [problem.capacity]
        for i in members:
            if i == EMPTY:
                break
            # the first entry with enough room: the fullest bins that this conversation fits into
            at = bisect.bisect_left(rooms, lengths[i])
            if at == len(rooms):
                return None
            room = rooms[at]
            b = heapq.heappop(bins_with[room])
            bin_of[i] = b

            # The bin has less room now. A room that no bin has any more is no entry.
            if not bins_with[room]:
                del bins_with[room], rooms[at]
            left = room - int(lengths[i])
            if left not in bins_with:
                bins_with[left] = []
                bisect.insort(rooms, left)
            heapq.heappush(bins_with[left], b)
    return bin_of


def class_shares(
    problem: Problem, group_of: np.ndarray, bin_of: np.ndarray, groups: int, bins: int
) -> np.ndarray:
    """fp64 [G, B, C]: of each class, the share of the group's weight that lies in a bin. Shares, so
    that a rare class counts as much as a common one.
    """
    classes = problem.class_ids.max() + 1
    share_GBC = np.zeros((groups, bins, classes))
    np.add.at(share_GBC, (group_of, bin_of, problem.class_ids), problem.weight_sums)
    # In a group without the class all shares are 0: 1e-30 avoids 0 / 0.
    share_GBC /= np.maximum(share_GBC.sum(1, keepdims=True), 1e-30)
    return share_GBC


# In a group of more bins than this, they are given to its steps by `spread_in_rounds`: the time of
# `spread` grows with the square of the bins.
MANY_BINS = 10_000


def spread(share_GBC: np.ndarray, M: int) -> tuple[np.ndarray, np.ndarray]:
    """(step, micro-batch), int64 [G, B]: each group's bins are given to its steps, M bins to a
    step, so that each step has the classes nearly in proportion.
    """
    groups, bins, classes = share_GBC.shape
    steps_per_group = bins // M
    all_groups = np.arange(groups)

    # The bins with the largest share of some class go first. Those with small shares come later,
    # when they can make up for differences.
    order_GB = np.argsort(-share_GBC.max(2), axis=1)
    step_GB = np.empty_like(order_GB)
    micro_GB = np.empty_like(order_GB)
    load_GPC = np.zeros((groups, steps_per_group, classes))
    filled_GP = np.zeros((groups, steps_per_group), np.int64)
    for bin_G in order_GB.T:
        # One bin of every group at a time. Of the steps that have fewer than M bins, it goes to the
        # one where the sum of squares over the classes grows least: at the end such a sum is least
        # where all steps have the same shares.
        share_GC = share_GBC[all_groups, bin_G]
        load_after_GPC = load_GPC + share_GC[:, None]
        growth_GP = (load_after_GPC**2 - load_GPC**2).sum(2)
        step_G = np.where(filled_GP < M, growth_GP, np.inf).argmin(1)

        step_GB[all_groups, bin_G] = step_G
        micro_GB[all_groups, bin_G] = filled_GP[all_groups, step_G]
        load_GPC[all_groups, step_G] += share_GC
        filled_GP[all_groups, step_G] += 1
    return step_GB, micro_GB


def spread_in_rounds(share_GBC: np.ndarray, M: int) -> tuple[np.ndarray, np.ndarray]:
    """The same as `spread`, for many bins: M rounds, in each of which every step gets one bin."""
    groups, bins, classes = share_GBC.shape
    steps_per_group = bins // M
    step_GB = np.empty((groups, bins), np.int64)
    micro_GB = np.empty((groups, bins), np.int64)
    for g, share_BC in enumerate(share_GBC):
        # The bins that matter most to the same class come one after another, the largest share
        # first. Then the bins of a round are much alike, and can make up for what came before.
        # Bins without a conversation come last.
        largest_B = share_BC.max(1)
        matters_to_B = np.where(largest_B > 0, share_BC.argmax(1), classes - 1)
        order_B = np.lexsort((-largest_B, matters_to_B))
        load_PC = np.zeros((steps_per_group, classes))
        for m, bin_P in enumerate(order_B.reshape(M, steps_per_group)):
            # the largest share goes to the step that has least of this class
            c = matters_to_B[bin_P[0]]
            bin_P = bin_P[np.argsort(-share_BC[bin_P, c], kind="stable")]
            step_P = np.argsort(load_PC[:, c], kind="stable")
            step_GB[g, bin_P] = step_P
            micro_GB[g, bin_P] = m
            load_PC[step_P] += share_BC[bin_P]
    return step_GB, micro_GB


# ---- the end of plan_steps and of plan_groups: even micro-batches, as lists


def finish(problem: Problem, step_of: np.ndarray, micro_of: np.ndarray, steps: int) -> Steps | None:
    """The plan as lists, its micro-batches balanced; None if one of them is too full."""
    micro_of = balance(problem, step_of, micro_of, steps)

    # one number for each micro-batch of the epoch
    number_of = step_of * problem.M + micro_of
    tokens = np.bincount(number_of, problem.lengths)
    if tokens.max() > problem.capacity:
        return None

    # sorted by that number, a micro-batch ends where the number changes
    order = np.argsort(number_of, kind="stable")
    ends = np.flatnonzero(np.diff(number_of[order])) + 1
    planned = collections.defaultdict(list)
    for micro in np.split(order, ends):
        planned[step_of[micro[0]]].append(micro)

    for step in planned.values():
        if problem.weight_sums[np.concatenate(step)].sum() == 0:
            raise ValueError(
                "a step whose weights are all 0 has no loss; give some answers a weight above 0"
            )
    return list(planned.values())


# The constants of `balance`. The figures are of 20,000 ShareGPT-like lengths, with M micro-batches
# of 16,384 tokens in a step. "Off" is how far a step's largest micro-batch is above its mean one.

# The cost counts most, since ranks wait for it: 1% off in cost is as bad as 20% off in
# sum(length^2). What that gives, and what it would be if both counted the same:
#
#     COST_COUNTS    off in cost, M = 8    M = 32    off in sum(length^2)
#     20             0.07%                 0.08%     2%
#     1              0.4%                  0.5%      1%
COST_COUNTS = 20

# A micro-batch that is too full is worse than any ordinary unevenness, so that it is repaired
# first: one token above 16,384 is as bad as a cost that is 39% off. In a step whose costs are
# further off than that, a few tokens too many may stay; then `finish` returns None.
OVERFULL = 1e6

# A smaller gain is a rounding error: a swap that gains so little could be made again and again.
LEAST_GAIN = 1e-12

# How many rounds there are: 5 for each micro-batch of a step, and 10. Twice as many change little:
# 0.078% off instead of 0.084% in cost, M = 32. At most 400, which bounds the time where M is above
# 78.
ROUNDS_PER_MICRO_BATCH = 5
ROUNDS = 10
MOST_ROUNDS = 400

# In a micro-batch with more slots than this, a round tries 48 of them and the last: 49^2 swaps of
# two micro-batches. That bounds memory and time: with 200 instead of 48, 40,000 short conversations
# take 8 times as long, and come out as even.
MOST_SLOTS = 48

# How many slots of a micro-batch a round tries: the fewest of these that reach its conversations.
REACHES = (4, 8, 16, 32, MOST_SLOTS + 1)


def balance(problem: Problem, step_of: np.ndarray, micro_of: np.ndarray, steps: int) -> np.ndarray:
    """int64 [N], the micro-batch of each conversation, after swaps within each step that bring its
    micro-batches nearer to the same cost and to the same sum(length^2).

    Why both: then they take nearly the same time even if a GPU computes attention at fewer FLOPs
    per second than matmuls.

    There is a fixed number of rounds. Each looks at two micro-batches of every step, tries the
    swaps of a slot of the one with a slot of the other, and makes the best swap if it helps. If one
    of the slots is EMPTY, the swap moves a conversation. All steps are worked on at once.
    """
    if problem.M == 1:
        return micro_of
    layout = Layout(problem, step_of, micro_of, steps)
    all_steps = np.arange(steps)

    rounds = ROUNDS + ROUNDS_PER_MICRO_BATCH * problem.M
    for r in range(min(rounds, MOST_ROUNDS)):
        one, other = pick_two(r, layout)
        tried = slots_to_try(r, layout.slots)

        # A pair is not tried again while neither of the two has changed. (With more slots than
        # MOST_SLOTS each round tries others.)
        open_steps = np.flatnonzero(~layout.no_use_SMM[all_steps, one, other])
        one, other = one[open_steps], other[open_steps]
        after, at_one, at_other = best_swaps(layout, open_steps, one, other, tried)

        # the open steps in which the best swap is better than no swap
        before = layout.badness_SM[open_steps, one] + layout.badness_SM[open_steps, other]
        helps = after < before - LEAST_GAIN
        if layout.slots <= MOST_SLOTS:
            layout.no_use_SMM[open_steps[~helps], one[~helps], other[~helps]] = True
            layout.no_use_SMM[open_steps[~helps], other[~helps], one[~helps]] = True
        slot_of_one = tried[at_one[helps]]
        slot_of_other = tried[at_other[helps]]
        layout.swap(open_steps[helps], one[helps], slot_of_one, other[helps], slot_of_other)
    return layout.micro_of()


def best_swaps(
    layout: "Layout", steps: np.ndarray, one: np.ndarray, other: np.ndarray, tried: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(badness, at_one, at_other): of each of these steps the best swap of a tried slot of `one`
    with a tried slot of `other`, and how bad the two would be after it, together.

    at_one, at_other: which of the tried slots they are. The first of several that are as good.
    """
    length_one_SQ = layout.length_SMQ[steps, one][:, tried]
    length_other_SQ = layout.length_SMQ[steps, other][:, tried]
    after = np.empty(len(steps))
    at_one = np.empty(len(steps), np.int64)
    at_other = np.empty(len(steps), np.int64)

    # One EMPTY slot is as good as another, so it is enough to look at the slots before the last
    # conversation, and at one more. A micro-batch of short conversations has many times as many
    # slots as one of long ones. So steps with about equally many are worked on together.
    reach_one = reach(length_one_SQ)
    reach_other = reach(length_other_SQ)
    for most_one, most_other in set(zip(reach_one.tolist(), reach_other.tolist())):
        alike = np.flatnonzero((reach_one == most_one) & (reach_other == most_other))
        length_SQ1 = length_one_SQ[alike, :most_one, None]
        length_S1Q = length_other_SQ[alike, None, :most_other]

        # What `one` would lose to `other` by each swap. The first Q are the slots of `one`, the
        # second Q those of `other`.
        lost_tokens_SQQ = length_SQ1 - length_S1Q
        lost_square_SQQ = length_SQ1**2 - length_S1Q**2

        # how bad the two would be after each swap
        of = steps[alike]
        badness_one_SQQ = layout.badness(
            of,
            layout.tokens_SM[of, one[alike]][:, None, None] - lost_tokens_SQQ,
            layout.square_SM[of, one[alike]][:, None, None] - lost_square_SQQ,
        )
        badness_other_SQQ = layout.badness(
            of,
            layout.tokens_SM[of, other[alike]][:, None, None] + lost_tokens_SQQ,
            layout.square_SM[of, other[alike]][:, None, None] + lost_square_SQQ,
        )

        # pair number a * most_other + b is slot a of `one` and slot b of `other`
        pairs = (badness_one_SQQ + badness_other_SQQ).reshape(len(alike), -1)
        best = pairs.argmin(1)
        after[alike] = pairs[np.arange(len(alike)), best]
        at_one[alike] = best // most_other
        at_other[alike] = best % most_other
    return after, at_one, at_other


def reach(length_SQ: np.ndarray) -> np.ndarray:
    """int64 [S]: how many slots of each row `best_swaps` looks at: up to its last conversation, and
    one more. Rounded up to one of REACHES, so that few of them differ; at most Q.
    """
    slots = length_SQ.shape[1]
    last = ((length_SQ > 0) * np.arange(1, slots + 1)).max(1)
    needed = np.minimum(last + 1, slots)
    rounded = np.array(REACHES)[np.searchsorted(REACHES, needed)]
    return np.minimum(rounded, slots)


class Layout:
    """Which conversation lies in which slot of its step's micro-batches, and the sums that follow.

    i_SMQ int64: the conversation in each slot, or EMPTY
    length_SMQ fp64: its length, or 0
    tokens_SM, square_SM fp64: the sum of the lengths in each micro-batch, and of length^2
    badness_SM fp64: how far each micro-batch is from what it should be
    no_use_SMM bool: no swap of these two micro-batches helps, as they are now
    mean_tokens, mean_square, mean_cost fp64 [S]: what each micro-batch of a step should have
    """

    def __init__(
        self, problem: Problem, step_of: np.ndarray, micro_of: np.ndarray, steps: int
    ) -> None:
        M = problem.M
        self.cost = problem.cost
        self.capacity = problem.capacity
        i_SMQ = members_of(problem.lengths, step_of * M + micro_of, steps * M)
        i_SMQ = i_SMQ.reshape(steps, M, -1)
        # an EMPTY slot at the end of each micro-batch, so that a conversation can be moved there
        self.i_SMQ = np.concatenate([i_SMQ, np.full((steps, M, 1), EMPTY)], 2)
        self.slots = self.i_SMQ.shape[2]

        lengths_SMQ = np.where(self.i_SMQ != EMPTY, problem.lengths[self.i_SMQ], 0)
        self.length_SMQ = lengths_SMQ.astype(np.float64)
        self.tokens_SM = self.length_SMQ.sum(2)
        self.square_SM = (self.length_SMQ**2).sum(2)

        # Swaps within a step do not change its means. They are at least 1, since others are divided
        # by them, and a step may have no conversation.
        self.mean_tokens = np.maximum(self.tokens_SM.mean(1), 1)
        self.mean_square = np.maximum(self.square_SM.mean(1), 1)
        linear, quadratic = self.cost
        self.mean_cost = linear * self.mean_tokens + quadratic * self.mean_square
        self.badness_SM = self.badness(np.arange(steps), self.tokens_SM, self.square_SM)
        self.no_use_SMM = np.zeros((steps, M, M), bool)

    def badness(self, steps: np.ndarray, tokens: np.ndarray, square: np.ndarray) -> np.ndarray:
        """How far micro-batches of these steps are from what they should be: fp64 [len(steps), ..],
        0 at best.

        tokens and square [len(steps), ..]: the sum of the lengths in each of them, and of length^2.
        """
        # the first axis is the step; over all others the step's means are broadcast
        shape = [-1] + [1] * (tokens.ndim - 1)
        linear, quadratic = self.cost
        mean_cost = self.mean_cost[steps].reshape(shape)
        mean_square = self.mean_square[steps].reshape(shape)
        overfull = np.maximum(tokens / self.capacity - 1, 0)
        off_cost = (linear * tokens + quadratic * square) / mean_cost - 1
        off_square = square / mean_square - 1
        return COST_COUNTS**2 * off_cost**2 + off_square**2 + OVERFULL * overfull

    def swap(
        self,
        step: np.ndarray,
        one: np.ndarray,
        slot_of_one: np.ndarray,
        other: np.ndarray,
        slot_of_other: np.ndarray,
    ) -> None:
        """In each of these steps, swap a slot of micro-batch `one` with a slot of `other`.

        All arguments are int64 of the same length, with an entry for each of the steps.
        """
        length_one = self.length_SMQ[step, one, slot_of_one]
        length_other = self.length_SMQ[step, other, slot_of_other]
        self.tokens_SM[step, one] -= length_one - length_other
        self.tokens_SM[step, other] += length_one - length_other
        self.square_SM[step, one] -= length_one**2 - length_other**2
        self.square_SM[step, other] += length_one**2 - length_other**2
        for micro in (one, other):
            tokens = self.tokens_SM[step, micro]
            self.badness_SM[step, micro] = self.badness(step, tokens, self.square_SM[step, micro])
            self.no_use_SMM[step, micro] = False
            self.no_use_SMM[step, :, micro] = False

        self.length_SMQ[step, one, slot_of_one] = length_other
        self.length_SMQ[step, other, slot_of_other] = length_one
        i_one = self.i_SMQ[step, one, slot_of_one]
        self.i_SMQ[step, one, slot_of_one] = self.i_SMQ[step, other, slot_of_other]
        self.i_SMQ[step, other, slot_of_other] = i_one

    def micro_of(self) -> np.ndarray:
        """int64 [N]: the micro-batch in which each conversation lies now."""
        used_SMQ = self.i_SMQ != EMPTY
        _, micro, _ = np.nonzero(used_SMQ)
        micro_of = np.empty(len(micro), np.int64)
        micro_of[self.i_SMQ[used_SMQ]] = micro
        return micro_of


def pick_two(r: int, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """(one, other), int64 [S]: the two micro-batches of each step that round r looks at."""
    steps, M = layout.badness_SM.shape
    all_steps = np.arange(steps)
    tokens_off_SM = layout.tokens_SM / layout.mean_tokens[:, None] - 1
    square_off_SM = layout.square_SM / layout.mean_square[:, None] - 1

    # `one` is the worst. But the worst may have no swap that helps. So in every third round `one`
    # is the micro-batch whose tokens are most off.
    if r % 3 == 0:
        one = np.abs(tokens_off_SM).argmax(1)
    else:
        one = layout.badness_SM.argmax(1)

    # In odd rounds `other` is the one that is most off in the opposite direction: it can take what
    # `one` has too much of. (Tokens stand for the cost here: the two are nearly proportional.) In
    # even rounds it is the one after `one`, then the second after it, .., so that every other
    # micro-batch has its turn.
    if r % 2 == 1:
        direction = np.sign(tokens_off_SM[all_steps, one])[:, None]
        off_SM = COST_COUNTS * tokens_off_SM + square_off_SM
        other = (off_SM * direction).argmin(1)
    else:
        further = r // 2 % (M - 1)
        other = (one + 1 + further) % M
    # never one micro-batch with itself: where all are even, argmin may find `one` again
    other = np.where(other == one, (other + 1) % M, other)
    return one, other


def slots_to_try(r: int, slots: int) -> np.ndarray:
    """int64, rising: the slots of a micro-batch that round r tries to swap."""
    if slots <= MOST_SLOTS:
        return np.arange(slots)
    # Evenly spread, so that there are long and short conversations among them: at first the slots
    # are sorted by length. Each round tries others.
    evenly = np.arange(MOST_SLOTS) * slots // MOST_SLOTS
    shifted = (evenly + r) % slots
    # and always the last slot: at first it is EMPTY, so a conversation can be moved there
    return np.unique(np.append(shifted, slots - 1))


def flat(steps: Steps) -> np.ndarray:
    """int64: all conversations of these steps, in their order."""
    micro_batches = itertools.chain.from_iterable(steps)
    return np.concatenate(list(micro_batches))


# ---- from conversations to a batch


def pack(
    conversations: list[tuple[np.ndarray, np.ndarray]], class_ids: np.ndarray | None = None
) -> "Batch":
    """One micro-batch: conversations, (tokens [n], weights [n]) each, end to end.

    class_ids [N], or None where classes do not matter: then all are of class 0.

    `tokenize` gives a token the weight of predicting it. At t the model predicts the token at
    t + 1. So the label at t is the token at t + 1, and the weight moves with it from t + 1 to t.
    The method has no other shift:

        t           0       1       2       3       4       5     | 6       7
        token       <s>     User:   hi      Asst:   hello   END   | <s>     User:
        its weight  0       0       0       0       w       w     | 0       0
                          /       /       /       /       /               /
        label       User:   hi      Asst:   hello   END     0     | User:   ..
        weight      0       0       0       w       w       0     | 0       ..

    At the last token of a conversation there is nothing to predict: label 0 and weight 0. At the
    last token before an answer there is a weight: the answer's first token is predicted there.
    """
    lengths = np.array([len(tokens) for tokens, _ in conversations])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    if class_ids is None:
        class_ids = np.zeros(len(lengths))
    class_ids = np.asarray(class_ids, np.int64)

    tokens_T = np.concatenate([tokens for tokens, _ in conversations]).astype(np.int64)
    token_weights_T = np.concatenate([weights for _, weights in conversations]).astype(np.float32)

    # The shift. It also moves the first token of each conversation to the end of the one before
    # (np.roll: of the first one to the end of the last), where it is overwritten.
    labels_T = np.roll(tokens_T, -1)
    weights_T = np.roll(token_weights_T, -1)
    labels_T[ends - 1] = 0
    weights_T[ends - 1] = 0.0

    rows_R = np.flatnonzero(weights_T)
    return Batch(
        tokens_T=torch.from_numpy(tokens_T),
        positions_T=torch.from_numpy(np.arange(len(tokens_T)) - np.repeat(starts, lengths)),
        labels_T=torch.from_numpy(labels_T),
        weights_T=torch.from_numpy(weights_T),
        cu_seqlens=torch.from_numpy(np.append(0, ends).astype(np.int32)),
        max_seqlen=int(lengths.max()),
        rows_R=torch.from_numpy(rows_R),
        class_R=torch.from_numpy(np.repeat(class_ids, lengths)[rows_R]),
    )


@dataclass
class Batch:
    """One micro-batch: its conversations end to end, T tokens. After tokens_T[t] the model learns
    to predict labels_T[t], and the loss counts that with weights_T[t].
    """

    tokens_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64, from 0 in each conversation
    labels_T: torch.Tensor  # int64
    weights_T: torch.Tensor  # fp32
    # int32 [N + 1]: where each conversation starts, and the end of the last. Tokens attend only
    # within their own conversation.
    cu_seqlens: torch.Tensor
    # The longest conversation. Packed attention of other libraries asks for it; ours works out from
    # cu_seqlens, on the GPU, what there is to compute.
    max_seqlen: int
    # int64: each t whose weight is not 0. Only these rows of the model's output go through the
    # vocabulary projection.
    rows_R: torch.Tensor
    class_R: torch.Tensor  # int64, the class of each of these rows, for the log

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What the model is called with, in its order."""
        return (
            self.tokens_T,
            self.positions_T,
            self.cu_seqlens,
            self.labels_T,
            self.weights_T,
            self.rows_R,
        )

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The batch with the function applied to each of its tensors."""
        values = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if torch.is_tensor(value):
                value = function(value)
            values[field.name] = value
        return Batch(**values)

    def to(self, device: torch.device) -> "Batch":
        """The batch on the device. From pinned memory (`ahead`) the copy does not wait."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


def ahead(batches: Iterable[Batch], pin: bool) -> Iterator[Batch]:
    """The same batches, but a thread makes the next two or three while the caller computes.

    pin: put them into pinned memory, from which a GPU can copy while it computes.
    """
    ready = queue.Queue(maxsize=2)
    end = object()

    def make() -> None:
        try:
            for batch in batches:
                ready.put(batch.map(torch.Tensor.pin_memory) if pin else batch)
            ready.put(end)
        # any error at all: the caller waits for a batch, and must get the error instead
        except BaseException as error:
            ready.put(error)

    threading.Thread(target=make, daemon=True).start()
    while True:
        item = ready.get()
        if item is end:
            return
        if isinstance(item, BaseException):
            raise item
        yield item
