"""`python -m moerouters.cli`: the same as the console script, where only a source tree is on the path."""

from moerouters.cli import main

main()
