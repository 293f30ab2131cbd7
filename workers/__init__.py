"""The side of SAE Atlas that computes: SAE maths, model loading, the gpu worker and the trainer."""

import os

# Before torch loads OpenMP. By default its threads spin without end while they wait for each other; where the gpu
# worker and the trainer share the cores that is ruinous: two such processes on two cores took 3.5 s for a forward pass
# of 0.6 s, and 1.5 s when waiting threads go to sleep after a while. Asleep at once (OMP_WAIT_POLICY=PASSIVE), though,
# a prompt alone takes twice as long; 30,000 spins, some tens of microseconds, keep both.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
