"""Transformer GANs that train with fused attention: `python -m gans train --help`."""

import os

# OpenMP threads that spin while they wait make small layers several times slower as soon as anything else runs on the
# machine (six times, measured with two threads on two busy cores). Read when torch loads; a user's own choice stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
