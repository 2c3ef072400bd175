"""How the threads of a process wait for one another on a CPU. To be imported before torch.

OpenMP divides a matrix product among its threads, and a thread that is done first waits for the
others. By default it asks 300,000 times, for milliseconds, before it sleeps, and keeps its core
busy. Alone on a machine that is the fastest. But where another program has one of the cores, the
thread that still has work to do is put off while the one that has none asks.

So here it asks 20,000 times. The median step of the toy, two threads on two cores, seconds:

    asks       alone           beside busy neighbours
    300,000    0.093, 0.105    3.46
    20,000     0.102, 0.104    1.05
    1,000      0.148, 0.152    0.17
    0          0.172, 0.179    -

2026-11-27, torch 2.13. Each number is a run, the median of its steps from 6 on in
OUT/metrics.jsonl: of 60 alone, of 12 at a load of 5. (0 is OMP_WAIT_POLICY=PASSIVE.)

    GOMP_SPINCOUNT=20000 python train.py --data out/demo/train.safetensors --model toy --out OUT \\
        --steps 60 --val_every 10000

The number of threads, on which the order of sums depends, stays what it is. Who has set one of the
two variables keeps it.

On another machine of two cores, whose neighbour kept one of them busy, the median of 100 steps was
0.49 s with 20,000, 0.12 with 1,000, and 0.07 with one thread (OMP_NUM_THREADS=1); alone 0.054 with
two threads, 0.067 with one (2026-11-28). So where the cores are shared, one thread is the cure.
"""

import os

# The library of GNU's compiler reads it once, when it is loaded: with torch.
SPINS = "20000"
IS_SET = [name for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ]
if not IS_SET:
    os.environ["GOMP_SPINCOUNT"] = SPINS
