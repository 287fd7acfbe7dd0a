"""`lmq completion`: what a shell needs to complete lmq's commands, options, their values and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

SHELLS = ("bash", "zsh", "fish")
_HOW = """\
To use it: lmq completion bash > ~/.local/share/bash-completion/completions/lmq;
lmq completion zsh > a directory of $fpath/_lmq;
lmq completion fish > ~/.config/fish/completions/lmq.fish."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lmq completion`."""
    parser.epilog = _HOW
    parser.add_argument("shell", choices=SHELLS, help="for which shell")
    parser.set_defaults(command=completion_command)


def completion_command(arguments: argparse.Namespace) -> int:
    """Print the script."""
    import shtab

    from lmq_flows.cli import whole_parser

    parser = whole_parser()
    for action in _actions(parser):
        if action.nargs != 0 and not action.choices:  # a shell completes nothing itself where a command has a script
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell=arguments.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Arguments of a parser and of the commands below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
