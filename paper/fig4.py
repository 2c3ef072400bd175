"""Fig. 4 in miniature: do the representations of the two classes part, under SFT and C-RLFT?

    python -m paper.fig4

The paper's picture is UMAP of the mean over all tokens' last-layer states. Ours is PCA of the same
mean, with two numbers beside it: the accuracy of a linear probe on the full states, on
conversations it was not fitted to, and the silhouette in the picture's two dimensions. 0.5 is
chance, but who sees the errors in the answers is better off: calling a conversation the expert's
where it has none is the table's last row.

The condition's own tokens are in that mean, so there are two controls: the mean over answer tokens
only, whose states still see the condition through attention, and both classes put under the
expert's prompt. All conversations are new to the models, and both sources are asked to use each
skill equally often.
"""

# N conversations (F of them fitted), T packed tokens, D width, K directions

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch

from data import Prepared
from model import Model
from paper.commands import cell, command, markdown, open_figure, save_figure
from paper.runs import prepared, share, sharegpt
from paper.table2 import HABITS, arm
from paper.toy import Task, make_task
from sample import Speaker
from support.cli import run

SEEDS = 3
# label, conversations, probability that an answer is right
SOURCES = (("GPT-4", 1000, 1.0), ("GPT-3.5", 1000, 0.4))
# seeds from here on are no model's
NEW_SEEDS = 10_000
# conversations that go through the model at once
BATCH = 100
# of the linear probe, by conversation
RIDGE = 1e-2
# --classes
EACH_ITS_OWN = "GPT-4=GPT4:1,*=GPT3:0.1"
BOTH_EXPERT = "GPT-4=GPT4:1,*=GPT4:0.1"


class View(NamedTuple):
    """What is looked at: an arm's states of conversations under these classes."""

    arm: str
    classes: str
    answers_only: bool = False


VIEWS = {
    "SFT": View("SFT on all", BOTH_EXPERT),
    "C-RLFT": View("C-RLFT", EACH_ITS_OWN),
    "SFT, answer tokens only": View("SFT on all", BOTH_EXPERT, answers_only=True),
    "C-RLFT, answer tokens only": View("C-RLFT", EACH_ITS_OWN, answers_only=True),
    "C-RLFT, both under the expert's prompt": View("C-RLFT", BOTH_EXPERT),
    "C-RLFT, both so, answer tokens only": View("C-RLFT", BOTH_EXPERT, answers_only=True),
}


HEAD = ["representation", "linear probe", "silhouette in 2-D"]


def jobs(seed: int) -> dict:
    return {name: arm(name, seed) for name in ("SFT on all", "C-RLFT")}


# ---- the numbers


def new_task(result: dict) -> Task:
    """As many conversations of each source, which a model has not been trained on."""
    return Task(
        sources=SOURCES,
        scarce=1,
        habits=HABITS,
        heldout=0,
        seed=NEW_SEEDS + result["run"]["seed"],
    )


def new_conversations(result: dict, classes: str, folder: Path) -> Prepared:
    sources, _ = make_task(new_task(result))
    rows = []
    for label, chats in sources.items():
        rows += [sharegpt(turns, label) for turns in chats]
    tokenizer = result["folder"] + "/hf/tokenizer.model"
    return prepared(folder / "new.safetensors", rows, classes, tokenizer)


@torch.no_grad()
def pooled(model: Model, data: Prepared, answers_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(states_ND, expert_N): each conversation's mean state, and whether it is the expert's."""
    states = []
    for start in range(0, len(data), BATCH):
        conversations = range(start, min(start + BATCH, len(data)))
        states.append(mean_states(model, data, conversations, answers_only))
    return torch.cat(states).double(), torch.from_numpy(data.class_ids == 0)


def mean_states(
    model: Model, data: Prepared, conversations: range, answers_only: bool
) -> torch.Tensor:
    """mean_ND of the last-layer states, over all tokens or over those that are trained on."""
    batch = data.batch(conversations)
    hidden_TD = model.hidden(batch.tokens_T, batch.positions_T, batch.cu_seqlens)
    counts_T = torch.ones(len(hidden_TD))
    if answers_only:
        # not the batch's weights: those stand at the token before the one they weigh
        weights_T = np.concatenate([data.conversation(i)[1] for i in conversations])
        counts_T = torch.from_numpy(weights_T > 0).float()

    # sums over each conversation's tokens: every token is added to the row of its own
    N, D = len(conversations), hidden_TD.shape[1]
    row_T = torch.repeat_interleave(torch.arange(N), batch.cu_seqlens.diff().long())
    sum_ND = torch.zeros(N, D).index_add(0, row_T, hidden_TD * counts_T[:, None])
    count_N = torch.zeros(N).index_add(0, row_T, counts_T)
    return sum_ND / count_N[:, None]


def plane(states_ND: torch.Tensor) -> torch.Tensor:
    """The states in their two principal directions, [N, 2]."""
    centred_ND = states_ND - states_ND.mean(0)
    _, _, directions_KD = torch.linalg.svd(centred_ND, full_matrices=False)
    return centred_ND @ directions_KD[:2].T


def probe(states_ND: torch.Tensor, expert_N: torch.Tensor, seed: int) -> float:
    """Accuracy of a ridge regression on the half of the conversations it was not fitted to."""
    generator = torch.Generator().manual_seed(seed)
    fitted, tested = torch.randperm(len(states_ND), generator=generator).chunk(2)

    # each dimension at mean 0 and deviation 1, and a constant; the target is 1 or -1
    mean_D = states_ND[fitted].mean(0)
    std_D = states_ND[fitted].std(0) + 1e-9
    scaled_ND = (states_ND - mean_D) / std_D
    x_ND = torch.cat([scaled_ND, torch.ones(len(scaled_ND), 1)], 1)
    y_N = (2.0 * expert_N - 1).to(x_ND.dtype)

    # (x^T x + ridge) w = x^T y
    x_FD = x_ND[fitted]
    ridge_DD = RIDGE * len(fitted) * torch.eye(x_ND.shape[1], dtype=x_ND.dtype)
    w_D = torch.linalg.solve(x_FD.T @ x_FD + ridge_DD, x_FD.T @ y_N[fitted])
    guess_N = x_ND[tested] @ w_D > 0
    right_N = (guess_N == expert_N[tested]).double()
    return right_N.mean().item()


def silhouette(points_NK: torch.Tensor, expert_N: torch.Tensor) -> float:
    """Mean of (b - a) / max(a, b); 1 is apart, 0 mixed.

    a is a point's mean distance to its own class, b to the other.
    """
    distance_NN = torch.cdist(points_NK, points_NK)
    own_NN = expert_N[:, None] == expert_N
    # a point is no neighbour of itself
    a_N = (distance_NN * own_NN).sum(1) / (own_NN.sum(1) - 1)
    b_N = (distance_NN * ~own_NN).sum(1) / (~own_NN).sum(1)
    silhouette_N = (b_N - a_N) / torch.maximum(a_N, b_N)
    return silhouette_N.mean().item()


def accuracy_by_errors(result: dict) -> float:
    """Of calling a conversation the expert's where it has no error, half of them being so."""
    sources, _ = make_task(new_task(result))
    other = share(has_error(turns) for turns in sources["GPT-3.5"])
    # the expert's have none, so all of them are called right
    return (1 + other) / 2


def has_error(turns: list[tuple]) -> bool:
    return not all(right for _, _, right in turns)


# ---- the page


def report(results: dict, folder: Path) -> tuple[dict, str]:
    rows = {}
    pictures = {}
    table = []
    for name, view in VIEWS.items():
        row = {"probe": [], "silhouette": []}
        for result in results[view.arm]:
            states_ND, expert_N = states_of(result, view)
            points_NK = plane(states_ND)
            row["probe"].append(probe(states_ND, expert_N, result["run"]["seed"]))
            row["silhouette"].append(silhouette(points_NK, expert_N))
            # the picture is the first seed's
            pictures.setdefault(name, (points_NK, expert_N))
        rows[name] = row
        table.append([name, cell(row["probe"]), cell(row["silhouette"])])
    draw(rows, pictures, folder / "fig4.png")

    by_errors = [accuracy_by_errors(result) for result in results["C-RLFT"]]
    rows["an error or none"] = by_errors
    table.append(["no representation: an error or none", cell(by_errors), ""])
    return rows, markdown(HEAD, table)


def states_of(result: dict, view: View) -> tuple[torch.Tensor, torch.Tensor]:
    """`pooled` of one model under one view."""
    with TemporaryDirectory() as place:
        data = new_conversations(result, view.classes, Path(place))
        speaker = Speaker(result["folder"] + "/hf", device="cpu")
        return pooled(speaker.model, data, view.answers_only)


def draw(rows: dict, pictures: dict, path: Path) -> None:
    figure, axes = open_figure(width=9, height=6, shape=(2, 3))
    for axis, (name, (points_NK, expert_N)) in zip(axes.flat, pictures.items()):
        axis.scatter(*points_NK[expert_N].T, s=6, color="black", label="GPT-4")
        axis.scatter(*points_NK[~expert_N].T, s=6, color="tab:orange", label="GPT-3.5")
        accuracy = rows[name]["probe"][0]
        # the title's second line is what was done to the view
        title = name.replace(", ", "\n", 1)
        axis.set_title(f"{title}\nprobe {accuracy:.2f}")
        axis.set(xticks=(), yticks=())
    axes.flat[0].legend(markerscale=3)
    save_figure(figure, path)


def main(argv: list[str]) -> None:
    command("fig4", argv)


if __name__ == "__main__":
    run(main)
