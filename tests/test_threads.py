"""support/threads.py: how OpenMP's threads wait, and whose word counts."""

import os
import subprocess
import sys

from conftest import ROOT

PROGRAMS = "train", "sample", "data", "evaluate", "paper"


def asked_for(module, **env):
    """OMP_WAIT_POLICY and GOMP_SPINCOUNT when torch or numpy is loaded by a module of ours."""
    code = (
        "import os, sys, importlib.abc\n"
        "class Watch(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name in ('torch', 'numpy'):\n"
        "            env = os.environ.get\n"
        "            print(env('OMP_WAIT_POLICY'), env('GOMP_SPINCOUNT'), flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"import {module}\n"
    )
    mine = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=mine | env, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_every_program_says_how_threads_wait_unless_the_user_has():
    for program in PROGRAMS:
        assert asked_for(f"{program}.toy" if program == "paper" else program) == "None 20000"
    assert asked_for("train", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE None"
    assert asked_for("train", GOMP_SPINCOUNT="1000") == "None 1000"
