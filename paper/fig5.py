"""Fig. 5 in miniature: one C-RLFT model, asked with the expert's prompt or with the other's; and further along that line.

    python -m paper.fig5

The second table is an experiment of ours: sampling from logits_e + g (logits_e - logits_o), e and o the same conversation under the
expert's and the other prompt, as classifier-free guidance does. g = 0 is the expert's prompt, g = -1 the other. A g above 0 also makes
the distribution sharper, so lower temperatures stand beside it.

B prompts, T packed tokens, V vocab.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from model import KVCache
from paper.runs import (
    cell,
    command,
    converse,
    figure,
    lines,
    markdown,
    prepared,
    sharegpt,
    unbroken,
)
from paper.table2 import arm
from paper.toy import Task, make_task, solve
from sample import Speaker
from support.cli import run

SEEDS = 3
GUIDANCE, TEMPERATURES = (-1, -0.5, 0, 0.5, 1, 2, 4), (1, 0.75, 0.5, 0.25)


def runs(seed):
    return {"C-RLFT": arm("C-RLFT", seed)}


class Guided:
    """Stands in for a Speaker's model: the two prompts differ in one token, so the other's is the expert's with that exchanged."""

    def __init__(self, speaker, g):
        self.model, self.g, self.config, self.lm_head = (
            speaker.model,
            g,
            speaker.model.config,
            speaker.model.lm_head,
        )
        (self.e,), (self.o,) = (
            set(speaker.tokenizer.encode(a)) - set(speaker.tokenizer.encode(b))
            for a, b in (("GPT4", "GPT3"), ("GPT3", "GPT4"))
        )

    def mix(self, e_BV, o_BV):
        return e_BV + self.g * (e_BV - o_BV)

    def prefill(self, tokens_T, positions_T, cu_seqlens, cache):
        self.cache = KVCache(self.config, *cache.k_LBGSE.shape[1:4:2])
        o_BV = self.model.prefill(
            tokens_T.where(tokens_T != self.e, self.o), positions_T, cu_seqlens, self.cache
        )
        return self.mix(self.model.prefill(tokens_T, positions_T, cu_seqlens, cache), o_BV)

    def decode(self, tokens_B, cache):
        return self.mix(self.model.decode(tokens_B, cache), self.model.decode(tokens_B, self.cache))


@torch.no_grad()
def log_prob(result, condition):
    """Mean log-probability of the right answers to the held-out conversations, per answer."""
    chats = [
        [(words, right, True) for words, right in zip(asked, solve(asked))]
        for asked in make_task(Task(seed=result["run"]["seed"]))[1]
    ]
    with TemporaryDirectory() as place:
        data = prepared(
            Path(place) / "new.safetensors",
            map(sharegpt, chats),
            f"*={condition}:1",
            result["folder"] + "/hf/tokenizer.model",
        )
        batch, model = (
            data.batch(range(len(data))),
            Speaker(result["folder"] + "/hf", device="cpu").model,
        )
        nll_sum, _ = model(
            batch.tokens_T,
            batch.positions_T,
            batch.cu_seqlens,
            batch.labels_T,
            batch.weights_T,
            rows_R=batch.rows_R,
        )
    return -nll_sum.item() / sum(map(len, chats))


def report(results, folder):
    group, rows = results["C-RLFT"], {}
    for condition in ("GPT4", "GPT3"):
        rows[condition] = {
            how: [r["scores"][condition][how]["all"] for r in group]
            for how in ("sampled", "greedy")
        }
        rows[condition]["log_prob"] = [log_prob(r, condition) for r in group]

    def ask(result, g, temperature):
        seed = result["run"]["seed"]
        speaker = Speaker(result["folder"] + "/hf", "GPT4", device="cpu", seed=seed)
        speaker.model = Guided(speaker, g)
        return unbroken(converse(speaker, make_task(Task(seed=seed))[1], temperature))

    rows["guidance"] = {g: [ask(r, g, 1.0) for r in group] for g in GUIDANCE}
    rows["temperature"] = {t: [ask(r, 0, t) for r in group] for t in TEMPERATURES}

    def draw(axes):
        lines(axes, GUIDANCE, {"temperature 1": list(rows["guidance"].values())})
        axes.set(xlabel="g in logits_e + g (logits_e - logits_o)", ylabel="right answers")

    figure(folder / "fig5.png", draw)
    table = [
        [
            f"`{condition} User:`",
            *(cell(rows[condition][how]) for how in ("sampled", "greedy")),
            cell(rows[condition]["log_prob"], 2),
        ]
        for condition in ("GPT4", "GPT3")
    ]
    table = markdown(
        ["prompt", "right answers, sampled", "greedy", "log p of the right answer"], table
    )
    guided = markdown(
        ["g, at temperature 1", *GUIDANCE],
        [["right answers", *map(cell, rows["guidance"].values())]],
    )
    cooler = markdown(
        ["temperature, at g = 0", *TEMPERATURES],
        [["right answers", *map(cell, rows["temperature"].values())]],
    )
    return rows, "\n\n".join((table, guided, cooler))


if __name__ == "__main__":
    run(command("fig5"))
