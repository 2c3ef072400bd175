"""Fig. 4 in miniature: do the representations of the two classes part? PCA of mean-pooled last-layer states, SFT beside C-RLFT.

    python -m paper.fig4

The paper's picture is UMAP of the mean over all tokens. Ours is PCA, with a number beside it: the accuracy of a linear probe on
the full states, on conversations it was not fitted to, and the silhouette in the picture's two dimensions. 0.5 is chance, but who
sees the errors in the answers is better off: calling a conversation the expert's where it has none is the table's last row. The
condition's own tokens are in that mean, so there are two controls: the mean over answer tokens only, whose states still see the
condition through attention, and both classes put under the expert's prompt. All conversations are drawn anew, and both sources are
asked to use each skill equally often.

N conversations, D width, K directions.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from paper.runs import cell, command, figure, markdown, prepared, share, sharegpt
from paper.table2 import arm
from paper.toy import Task, make_task
from sample import Speaker
from support.cli import run

SEEDS, EACH = 3, 1000
EACH_ITS_OWN, BOTH_EXPERT = "GPT-4=GPT4:1,*=GPT3:0.1", "GPT-4=GPT4:1,*=GPT4:0.1"
VIEWS = {  # name: (arm, --classes, answer tokens only)
    "SFT": ("SFT on all", BOTH_EXPERT, False),
    "C-RLFT": ("C-RLFT", EACH_ITS_OWN, False),
    "SFT, answer tokens only": ("SFT on all", BOTH_EXPERT, True),
    "C-RLFT, answer tokens only": ("C-RLFT", EACH_ITS_OWN, True),
    "C-RLFT, both under the expert's prompt": ("C-RLFT", BOTH_EXPERT, False),
    "C-RLFT, both so, answer tokens only": ("C-RLFT", BOTH_EXPERT, True),
}


def runs(seed):
    return {name: arm(name, seed) for name in ("SFT on all", "C-RLFT")}


def task_of(result):
    return Task(
        (("GPT-4", EACH, 1.0), ("GPT-3.5", EACH, 0.4)),
        scarce=1,
        heldout=0,
        seed=10_000 + result["run"]["seed"],
    )


def conversations(result, classes, folder):
    """A Prepared of EACH new conversations per source."""
    rows = [
        sharegpt(turns, label)
        for label, chats in make_task(task_of(result))[0].items()
        for turns in chats
    ]
    return prepared(
        Path(folder) / "new.safetensors", rows, classes, result["folder"] + "/hf/tokenizer.model"
    )


@torch.no_grad()
def pooled(model, data, answers_only):
    """(states_ND, the mean of each conversation's last-layer states; whether each is the expert's)."""
    states = []
    for start in range(0, len(data), 100):
        batch = data.batch(range(start, min(start + 100, len(data))))
        hidden_TD = model(batch.tokens_T, batch.positions_T, batch.cu_seqlens)
        keep_T = torch.ones(len(hidden_TD))
        if answers_only:
            keep_T = torch.from_numpy(
                data.weights[data.offsets[start] : data.offsets[min(start + 100, len(data))]] > 0
            ).float()
        which_T = torch.repeat_interleave(
            torch.arange(len(batch.cu_seqlens) - 1), batch.cu_seqlens.diff().long()
        )
        sum_ND = torch.zeros(len(batch.cu_seqlens) - 1, hidden_TD.shape[1]).index_add(
            0, which_T, hidden_TD * keep_T[:, None]
        )
        states.append(sum_ND / torch.zeros(len(sum_ND)).index_add(0, which_T, keep_T)[:, None])
    return torch.cat(states).double(), torch.from_numpy(data.class_ids == 0)


def plane(states_ND):
    """The states in their two principal directions."""
    centred_ND = states_ND - states_ND.mean(0)
    return centred_ND @ torch.linalg.svd(centred_ND, full_matrices=False)[2][:2].T


def probe(states_ND, expert_N, seed):
    """Accuracy of a ridge-regression probe on the half of the conversations that it was not fitted to."""
    order = torch.randperm(len(states_ND), generator=torch.Generator().manual_seed(seed))
    fit, test = order.chunk(2)
    mean, std = states_ND[fit].mean(0), states_ND[fit].std(0) + 1e-9
    x_ND = torch.cat([(states_ND - mean) / std, torch.ones(len(states_ND), 1)], 1)
    y_N = 2.0 * expert_N - 1
    eye = 1e-2 * len(fit) * torch.eye(x_ND.shape[1], dtype=x_ND.dtype)
    w_D = torch.linalg.solve(x_ND[fit].T @ x_ND[fit] + eye, x_ND[fit].T @ y_N[fit].to(x_ND.dtype))
    return ((x_ND[test] @ w_D > 0) == expert_N[test]).double().mean().item()


def silhouette(points_NK, expert_N):
    """Mean of (b - a) / max(a, b): a the mean distance to one's own class, b to the other; 1 is apart, 0 mixed."""
    distance_NN, own_NN = torch.cdist(points_NK, points_NK), expert_N[:, None] == expert_N
    a_N = (distance_NN * own_NN).sum(1) / (own_NN.sum(1) - 1)
    b_N = (distance_NN * ~own_NN).sum(1) / (~own_NN).sum(1)
    return ((b_N - a_N) / torch.maximum(a_N, b_N)).mean().item()


def report(results, folder):
    rows, pictures = {view: {"probe": [], "silhouette": []} for view in VIEWS}, {}
    for view, (name, classes, answers_only) in VIEWS.items():
        for result in results[name]:
            with TemporaryDirectory() as place:
                data = conversations(result, classes, place)
                states_ND, expert_N = pooled(
                    Speaker(result["folder"] + "/hf", device="cpu").model, data, answers_only
                )
            points_NK = plane(states_ND)
            rows[view]["probe"].append(probe(states_ND, expert_N, result["run"]["seed"]))
            rows[view]["silhouette"].append(silhouette(points_NK, expert_N))
            pictures.setdefault(view, (points_NK, expert_N))

    def draw(axes):
        for axis, (view, (points_NK, expert_N)) in zip(axes.flat, pictures.items()):
            for label, mask_N in (("GPT-4", expert_N), ("GPT-3.5", ~expert_N)):
                axis.scatter(*points_NK[mask_N].T, s=2, label=label)
            axis.set_title(f"{view}\nprobe {rows[view]['probe'][0]:.2f}", fontsize=8)
            axis.set(xticks=(), yticks=())
        axes.flat[0].legend(fontsize=7)

    figure(folder / "fig4.png", draw, 9, 6, (2, 3))
    table = [[view, cell(r["probe"]), cell(r["silhouette"])] for view, r in rows.items()]
    rows["an error or none"] = [
        (
            1
            + share(
                not all(right for *_, right in turns)
                for turns in make_task(task_of(r))[0]["GPT-3.5"]
            )
        )
        / 2
        for r in results["C-RLFT"]
    ]
    return rows, markdown(
        ["representation", "linear probe", "silhouette in 2-D"],
        [*table, ["no representation: an error or none", cell(rows["an error or none"]), ""]],
    )


if __name__ == "__main__":
    run(command("fig4"))
