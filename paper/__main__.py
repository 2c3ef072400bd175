"""The whole paper in miniature: every run that any command wants, once, then every table and figure.

    python -m paper [--assets DIR] [--processes N]
"""

import importlib
import time

from data import parse_args, run
from paper.runs import PaperConfig, check, command, perform, runs_of

COMMANDS = "table2", "fig3", "fig4", "fig5", "fig6", "fig7", "alpha", "optimum", "classes", "seven"


def main(argv):
    config, began = check(parse_args(PaperConfig, argv)), time.monotonic()
    modules = [importlib.import_module(f"paper.{name}") for name in COMMANDS]
    wanted = [one for module in modules if config.assets or not getattr(module, "NEEDS_ASSETS", False)
              for group in runs_of(module, config).values() for one in group]
    done = perform(wanted, config)
    analysis = sum(command(name)(argv) for name in COMMANDS)
    cpu = sum(result["cpu_seconds"] for result in done.values())
    print(f"{len(done)} runs: {cpu / 3600:.2f} core-hours, and {analysis / 60:.0f} min of analysis ({config.processes} processes of one thread; "
          f"this call took {(time.monotonic() - began) / 60:.0f} min)")


if __name__ == "__main__":
    run(main)
