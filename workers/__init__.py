"""The side of SAE Atlas that computes: SAE maths, model loading, the gpu worker and the trainer."""

import os

# Before torch loads OpenMP. By default its threads spin while they wait for each other; where the gpu worker and the
# trainer share the cores that is ruinous: two such processes on two cores took 3.5 s for a forward pass of 0.6 s, and
# 1.2 s with waiting threads asleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
