"""The tables of README and docs, rendered from results/*.json; docs/flags.md from the dataclasses
of the flags.

    python tests/pages.py        write them into the pages, after `<!-- name -->`

tests/test_readme.py checks that each page shows what its results say.
"""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import PrepareConfig, ShowConfig, StatsConfig  # noqa: E402, after the path
from evaluation.agieval import AgievalConfig  # noqa: E402
from evaluation.answers import AnswersConfig  # noqa: E402
from evaluation.judge import JudgeConfig  # noqa: E402
from evaluation.report import ReportConfig  # noqa: E402
from paper.cancel import CancelConfig  # noqa: E402
from paper.commands import PaperConfig  # noqa: E402
from paper.packing import PackingConfig  # noqa: E402
from paper.real import RealConfig  # noqa: E402
from paper.step import StepConfig  # noqa: E402
from paper.toy import ToyConfig  # noqa: E402
from recipe import TrainConfig  # noqa: E402
from sample import SampleConfig  # noqa: E402
from support.budget import FitConfig  # noqa: E402
from support.cli import flags_of  # noqa: E402

RESULTS = ROOT / "results"

# Where our kernels stand in README: one case of each, LLaMA-2 7B's.
README_CASES = [
    ("rms_norm", "D=4096", "RMSNorm + residual"),
    ("swiglu", "F=11008", "SwiGLU"),
    ("rotary_attention", "H=32 G=32 lengths=sharegpt seed=0", "attention with RoPE, packed"),
    ("cross_entropy", "D=4096 supervised=1.0", "head and weighted loss"),
    ("cross_entropy", "D=4096 supervised=0.6", "the same, 60% supervised"),
]


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def where(results: dict) -> str:
    """One line on the machine, below a table."""
    return (
        f"{results['device']}, driver {results['driver']}, torch {results['torch']}, "
        f"triton {results['triton']}, {results['date']}; `{results['command']}`"
    )


# ---- kernels.bench


def cases_of(results: dict) -> dict:
    """{(kernel, shape, direction): {implementation: row}}, shapes as text without what is alike."""
    cases = {}
    for row in results["rows"]:
        sizes = {k: v for k, v in row["shape"].items() if k not in ("T", "E", "V")}
        shape = " ".join(f"{k}={v}" for k, v in sizes.items())
        key = row["kernel"], shape, row["direction"]
        cases.setdefault(key, {})[row["implementation"]] = row
    return cases


def comparable(case: dict) -> dict:
    """The peers: neither ours, nor a part of it. One "without RoPE" does less than ours."""
    peers = {}
    for name, row in case.items():
        if name != "ours" and "of it" not in name:
            peers[name] = row
    return peers


def gpu() -> str:
    """README: ours beside the fastest peer."""
    results = read("bench.json")
    cases = cases_of(results)
    rows = []
    for kernel, shape, title in README_CASES:
        for (name, sizes, direction), case in cases.items():
            if (name, sizes) != (kernel, shape):
                continue
            ours = case["ours"]
            fastest = min(comparable(case).values(), key=lambda row: row["milliseconds"])
            rows.append(
                [
                    title,
                    direction if direction != "both" else "forward and backward",
                    f"{ours['milliseconds']:.2f}",
                    f"{ours['share']:.0%}",
                    f"{fastest['milliseconds']:.2f}",
                    fastest["implementation"],
                ]
            )
    head = ["kernel", "pass", "ours, ms", "of the ceiling", "fastest peer, ms", "which"]
    return f"{markdown(head, rows)}\n\n{ceiling(results)}\n{where(results)}"


def ceiling(results: dict) -> str:
    measured = results["ceiling"]
    return (
        f"Ceilings measured in the same run: a copy at {measured['bytes'] / 1e12:.2f} TB/s, "
        f"an 8192^3 matmul at {measured['flops'] / 1e12:.0f} TFLOP/s."
    )


def bench() -> str:
    """docs/kernels.md: every case with every peer."""
    results = read("bench.json")
    rows = []
    for (kernel, shape, direction), case in cases_of(results).items():
        ours = case["ours"]
        unit = "TB/s" if ours["unit"] == "bytes" else "TFLOP/s"
        rate = f"{ours['rate'] / 1e12:.2f}" if unit == "TB/s" else f"{ours['rate'] / 1e12:.0f}"
        others = {name: row for name, row in case.items() if name != "ours"}
        peers = [f"{name} {row['milliseconds']:.2f}" for name, row in others.items()]
        rows.append(
            [
                f"{kernel} {shape}",
                direction,
                f"{ours['milliseconds']:.3f}",
                f"{rate} {unit}, {ours['share']:.0%}",
                f"{ours['error']:.1e}, {case['torch']['error']:.1e}",
                "; ".join(peers),
            ]
        )
    head = ["kernel and sizes", "pass", "ours, ms", "rate, of the ceiling"]
    head += ["error: ours, PyTorch's", "peers, ms"]
    return f"{markdown(head, rows)}\n\n{ceiling(results)}\n{where(results)}"


# What a program, or one turn of its loop, computes: the product of these sizes, in elements.
ELEMENTS = {
    ("rms_norm", "_fwd_kernel"): ["BD"],
    ("rms_norm", "_bwd_kernel"): ["BD"],
    ("swiglu", "_fwd_kernel"): ["B"],
    ("swiglu", "_bwd_kernel"): ["B"],
    ("rotary_attention", "_rotate_kernel"): ["BA", "E"],
    ("rotary_attention", "_fwd_kernel"): ["BM", "BN"],
    ("rotary_attention", "_dq_kernel"): ["BM", "BN"],
    ("rotary_attention", "_dkv_kernel"): ["BM", "BN"],
    ("cross_entropy", "_softmax_kernel"): ["BV"],
}


def counts() -> str:
    """docs/kernels.md: instructions and registers of every kernel, at commit d331a37 and now."""
    after = read("kernel_counts.json")
    before = {}
    for row in read("kernel_counts_d331a37.json")["rows"]:
        before.setdefault((row["arch"], row["file"], row["kernel"]), row)
    table = {}
    for row in after["rows"]:
        kernel = row["file"], row["kernel"]
        cells = table.setdefault(kernel, {})
        if kernel in ELEMENTS and row["arch"] not in cells:
            cells[row["arch"]] = f"{count(before[row['arch'], *kernel])} -> {count(row)}"
    archs = list(dict.fromkeys(row["arch"] for row in after["rows"]))
    rows = []
    for (file, kernel), cells in table.items():
        if cells:
            rows.append([f"`{file}.{kernel}`", *(cells[arch] for arch in archs)])
    made = f"triton {after['triton']}; `{after['command']}`"
    return f"{markdown(['kernel', *archs], rows)}\n\n{made}"


def count(row: dict) -> str:
    """Instructions an element, and registers; spills where there are any."""
    sizes = row["constants"]
    # the old rotation was of a tile of rows of one head
    elements = math.prod(
        sizes.get(name, sizes.get("BT")) for name in ELEMENTS[row["file"], row["kernel"]]
    )
    lanes = 64 if row["arch"] == "gfx942" else 32
    # attention's first loop is that of whole tiles, the second that of the diagonal
    loops = row["loops"][:1] if row["file"] == "rotary_attention" else row["loops"]
    done = sum(loops) or row["instructions"]
    spills = f", {row['spills']} spills" if row["spills"] else ""
    return f"{done * lanes * row['warps'] / elements:.1f} ({row['registers']}{spills})"


# ---- paper.step


def step_gpu() -> str:
    results = read("step_gpu_7b.json")
    rows = []
    for row in results["rows"]:
        rows.append(
            [
                row["contestant"],
                f"{row['tokens_per_s']:,.0f}",
                f"{row['tflops']:.0f}",
                f"{row['mfu']:.0%}",
                f"{row['peak_bytes'] / 2**30:.1f}",
            ]
        )
    head = ["contestant", "tokens/s", "TFLOP/s", "MFU", "peak GiB"]
    return f"{markdown(head, rows)}\n\n{where(results)}"


# ---- the paper in miniature


def table2_short() -> str:
    """docs/method.md: Table 2's first table, without the scarce skill."""
    first, *_ = read("paper/table2.json")["table"].split("\n\n")
    _, _, *lines = first.splitlines()
    keep = (0, 1, 2, 3, 5, 6)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    titles = ["arm", "paper, %", "habits: sampled", "greedy", "noise: sampled", "greedy"]
    return markdown(titles, [[row[i] for i in keep] for row in rows])


# ---- paper.packing and paper.cancel


def packing() -> str:
    """docs/data.md: the ways to form batches, for 8 ranks."""
    results = read("packing.json")
    rows = []
    for name, by_ranks in results["plans"].items():
        # the first name stands in the head of the table, another in a row of its own
        if rows:
            rows.append([f"**{name}**", *[""] * 5])
        for way, row in by_ranks["8"].items():
            rows.append(
                [
                    way,
                    f"{row['steps']:.0f}; {row['fill']:.1%}",
                    f"{row['dropped']:.0f}",
                    f"{row['flops_mean']:.4f}, {row['flops_worst']:.4f}",
                    f"{row['share_low']:.3f}, {row['share_high']:.3f}",
                    f"{row['cpu_seconds']:.2f}",
                ]
            )
    first, *_ = results["plans"]
    head = [first, "steps; fill", "dropped", "FLOPs: mean, worst", "share: lowest, highest"]
    return markdown([*head, "seconds of CPU"], rows)


def plan_times() -> str:
    """docs/data.md: how long `plan` takes, seconds of CPU and of the clock."""
    rows = []
    for row in read("packing.json")["plan_times"]:
        rows.append(
            [
                row["kind"],
                f"{row['micro_tokens']:,}",
                f"{row['steps']:,}; {row['fill']:.1%}",
                f"{row['cpu_seconds']:.2f}; {row['seconds']:.2f}",
            ]
        )
    return markdown(["lengths", "micro-batch", "steps; fill", "seconds: CPU; clock"], rows)


# what the ways of paper.cancel are called in the page
DIVIDED_BY = {
    "step": "the step's weights (ours)",
    "micro-batch, by tokens": "each micro-batch's weights, then by tokens (LLaMA-Factory v1)",
    "micro-batch": "each micro-batch's weights, then the mean",
    "conversation": "each conversation's tokens, then the step's weights",
    "tokens": "the step's tokens, without weights (SFT)",
}


def cancel() -> str:
    """docs/method.md: the expert's share, and what a weight of 0.1 counts as."""
    by_corpus = read("cancel.json")["rows"]
    rows = []
    for several in zip(*by_corpus.values()):
        way, size = several[0]["way"], several[0]["size"]
        cells = [DIVIDED_BY[way], "packed" if size is None else str(size)]
        for row in several:
            cells.append(f"{row['share']:.3f} ({row['low']:.3f} to {row['high']:.3f})")
            cells.append(f"{row['counts_as']:.2f}")
        rows.append(cells)
    head = ["the loss is divided by the sum of", "conversations of a micro-batch"]
    for name in by_corpus:
        head += [f"expert's share, {name}", "0.1 counts as"]
    return markdown(head, rows)


# ---- paper.real


def real() -> str:
    """docs/real.md: held-out answers by source and prompt."""
    results = read("real_smollm2.json")
    return f"{results['tables']['real']}\n\n{real_run(results)}"


def real_equal() -> str:
    """docs/real.md: the same with equal weights."""
    results = read("real_smollm2_equal.json")
    return f"{results['tables']['real']}\n\n{real_run(results)}"


def real_parts() -> str:
    return read("real_smollm2.json")["tables"]["real_parts"]


def real_none() -> str:
    return read("real_smollm2.json")["tables"]["real_none"]


def real_run(results: dict) -> str:
    """One line on the run, below the first table."""
    minutes = results["seconds_of_steps"] / 60
    return (
        f"{results['steps']} steps an arm, {results['tokens_trained']:,} tokens in both, "
        f"{minutes:.0f} minutes of steps by the clock, both arms together, "
        f"torch {results['versions']['torch']}; `{results['command']}`"
    )


def real_samples() -> str:
    """docs/real.md: what the model says under either prompt."""
    blocks = []
    for sample in read("real_smollm2.json")["samples"]:
        lines = [sample["prompt"]]
        for condition in ("GPT4", "GPT3"):
            lines.append(f"\n[{condition} User:] {sample[condition].strip()}")
        # pages are ASCII
        text = "\n".join(lines).encode("ascii", "backslashreplace").decode()
        text = text.replace("```", "'''")
        blocks.append(f"```\n{text}\n```")
    return "\n\n".join(blocks)


# ---- the flags

# each entry point, and the field that takes the words which belong to no flag
ENTRY_POINTS = [
    ("train.py", TrainConfig, None),
    ("train.py --dry_run", FitConfig, None),
    ("data.py prepare", PrepareConfig, "files"),
    ("data.py show", ShowConfig, "files"),
    ("data.py stats", StatsConfig, "files"),
    ("sample.py", SampleConfig, "folder"),
    ("evaluate.py agieval", AgievalConfig, "model"),
    ("evaluate.py answers", AnswersConfig, "model"),
    ("evaluate.py judge", JudgeConfig, "files"),
    ("evaluate.py report", ReportConfig, "files"),
    ("-m paper, and each of its tables and figures", PaperConfig, None),
    ("-m paper.toy", ToyConfig, None),
    ("-m paper.packing", PackingConfig, None),
    ("-m paper.cancel", CancelConfig, None),
    ("-m paper.real", RealConfig, "files"),
    ("-m paper.step", StepConfig, None),
]


def flags() -> str:
    """docs/flags.md: what --help says, a table for each entry point."""
    inherited = {field.name for field in dataclasses.fields(TrainConfig)}
    sections = []
    for title, config_class, positional in ENTRY_POINTS:
        rows = []
        for name, default, lines in flags_of(config_class):
            # --dry_run takes the run's own flags, too
            if config_class is FitConfig and name in inherited:
                continue
            flag = f"{name.upper()}.." if name == positional else f"--{name}"
            shown = f"`{default}`" if default else ""
            for line in lines:
                if line.startswith("default: "):
                    shown = line.removeprefix("default: ")
            said = "<br>".join(line for line in lines if not line.startswith("default:"))
            rows.append([f"`{flag}`", shown, said])
        note = "The run's own flags, and:\n\n" if config_class is FitConfig else ""
        sections.append(f"## {title}\n\n{note}{markdown(['flag', 'default', 'what'], rows)}")
    return "\n" + "\n\n".join(sections) + "\n"


# ---- tests/fuzz.py


def fuzz() -> str:
    """CONTRIBUTING.md: what became of broken input."""
    results = read("fuzz.json")
    rows = []
    for row in results["rows"]:
        counts = [f"{row[key]:,}" for key in ("inputs", "refused", "accepted", "unexpected")]
        rows.append([f"`{row['target']}`", row["what"], *counts])
    head = ["target", "what is broken", "inputs", "refused", "accepted", "unexpected"]
    dates = " and ".join(sorted({row["date"] for row in results["rows"]}))
    return f"{markdown(head, rows)}\n\n{dates}; `{results['command']}`"


PAGES = {
    "CONTRIBUTING.md": [fuzz],
    "docs/flags.md": [flags],
    "README.md": [gpu],
    "docs/data.md": [packing, plan_times],
    "docs/kernels.md": [bench, counts],
    "docs/training.md": [step_gpu],
    "docs/method.md": [table2_short, cancel],
    "docs/real.md": [real, real_parts, real_none, real_equal, real_samples],
}


def region(name: str) -> re.Pattern:
    return re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)


def main() -> None:
    for page, tables in PAGES.items():
        text = (ROOT / page).read_text()
        for table in tables:
            rendered = table()
            # a function, since the text of a replacement must not be read for escapes
            text = region(table.__name__).sub(lambda m, x=rendered: f"{m[1]}{x}\n{m[2]}", text)
        (ROOT / page).write_text(text)


if __name__ == "__main__":
    main()
