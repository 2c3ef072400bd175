"""What the commands of the paper in miniature share: flags, statistics, tables, figures, pages.

    python -m paper            all commands: an hour or two on 2 cores; stop it when you like,
                               the same line goes on
    python -m paper.table2     one of them; --processes N, --seeds N,
                               --steps N (shorter runs, into out/paper only)

A command is a module of this folder with

    SEEDS                      how many, where --seeds does not say
    jobs(seed)                 {key: Job}: an arm, or a point of a figure, with this seed
    report(results, folder)    {key: [a result per seed]} -> (numbers for JSON, the page's table);
                               the picture goes into the folder
    PAGE                       the page with the table's mark, where it is not paper/README.md

`command` puts them together: jobs, then runs.perform, then report, then publish.
"""

import dataclasses
import importlib
import itertools
import json
import math
import os
import platform
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from paper.code_hash import ROOT
from paper.runs import MOST_SEEDS, Job, cpu_seconds, perform
from support.cli import parse_args
from support.files import written_whole

# docs/method.md has four columns of Table 2: tests/pages.py writes them from the same results
PAGE = ROOT / "paper" / "README.md"
ASSETS = "conversations/mixed_quality.jsonl", "llama2/tokenizer.model"
# Student's t of a 95% interval, by the number of seeds
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
assert max(T_95) == MOST_SEEDS


# ---- flags


def cores() -> int:
    """That this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


@dataclass(frozen=True)
class PaperConfig:
    """The flags of every table and figure of the paper."""

    # a folder for the runs; what is there already is not run again
    out: str = "out/paper"
    # runs of each kind, each with a seed of its own
    # default: 5 for table2 and claims, 3 for the others
    seeds: int | None = None
    # shorten every run to so many steps; with this or --seeds results stay in --out
    steps: int | None = None
    # runs at a time
    # default: the cores that this process may use
    processes: int = cores()
    # a folder with real conversations, for paper.seven
    assets: str = ""


def read_config(argv: list[str]) -> PaperConfig:
    """The flags, checked before any run is made."""
    config = parse_args(PaperConfig, argv)
    for name, most in (("seeds", MOST_SEEDS), ("steps", 10**6), ("processes", 1024)):
        value = getattr(config, name)
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"--{name} {value} is not from 1 to {most:,}")
    for file in ASSETS:
        if config.assets and not (Path(config.assets) / file).is_file():
            raise ValueError(f"--assets {config.assets}: no {file} in it")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("the figures need matplotlib: `pip install matplotlib`") from None
    return config


def is_whole(config: PaperConfig) -> bool:
    """Whether the results are the repository's: not of shortened runs, and of all seeds."""
    return config.steps is None and config.seeds is None


# ---- a command


def command(name: str, argv: list[str]) -> float:
    """`python -m paper.<name>`; returns the seconds of CPU that the report took."""
    config = read_config(argv)
    # By its name even where it is the script that runs: a job of `__main__` would be another kind
    # of job, and not found by others.
    module = importlib.import_module(f"paper.{name}")
    if is_left_out(module, config):
        print(f"{name}: left out; --assets DIR names a folder with {' and '.join(ASSETS)}")
        return 0
    wanted = jobs_of(module, config)
    done = perform(list(itertools.chain(*wanted.values())), config)

    torch.set_num_threads(1)
    began = cpu_seconds()
    results = {}
    for key, group in wanted.items():
        results[key] = [done[job] for job in group]
    numbers, table = module.report(results, place_of(config))
    seconds = {
        "runs": round(sum(result["cpu_seconds"] for result in done.values()), 1),
        "analysis": round(cpu_seconds() - began, 1),
    }
    content = {
        "command": f"python -m paper.{name}",
        "seeds": config.seeds or module.SEEDS,
        "cpu_seconds": seconds,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "results": numbers,
        "table": table,
    }
    publish(name, config, content)
    return seconds["analysis"]


def is_left_out(module: ModuleType, config: PaperConfig) -> bool:
    """Whether a command needs real conversations, and the flags name none."""
    return getattr(module, "NEEDS_ASSETS", False) and not config.assets


def jobs_of(module: ModuleType, config: PaperConfig) -> dict[object, list[Job]]:
    """{key: [its job for each seed]} of a command's module, shortened as the flags say."""
    wanted = {}
    for seed in range(config.seeds or module.SEEDS):
        for key, job in module.jobs(seed).items():
            job = dataclasses.replace(shortened(job, config.steps), assets=config.assets)
            wanted.setdefault(key, []).append(job)
    return wanted


def shortened(job: Job, steps: int | None) -> Job:
    """The same job with at most so many steps, and so many of its base's."""
    if steps is None:
        return job
    if job.needs:
        job = dataclasses.replace(job, base=shortened(job.base, steps))
    return dataclasses.replace(job, steps=min(steps, job.steps or steps))


def place_of(config: PaperConfig) -> Path:
    """The folder of JSON and pictures: the repository's results for whole runs, else in --out."""
    place = ROOT / "results" / "paper" if is_whole(config) else Path(config.out) / "short"
    place.mkdir(parents=True, exist_ok=True)
    return place


def publish(name: str, config: PaperConfig, content: dict) -> None:
    """Write <name>.json, print the table, and put that of whole runs where a page has its mark."""
    path = place_of(config) / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    table = content["table"]
    print(f"\n{table}\n", flush=True)
    if not is_whole(config):
        return
    mark = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)", re.DOTALL)
    page = getattr(importlib.import_module(f"paper.{name}"), "PAGE", PAGE)
    # a function, since re would read the backslashes of a text
    text, places = mark.subn(lambda _: f"{table}\n", page.read_text())
    if places != 1:
        raise ValueError(f"{page}: {places} places of the mark <!-- {name} -->; there must be one")
    with written_whole(page) as partial:
        partial.write_text(text)


# ---- statistics and tables


def interval(values: Iterable[float]) -> tuple[float, float | None]:
    """(mean, half width of its 95% interval by Student's t), None for the width of one value."""
    values = list(values)
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None
    return mean, T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def cell(values: Iterable[float], digits: int = 3) -> str:
    """`0.812 +- 0.034` of a value per seed."""
    mean, half = interval(values)
    text = f"{mean:.{digits}f}"
    return text if half is None else f"{text} +- {half:.{digits}f}"


def markdown(head: list, rows: list[list]) -> str:
    """The table, a line a row."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# ---- figures

# A group's shade, sign and line. The shades part in grey, too, and the signs do at half the width.
LOOKS = (
    ("black", "o", "-"),
    ("tab:orange", "s", "--"),
    ("tab:blue", "^", "-."),
    ("0.6", "D", ":"),
    ("tab:red", "v", (0, (5, 1, 1, 1, 1, 1))),
    ("tab:green", "P", (0, (1, 2))),
)
# One style for all pictures.
STYLE = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
    "legend.fontsize": 11,
    "lines.markersize": 6,
}


def open_figure(width: float = 6.4, height: float = 4.0, shape: tuple[int, int] = (1, 1)):
    """(figure, axes) of matplotlib, an array of axes if shape is not (1, 1); sizes in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(STYLE)
    return pyplot.subplots(*shape, figsize=(width, height))


def save_figure(figure, path: Path) -> None:
    """As PNG; the figure is closed."""
    from matplotlib import pyplot

    # what stands outside the axes, as a legend, belongs to the picture; without matplotlib's
    # version in the file, the same picture is the same bytes
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
    print(f"wrote {path}")


def intervals(rows: Iterable[list[float]]) -> tuple[list[float], list[float]]:
    """(means, half widths) of rows of values; 0 for the width of one value."""
    means = []
    halves = []
    for values in rows:
        mean, half = interval(values)
        means.append(mean)
        halves.append(half or 0)
    return means, halves


def lines(axes, x: list[float], groups: dict[str, list]) -> None:
    """Lines with intervals: groups {name: [values by x]}."""
    assert len(groups) <= len(LOOKS)
    for (colour, sign, line), (name, values_by_x) in zip(LOOKS, groups.items()):
        means, halves = intervals(values_by_x)
        axes.errorbar(
            x, means, halves, marker=sign, color=colour, linestyle=line, capsize=3, label=name
        )


def paired_dots(axes, labels: list[str], groups: dict[str, dict]) -> None:
    """A row for each label, and in it a dot with its interval for each group that has one.

    groups: {legend: {label: values}}. A grey line joins the dots of a row.
    """
    assert len(groups) <= len(LOOKS)
    # the dots of a row stand a little below one another, so that their intervals part
    step = 0.5 / len(groups)
    rows = {label: i for i, label in enumerate(labels)}
    joined = {label: [] for label in labels}
    for k, ((colour, sign, _), (legend, values_by_label)) in enumerate(zip(LOOKS, groups.items())):
        means, halves = intervals(values_by_label.values())
        places = [rows[label] + k * step for label in values_by_label]
        axes.errorbar(
            means, places, xerr=halves, fmt=sign, color=colour, capsize=3, label=legend, zorder=3
        )
        for label, mean, place in zip(values_by_label, means, places):
            joined[label].append((mean, place))
    for dots in joined.values():
        axes.plot(*zip(*dots), color="0.8", zorder=1)
    middle = step * (len(groups) - 1) / 2
    axes.set_yticks([i + middle for i in rows.values()], labels)
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()


def legend_above(axes, columns: int) -> None:
    """Where no dot and no line can be under it."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns)
