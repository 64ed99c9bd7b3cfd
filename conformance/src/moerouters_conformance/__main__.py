"""`python -m moerouters_conformance NAME ...`: the same as `moerouters check NAME ...`."""

import sys

from moerouters.cli import app

if __name__ == "__main__":
    app(["check", *sys.argv[1:]], prog_name="python -m moerouters_conformance")
