"""What holds for every test of the suite."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several ranks on a small machine would wait for each other's threads
