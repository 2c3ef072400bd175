"""Fig. 5 in miniature: one C-RLFT model, asked with the expert's prompt or with the other's.

    python -m paper.fig5

The second table goes further along that line, an experiment of ours: sampling from
logits_e + g (logits_e - logits_o), e and o the same conversation under the expert's and the other
prompt, as classifier-free guidance does. g = 0 is the expert's prompt, g = -1 the other. A g above
0 also makes the distribution sharper, so lower temperatures stand beside it.
"""

# B prompts, T packed tokens, V vocab; L, G, S, E of the cache as in model.py

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from model import KVCache
from paper.commands import cell, command, lines, markdown, open_figure, save_figure
from paper.runs import converse, prepared, sharegpt, unbroken
from paper.table2 import HOW, arm
from paper.toy import Task, make_task, solve
from sample import Speaker
from support.cli import run
from tokenizer import Tokenizer

SEEDS = 3
CONDITIONS = "GPT4", "GPT3"
GUIDANCE = (-1, -0.5, 0, 0.5, 1, 2, 4)
TEMPERATURES = (1, 0.75, 0.5, 0.25)


def jobs(seed: int) -> dict:
    return {"C-RLFT": arm("C-RLFT", seed)}


# ---- guidance


class Guided:
    """Stands in for a Speaker's model: each call asks that model twice and mixes the logits.

    The two prompts are of equal length and differ in one token, so the other prompt is the
    expert's with that token exchanged.
    """

    def __init__(self, speaker: Speaker, g: float):
        self.model = speaker.model
        self.config = speaker.model.config
        self.lm_head = speaker.model.lm_head
        self.g = g
        self.expert_token = only_token(speaker.tokenizer, "GPT4", "GPT3")
        self.other_token = only_token(speaker.tokenizer, "GPT3", "GPT4")

    def prefill(self, tokens_T, positions_T, cu_seqlens, cache):
        # the other prompt's keys and values are kept here, for `decode`
        _, B, _, S, _ = cache.k_LBGSE.shape
        self.other_cache = KVCache(self.config, B, S)
        other_T = tokens_T.where(tokens_T != self.expert_token, self.other_token)
        o_BV = self.model.prefill(other_T, positions_T, cu_seqlens, self.other_cache)
        e_BV = self.model.prefill(tokens_T, positions_T, cu_seqlens, cache)
        return self.mix(e_BV, o_BV)

    def decode(self, tokens_B, cache):
        e_BV = self.model.decode(tokens_B, cache)
        o_BV = self.model.decode(tokens_B, self.other_cache)
        return self.mix(e_BV, o_BV)

    def mix(self, e_BV, o_BV):
        return e_BV + self.g * (e_BV - o_BV)


def only_token(tokenizer: Tokenizer, text: str, other: str) -> int:
    """The one token of a text that the other text does not have."""
    (token,) = set(tokenizer.encode(text)) - set(tokenizer.encode(other))
    return token


# ---- the numbers


def guided_score(result: dict, g: float, temperature: float) -> float:
    """The share of right answers under guidance g."""
    seed = result["run"]["seed"]
    _, heldout = make_task(Task(seed=seed))
    speaker = Speaker(result["folder"] + "/hf", "GPT4", device="cpu", seed=seed)
    speaker.model = Guided(speaker, g)
    return unbroken(converse(speaker, heldout, temperature))


@torch.no_grad()
def log_prob(result: dict, condition: str) -> float:
    """Mean log-probability of the right answers to the held-out conversations, per answer."""
    _, heldout = make_task(Task(seed=result["run"]["seed"]))
    rows = []
    answers = 0
    for asked in heldout:
        turns = [(words, right, True) for words, right in zip(asked, solve(asked))]
        rows.append(sharegpt(turns))
        answers += len(turns)
    with TemporaryDirectory() as place:
        path = Path(place) / "new.safetensors"
        # all in one class of weight 1, so that the weighted loss sum is that of the nlls
        tokenizer = result["folder"] + "/hf/tokenizer.model"
        data = prepared(path, rows, f"*={condition}:1", tokenizer)
        batch = data.batch(range(len(data)))
    model = Speaker(result["folder"] + "/hf", device="cpu").model
    losses = model(
        batch.tokens_T,
        batch.positions_T,
        batch.cu_seqlens,
        batch.labels_T,
        batch.weights_T,
        rows_R=batch.rows_R,
    )
    return -losses.loss_sum.item() / answers


# ---- the page


def report(results: dict, folder: Path) -> tuple[dict, str]:
    group = results["C-RLFT"]
    rows = {condition: numbers_of(group, condition) for condition in CONDITIONS}
    rows["guidance"] = {}
    for g in GUIDANCE:
        rows["guidance"][g] = [guided_score(result, g, 1.0) for result in group]
    rows["temperature"] = {}
    for temperature in TEMPERATURES:
        scores = [guided_score(result, 0, temperature) for result in group]
        rows["temperature"][temperature] = scores
    draw(rows["guidance"], folder / "fig5.png")

    tables = [
        prompts_table(rows),
        line_table("g, at temperature 1", rows["guidance"]),
        line_table("temperature, at g = 0", rows["temperature"]),
    ]
    return rows, "\n\n".join(tables)


def numbers_of(group: list[dict], condition: str) -> dict[str, list]:
    """{"sampled", "greedy", "log_prob": [a value per seed]} under a prompt."""
    row = {}
    for how in HOW:
        row[how] = [result["scores"][condition][how]["all"] for result in group]
    row["log_prob"] = [log_prob(result, condition) for result in group]
    return row


def prompts_table(rows: dict) -> str:
    table = []
    for condition in CONDITIONS:
        row = rows[condition]
        scores = [cell(row[how]) for how in HOW]
        table.append([f"`{condition} User:`", *scores, cell(row["log_prob"], 2)])
    head = ["prompt", "right answers, sampled", "greedy", "log p of the right answer"]
    return markdown(head, table)


def line_table(title: str, scores: dict[float, list]) -> str:
    """One line: the scores by g or by temperature."""
    return markdown([title, *scores], [["right answers", *map(cell, scores.values())]])


def draw(scores: dict[float, list], path: Path) -> None:
    figure, axes = open_figure()
    lines(axes, GUIDANCE, {"temperature 1": list(scores.values())})
    axes.set(xlabel="g in logits_e + g (logits_e - logits_o)", ylabel="right answers")
    save_figure(figure, path)


def main(argv: list[str]) -> None:
    command("fig5", argv)


if __name__ == "__main__":
    run(main)
