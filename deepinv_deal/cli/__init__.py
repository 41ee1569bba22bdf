"""
The command ``deepinv-deal``.

Importing it imports no torch, so that help and completion answer at once: the commands
import what they compute with when they run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from deepinv_deal import __version__
from deepinv_deal._memory import keep_freed_memory
from deepinv_deal.cli._options import BAD_INPUT, drop_output
from deepinv_deal.cli.completion import add_completion
from deepinv_deal.cli.demo import add_demo
from deepinv_deal.cli.denoise import add_denoise
from deepinv_deal.cli.evaluate import add_evaluate
from deepinv_deal.cli.reconstruct import add_reconstruct
from deepinv_deal.cli.train import add_train

#: Exit code after Ctrl-C, as shells have it.
INTERRUPTED = 130

#: Exit code if nobody reads the output to its end, likewise.
BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs the command line.

    :param list argv: arguments; those of the process if ``None``.
    :return: exit code: 0 if all went well, 1 if something did not converge (for
        ``denoise`` and ``reconstruct`` with ``--strict``) or some files of a folder
        could not be denoised, 2 for bad input, 130 after Ctrl-C, 141 if the output
        went to a pipe that was closed (``denoise`` and ``reconstruct`` go on).
    """
    args = _parser().parse_args(argv)
    keep_freed_memory()
    try:
        return int(args.run(args))
    except BrokenPipeError:  # as when the output goes to head
        drop_output(sys.stdout)
        return BROKEN_PIPE
    except BAD_INPUT as error:
        print(f"deepinv-deal: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("deepinv-deal: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepinv-deal",
        description="Denoise and reconstruct images; train and evaluate models.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        add_demo,
        add_denoise,
        add_reconstruct,
        add_evaluate,
        add_train,
    ):
        add(commands)
    add_completion(commands, parser)
    return parser
