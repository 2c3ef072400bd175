"""Judgments -> the paper's tables: win rates, scores, and whether two judges agree.

What the paper did: Table 1 counts a win as 1, a tie as 0.5 and a loss as 0, so that 50% is the
model that one compares with: text-davinci-003 in AlpacaEval, gpt-3.5-turbo in MT-bench and
Vicuna-bench. Fig. 2 averages MT-bench's scores, Fig. 3 those of the training data by source. And
since a judge is itself a model, Fig. 8 and 9 ask whether judges agree on the models: Pearson 0.91
between gpt-3.5 and claude-2, 0.79 and 0.73 between gpt-4 and these two, over the models' win rates.
Here single judgments are correlated: another number, and usually a lower one.

What you get: these tables from any mixture of files, which are recognised by their fields:
FastChat's judgments, AlpacaEval's annotations, conversation scores, and `agieval`'s responses.

Three rules to know, all of the official tools. A pair counts as won only when the judge says so in
both orders; when the orders disagree it is a tie. An answer that was judged twice counts with both
judgments, in every mean. Verdicts that could not be read are left out, and counted below the
tables: many of them mean that the judge, not the model, is at fault.
"""

import collections
import itertools
import math
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluation.agieval import TASKS, agieval_table
from evaluation.rows import MEND, name_or_number, require, rows_of, table_head, table_row
from support.cli import printable
from support.fields import is_number, shown

# AlpacaEval's answers are compared with those of a reference model, each a column of its own
ALPACA = "AlpacaEval against "
# the columns of Table 1, whose average is over these three
TABLE_1 = f"{ALPACA}text_davinci_003", "MT-bench", "Vicuna-bench"
# of MT-bench's questions 81-90, 91-100, ..
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
# FastChat's numbers: Vicuna-bench has 1 to 80, MT-bench follows
MT_FIRST, MT_LAST = 81, 160
MT_PER_CATEGORY = 10
# what a judge may say of a game
WINNERS = "model_1", "model_2", "tie", "error"
# scores go to 10, and a judge may write any number
HIGHEST_SCORE = 1e6
MOST_TURNS = 10**6
# models that a message names, at most
NAMES_SHOWN = 5


@dataclass(frozen=True)
class ReportConfig:
    """The flags of `evaluate.py report`."""

    # FastChat judgments, AlpacaEval annotations, conversation scores, agieval's responses
    files: tuple = ()
    # the model that pairs are counted against
    baseline: str = "gpt-3.5-turbo"
    # where to draw the scatter of the first two judges (Fig. 8)
    png: str = ""


def report(config: ReportConfig) -> None:
    """Print every table that the files have rows for."""
    if not config.files:
        raise ValueError(
            "report needs FILE..: FastChat judgments, AlpacaEval annotations, "
            "conversation scores or agieval's responses"
        )
    agieval_files = [path for path in config.files if is_agieval(path)]
    for path in agieval_files:
        print_agieval(path)

    judged_files = [path for path in config.files if path not in agieval_files]
    found = read_judgments(judged_files)
    if config.png and len(found.judges) < 2:
        raise ValueError(f"--png {config.png} needs the judgments of two judges")
    say_what_is_not_counted(found.judges, config.baseline)
    print_win_rates(found.judges, config.baseline)
    for judge, kinds in found.judges.items():
        print_scores(judge, rows_in(kinds.get("single", {})))
        print_conversation_scores(judge, kinds.get("conversation", {}))
    print_agreement(found.judges, config.png)

    if found.judges or found.unparsed:
        judgments = 0
        items = 0
        for kinds in found.judges.values():
            for by_item in kinds.values():
                items += len(by_item)
                judgments += len(rows_in(by_item))
        print(
            f"{judgments} judgments of {items} items; left out: {found.unparsed} without a verdict"
        )


def is_agieval(path: str) -> bool:
    """Whether a file holds responses to AGIEval's items; its first row tells."""
    _, first = rows_of(path)[0]
    return isinstance(first, dict) and {"task", "response"} <= first.keys()


def print_agieval(path: str) -> None:
    """Table 5, scored again from the responses."""
    rows = []
    for where, row in rows_of(path):
        fields = require(row, where, "task", "label", "response")
        is_text = isinstance(row["response"], str) and isinstance(row["task"], str)
        if not is_text or row["task"] not in TASKS:
            raise ValueError(
                f"{where}: no response to one of AGIEval's English tasks; "
                "give the --out of an agieval run"
            )
        fields.text("label")
        rows.append(row)
    print(agieval_table(rows, Path(path).stem))


# ---- reading judgments


class Judgment(NamedTuple):
    """A row of a judge's file, and what it is."""

    judge: str
    # pair, single, conversation or alpaca
    kind: str
    # (models, question, turn)
    item: tuple
    row: dict
    # False: the judge's text held no verdict
    has_verdict: bool


@dataclass
class Judgments:
    """All files together."""

    # {judge: {kind: {item: its rows, more than one when it was judged again}}}
    judges: dict[str, dict[str, dict[tuple, list[dict]]]]
    # rows left out: without a verdict, as in the official tools
    unparsed: int = 0


def read_judgments(files: list[str]) -> Judgments:
    """The judgments of all files. ValueError: a row that is none."""
    found = Judgments(judges={})
    for path in files:
        for where, row in rows_of(path):
            judgment = parse_judgment(row, where)
            if not judgment.has_verdict:
                found.unparsed += 1
                continue
            kinds = found.judges.setdefault(judgment.judge, {})
            by_item = kinds.setdefault(judgment.kind, {})
            by_item.setdefault(judgment.item, []).append(judgment.row)
    return found


def rows_in(by_item: dict[tuple, list[dict]]) -> list[dict]:
    """The rows of all items: FastChat and AlpacaEval average over rows, whatever they are of."""
    return list(itertools.chain.from_iterable(by_item.values()))


def parse_judgment(row: object, where: str) -> Judgment:
    """A row's kind goes by a field that only this kind has."""
    fields = row if isinstance(row, dict) else {}
    if "g1_winner" in fields:
        return parse_pair(row, where)
    if "preference" in fields:
        return parse_alpaca(row, where)
    if "score" in fields:
        return parse_score(row, where)
    raise ValueError(
        f"{where}: not a judgment; "
        "give FastChat judgments, AlpacaEval annotations or conversation scores"
    )


def parse_pair(row: dict, where: str) -> Judgment:
    """FastChat's judgment of two answers, in both orders."""
    fields = require(row, where, "judge", "model_1", "model_2", "question_id", "turn", "g2_winner")
    judge, _ = judge_and_prompt(row, where)
    check_question_number(row, where)
    models = fields.text("model_1"), fields.text("model_2")
    item = *models, row["question_id"], fields.whole("turn", 1, 2)
    for game in ("g1_winner", "g2_winner"):
        if fields.text(game) not in WINNERS:
            raise fields.wrong(game, f"one of {', '.join(WINNERS)}")
    has_verdict = "error" not in (row["g1_winner"], row["g2_winner"])
    return Judgment(judge, "pair", item, row, has_verdict)


def parse_score(row: dict, where: str) -> Judgment:
    """A score from 1 to 10: FastChat's of an answer, or ours of a conversation's turn."""
    fields = require(row, where, "judge", "model", "question_id", "turn")
    judge, prompt = judge_and_prompt(row, where)
    kind = "conversation" if prompt == "table-6" else "single"
    if kind == "single":
        check_question_number(row, where)
    question = name_or_number(fields, "question_id")
    # a conversation may have no source
    model = fields.text("model", default="")
    item = model, question, fields.whole("turn", 0, MOST_TURNS)
    row = row | {"model": model}
    # -1 is FastChat's for a text without a rating
    has_verdict = is_number(row["score"]) and -1 < row["score"] <= HIGHEST_SCORE
    return Judgment(judge, kind, item, row, has_verdict)


def parse_alpaca(row: dict, where: str) -> Judgment:
    """AlpacaEval's annotation: preference 1 is the first output's win, 2 the second's."""
    fields = require(row, where, "generator_1", "generator_2", "instruction")
    judge = fields.text("annotator", default="") or "annotator"
    models = fields.text("generator_1"), fields.text("generator_2")
    item = *models, fields.text("instruction")
    # older files write a draw as 0, newer ones as 1.5
    if row["preference"] == 0:
        row = row | {"preference": 1.5}
    preference = row["preference"]
    has_verdict = is_number(preference) and 1 <= preference <= 2
    return Judgment(judge, "alpaca", item, row, has_verdict)


def judge_and_prompt(row: dict, where: str) -> list:
    """[the judge's name, its prompt's name] of a FastChat row."""
    judge = row["judge"]
    is_pair = isinstance(judge, list) and len(judge) == 2
    if not is_pair or not all(isinstance(name, str) for name in judge):
        raise ValueError(
            f"{where}: judge is [its name, its prompt's name], not {shown(judge)}; {MEND}"
        )
    return judge


def check_question_number(row: dict, where: str) -> None:
    """ValueError unless the question has a number: the number tells its bench and category."""
    question = row["question_id"]
    is_named = isinstance(question, (int, str)) and not isinstance(question, bool)
    if not is_named or not re.fullmatch(r"[0-9]{1,9}", str(question)[:10]):
        raise ValueError(
            f"{where}: question_id {shown(question)} is not one of FastChat's numbers; {MEND}"
        )


def bench_of(question: int | str) -> str:
    """The bench that a question is of."""
    return "MT-bench" if MT_FIRST <= int(question) <= MT_LAST else "Vicuna-bench"


def category_of(question: int | str) -> str:
    """The category of a question of MT-bench."""
    return MT_CATEGORIES[(int(question) - MT_FIRST) // MT_PER_CATEGORY]


# ---- Table 1: win rates


class WinRate(NamedTuple):
    """The mean of a model's points on a bench, and its games."""

    rate: float
    won: int
    lost: int
    tied: int
    # of the rate, NaN for a single game
    standard_error: float


def points_of_pair(row: dict) -> float:
    """1, 0.5 or 0 for model_1: a tie when the two orders disagree, or either says so."""
    if row["g1_winner"] == "tie" or row["g1_winner"] != row["g2_winner"]:
        return 0.5
    return float(row["g1_winner"] == "model_1")


def points_of_alpaca(row: dict) -> float:
    """1 where the second output is preferred, the model's; 0 where the first, the reference's."""
    return row["preference"] - 1


def win_rates(kinds: dict, baseline: str) -> dict[tuple[str, str], WinRate]:
    """{(column, model): win rate} of one judge; pairs without the baseline are not counted."""
    points = {}
    for row in rows_in(kinds.get("pair", {})):
        first, second = row["model_1"], row["model_2"]
        if first == second or baseline not in (first, second):
            continue
        bench = bench_of(row["question_id"])
        if second == baseline:
            points.setdefault((bench, first), []).append(points_of_pair(row))
        else:
            points.setdefault((bench, second), []).append(1 - points_of_pair(row))
    # AlpacaEval names its own reference: generator_1
    for row in rows_in(kinds.get("alpaca", {})):
        column = f"{ALPACA}{row['generator_1']}"
        points.setdefault((column, row["generator_2"]), []).append(points_of_alpaca(row))

    rates = {}
    for key, games in points.items():
        # AlpacaEval's preferences lie anywhere in 1 to 2, so points lie anywhere in 0 to 1
        won = sum(x > 0.5 for x in games)
        lost = sum(x < 0.5 for x in games)
        tied = len(games) - won - lost
        rates[key] = WinRate(statistics.mean(games), won, lost, tied, standard_error(games))
    return rates


def standard_error(games: list[float]) -> float:
    """Of the mean of these points, as AlpacaEval counts it: sample deviation / sqrt(n)."""
    if len(games) < 2:
        return math.nan
    return statistics.stdev(games) / math.sqrt(len(games))


def say_what_is_not_counted(judges: dict, baseline: str) -> None:
    """A line for pairs of two models of which neither is the baseline."""
    pairs = 0
    models = collections.Counter()
    for kinds in judges.values():
        for row in rows_in(kinds.get("pair", {})):
            both = row["model_1"], row["model_2"]
            if baseline not in both:
                pairs += 1
                models.update(both)
    if pairs:
        names = ", ".join(name for name, _ in models.most_common(NAMES_SHOWN))
        line = f"{pairs} pairs are not against --baseline {baseline}, but of {names}: not counted"
        print(printable(line), file=sys.stderr)


def print_win_rates(judges: dict, baseline: str) -> None:
    """Table 1. Its columns have different judges, so a cell names its own."""
    # {model: {column: {judge: win rate}}}
    models = {}
    for judge, kinds in judges.items():
        for (column, model), rate in win_rates(kinds, baseline).items():
            models.setdefault(model, {}).setdefault(column, {})[judge] = rate
    if not models:
        return
    columns = sorted({*TABLE_1, *itertools.chain.from_iterable(models.values())})
    print(table_head(["win rate (Table 1)", *columns, "average"]))
    for model, found in sorted(models.items()):
        cells = []
        for column in columns:
            by_judge = found.get(column, {})
            cells.append(" / ".join(win_cell(column, judge, x) for judge, x in by_judge.items()))
        print(table_row([model, *cells, average_of(found)]))


def average_of(found: dict[str, dict[str, WinRate]]) -> str:
    """Table 1's average of a model's {column: {judge: win rate}}; empty where it has none.

    Several judges of one bench have no one average, neither have two benches, and one against
    another reference would not be the paper's.
    """
    rates = []
    for column in TABLE_1:
        by_judge = found.get(column, {})
        if len(by_judge) != 1:
            return ""
        rates += [x.rate for x in by_judge.values()]
    return f"{statistics.mean(rates):.1%}"


def win_cell(column: str, judge: str, x: WinRate) -> str:
    """What one judge says of a model in one column; AlpacaEval's with its standard error."""
    rate = f"{x.rate:.1%}"
    if column.startswith(ALPACA):
        rate += f" +- {100 * x.standard_error:.1f}"
    return f"{rate} ({x.won} won, {x.lost} lost, {x.tied} tied; {judge})"


# ---- Fig. 2 and 3: scores


def print_scores(judge: str, rows: list[dict]) -> None:
    """Fig. 2: FastChat's mean scores by turn and, in MT-bench, by category."""
    for bench, categories in (("MT-bench", MT_CATEGORIES), ("Vicuna-bench", ())):
        of_bench = [row for row in rows if bench_of(row["question_id"]) == bench]
        if not of_bench:
            continue
        title = f"{bench} score by {judge} (Fig. 2)"
        print(table_head([title, "turn 1", "turn 2", "average", *categories]))
        for model in sorted({row["model"] for row in of_bench}):
            mine = [row for row in of_bench if row["model"] == model]
            columns = []
            for turn in (1, 2):
                columns.append([row for row in mine if row["turn"] == turn])
            columns.append(mine)
            for name in categories:
                columns.append([row for row in mine if category_of(row["question_id"]) == name])
            print(table_row([model, *(mean_score(column) for column in columns)]))


def mean_score(rows: list[dict]) -> str:
    """A cell: the mean of these rows' scores, empty without rows."""
    if not rows:
        return ""
    return f"{statistics.mean(row['score'] for row in rows):.2f}"


def print_conversation_scores(judge: str, scores: dict[tuple, list[dict]]) -> None:
    """Fig. 3: how the scores of each source's conversations are distributed."""
    if not scores:
        return
    # {source: {conversation: the scores of its turns}}
    sources = {}
    for (source, conversation, _), rows in scores.items():
        score = statistics.mean(row["score"] for row in rows)
        sources.setdefault(source, {}).setdefault(conversation, []).append(score)

    title = f"conversation scores by {judge} (Fig. 3)"
    marks = range(1, 11)
    print(table_head([title, "conversations", "mean", *(str(mark) for mark in marks)]))
    for source, conversations in sorted(sources.items()):
        # App. G: a conversation's score is the mean of its turns'
        means = [statistics.mean(turns) for turns in conversations.values()]
        # a half goes up; round() would send 6.5 and 7.5 to even numbers, to 6 and 8
        nearest = [math.floor(mean + 0.5) for mean in means]
        counts = [str(nearest.count(mark)) for mark in marks]
        overall = f"{statistics.mean(means):.2f}"
        print(table_row([source or "(none)", str(len(means)), overall, *counts]))


# ---- do judges agree? (Fig. 8 and 9 ask it of models, this of single judgments)


def print_agreement(judges: dict, png: str) -> None:
    """The correlation of every two judges, over what both have judged."""
    pairs = list(itertools.combinations(sorted(judges), 2))
    for one, two in pairs:
        numbers_one = numbers_of(judges[one])
        numbers_two = numbers_of(judges[two])
        common = sorted(numbers_one.keys() & numbers_two.keys(), key=str)
        x = [numbers_one[item] for item in common]
        y = [numbers_two[item] for item in common]
        print(
            f"{one} and {two}: Pearson r = {pearson(x, y):.2f} "
            f"over {len(common)} common judgments (Fig. 8, 9: over models)"
        )
        if png and (one, two) == pairs[0]:
            scatter(png, one, x, two, y)


def numbers_of(kinds: dict) -> dict[tuple, float]:
    """{(kind, item): number} of one judge: scores, and the points of pairs and preferences; the
    mean where an item was judged more than once."""
    numbers = {}
    for kind, by_item in kinds.items():
        for item, rows in by_item.items():
            numbers[(kind, *item)] = statistics.mean(number_of(kind, row) for row in rows)
    return numbers


def number_of(kind: str, row: dict) -> float:
    """What a judgment says, as a number."""
    if kind == "pair":
        return points_of_pair(row)
    if kind == "alpaca":
        return points_of_alpaca(row)
    return row["score"]


def pearson(x: list[float], y: list[float]) -> float:
    """Pearson's r; NaN where it is not defined: of fewer than two, or of all the same number."""
    if len(x) < 2 or np.std(x) == 0 or np.std(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def scatter(path: str, one: str, x: list[float], two: str, y: list[float]) -> None:
    """A picture of two judges' numbers, a dot for each common judgment."""
    # only this picture needs matplotlib
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--png: `pip install matplotlib`") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4, 4))
    axes.scatter(x, y, s=8, alpha=0.5)
    # names are no formulas, whatever dollar signs they have
    axes.set_xlabel(one, parse_math=False)
    axes.set_ylabel(two, parse_math=False)
    axes.set_title(f"Pearson r = {pearson(x, y):.2f}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
