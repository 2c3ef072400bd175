"""How the threads of a process wait for one another on a CPU. To be imported before torch.

OpenMP divides a matrix product among its threads, and a thread that is done first waits for the
others. By default it spins: it asks again and again, for milliseconds, and keeps its core busy.
Alone on a machine that is the fastest. But where another program has one of the cores, the thread
that still has work to do is put off while the one that has none spins.

So here a thread that waits sleeps. This changes no bit of any result: the number of threads, on
which the order of sums depends, stays what it is. Who has set one of the two variables keeps it.
"""

import os

# The names under which OpenMP and GNU's library for it know the wait.
IS_SET = [name for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ]

# The library reads it once, when it is loaded: with torch.
if not IS_SET:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
