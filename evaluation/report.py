"""Judgments -> win rates, scores, correlation of judges."""

import itertools
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.agieval import TASKS, agieval_table
from evaluation.rows import field, rows_of

# of questions 81-90, 91-100, ..
MT_CATEGORIES = (
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
)


@dataclass(frozen=True)
class ReportConfig:
    # FastChat judgments, AlpacaEval annotations, conversation scores, agieval's responses; told
    # apart by content
    files: tuple = ()
    baseline: str = "gpt-3.5-turbo"
    png: str = ""  # scatter of the first two judges (Fig. 8)


def bench_of(question):
    """FastChat numbers Vicuna-bench 1 to 80 and MT-bench 81 to 160."""
    return "MT-bench" if 81 <= int(question) <= 160 else "Vicuna-bench"


def outcome(row):
    """1, 0.5 or 0 for model_1: a tie when the two orders disagree, or either says so."""
    if row["g1_winner"] == "tie" or row["g1_winner"] != row["g2_winner"]:
        return 0.5
    return float(row["g1_winner"] == "model_1")


KINDS = {  # a row's kind by a field that only it has: the fields read from it
    "g1_winner": ("judge", "model_1", "model_2", "question_id", "turn", "g2_winner"),
    "preference": ("generator_1", "generator_2", "instruction"),
    "score": ("judge", "model", "question_id", "turn"),
}


def read_judgments(files):
    """{judge: {kind: {item: row}}} and how many rows were left out: unparsed verdicts, as the official tools do, and doubled items.

    kind: pair, single, conversation, alpaca. An item is (models, question, turn); the last row of one counts.
    """
    found, unparsed, doubled = {}, 0, 0
    for path in files:
        for where, row in rows_of(path):
            mark = next((mark for mark in KINDS if isinstance(row, dict) and mark in row), None)
            if mark is None:
                raise ValueError(
                    f"{where}: not a judgment; give FastChat judgments, AlpacaEval annotations or conversation scores"
                )
            values = field(row, where, *KINDS[mark])
            if mark == "preference":
                kind, judge, item = "alpaca", row.get("annotator") or "annotator", tuple(values)
                if row["preference"] == 0:
                    row = row | {"preference": 1.5}  # a draw, in older files
                ok = isinstance(row["preference"], (int, float)) and 1 <= row["preference"] <= 2
            else:
                judge, *item = values[:-1] if mark == "g1_winner" else values
                if not isinstance(judge, list) or len(judge) != 2:
                    raise ValueError(
                        f"{where}: judge is [its name, its prompt's name], not {judge!r}; mend the line"
                    )
                kind = (
                    "pair"
                    if mark == "g1_winner"
                    else "conversation"
                    if judge[1] == "table-6"
                    else "single"
                )
                if kind != "conversation" and not str(row["question_id"]).isdigit():
                    raise ValueError(
                        f"{where}: question_id {row['question_id']!r} is not one of FastChat's numbers; mend the line"
                    )
                judge, item = judge[0], tuple(item)
                ok = (
                    "error" not in (row["g1_winner"], row["g2_winner"])
                    if kind == "pair"
                    else isinstance(row["score"], (int, float)) and row["score"] != -1
                )
            unparsed += not ok
            if ok:
                rows = found.setdefault(judge, {}).setdefault(kind, {})
                doubled += item in rows
                rows[item] = row
    return found, unparsed, doubled


def win_rates(kinds, baseline):
    """{(bench, model): (win rate, wins, losses, ties)} of one judge, against the baseline (AlpacaEval: against generator_1)."""
    points = {}
    for row in kinds.get("pair", {}).values():
        if baseline in (row["model_1"], row["model_2"]) and row["model_1"] != row["model_2"]:
            ours = outcome(row)
            model, point = (
                (row["model_1"], ours) if row["model_2"] == baseline else (row["model_2"], 1 - ours)
            )
            points.setdefault((bench_of(row["question_id"]), model), []).append(point)
    # 2: the second is preferred, the model; 1: the first, the reference
    for row in kinds.get("alpaca", {}).values():
        points.setdefault(("AlpacaEval", row["generator_2"]), []).append(row["preference"] - 1)
    return {
        key: (
            statistics.mean(x),
            sum(p > 0.5 for p in x),
            sum(p < 0.5 for p in x),
            sum(p == 0.5 for p in x),
        )
        for key, x in points.items()
    }


def values_of(kinds):
    """{item: number} of one judge: scores, outcomes of pairs and preferences, for the correlation of judges."""
    number = {"pair": outcome, "alpaca": lambda row: row["preference"] - 1}
    return {
        (kind, *item): number.get(kind, lambda row: row["score"])(row)
        for kind, rows in kinds.items()
        for item, row in rows.items()
    }


def pearson(x, y):
    return (
        float(np.corrcoef(x, y)[0, 1])
        if len(x) > 1 and np.std(x) > 0 and np.std(y) > 0
        else math.nan
    )


def report(config):
    if not config.files:
        raise ValueError(
            "report needs FILE..: FastChat judgments, AlpacaEval annotations, conversation scores or agieval's responses"
        )
    agieval_files = [
        path
        for path in config.files
        if isinstance(first := rows_of(path)[0][1], dict) and {"task", "response"} <= first.keys()
    ]
    for path in agieval_files:  # scored again, from the responses
        rows = rows_of(path)
        for where, row in rows:
            task, _, response = field(row, where, "task", "label", "response")
            if str(task) not in TASKS or not isinstance(response, str):
                raise ValueError(
                    f"{where}: no response to one of AGIEval's English tasks; give the --out of an agieval run"
                )
        print(agieval_table([row for _, row in rows], Path(path).stem))
    judges, unparsed, doubled = read_judgments(
        [path for path in config.files if path not in agieval_files]
    )
    mean = lambda rows: f"{statistics.mean(row['score'] for row in rows):.2f}" if rows else ""
    benches = "AlpacaEval", "MT-bench", "Vicuna-bench"
    # Table 1's columns have judges of their own: the table is over all, a row per judge and model
    rates = {}
    for judge, kinds in judges.items():
        for (bench, model), cell in win_rates(kinds, config.baseline).items():
            rates.setdefault(model, {}).setdefault(bench, {})[judge] = cell
    if rates:
        print(f"| win rate (Table 1) | {' | '.join(benches)} | average |\n|---|---|---|---|---|")
        for model, columns in sorted(rates.items()):
            cells = [
                " / ".join(
                    f"{c[0]:.1%} ({c[1]} won, {c[2]} lost, {c[3]} tied; {judge})"
                    for judge, c in columns.get(bench, {}).items()
                )
                for bench in benches
            ]
            # several judges of one bench have no one average
            single = all(len(columns.get(bench, {})) == 1 for bench in benches)
            average = (
                f"{statistics.mean(c[0] for bench in benches for c in columns[bench].values()):.1%}"
                if single
                else ""
            )
            print(f"| {model} | {' | '.join(cells)} | {average} |")
    for judge, kinds in judges.items():
        singles, scores = list(kinds.get("single", {}).values()), kinds.get("conversation", {})
        for bench, categories in (("MT-bench", MT_CATEGORIES), ("Vicuna-bench", ())):
            if rows := [row for row in singles if bench_of(row["question_id"]) == bench]:
                category = lambda row: MT_CATEGORIES[(int(row["question_id"]) - 81) // 10]
                print(
                    f"| {bench} score by {judge} (Fig. 2) | turn 1 | turn 2 | average |{''.join(f' {c} |' for c in categories)}\n"
                    + "|---" * (4 + len(categories))
                    + "|"
                )
                for model in sorted({row["model"] for row in rows}):
                    mine = [row for row in rows if row["model"] == model]
                    parts = [
                        *([r for r in mine if r["turn"] == turn] for turn in (1, 2)),
                        mine,
                        *([r for r in mine if category(r) == name] for name in categories),
                    ]
                    print(f"| {model} | " + " | ".join(map(mean, parts)) + " |")
        if scores:  # a conversation's score is the mean of its turns'
            print(
                f"| conversation scores by {judge} (Fig. 3) | conversations | mean | "
                + " | ".join(f"{n}" for n in range(1, 11))
                + " |\n"
                + "|---" * 13
                + "|"
            )
            of = {}
            for (source, conversation, _), row in scores.items():
                of.setdefault(source, {}).setdefault(conversation, []).append(row["score"])
            for source, conversations in sorted(of.items()):
                means = [statistics.mean(x) for x in conversations.values()]
                print(
                    f"| {source or '(none)'} | {len(means)} | {statistics.mean(means):.2f} | "
                    + " | ".join(
                        str(sum(math.floor(x + 0.5) == n for x in means)) for n in range(1, 11)
                    )
                    + " |"
                )
    pairs = list(itertools.combinations(sorted(judges), 2))
    for one, two in pairs:
        a, b = values_of(judges[one]), values_of(judges[two])
        common = sorted(a.keys() & b.keys(), key=str)
        x, y = [a[item] for item in common], [b[item] for item in common]
        print(
            f"{one} and {two} (Fig. 8, 9): Pearson r = {pearson(x, y):.2f} over {len(common)} common judgments"
        )
        if config.png and (one, two) == pairs[0]:
            scatter(config.png, one, x, two, y)
    if judges or unparsed:
        print(
            f"{sum(len(rows) for kinds in judges.values() for rows in kinds.values())} judgments; left out: {unparsed} without a verdict, {doubled} doubled"
        )


def scatter(path, one, x, two, y):
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--png: `pip install matplotlib`") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4, 4))
    axes.scatter(x, y, s=8, alpha=0.5)
    axes.set(xlabel=one, ylabel=two, title=f"Pearson r = {pearson(x, y):.2f}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
