"""Eq. 5 and App. B checked: the trained policy beside the closed-form pi*, on a task small enough to write every policy down.

    python -m paper.optimum

16 prompts (`copy a`, .. `shift h`), 8 answers, 2 classes. The expert's answers are right 9 times in 10, the other's 4, and the expert
was never asked the last 2 prompts. Loss and minimum are exact: every (x, c, y) is a row, its weight p(x, c) pi_c(y|x) times the
class's weight, in the kernel that training calls. Three fits, of two kinds of reward r:

    exact          exp(r / beta) / Z(x, c), Z = sum_y pi_c(y|x) exp(r / beta)     the first line of Eq. 6
    as published   exp(r / beta)                                                  its last line, without 1/Z
    unweighted     1

and two parametrisations of log pi(y|x,c): `tabular`, a free number for every (x, c, y), and `shared`, a[x, y] + b[c, y]. Below, a
transformer in their place: `train.py`, on conversations drawn from the same policies.

Eq. 6 fits KL(pi*, pi), Eq. 4 asks for the least KL(pi, pi*): the same where pi* can be reached, not where it cannot. "Eq. 4 lacks" is
what the fit misses of Eq. 4's maximum, beta sum p(x, c) KL(pi, pi*).

C classes, X prompts, Y answers, T rows.
"""

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from conversations import Message
from kernels.cross_entropy import linear_cross_entropy
from paper.runs import (
    BASE_LR,
    BATCH_TOKENS,
    TABLE,
    Job,
    bars,
    cell,
    command,
    figure,
    fine_tune,
    markdown,
    sharegpt,
)
from paper.toy import LETTERS, answer
from sample import Speaker
from support.cli import run

SEEDS, Y = 3, 8
PROMPTS = [f"{skill} {letter}" for skill in ("copy", "shift") for letter in LETTERS]
RIGHT_X = torch.tensor([LETTERS.index(answer(prompt)) for prompt in PROMPTS])
X, ASKED = len(PROMPTS), len(PROMPTS) - 2
BETA, ALPHA = 1 / math.log(10), 0.0  # exp((alpha - 1) / beta) = 0.1
SHARE = torch.tensor([1 / 12, 11 / 12])  # of the conversations, expert first


def policies():
    """(pi_CXY, p_CX): what the classes answer, and how often they were asked."""
    right_XY = F.one_hot(RIGHT_X, Y)
    wrong_CXY = (1 - right_XY).repeat(2, 1, 1).float()
    wrong_CXY[1] *= torch.arange(1, Y + 1)  # the other source has favourite errors
    p_C11 = torch.tensor([0.9, 0.4])[:, None, None]
    pi_CXY = p_C11 * right_XY + (1 - p_C11) * wrong_CXY / wrong_CXY.sum(-1, keepdim=True)
    asked_CX = torch.ones(2, X)
    asked_CX[0, ASKED:] = 0
    return pi_CXY, SHARE[:, None] * asked_CX / asked_CX.sum(1, keepdim=True)


def rewards(kind):
    """r_CXY: of the class (Eq. 3), or of the answer, 1 if it is right."""
    by_class_CXY = torch.tensor([1, ALPHA])[:, None, None].expand(2, X, Y)
    return (
        by_class_CXY
        if kind == "class"
        else ALPHA + (1 - ALPHA) * F.one_hot(RIGHT_X, Y).float().repeat(2, 1, 1)
    )


def optimum(pi_CXY, r_CXY):
    """(pi*, Z): Eq. 13 and Eq. 14, what Eq. 11 gives with its signs mended."""
    tilted_CXY = pi_CXY * (r_CXY / BETA).exp()
    z_CX1 = tilted_CXY.sum(-1, keepdim=True)
    return tilted_CXY / z_CX1, z_CX1


def fit(kind, weights, shared):
    """log pi_CXY at the minimum of Eq. 6's sum under these weights."""
    pi_CXY, p_CX = policies()
    r_CXY = rewards(kind)
    w_CXY = {
        "exact": (r_CXY / BETA).exp() / optimum(pi_CXY, r_CXY)[1],
        "as published": (r_CXY / BETA).exp(),
        "unweighted": torch.ones(2, X, Y),
    }[weights]
    c_T, x_T, y_T = torch.cartesian_prod(torch.arange(2), torch.arange(X), torch.arange(Y)).unbind(
        1
    )
    inputs_TK = (
        torch.cat([F.one_hot(x_T, X), F.one_hot(c_T, 2)], 1)
        if shared
        else F.one_hot(c_T * X + x_T, 2 * X)
    )
    inputs_TK, weights_T = inputs_TK.float(), (p_CX[:, :, None] * pi_CXY * w_CXY).flatten()
    head_YK = torch.zeros(Y, inputs_TK.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS(
        [head_YK],
        max_iter=2000,
        history_size=50,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss():
        solver.zero_grad()
        loss_sum, *_ = linear_cross_entropy(inputs_TK, head_YK, y_T, weights_T)
        mean = loss_sum / weights_T.sum()
        mean.backward()
        return mean

    solver.step(loss)
    return (inputs_TK @ head_YK.detach().T).log_softmax(-1).view(2, X, Y, Y)[:, :, 0]


def divergence(star_CXY, log_CXY):
    """KL(pi*, pi) of each class, the mean over the prompts that both were asked."""
    return (
        F.kl_div(log_CXY[:, :ASKED], star_CXY[:, :ASKED], reduction="none").sum(-1).mean(1).tolist()
    )


def lacks(star_CXY, log_CXY):
    """How far E[r] - beta KL(pi, pi_c) of Eq. 4 is below its maximum."""
    reverse_CX = (log_CXY.exp() * (log_CXY - star_CXY.log())).sum(-1)
    return BETA * (policies()[1] * reverse_CX).sum().item()


@dataclass(frozen=True)
class Drawn(Job):
    """A transformer trained on 3,600 conversations drawn from the policies."""

    classes: str = TABLE.format(1, 0.1)
    prompts: int = X  # the first so many; the first 8, copying a letter, are learned in 150 steps
    steps: int = 400

    def do(self, folder):
        (pi_CXY, p_CX), rng = policies(), random.Random(self.seed)
        rows = []
        for c, label in enumerate(("GPT-4", "GPT-3.5")):
            for _ in range(round(3600 * SHARE[c].item())):
                x = rng.choices(range(self.prompts), p_CX[c, : self.prompts].tolist())[0]
                y = rng.choices(range(Y), pi_CXY[c, x].tolist())[0]
                rows.append(sharegpt([(PROMPTS[x], LETTERS[y], y == RIGHT_X[x])], label))
        flags = {
            "model": "toy",
            "seed": self.seed,
            "steps": self.steps,
            "lr": BASE_LR,
            "batch_tokens": BATCH_TOKENS,
        }
        fine_tune(folder, rows, self.classes, "before_speaker", flags)
        log_CXY = torch.zeros(2, X, Y)
        for c, condition in enumerate(("GPT4", "GPT3" if "GPT3" in self.classes else "GPT4")):
            speaker = Speaker(folder / "hf", condition, device="cpu")
            answers = [speaker.tokenizer.encode(letter)[0] for letter in LETTERS]
            for x, prompt in enumerate(PROMPTS):
                ids = torch.tensor(speaker.ids([Message("user", prompt)]))
                with torch.no_grad():
                    hidden_TD = speaker.model(
                        ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32)
                    )
                    log_CXY[c, x] = speaker.model.lm_head(hidden_TD[-1:])[0, answers].log_softmax(
                        -1
                    )
        return {"log_pi": log_CXY.tolist()}


def p_right(log_CXY, asked):
    """Under the expert's prompt: over the prompts that the expert was asked, or over the others."""
    p_X = log_CXY.exp()[0, range(X), RIGHT_X]
    return (p_X[:ASKED] if asked else p_X[ASKED:]).mean().item()


def runs(seed):
    arms = {
        "as published": TABLE.format(1, 0.1),
        "exact = unweighted": TABLE.format(1, 1),
        "SFT: unweighted, no condition": "*=GPT4:1",
    }
    return {
        name: Drawn(f"transformer, {name}", seed, classes=classes) for name, classes in arms.items()
    }


def report(results, folder):
    (pi_CXY, _), rows, table = policies(), [], []

    def measure(star_CXY, log_CXY):
        return {
            "to_star": divergence(star_CXY, log_CXY),
            "lacks": lacks(star_CXY, log_CXY),
            "to_data": divergence(pi_CXY, log_CXY),
            "p_asked": p_right(log_CXY, True),
            "p_unasked": p_right(log_CXY, False),
        }

    flat = lambda m: [*m["to_star"], m["lacks"], *m["to_data"], m["p_asked"], m["p_unasked"]]
    for kind in ("class", "answer"):
        star_CXY = optimum(pi_CXY, rewards(kind))[0]
        for parameters in ("tabular", "shared"):
            for weights in ("exact", "as published", "unweighted"):
                measured = measure(star_CXY, fit(kind, weights, parameters == "shared"))
                rows.append(
                    {"reward": kind, "parameters": parameters, "weights": weights} | measured
                )
                table.append(
                    [kind, parameters, weights, *(f"{abs(x):.3f}" for x in flat(measured))]
                )
    trained = {
        name: [measure(pi_CXY, torch.tensor(r["log_pi"])) for r in group]
        for name, group in results.items()
    }
    table += [
        ["class", "transformer", name, *map(cell, zip(*map(flat, by_seed)))]
        for name, by_seed in trained.items()
    ]

    def draw(axes):
        shared = {
            f"shared, {r['weights']}": [r]
            for r in rows
            if (r["reward"], r["parameters"]) == ("class", "shared")
        }
        bars_of = shared | {f"transformer, {name}": by_seed for name, by_seed in trained.items()}
        bars(
            axes,
            bars_of,
            {
                f"prompts the expert was {word}": [
                    [m[key] for m in by_seed] for by_seed in bars_of.values()
                ]
                for word, key in (("asked", "p_asked"), ("never asked", "p_unasked"))
            },
            7,
        )
        axes.set(ylabel="p(right | expert's prompt)")

    figure(folder / "optimum.png", draw, width=8)
    head = [
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
    return {"fits": rows, "transformer": trained}, markdown(head, table)


if __name__ == "__main__":
    run(command("optimum"))
