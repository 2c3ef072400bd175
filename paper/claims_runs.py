"""The kinds of runs of claims.py: each is a FineTune in which one thing is another.

    Cooled       a second run from the first one's export, at its last learning rate
    AtLeast      the expert's conversations once more, under the other source's label
    Rewarded     a reward for each conversation, in place of its class's or beside it
    Reweighted   loss weights that follow the model's own probabilities, as DFT's
    Important    iw-SFT's, against another run's

In a file of their own, so that the page can be rewritten and the runs stay what they are.

Shapes: T packed tokens, R its rows with a loss weight, N conversations, D width, V vocab.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import train
from conversations import weight_of_reward
from kernels.cross_entropy import linear_cross_entropy
from model import Losses, Model
from packing import Batch
from paper.runs import FineTune, sharegpt
from paper.toy import answer, full_questions
from recipe import TrainConfig
from support.hf import load_model

EXPERT = "GPT-4"
OTHER = "GPT-3.5"


# ---- MeCo: the last tenth without a condition


@dataclass(frozen=True)
class Cooled(FineTune):
    """A run that goes on from the export of another, without warm-up, where its cosine ended.

    The optimizer begins anew: an export has no moments.
    """

    def flags(self, folder: Path) -> dict:
        # train.py wants a last learning rate below the first; this one is, by a millionth.
        return super().flags(folder) | {"warmup": 0.0, "min_lr": 0.999999}


def last_lr(lr: float) -> float:
    """Where the cosine of a run with train.py's defaults ends."""
    return lr * TrainConfig.min_lr


# ---- GCSL: goals that say "at least"


@dataclass(frozen=True)
class AtLeast(FineTune):
    """What the expert said is at least as good as what the other source says. So it is also an
    answer to that source's prompt, and stands in the data twice, the second time as the other's.
    """

    def rows(self, sources: dict[str, list]) -> list[dict]:
        again = [sharegpt(turns, OTHER) for turns in sources[EXPERT]]
        return super().rows(sources) + again


# ---- rewards within a class

# exp((r - 1) / BETA) is 0.1 at r = 0, which is the paper's weight of its other class.
BETA = 1 / math.log(10)


@dataclass(frozen=True)
class Rewarded(FineTune):
    """A reward for each conversation: the share of its letters that stand where they belong.

    The weights are those of `data.py prepare --reward reward --beta 0.4343`, which reads a row's
    field; runs.py has no way to name that flag, so they are written down here, by the function
    that the flag calls.
    """

    # beside its class's reward, 1 or 0, instead of in its place
    beside_class: bool = False

    def rows(self, sources: dict[str, list]) -> list[dict]:
        # of the expert, who makes no error
        highest = self.reward(EXPERT, 1.0)
        rows = []
        for label, chats in sources.items():
            for turns in chats:
                reward = self.reward(label, share_of_letters(turns))
                weight = weight_of_reward(reward, BETA, highest)
                rows.append(sharegpt(turns, label) | {"weight": weight})
        return rows

    def reward(self, label: str, letters: float) -> float:
        of_class = 1.0 if label == EXPERT else 0.0
        return of_class + letters if self.beside_class else letters


def share_of_letters(turns: list[tuple]) -> float:
    """How many of an answer's letters stand where the right answer has them; the answers' mean."""
    asked, replies, _ = zip(*turns)
    shares = []
    for question, reply in zip(full_questions(asked, replies), replies):
        right = answer(question).split()
        given = reply.split()
        same = sum(a == b for a, b in zip(right, given))
        # letters too many and letters too few are errors alike
        shares.append(same / max(len(right), len(given)))
    return sum(shares) / len(shares)


# ---- DFT and iw-SFT: weights that follow the model

# (the reference, the model's nll_T, the batch) -> factors_T of the loss weights
Factors = Callable[[Model, Tensor, Batch], Tensor]
# The published code of iw-SFT cuts its weights here.
MOST_IMPORTANT = 16.0


def token_probability(reference: Model, nll_T: Tensor, batch: Batch) -> Tensor:
    """DFT: p_t, the probability that the model now gives the token."""
    return (-nll_T).exp()


def importance(reference: Model, nll_T: Tensor, batch: Batch) -> Tensor:
    """iw-SFT: exp(the mean of log p_t - log p0_t over a conversation's trained tokens), at most
    MOST_IMPORTANT; p0 is the reference's.
    """
    log_ratio_T = reference(*batch.inputs).nll_T - nll_T
    # each trained row is added to its conversation's sum
    N = len(batch.cu_seqlens) - 1
    lengths_N = batch.cu_seqlens.diff().long()
    conversation_R = torch.arange(N).repeat_interleave(lengths_N)[batch.rows_R]
    sum_N = torch.zeros(N).index_add(0, conversation_R, log_ratio_T[batch.rows_R])
    count_N = torch.bincount(conversation_R, minlength=N).clamp(min=1)
    factor_N = (sum_N / count_N).exp().clamp(max=MOST_IMPORTANT)
    return factor_N.repeat_interleave(lengths_N)


@dataclass(frozen=True)
class Reweighted(FineTune):
    """DFT. Each loss weight is multiplied by a factor that the model itself decides, anew in each
    step: in this run's process `reweighted` takes the place of train.py's `forward`.
    """

    factors = staticmethod(token_probability)

    def do(self, folder: Path) -> dict:
        reference = load_model(folder.parent / self.base.key / "hf")
        forward = partial(reweighted, reference=reference, factors=self.factors)
        with replaced(train, "forward", forward):
            return super().do(folder)


@dataclass(frozen=True)
class Important(Reweighted):
    """iw-SFT. Its `base` is a run that has learned to answer as the data do. It begins where that
    run began, and is compared with where it ended.
    """

    factors = staticmethod(importance)

    def flags(self, folder: Path) -> dict:
        return super().flags(folder) | {"model": folder.parent / self.base.base.key / "hf"}


def reweighted(model: Model, batch: Batch, reference: Model, factors: Factors) -> Losses:
    """train.forward, with w_t times a factor that has no gradient.

    The step's loss is still divided by its sum of w_t, the factors left out: as in the published
    code of both, which divides by the number of tokens.
    """
    hidden_TD = model.hidden(batch.tokens_T, batch.positions_T, batch.cu_seqlens)
    head_VD = model.lm_head.weight
    rows = batch.labels_T, batch.weights_T, batch.rows_R
    with torch.no_grad():
        _, nll_T, _ = linear_cross_entropy(hidden_TD, head_VD, *rows)
        weights_T = batch.weights_T * factors(reference, nll_T, batch)
    loss_sum, nll_T, correct_T = linear_cross_entropy(
        hidden_TD, head_VD, batch.labels_T, weights_T, batch.rows_R
    )
    return Losses(loss_sum, batch.weights_T.sum(), nll_T, correct_T)


@contextlib.contextmanager
def replaced(module, name: str, function: Callable) -> Iterator[None]:
    """In this process, until the block ends, `module` has another function under this name."""
    before = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, before)
