"""The whole paper in miniature: every run that any command wants, then every table and figure.

python -m paper [--assets DIR] [--processes N]
"""

import importlib
import json
import time

from paper.commands import command, is_left_out, jobs_of, place_of, read_config
from paper.runs import perform
from support.cli import run

COMMANDS = (
    "table2",
    "habits",
    "fig3",
    "fig4",
    "fig5",
    "fig6",
    "fig7",
    "alpha",
    "optimum",
    "classes",
    "seven",
)


def main(argv: list[str]) -> None:
    began = time.monotonic()
    config = read_config(argv)

    # All runs first, so that the cores are busy to the end. Then each command finds its own.
    wanted = []
    for name in COMMANDS:
        module = importlib.import_module(f"paper.{name}")
        if not is_left_out(module, config):
            for group in jobs_of(module, config).values():
                wanted += group
    done = perform(wanted, config)
    analysis = sum(command(name, argv) for name in COMMANDS)

    # each run once, whoever asked for it
    runs = sum(result["cpu_seconds"] for result in done.values())
    hours = (runs + analysis) / 3600
    content = {"command": "python -m paper", "runs": len(done), "core_hours": round(hours, 3)}
    path = place_of(config) / "all.json"
    path.write_text(json.dumps(content) + "\n")
    minutes = (time.monotonic() - began) / 60
    spent = f"{len(done)} runs and their analysis: {hours:.2f} core-hours, processes of one thread"
    pace = f"({config.processes} at a time; this call took {minutes:.0f} min)"
    print(spent, pace)


if __name__ == "__main__":
    run(main)
