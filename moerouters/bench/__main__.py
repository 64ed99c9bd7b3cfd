"""A process that measures: `python -m moerouters.bench TASK RANK`, started by `moerouters.bench.measure`."""

import sys
from pathlib import Path

from moerouters.bench.measure import serve

if __name__ == "__main__":  # processes that it spawns import this file too
    serve(Path(sys.argv[1]), int(sys.argv[2]))
