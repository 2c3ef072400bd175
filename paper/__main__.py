"""The whole paper in miniature: every run that any command wants, once, then every table and figure.

python -m paper [--assets DIR] [--processes N]
"""

import importlib
import json
import time

from paper.runs import PaperConfig, check, command, perform, place_of, runs_of
from support.cli import parse_args, run

COMMANDS = "table2", "fig3", "fig4", "fig5", "fig6", "fig7", "alpha", "optimum", "classes", "seven"


def main(argv):
    config, began = check(parse_args(PaperConfig, argv)), time.monotonic()
    modules = [importlib.import_module(f"paper.{name}") for name in COMMANDS]
    wanted = [
        one
        for module in modules
        if config.assets or not getattr(module, "NEEDS_ASSETS", False)
        for group in runs_of(module, config).values()
        for one in group
    ]
    done = perform(wanted, config)
    analysis = sum(command(name)(argv) for name in COMMANDS)
    hours = (sum(result["cpu_seconds"] for result in done.values()) + analysis) / 3600
    (place_of(config) / "all.json").write_text(
        json.dumps({"command": "python -m paper", "runs": len(done), "core_hours": round(hours, 3)})
        + "\n"
    )
    print(
        f"{len(done)} runs and their analysis: {hours:.2f} core-hours, processes of one thread ({config.processes} at a time; "
        f"this call took {(time.monotonic() - began) / 60:.0f} min)"
    )


if __name__ == "__main__":
    run(main)
