"""python -m moerouters_ds_moe: a study of sparse inference, and its picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moerouters.errors import MoeroutersError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 1 with the message where it cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m moerouters_ds_moe", description=__doc__)
    commands = parser.add_subparsers(required=True)
    sweep = commands.add_parser("sweep", help="train lab models densely, and evaluate them sparsely")
    sweep.add_argument("output", type=Path, metavar="JSON")
    sweep.add_argument("--alpha", default="0,0.00063,0.01", help="coefficients of the loss, one model each")
    sweep.add_argument("--preset", default="tiny", help="of `moerouters compare`")
    sweep.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting of the preset")
    sweep.add_argument(
        "--peers", type=_widths, default=(), metavar="WIDTHS", help="of dense models to time layers against"
    )
    sweep.add_argument("--seed", type=int, default=0)
    sweep.add_argument("--text", type=Path, default=None, help="text to train on; else the standard library")
    sweep.set_defaults(run=_sweep)
    picture = commands.add_parser("render", help="draw what `sweep` wrote")
    picture.add_argument("source", type=Path, metavar="JSON")
    picture.add_argument("target", type=Path, metavar="SVG")
    picture.set_defaults(run=_render)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except MoeroutersError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _widths(text: str) -> tuple[int, ...]:
    return tuple(int(width) for width in text.split(","))


def _sweep(options: argparse.Namespace) -> None:
    from moerouters.lab.corpus import from_path, standard_library
    from moerouters.lab.files import require_writable
    from moerouters.lab.job import set_threads
    from moerouters.lab.overrides import parse_changes
    from moerouters_ds_moe.study import run_study, settings_of

    settings = settings_of(options.preset, parse_changes(options.set, where="--set"))
    require_writable(options.output.parent)
    set_threads()
    corpus = standard_library() if options.text is None else from_path(options.text)
    study = run_study(settings, options.alpha.split(","), corpus, seed=options.seed, peers=options.peers, told=print)
    study.save(options.output)


def _render(options: argparse.Namespace) -> None:
    from moerouters_ds_moe.pictures import render

    render(options.source, options.target)


if __name__ == "__main__":
    sys.exit(main())
