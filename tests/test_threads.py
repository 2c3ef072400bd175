"""support/threads.py: how OpenMP's threads wait, and whose word counts."""

import os
import subprocess
import sys

from conftest import ROOT

PROGRAMS = "train", "sample", "data", "evaluate", "paper"


def policy_after(module, **env):
    """OMP_WAIT_POLICY when torch is loaded by a module of ours."""
    code = (
        "import os, sys, importlib.abc\n"
        "class Watch(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name in ('torch', 'numpy'):\n"
        "            print(os.environ.get('OMP_WAIT_POLICY'), flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"import {module}\n"
        "print('no torch', os.environ.get('OMP_WAIT_POLICY'))\n"
    )
    mine = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=mine | env, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_every_program_lets_waiting_threads_sleep_unless_the_user_said_otherwise():
    for program in PROGRAMS:
        assert policy_after(program).endswith("PASSIVE"), program
    assert policy_after("train", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"
    assert policy_after("train", GOMP_SPINCOUNT="1000") == "None"
