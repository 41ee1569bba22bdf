"""The command ``deepinv-deal``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from deepinv_deal.cli.demo import add_demo
from deepinv_deal.cli.denoise import add_denoise
from deepinv_deal.cli.evaluate import add_evaluate
from deepinv_deal.cli.reconstruct import add_reconstruct
from deepinv_deal.cli.train import add_train


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs the command line.

    :param list argv: arguments; those of the process if ``None``.
    :return: exit code: 0 if all went well, 1 if something did not converge (for
        ``denoise`` and ``reconstruct`` with ``--strict``), 2 for bad input.
    """
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, TypeError, FileNotFoundError, FloatingPointError) as error:
        print(f"deepinv-deal: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepinv-deal", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_demo, add_denoise, add_reconstruct, add_evaluate, add_train):
        add(commands)
    return parser
