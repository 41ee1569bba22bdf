"""``deepinv-deal completion``: a script with which a shell completes the command."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

from deepinv_deal.cli._options import Commands

SHELLS = ("bash", "zsh")


def add_completion(
    commands: Commands[argparse.ArgumentParser], parser: argparse.ArgumentParser
) -> None:
    """
    Adds the command.

    :param argparse._SubParsersAction commands: the commands of the parser.
    :param argparse.ArgumentParser parser: what is completed.
    """
    completion = commands.add_parser(
        "completion",
        help="print a script with which a shell completes this command",
        description='For the shell that is open: eval "$(deepinv-deal completion '
        'bash)". For others to come, write the script to the file that they read.',
    )
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(run=partial(_completion, parser))


def _completion(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise ValueError(
            "Completion needs the package shtab: pip install deepinv-deal[completion]"
        ) from error

    for action in _actions(parser):
        # Any text may be the name of a file. shtab reads this attribute.
        if action.nargs != 0 and not action.choices and action.type in (None, str):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, args.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yields the arguments of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, Commands):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action
