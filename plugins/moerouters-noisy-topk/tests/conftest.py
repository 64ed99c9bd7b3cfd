"""What holds for every test of this distribution."""

import os

# Read when torch starts, here and in the ranks that tests start: how a sum is split over threads decides its last bits,
# and on a small machine the threads of several processes wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
