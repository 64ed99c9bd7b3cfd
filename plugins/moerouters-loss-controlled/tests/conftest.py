"""What holds for every test of this distribution."""

import os
import sys
from pathlib import Path

# Read when torch starts, here and in the ranks that tests start: how a sum is split over threads decides its last bits,
# and on a small machine the threads of several processes wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Ranks are processes that import what they run by name, and get this path when they start.
sys.path.append(str(Path(__file__).parent))
