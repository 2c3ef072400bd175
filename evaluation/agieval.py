"""AGIEval's English tasks, exact match (Table 5)."""

import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from conversations import Message
from evaluation.answers import load, name_of
from evaluation.rows import check_out, field, rows_of, write_lines
from sample import SampleConfig, check_sampling

TASKS = {  # AGIEval's English tasks and their sizes; Table 5's rows
    "aqua-rat": 254,
    "logiqa-en": 651,
    "lsat-ar": 230,
    "lsat-lr": 510,
    "lsat-rc": 269,
    "sat-en-without-passage": 206,
    "sat-en": 206,
    "sat-math": 220,
}
# the paper's accuracies in %, in the order of TASKS, then its average: correct items / 2,546
TABLE_5 = {
    "openchat-13b": (19.3, 34.9, 19.1, 37.5, 45.0, 44.7, 66.0, 30.9, 36.4),
    "llama-2-13b": (20.1, 32.6, 21.3, 33.3, 46.1, 41.3, 65.5, 29.1, 35.0),
    "wizardlm-v1.2-13b": (28.3, 27.2, 21.7, 32.4, 43.5, 33.5, 65.5, 22.7, 32.8),
    "llama-2-chat-13b": (22.4, 27.3, 19.6, 27.6, 25.3, 25.2, 25.7, 28.6, 25.8),
    "vicuna-v1.5-13b": (21.7, 19.0, 20.0, 16.7, 19.0, 26.7, 28.2, 24.5, 20.7),
}


@dataclass(frozen=True)
class AgievalConfig:
    model: tuple = ()
    data: str = ""
    out: str = ""
    template: str | None = None  # `base` for a model that was not fine-tuned: the raw prompt
    condition: str | None = None
    prompts_only: bool = False
    max_new: int = 64
    batch: int = 16


def agieval_prompt(item):
    """The official zero-shot prompt."""
    last = chr(ord("A") + len(item["options"]) - 1)
    return f"{item['passage'] or ''}Q: {item['question']} Answer Choices: {' '.join(item['options'])}\nA: Among A through {last}, the answer is"


def agieval_letter(response):
    """The leftmost character of the response that is one of A to F, anywhere in it, or None."""
    return next((c for c in response if c in "ABCDEF"), None)


def agieval_items(folder):
    """[{task, index, prompt, label}] of the official files."""
    items = []
    for task, count in TASKS.items():
        path = Path(folder) / f"{task}.jsonl"
        if not path.is_file():
            raise ValueError(
                f"{path}: no such file; --data is the folder of AGIEval's v1 jsonl files"
            )
        rows = rows_of(path)
        for index, (where, row) in enumerate(rows):
            passage, question, options, _ = field(
                row, where, "passage", "question", "options", "label"
            )
            if (
                not isinstance(passage or "", str)
                or not isinstance(question, str)
                or not isinstance(options, list)
                or not all(isinstance(o, str) for o in options)
            ):
                raise ValueError(
                    f"{where}: passage and question are texts, options a list of them; fetch the file again"
                )
            items.append(
                {"task": task, "index": index, "prompt": agieval_prompt(row), "label": row["label"]}
            )
        if len(rows) != count:
            print(f"{path}: {len(rows)} items, the official file has {count}", file=sys.stderr)
    return items


def interval(correct, n):
    """Wilson's 95% interval of a proportion."""
    z, p = 1.96, correct / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def agieval_table(rows, name="this model"):
    """Accuracy per task with its interval, micro average over items (the paper's Average), macro average, Table 5 beside them."""
    lines = [
        f"| task | items | {name} | 95% interval | no letter | " + " | ".join(TABLE_5) + " |",
        "|" + "---|" * (5 + len(TABLE_5)),
    ]
    shares, count = [], [0, 0, 0]

    def line(label, n, correct, unmatched, published):
        low, high = interval(correct, n)
        lines.append(
            f"| {label} | {n} | {correct / n:.1%} | {low:.1%} to {high:.1%} | {unmatched / n:.1%} | "
            + " | ".join(f"{x}" for x in published)
            + " |"
        )

    for i, task in enumerate(TASKS):
        letters = [
            (agieval_letter(row["response"]), row["label"]) for row in rows if row["task"] == task
        ]
        if not letters:
            continue
        numbers = len(letters), sum(a == b for a, b in letters), sum(a is None for a, _ in letters)
        count = [a + b for a, b in zip(count, numbers)]
        shares.append(numbers[1] / numbers[0])
        line(task, *numbers, (cells[i] for cells in TABLE_5.values()))
    line("average over items", *count, (cells[-1] for cells in TABLE_5.values()))
    lines.append(
        f"| mean of the tasks | | {statistics.mean(shares):.1%} | | | "
        + " | ".join(f"{statistics.mean(cells[:-1]):.1f}" for cells in TABLE_5.values())
        + " |"
    )
    return "\n".join(lines)


def answered(out, items, source):
    """{(task, index): row} of an earlier run into the same file; a last line that a kill cut short is asked again.

    ValueError: the file is of another model, other settings or other questions; it stays as it is.
    """
    if not Path(out).is_file():
        return {}
    wanted, done = {(item["task"], item["index"]): item for item in items}, {}
    *whole, tail = Path(out).read_bytes().split(b"\n")
    for number, line in enumerate(whole, 1):
        try:
            row = json.loads(line)
            item = wanted[row["task"], row["index"]]
        except (ValueError, KeyError, TypeError):
            row = item = {}
        if (
            not item
            or {key: row.get(key) for key in source} != source
            or any(row.get(key) != item[key] for key in item)
            or not isinstance(row.get("response"), str)
        ):
            raise ValueError(
                f"{out}:{number}: not an answer of this model, in this way, to these questions; give another --out"
            )
        done[row["task"], row["index"]] = row
    if tail:
        if tail[:7] != b'{"task"'[: len(tail)]:  # a kill may cut anywhere
            raise ValueError(
                f"{out}:{len(whole) + 1}: not a line of an agieval run; give another --out"
            )
        write_lines(out, done.values())
    return done


def agieval(config):
    if not config.data or not config.out:
        raise ValueError("agieval needs MODEL --data FOLDER --out FILE.jsonl")
    check_out(config.out)
    how = check_sampling(SampleConfig(temperature=0.0, max_new=config.max_new, batch=config.batch))
    items = agieval_items(config.data)
    if config.prompts_only:
        if Path(config.out).is_file() and b'"response": ' in Path(config.out).read_bytes():
            raise ValueError(f"--out {config.out} holds responses; give another name")
        write_lines(config.out, items)
        return print(f"{len(items)} prompts in {config.out}")
    speaker = load(config)
    source = {
        "model": str(Path(config.model[0]).resolve()),
        "template": speaker.template,
        "condition": speaker.condition,
        "max_new": config.max_new,
    }
    done = answered(config.out, items, source)
    todo = [item for item in items if (item["task"], item["index"]) not in done]
    ids = []
    for item in todo:
        before = speaker.cut
        ids.append(
            speaker.ids(
                [Message("user", item["prompt"])], truncate_left=True, max_new=config.max_new
            )
        )
        item["cut"] = speaker.cut > before
    with open(config.out, "a", encoding="utf-8") as file:
        for i, (answer, finish) in speaker.answer_each(ids, how):
            response = speaker.text(answer)
            row = (
                todo[i]
                | {"response": response, "letter": agieval_letter(response), "finish": finish}
                | source
            )
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            done[row["task"], row["index"]] = row
    print(agieval_table(done.values(), name_of(config.model[0])))
    print(
        f"{sum(row['cut'] for row in done.values())} prompts cut on the left; prompts and responses in {config.out}"
    )
