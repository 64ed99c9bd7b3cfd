"""`python -m moerouters`, and so `torchrun -m moerouters`: the command line."""

from moerouters.cli import main

main()
