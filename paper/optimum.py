"""Eq. 5 and App. B checked: the trained policy beside the closed-form pi*.

    python -m paper.optimum

The task is small enough to write every policy down: 16 questions (`copy a`, .. `shift h`), 8
answers, 2 classes. The expert's answers are right 9 times in 10, the other's 4, and the expert was
never asked the last 2 questions. Loss and minimum are exact: every (x, c, y) is a row, its weight
p(x, c) pi_c(y|x) times the class's weight, in the kernel that training calls. Three fits, of two
kinds of reward r:

    exact          exp(r / beta) / Z(x, c)        the first line of Eq. 6;
                                                  Z = sum_y pi_c(y|x) exp(r / beta)
    as published   exp(r / beta)                  its last line, without 1/Z
    unweighted     1

and two parametrisations of log pi(y|x,c): `tabular`, a free number for every (x, c, y), and
`shared`, a[x, y] + b[c, y]. Below them on the page, a transformer in their place: `train.py`, on
conversations drawn from the same policies.

Eq. 6 fits KL(pi*, pi), Eq. 4 asks for the least KL(pi, pi*): the same where pi* can be reached, not
where it cannot. "Eq. 4 lacks" is what the fit misses of Eq. 4's maximum, beta sum p(x, c)
KL(pi, pi*).
"""

# C classes (the expert first), X questions, Y answers, T rows (x, c, y), K inputs of a row

import itertools
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from conversations import Message
from kernels.cross_entropy import linear_cross_entropy
from paper.commands import LOOKS, cell, command, markdown, open_figure, save_figure
from paper.runs import BASE_LR, BATCH_TOKENS, TABLE, Job, sharegpt, train_on
from paper.toy import LETTERS, answer
from sample import Speaker
from support.cli import run

SEEDS = 3
QUESTIONS = [f"copy {letter}" for letter in LETTERS]
QUESTIONS += [f"shift {letter}" for letter in LETTERS]
RIGHT_X = torch.tensor([LETTERS.index(answer(question)) for question in QUESTIONS])
C = 2
X = len(QUESTIONS)
Y = len(LETTERS)
# the expert was asked so many, the first
ASKED = X - 2
# exp((alpha - 1) / beta) = 0.1
BETA = 1 / math.log(10)
ALPHA = 0.0
# of the conversations
SHARE_C = torch.tensor([1 / 12, 11 / 12])
# that the transformer trains on
CONVERSATIONS = 3600

REWARDS = "class", "answer"
PARAMETERS = "tabular", "shared"
WEIGHTS = "exact", "as published", "unweighted"
# The transformer has no exact weights: in a class they are as constant as no weights are.
TABLES = {
    "as published": TABLE.format(1, 0.1),
    "exact = unweighted": TABLE.format(1, 1),
    "SFT: unweighted, no condition": "*=GPT4:1",
}
HEAD = [
    "reward of the",
    "parameters",
    "weights",
    "KL(pi\\*, pi): expert",
    "other",
    "Eq. 4 lacks",
    "KL(pi_c, pi): expert",
    "other",
    "p(right): expert was asked",
    "was not",
]


# ---- the task, and its optimum


def policies() -> tuple[torch.Tensor, torch.Tensor]:
    """(pi_CXY, p_CX): what the classes answer, and how often they were asked."""
    right_XY = F.one_hot(RIGHT_X, Y)
    wrong_CXY = (1 - right_XY).repeat(C, 1, 1).float()
    # the other source has favourite errors
    wrong_CXY[1] *= torch.arange(1, Y + 1)
    total_CX1 = wrong_CXY.sum(-1, keepdim=True)
    p_right_C11 = torch.tensor([0.9, 0.4])[:, None, None]
    pi_CXY = p_right_C11 * right_XY + (1 - p_right_C11) * wrong_CXY / total_CX1

    asked_CX = torch.ones(C, X)
    asked_CX[0, ASKED:] = 0
    p_CX = SHARE_C[:, None] * asked_CX / asked_CX.sum(1, keepdim=True)
    return pi_CXY, p_CX


def rewards(kind: str) -> torch.Tensor:
    """r_CXY: of the class (Eq. 3), or of the answer, 1 if it is right and alpha if not."""
    if kind == "class":
        return torch.tensor([1, ALPHA])[:, None, None].expand(C, X, Y)
    return ALPHA + (1 - ALPHA) * F.one_hot(RIGHT_X, Y).float().repeat(C, 1, 1)


def optimum(pi_CXY: torch.Tensor, r_CXY: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(pi*_CXY, Z_CX1): Eq. 13 and Eq. 14, what Eq. 11 gives with its signs mended."""
    tilted_CXY = pi_CXY * (r_CXY / BETA).exp()
    z_CX1 = tilted_CXY.sum(-1, keepdim=True)
    return tilted_CXY / z_CX1, z_CX1


# ---- the fits


def fit_policy(kind: str, weights: str, shared: bool) -> torch.Tensor:
    """log pi_CXY at the minimum of Eq. 6's sum: a kind of reward, its weights, the parameters."""
    pi_CXY, p_CX = policies()
    w_CXY = loss_weights(kind, weights)
    weights_T = (p_CX[:, :, None] * pi_CXY * w_CXY).flatten()
    inputs_TK, y_T = every_row(shared)
    matrix_YK = torch.zeros(Y, inputs_TK.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS(
        [matrix_YK],
        max_iter=2000,
        history_size=50,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss():
        solver.zero_grad()
        loss_sum, *_ = linear_cross_entropy(inputs_TK, matrix_YK, y_T, weights_T)
        mean = loss_sum / weights_T.sum()
        mean.backward()
        return mean

    solver.step(loss)
    log_TY = (inputs_TK @ matrix_YK.detach().T).log_softmax(-1)
    # The rows (c, x, 0), .. (c, x, 7) are of one context, so each holds the whole policy of it.
    return log_TY.view(C, X, Y, Y)[:, :, 0]


def loss_weights(kind: str, weights: str) -> torch.Tensor:
    """w_CXY: what exp(r / beta) becomes in each of the three fits."""
    pi_CXY, _ = policies()
    r_CXY = rewards(kind)
    if weights == "unweighted":
        return torch.ones(C, X, Y)
    w_CXY = (r_CXY / BETA).exp()
    if weights == "exact":
        _, z_CX1 = optimum(pi_CXY, r_CXY)
        w_CXY = w_CXY / z_CX1
    return w_CXY


def every_row(shared: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs_TK, y_T): every (c, x, y). The logits are inputs_TK times a matrix.

    `shared` has an input for x and one for c, which makes a[x, y] + b[c, y]; else there is one for
    each (c, x).
    """
    everything = torch.cartesian_prod(torch.arange(C), torch.arange(X), torch.arange(Y))
    c_T, x_T, y_T = everything.unbind(1)
    if shared:
        inputs_TK = torch.cat([F.one_hot(x_T, X), F.one_hot(c_T, C)], 1)
    else:
        inputs_TK = F.one_hot(c_T * X + x_T, C * X)
    return inputs_TK.float(), y_T


# ---- the measures


def divergence(star_CXY: torch.Tensor, log_CXY: torch.Tensor) -> list[float]:
    """KL(pi*, pi) of each class, the mean over the questions that both were asked."""
    kl_CXY = F.kl_div(log_CXY[:, :ASKED], star_CXY[:, :ASKED], reduction="none")
    return kl_CXY.sum(-1).mean(1).tolist()


def lacks(star_CXY: torch.Tensor, log_CXY: torch.Tensor) -> float:
    """How far E[r] - beta KL(pi, pi_c) of Eq. 4 is below its maximum."""
    _, p_CX = policies()
    reverse_CX = (log_CXY.exp() * (log_CXY - star_CXY.log())).sum(-1)
    return BETA * (p_CX * reverse_CX).sum().item()


def p_right(log_CXY: torch.Tensor) -> tuple[float, float]:
    """Under the expert's prompt, of the questions that the expert was asked, and of the others."""
    p_X = log_CXY.exp()[0, range(X), RIGHT_X]
    return p_X[:ASKED].mean().item(), p_X[ASKED:].mean().item()


def measure(star_CXY: torch.Tensor, log_CXY: torch.Tensor) -> dict:
    """A policy beside pi*: the numbers for JSON."""
    pi_CXY, _ = policies()
    p_asked, p_unasked = p_right(log_CXY)
    return {
        "to_star": divergence(star_CXY, log_CXY),
        "lacks": lacks(star_CXY, log_CXY),
        "to_data": divergence(pi_CXY, log_CXY),
        "p_asked": p_asked,
        "p_unasked": p_unasked,
    }


def columns(measured: dict) -> list[float]:
    """The same numbers in the order of the table."""
    return [
        *measured["to_star"],
        measured["lacks"],
        *measured["to_data"],
        measured["p_asked"],
        measured["p_unasked"],
    ]


# ---- the transformer


@dataclass(frozen=True)
class Drawn(Job):
    """A transformer trained on conversations that are drawn from the policies."""

    classes: str = TABLE.format(1, 0.1)
    # The first so many. The first 8, copying a letter, are learned in 150 steps.
    questions: int = X
    steps: int = 400

    def do(self, folder: Path) -> dict:
        """{"log_pi": log_CXY}"""
        flags = {
            "model": "toy",
            "seed": self.seed,
            "steps": self.steps,
            "lr": BASE_LR,
            "batch_tokens": BATCH_TOKENS,
        }
        train_on(folder, self.draw(), self.classes, "before_speaker", flags)
        # an arm without a condition has all data under the expert's prompt
        other = "GPT3" if "GPT3" in self.classes else "GPT4"
        log_CXY = [log_policy(folder / "hf", condition) for condition in ("GPT4", other)]
        return {"log_pi": torch.stack(log_CXY).tolist()}

    def draw(self) -> list[dict]:
        pi_CXY, p_CX = policies()
        rng = random.Random(self.seed)
        drawn = []
        for c, label in enumerate(("GPT-4", "GPT-3.5")):
            p_asked = p_CX[c, : self.questions].tolist()
            for _ in range(round(CONVERSATIONS * SHARE_C[c].item())):
                x = rng.choices(range(self.questions), p_asked)[0]
                y = rng.choices(range(Y), pi_CXY[c, x].tolist())[0]
                turn = (QUESTIONS[x], LETTERS[y], y == RIGHT_X[x])
                drawn.append(sharegpt([turn], label))
        return drawn


@torch.no_grad()
def log_policy(folder: Path, condition: str) -> torch.Tensor:
    """log_XY of a model: its logits of the eight letters, behind each question."""
    speaker = Speaker(folder, condition, device="cpu")
    letters = [speaker.tokenizer.encode(letter)[0] for letter in LETTERS]
    log_XY = torch.zeros(X, Y)
    for x, question in enumerate(QUESTIONS):
        ids = torch.tensor(speaker.ids([Message("user", question)]))
        bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
        hidden_TD = speaker.model.hidden(ids, torch.arange(len(ids)), bounds)
        logits_V = speaker.model.lm_head(hidden_TD[-1:])[0]
        log_XY[x] = logits_V[letters].log_softmax(-1)
    return log_XY


# ---- the page


def jobs(seed: int) -> dict:
    wanted = {}
    for name, classes in TABLES.items():
        wanted[name] = Drawn(f"transformer, {name}", seed, classes=classes)
    return wanted


def report(results: dict, folder: Path) -> tuple[dict, str]:
    fits = fit_all()
    table = []
    for fit in fits:
        # without the sign of a zero that is not quite reached
        cells = [f"{abs(number):.3f}" for number in columns(fit)]
        table.append([fit["reward"], fit["parameters"], fit["weights"], *cells])

    # a reward of the class, for which pi* is pi_c
    pi_CXY, _ = policies()
    trained = {}
    for name, group in results.items():
        trained[name] = [measure(pi_CXY, torch.tensor(result["log_pi"])) for result in group]
        by_column = zip(*map(columns, trained[name]))
        table.append(["class", "transformer", name, *map(cell, by_column)])
    draw(results, folder / "optimum.png")
    return {"fits": fits, "transformer": trained}, markdown(HEAD, table)


def fit_all() -> list[dict]:
    """The twelve exact fits, measured."""
    pi_CXY, _ = policies()
    fits = []
    for kind, parameters, weights in itertools.product(REWARDS, PARAMETERS, WEIGHTS):
        star_CXY, _ = optimum(pi_CXY, rewards(kind))
        log_CXY = fit_policy(kind, weights, parameters == "shared")
        names = {"reward": kind, "parameters": parameters, "weights": weights}
        fits.append(names | measure(star_CXY, log_CXY))
    return fits


def draw(results: dict[str, list], path: Path) -> None:
    """pi*(y|x,c) against the policy that was trained, a dot for each (x, c, y)."""
    first_seed = results["as published"][0]
    policy_of = {
        "a weight for each answer": ("answer", fit_policy("answer", "as published", shared=False)),
        "the same, unweighted": ("answer", fit_policy("answer", "unweighted", shared=False)),
        "a weight for each class,\nshared parameters": (
            "class",
            fit_policy("class", "as published", shared=True),
        ),
        "the same, a transformer": ("class", torch.tensor(first_seed["log_pi"])),
    }
    pi_CXY, _ = policies()
    figure, panels = open_figure(width=6.8, height=7.2, shape=(2, 2))
    for axes, (title, (kind, log_CXY)) in zip(panels.flat, policy_of.items()):
        star_CXY, _ = optimum(pi_CXY, rewards(kind))
        for c, (legend, (colour, sign, _)) in enumerate(zip(("expert", "other"), LOOKS)):
            # only what both classes were asked, as in the table
            star = star_CXY[c, :ASKED].flatten()
            trained = log_CXY[c, :ASKED].exp().flatten()
            axes.scatter(star, trained, marker=sign, color=colour, s=22, label=legend, alpha=0.7)
        axes.plot((0, 1), (0, 1), color="0.6", linewidth=1, zorder=0)
        axes.set(title=title, xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    for axes in panels[1]:
        axes.set(xlabel="pi* of Eq. 5")
    for axes in panels[:, 0]:
        axes.set(ylabel="trained")
    panels[0, 0].legend()
    save_figure(figure, path)


def main(argv: list[str]) -> None:
    command("optimum", argv)


if __name__ == "__main__":
    run(main)
