"""Many conversations: which of them form a training step (`plan`), and how they lie in one row of
tokens (`pack`).

What a step must be. Its loss is divided by the weights of the step itself:

    loss = sum(weight * nll) / sum(weight)        both over all tokens of the step

Take experts of weight 1 and others of weight 0.1. A step without any expert divides 0.1 * nll by
0.1: here the others count in full, as if they were experts, and the reward is cancelled. So every
step must hold the classes in the proportion that they have in all data. Besides this,

- each conversation is used once in an epoch, and none is cut;
- the micro-batches of a step cost nearly the same, since the GPUs that compute them wait for one
  another, and they are nearly full, so that there are few steps;
- the steps do not depend on the number of GPUs. Step k has the same conversations on 1 GPU and on
  64, so a run can stop on the one and resume on the other.

Words:

    micro-batch   what one GPU computes at once: at most `capacity` tokens
    slot          a conversation's place in a micro-batch; some slots are empty
    step          M micro-batches, then one update. The ranks take its micro-batches in turn.
    group         a few steps that get their conversations together; most often a single step
    bin           a micro-batch of a group, before it is known to which of its steps it goes

`step_of[i]`, `group_of[i]`, .. is where conversation i goes. Shapes: N conversations, S steps, M
micro-batches of a step, G groups, P steps of a group, B bins of a group, Q slots, C classes; T
packed tokens, R of them supervised.
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

# What training on a conversation costs, in FLOPs: (for each token, for length^2). These are
# LLaMA-2-7B's: 6 for each of its 6.607e9 weights in matmuls, and causal attention in its 32 layers
# of width 4,096. Only the ratio of the two matters.
COST_7B = 6 * 6.607e9, 6 * 32 * 4096

# How full the steps are to be: `plan` tries to fill all room, then a little less, down to 98%.
# Where even that fails, fuller steps are worth a little unevenness of the classes.
FILLS = (1.0, 0.999, 0.9975, 0.99, 0.98)

# In more steps than this the first try, at 100%, is left out: it could save 0.1% of the steps, and
# hardly ever succeeds (70,000 ShareGPT-like lengths: the same 803 steps, after 1.4 times the time).
MANY_STEPS = 200


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
    A step is M = max(1, batch_tokens // micro_tokens) micro-batches, of micro_tokens tokens at
    most; a small step may have fewer. Their cost, cost[0] * tokens + cost[1] * sum(length^2), is
    nearly equal. The same arguments give the same steps; another epoch gives others.

    Classes are dealt to the steps first, and the micro-batches of each step are evened out second.
    The other way round, filling micro-batches and making steps of them, leaves it to chance how
    many experts a step has.

    ValueError: no conversation, one longer than a micro-batch, or a step whose weights are all 0.
    """
    problem = Problem(
        lengths=np.asarray(lengths, np.int64),
        class_ids=np.asarray(class_ids, np.int64),
        weight_sums=np.asarray(weight_sums, np.float64),
        seed=seed,
        epoch=epoch,
        M=max(1, batch_tokens // micro_tokens),
        capacity=min(micro_tokens, batch_tokens),
        cost=cost,
    )
    problem.check()

    # As many steps as it takes if no place stays empty, and then a few more.
    full_steps = problem.lengths.sum() / (problem.M * problem.capacity)
    counts = step_counts(full_steps)

    # The usual case: classes are dealt to single steps, which is as even as it gets.
    for steps in counts:
        found = plan_steps(problem, steps)
        if found is not None:
            return found

    # Where a micro-batch is hardly longer than the longest conversations, a step's own do not fill
    # its micro-batches well. The more steps share their conversations, the better these fill.
    for groups, steps_per_group in groupings(full_steps, counts):
        found = plan_groups(problem, groups, steps_per_group)
        if found is not None:
            return found

    # What is left are conversations that leave gaps wherever they go: all just above half a
    # micro-batch, say. They take as many steps as best fit needs for all of them at once.
    conversations = len(problem.lengths)
    one_group = np.zeros(conversations, np.int64)
    bin_of = best_fit(problem, one_group, groups=1, bins=conversations)
    bins = int(bin_of.max()) + 1
    return plan_groups(problem, groups=1, steps_per_group=math.ceil(bins / problem.M))


@dataclass(frozen=True)
class Problem:
    """What `plan` was asked for; its docstring explains the fields."""

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


def groupings(full_steps: float, counts: list[int]) -> Iterator[tuple[int, int]]:
    """(groups, steps per group), as `plan` tries them: groups of 2 steps, of 4, of 8, .."""
    steps_per_group = 2
    while steps_per_group < full_steps:
        for steps in counts:
            # whole groups may be more steps than asked for, but never more than the most allowed
            groups = math.ceil(steps / steps_per_group)
            if groups * steps_per_group <= counts[-1]:
                yield groups, steps_per_group
        steps_per_group *= 2


# ---- the usual case: each step gets conversations of its own


def plan_steps(problem: Problem, steps: int) -> Steps | None:
    """The plan in so many steps; None where a micro-batch would be too full."""
    step_of = deal(problem, steps)
    micro_of = emptiest_first(problem, step_of, steps)
    return finish(problem, step_of, micro_of, steps)


# Sizes in the same bucket count as equal. A factor e in size is 50 buckets, so that one spans 2%.
BUCKETS = 50


def deal(problem: Problem, groups: int) -> np.ndarray:
    """int64 [N], the group of each conversation, so that all groups hold the classes in proportion.

    Class by class, the heaviest conversation first, to the group that has least of this class. A
    group may be a single step.
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
            # The largest class is like water poured in last: it goes by tokens, those of the other
            # classes included, so that all groups end equally long.
            size = problem.lengths
            load = tokens

        # Equal sizes are shuffled: each epoch deals differently, though the heaviest come first.
        # A weight sum may be 0, which has no logarithm: hence the 1e-9.
        bucket = np.floor(np.log(np.maximum(size[members], 1e-9)) * BUCKETS)
        shuffle = rng.random(len(members))
        members = members[np.lexsort((shuffle, -bucket))]

        ties = rng.permutation(groups)
        group_of[members] = to_the_emptiest(size[members], load, ties)
        tokens += np.bincount(group_of[members], problem.lengths[members], groups)
    return group_of


def to_the_emptiest(sizes: np.ndarray, load: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """int64 [len(sizes)]: each size, in this order, goes where the load is least by then.

    load [groups] is what they start with. Equal loads go by ties, a permutation of the groups.
    """
    # A heap, whose first entry is always the emptiest group, makes this n * log(groups).
    emptiest = list(zip(load.tolist(), ties.tolist(), range(len(load))))
    heapq.heapify(emptiest)
    chosen = []
    for size in sizes.tolist():
        filled, tie, group = emptiest[0]
        heapq.heapreplace(emptiest, (filled + size, tie, group))
        chosen.append(group)
    return np.array(chosen, np.int64)


def emptiest_first(problem: Problem, step_of: np.ndarray, steps: int) -> np.ndarray:
    """int64 [N], the micro-batch of each conversation: the longest conversation first, each to the
    emptiest micro-batch of its step.

    A micro-batch may get too full: `balance` can mend that.
    """
    i_SQ = members_of(problem.lengths, step_of, steps)
    used_SQ = i_SQ != EMPTY
    length_SQ = np.where(used_SQ, problem.lengths[i_SQ], 0)
    tokens_SM = np.zeros((steps, problem.M))
    micro_SQ = np.empty_like(i_SQ)

    # One conversation of every step at a time: a loop over Q, not over all conversations.
    all_steps = np.arange(steps)
    for q in range(i_SQ.shape[1]):
        emptiest_S = tokens_SM.argmin(1)
        micro_SQ[:, q] = emptiest_S
        tokens_SM[all_steps, emptiest_S] += length_SQ[:, q]

    micro_of = np.empty(len(step_of), np.int64)
    micro_of[i_SQ[used_SQ]] = micro_SQ[used_SQ]
    return micro_of


# Stands in a table where a conversation could stand.
EMPTY = -1


def members_of(lengths: np.ndarray, place_of: np.ndarray, places: int) -> np.ndarray:
    """int64 [places, Q], a row for each place: its conversations, longest first, then EMPTY.

    A place is a step, a group or a micro-batch; place_of [N] says where each conversation goes.
    """
    # all conversations: those of place 0, then of place 1, ..; in each place the longest first
    order = np.lexsort((-lengths, place_of))
    count = np.bincount(place_of, minlength=places)
    # a conversation's column is its position in that order, less the position of its place's first
    first = np.cumsum(count) - count
    column = np.arange(len(order)) - np.repeat(first, count)

    table = np.full((places, count.max()), EMPTY)
    table[place_of[order], column] = order
    return table


# ---- tight micro-batches: some steps share their conversations


def plan_groups(problem: Problem, groups: int, steps_per_group: int) -> Steps | None:
    """The plan in so many groups; None where a group's conversations do not fit its bins.

    Classes are dealt to the groups. In each group the bins are filled as full as can be, and then
    given to the group's steps so that classes come out even; a little less even than if each step
    had its own conversations.
    """
    group_of = deal(problem, groups)
    bins = steps_per_group * problem.M
    bin_of = best_fit(problem, group_of, groups, bins)
    if bin_of is None:
        return None
    step_of, micro_of = spread(problem, group_of, bin_of, groups, steps_per_group)
    return finish(problem, step_of, micro_of, groups * steps_per_group)


def best_fit(problem: Problem, group_of: np.ndarray, groups: int, bins: int) -> np.ndarray | None:
    """int64 [N], the bin of each conversation: the longest first, each to its group's fullest bin
    that has room for it. None where there is no such bin.
    """
    lengths = problem.lengths
    bin_of = np.empty(len(lengths), np.int64)
    for members in members_of(lengths, group_of, groups).tolist():
        # (room, bin), least room first
        rooms = [(problem.capacity, b) for b in range(bins)]
        for i in members:
            if i == EMPTY:
                break
            # the first with room enough has the least room of those that have enough
            at = bisect.bisect_left(rooms, (lengths[i], -1))
            if at == len(rooms):
                return None
            room, b = rooms.pop(at)
            bin_of[i] = b
            bisect.insort(rooms, (room - lengths[i], b))
    return bin_of


def spread(
    problem: Problem,
    group_of: np.ndarray,
    bin_of: np.ndarray,
    groups: int,
    steps_per_group: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(step_of, micro_of), int64 [N]: each group's bins given to its steps, M bins to a step, so
    that the classes come out in proportion.
    """
    all_groups = np.arange(groups)
    bins = steps_per_group * problem.M
    classes = problem.class_ids.max() + 1

    # What a bin brings: of each class, the share of the group's weight that lies in this bin. In
    # shares a rare class counts as much as a common one. (1e-30: a group without this class.)
    share_GBC = np.zeros((groups, bins, classes))
    np.add.at(share_GBC, (group_of, bin_of, problem.class_ids), problem.weight_sums)
    share_GBC /= np.maximum(share_GBC.sum(1, keepdims=True), 1e-30)

    # The bins that bring most of a class go first: what is small can even them out later.
    order_GB = np.argsort(-share_GBC.max(2), axis=1)
    step_GB = np.empty_like(order_GB)
    micro_GB = np.empty_like(order_GB)
    load_GPC = np.zeros((groups, steps_per_group, classes))
    filled_GP = np.zeros((groups, steps_per_group), np.int64)
    for bin_G in order_GB.T:
        # A sum of squares is least where all are equal. So the bin goes to the step, of those that
        # want a bin, where the sum of squares grows least.
        share_GC = share_GBC[all_groups, bin_G]
        load_after_GPC = load_GPC + share_GC[:, None]
        growth_GP = (load_after_GPC**2 - load_GPC**2).sum(2)
        step_G = np.where(filled_GP < problem.M, growth_GP, np.inf).argmin(1)

        step_GB[all_groups, bin_G] = step_G
        micro_GB[all_groups, bin_G] = filled_GP[all_groups, step_G]
        load_GPC[all_groups, step_G] += share_GC
        filled_GP[all_groups, step_G] += 1

    step_of = group_of * steps_per_group + step_GB[group_of, bin_of]
    micro_of = micro_GB[group_of, bin_of]
    return step_of, micro_of


# ---- both ways end here: even micro-batches, as lists


def finish(problem: Problem, step_of: np.ndarray, micro_of: np.ndarray, steps: int) -> Steps | None:
    """The plan as lists, its micro-batches balanced; None where one of them is too full."""
    micro_of = balance(problem, step_of, micro_of, steps)

    # one number for each micro-batch of the epoch
    number_of = step_of * problem.M + micro_of
    tokens = np.bincount(number_of, problem.lengths)
    if tokens.max() > problem.capacity:
        return None

    # Sorted by that number, a micro-batch ends where the number changes.
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


# The constants of `balance`. The figures are of 20,000 ShareGPT-like lengths, with 8 and with 32
# micro-batches of 16,384 tokens in a step; "off" is how far a step's largest is above its mean.

# The cost counts most, since ranks wait for it: 1% in cost is as bad as 20% in sum(length^2). So
# the cost is 0.07% and 0.08% off, sum(length^2) 2%. With 1 instead of 20: 0.4% and 0.5%, and 1%.
COST_COUNTS = 20

# Too full is worse than any unevenness, so that it is mended first: one token above 16,384 is 61
# here, as bad as a cost that is 39% off.
OVERFULL = 1e6

# A smaller gain is a rounding error, and a swap for its sake could be made again and again.
LEAST_GAIN = 1e-12

# Rounds for each micro-batch of a step, and some more. Twice as many change little: 0.078% off
# instead of 0.084% with 32 micro-batches. Above 78 micro-batches 400 rounds bound the time.
ROUNDS_PER_MICRO_BATCH = 5
ROUNDS = 10
MOST_ROUNDS = 400

# Of a micro-batch with more slots than this a round tries only so many, so at most 48^2 swaps. It
# bounds memory and time: 200 slots take 8 times as long for 40,000 short conversations, and come
# out the same.
MOST_SLOTS = 48


def balance(problem: Problem, step_of: np.ndarray, micro_of: np.ndarray, steps: int) -> np.ndarray:
    """int64 [N], better micro-batches: within each step conversations are swapped, until all of its
    micro-batches cost nearly the same and have nearly the same sum(length^2).

    Why both: then they take the same time, too, where attention's part of the time is not its part
    of the FLOPs.

    A round looks at two micro-batches of every step, tries the swaps of a slot of one with a slot
    of the other, and makes the best, if it helps. A slot may be empty: then the swap is a move.
    All steps are worked on at once.
    """
    if problem.M == 1:
        return micro_of
    layout = Layout(problem, step_of, micro_of, steps)
    all_steps = np.arange(steps)

    rounds = ROUNDS + ROUNDS_PER_MICRO_BATCH * problem.M
    for r in range(min(rounds, MOST_ROUNDS)):
        badness_SM = layout.badness(layout.tokens_SM, layout.square_SM)
        one, other = pick_two(r, badness_SM, layout)
        slots = slots_to_try(r, layout.slots)

        # [S, slots of `one`, slots of `other`]: what `one` would lose to `other` by each swap
        length_one = layout.length_SMQ[all_steps, one][:, slots, None]
        length_other = layout.length_SMQ[all_steps, other][:, None, slots]
        lost_tokens = length_one - length_other
        lost_square = length_one**2 - length_other**2

        # the same shape: how bad the two would be after it
        badness_one = layout.badness(
            layout.tokens_SM[all_steps, one][:, None, None] - lost_tokens,
            layout.square_SM[all_steps, one][:, None, None] - lost_square,
        )
        badness_other = layout.badness(
            layout.tokens_SM[all_steps, other][:, None, None] + lost_tokens,
            layout.square_SM[all_steps, other][:, None, None] + lost_square,
        )

        # each step's best swap, where it is better than none
        after = (badness_one + badness_other).reshape(steps, -1)
        before = badness_SM[all_steps, one] + badness_SM[all_steps, other]
        best = after.argmin(1)
        helps = np.flatnonzero(after[all_steps, best] < before - LEAST_GAIN)
        slot_of_one = slots[best[helps] // len(slots)]
        slot_of_other = slots[best[helps] % len(slots)]
        layout.swap(helps, one[helps], slot_of_one, other[helps], slot_of_other)
    return layout.micro_of()


class Layout:
    """Which conversation lies in which slot of its step's micro-batches, and what follows from it.

    i_SMQ int64, conversations or EMPTY; length_SMQ fp64, their lengths or 0. tokens_SM and
    square_SM fp64: the sum of the lengths of a micro-batch, and of length^2. mean_tokens,
    mean_square, mean_cost [S]: what each micro-batch of a step should have.
    """

    def __init__(
        self, problem: Problem, step_of: np.ndarray, micro_of: np.ndarray, steps: int
    ) -> None:
        M = problem.M
        self.cost = problem.cost
        self.capacity = problem.capacity
        i_SMQ = members_of(problem.lengths, step_of * M + micro_of, steps * M)
        i_SMQ = i_SMQ.reshape(steps, M, -1)
        # an empty slot at the end of each, so that a conversation can be moved there
        self.i_SMQ = np.concatenate([i_SMQ, np.full((steps, M, 1), EMPTY)], 2)
        self.slots = self.i_SMQ.shape[2]

        lengths_SMQ = np.where(self.i_SMQ != EMPTY, problem.lengths[self.i_SMQ], 0)
        self.length_SMQ = lengths_SMQ.astype(np.float64)
        self.tokens_SM = self.length_SMQ.sum(2)
        self.square_SM = (self.length_SMQ**2).sum(2)

        # swaps within a step do not change its means; at least 1: a step may be empty
        self.mean_tokens = np.maximum(self.tokens_SM.mean(1), 1)
        self.mean_square = np.maximum(self.square_SM.mean(1), 1)
        linear, quadratic = self.cost
        self.mean_cost = linear * self.mean_tokens + quadratic * self.mean_square

    def badness(self, tokens: np.ndarray, square: np.ndarray) -> np.ndarray:
        """How far micro-batches with so many tokens and such a sum(length^2) are from what they
        should be: fp64 [S, ..], the shape of both arguments.
        """
        # the step is the first axis; all others are alike
        shape = [-1] + [1] * (tokens.ndim - 1)
        linear, quadratic = self.cost
        mean_cost = self.mean_cost.reshape(shape)
        mean_square = self.mean_square.reshape(shape)
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
        """In each of these steps, swap a slot of micro-batch `one` with a slot of `other`."""
        length_one = self.length_SMQ[step, one, slot_of_one]
        length_other = self.length_SMQ[step, other, slot_of_other]
        self.tokens_SM[step, one] -= length_one - length_other
        self.tokens_SM[step, other] += length_one - length_other
        self.square_SM[step, one] -= length_one**2 - length_other**2
        self.square_SM[step, other] += length_one**2 - length_other**2

        self.length_SMQ[step, one, slot_of_one] = length_other
        self.length_SMQ[step, other, slot_of_other] = length_one
        i_one = self.i_SMQ[step, one, slot_of_one]
        self.i_SMQ[step, one, slot_of_one] = self.i_SMQ[step, other, slot_of_other]
        self.i_SMQ[step, other, slot_of_other] = i_one

    def micro_of(self) -> np.ndarray:
        """int64 [N]: the micro-batch in which each conversation lies now."""
        used_SMQ = self.i_SMQ != EMPTY
        _, micro, _ = np.nonzero(used_SMQ)
        found = np.empty(len(micro), np.int64)
        found[self.i_SMQ[used_SMQ]] = micro
        return found


def pick_two(r: int, badness_SM: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """(one, other), int64 [S]: the two micro-batches of each step that round r looks at."""
    steps, M = badness_SM.shape
    all_steps = np.arange(steps)
    tokens_off_SM = layout.tokens_SM / layout.mean_tokens[:, None] - 1
    square_off_SM = layout.square_SM / layout.mean_square[:, None] - 1

    # `one` is the worst. In every third round it is the one that is most off in tokens instead: the
    # worst may have no swap that helps, and the others are to have their turn.
    if r % 3 == 0:
        one = np.abs(tokens_off_SM).argmax(1)
    else:
        one = badness_SM.argmax(1)

    # `other` is by turns the one that is most off in the other direction, which can take what `one`
    # has too much of, and simply the next one, then the one after, so that no pair is left out.
    if r % 2 == 1:
        direction = np.sign(tokens_off_SM[all_steps, one])[:, None]
        off_SM = COST_COUNTS * tokens_off_SM + square_off_SM
        other = (off_SM * direction).argmin(1)
    else:
        further = r // 2 % (M - 1)
        other = (one + 1 + further) % M
    # never one micro-batch with itself: where both are even, argmin may find `one` again
    other = np.where(other == one, (other + 1) % M, other)
    return one, other


def slots_to_try(r: int, slots: int) -> np.ndarray:
    """int64, rising: the slots of a micro-batch whose swaps round r tries."""
    if slots <= MOST_SLOTS:
        return np.arange(slots)
    # Of many, some: evenly spread, since they are sorted by length, and others in each round.
    evenly = np.arange(MOST_SLOTS) * slots // MOST_SLOTS
    shifted = (evenly + r) % slots
    # always the last one, which is empty
    return np.unique(np.append(shifted, slots - 1))


def flat(steps: Steps) -> np.ndarray:
    """int64: all conversations of these steps, in their order."""
    micro_batches = itertools.chain.from_iterable(steps)
    return np.concatenate(list(micro_batches))


# ---- from conversations to a batch


def pack(
    conversations: list[tuple[np.ndarray, np.ndarray]], class_ids: np.ndarray | None = None
) -> "Batch":
    """One micro-batch: conversations, (tokens [n], weights [n]) each, end to end in one flat row.

    class_ids [N], or None where classes do not matter: then all are of class 0.

    `tokenize` gives a token the weight of predicting it. Row t of the model's output predicts token
    t + 1, so here labels and weights move one row up; it is the only shift of the whole method:

        row t       0       1       2       3       4       5     | 6       7
        token       <s>     User:   hi      Asst:   hello   END   | <s>     User:
        its weight  0       0       0       0       w       w     | 0       0
                          /       /       /       /       /               /
        label       User:   hi      Asst:   hello   END     0     | User:   ..
        weight      0       0       0       w       w       0     | 0       ..

    The last row of a conversation predicts nothing: label 0 and weight 0. The row before an answer
    has a weight, since it has to begin the answer.
    """
    lengths = np.array([len(tokens) for tokens, _ in conversations])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    if class_ids is None:
        class_ids = np.zeros(len(lengths))
    class_ids = np.asarray(class_ids, np.int64)

    tokens_T = np.concatenate([tokens for tokens, _ in conversations]).astype(np.int64)
    token_weights_T = np.concatenate([weights for _, weights in conversations]).astype(np.float32)

    # The shift. What it carries from one conversation into another (roll: from the first into the
    # last) arrives in a last row, and is overwritten.
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
    """One micro-batch, flat: row t holds token t of the packed row, and learns to predict
    labels_T[t], which counts weights_T[t] in the loss.
    """

    tokens_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64, from 0 in each conversation
    labels_T: torch.Tensor  # int64
    weights_T: torch.Tensor  # fp32
    # int32 [N + 1]: where each conversation starts, and the end of the last. Tokens attend only
    # within their own conversation.
    cu_seqlens: torch.Tensor
    max_seqlen: int
    # int64, the rows with a weight: no other row goes through the vocabulary projection
    rows_R: torch.Tensor
    class_R: torch.Tensor  # int64, their classes, for the log

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
    """The same batches, but a thread makes the next two while the caller computes.

    pin: put them into pinned memory, from which a GPU can copy while it computes.
    """
    ready = queue.Queue(maxsize=2)
    end = object()

    def make() -> None:
        try:
            for batch in batches:
                ready.put(batch.map(torch.Tensor.pin_memory) if pin else batch)
            ready.put(end)
        # whatever happens here: the caller waits for a batch, and gets the error in its place
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
