"""A script without a main guard: importing it ends the interpreter, unless the host is careful."""

import sys

sys.exit("usage: moerouters-exits FILE")
