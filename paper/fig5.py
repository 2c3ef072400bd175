"""Fig. 5 in miniature: one C-RLFT model, asked with the expert's prompt or with the other's; and further along that line.

    python -m paper.fig5

The last column is an experiment of ours: sampling from logits_e + g (logits_e - logits_o), e and o the same conversation under the
expert's and the other prompt, as classifier-free guidance does. g = 0 is the expert's prompt, g = -1 the other.

B prompts, T packed tokens, V vocab.
"""

import json

import torch

from data import PrepareConfig, Prepared, prepare, run
from model import KVCache
from paper.runs import cell, command, converse, figure, interval, markdown
from paper.table2 import arm
from paper.toy import Task, make_task
from sample import Speaker

SEEDS = 3
GUIDANCE = (-1, -0.5, 0, 0.5, 1, 2, 4)


def runs(seed):
    return {"C-RLFT": arm("C-RLFT", seed)}


class Guided:
    """Stands in for a Speaker's model: the two prompts differ in one token, so the other's is the expert's with that exchanged."""

    def __init__(self, speaker, g):
        self.model, self.g, self.config, self.lm_head = speaker.model, g, speaker.model.config, speaker.model.lm_head
        (self.e,), (self.o,) = (set(speaker.tokenizer.encode(a)) - set(speaker.tokenizer.encode(b)) for a, b in (("GPT4", "GPT3"), ("GPT3", "GPT4")))

    def mix(self, e_BV, o_BV):
        return e_BV + self.g * (e_BV - o_BV)

    def prefill(self, tokens_T, positions_T, cu_seqlens, cache):
        self.cache = KVCache(self.config, *cache.k_LBGSE.shape[1:4:2])
        o_BV = self.model.prefill(tokens_T.where(tokens_T != self.e, self.o), positions_T, cu_seqlens, self.cache)
        return self.mix(self.model.prefill(tokens_T, positions_T, cu_seqlens, cache), o_BV)

    def decode(self, tokens_B, cache):
        return self.mix(self.model.decode(tokens_B, cache), self.model.decode(tokens_B, self.cache))


@torch.no_grad()
def log_prob(result, condition, path):
    """Mean log-probability of the right answers to new conversations, per answer."""
    task = Task((("GPT-4", 400, 1.0),), (1.0,), scarce=1, heldout=0, seed=20_000 + result["run"]["seed"])
    chats = make_task(task)[0]["GPT-4"]
    rows = [{"conversations": [part for words, reply, _ in turns for part in ({"from": "human", "value": words}, {"from": "gpt", "value": reply})]} for turns in chats]
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(PrepareConfig((str(path.with_suffix(".jsonl")),), result["folder"] + "/hf/tokenizer.model", str(path), f"*={condition}:1"))
    data = Prepared(path)
    batch, model = data.batch(range(len(data))), Speaker(result["folder"] + "/hf").model
    nll_sum, _ = model(batch.tokens_T, batch.positions_T, batch.cu_seqlens, batch.labels_T, batch.weights_T, rows_R=batch.rows_R)
    for suffix in (".safetensors", ".jsonl"):
        path.with_suffix(suffix).unlink()
    return -nll_sum.item() / sum(map(len, chats))


def report(results, folder):
    group, rows = results["C-RLFT"], {}
    for condition in ("GPT4", "GPT3"):
        rows[condition] = {how: [r["scores"][condition][how]["all"] for r in group] for how in ("sampled", "greedy")}
        rows[condition]["log_prob"] = [log_prob(r, condition, folder / "fig5.safetensors") for r in group]
    rows["guidance"] = {g: [] for g in GUIDANCE}
    for result in group:
        seed = result["run"]["seed"]
        for g in GUIDANCE:
            speaker = Speaker(result["folder"] + "/hf", "GPT4", seed=seed)
            speaker.model = Guided(speaker, g)
            outcome = converse(speaker, make_task(Task(seed=seed))[1], 1.0)
            rows["guidance"][g].append(sum(bool(right) for turns in outcome for _, right in turns) / sum(map(len, outcome)))

    def draw(axes):
        means, halves = zip(*map(interval, rows["guidance"].values()))
        axes.errorbar(GUIDANCE, means, [half or 0 for half in halves], marker="o", capsize=3)
        axes.set(xlabel="g in logits_e + g (logits_e - logits_o)", ylabel="right answers, temperature 1")

    figure(folder / "fig5.png", draw)
    table = [[f"`{condition} User:`", *(cell(rows[condition][how]) for how in ("sampled", "greedy")), cell(rows[condition]["log_prob"], 2)] for condition in ("GPT4", "GPT3")]
    table = markdown(["prompt", "right answers, sampled", "greedy", "log p of the right answer"], table)
    return rows, table + "\n\n" + markdown(["g", *GUIDANCE], [["sampled", *map(cell, rows["guidance"].values())]])


if __name__ == "__main__":
    run(command("fig5"))
