"""The command line as a whole: its help, its registry of commands, arguments that make no sense."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lmq_flows.cli
from lmq_flows.cli import COMMANDS, main

SUBCOMMANDS = [["store", "ls"], ["store", "verify"], ["store", "gc"], ["study", "sensitivity"], ["study", "costs"]]
USAGES = [[name] for name in COMMANDS] + SUBCOMMANDS
DEFAULTS_FROM_HEAVY_OPTIONS = {"study", "importance", "prune"}
"""Their help shows the defaults of dataclasses whose modules import torch."""


@pytest.mark.parametrize("command", USAGES, ids=" ".join)
def test_every_command_explains_itself(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: lmq {' '.join(command)}" in printed
    assert len(printed.splitlines()) >= 5


def test_help_names_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "lmq_flows.cli", "--help"], capture_output=True, text=True, check=True)
    for name, text in COMMANDS.items():
        assert f"\n    {name}" in done.stdout
        assert text in " ".join(done.stdout.split())


def test_help_loads_no_library() -> None:
    light = [[], *([name] for name in COMMANDS if name not in DEFAULTS_FROM_HEAVY_OPTIONS)]
    code = f"""
import sys
from lmq_flows.cli import main
for command in {light}:
    try: main([*command, '--help'])
    except SystemExit as ended: assert ended.code == 0
print([name for name in ("torch", "prefect", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_a_command_is_one_file_and_one_line_of_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "greet.py").write_text(
        """
def add_arguments(parser):
    parser.add_argument("names", nargs="+")
    parser.add_argument("--loud", action="store_true")
    parser.set_defaults(command=greet_command, continued_list="names")

def greet_command(arguments):
    print("hello", *arguments.names, "!" if arguments.loud else ".")
    return 0
"""
    )
    monkeypatch.setattr(lmq_flows.cli, "__path__", [*lmq_flows.cli.__path__, str(tmp_path)])
    monkeypatch.setitem(COMMANDS, "greet", "say hello")
    assert main(["greet", "Ada", "--loud", "Grace"]) == 0
    assert capsys.readouterr().out == "hello Ada Grace !\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "greet say hello" in " ".join(capsys.readouterr().out.split())


def test_every_file_of_a_command_is_registered() -> None:
    helpers = {"__init__", "__main__", "arguments", "terminal"}
    files = {path.stem for path in Path(lmq_flows.cli.__path__[0]).glob("*.py")} - helpers
    assert files == set(COMMANDS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["runn", "demo"], "invalid choice: 'runn'"),
        (["run"], "the following arguments are required: CONFIG"),
        (["evaluate", "x", "--tokens", "many"], "--tokens: invalid whole number value: 'many'"),
        (["evaluate", "x", "--tokens", "0"], "--tokens: 0 is not allowed; give 1 or more"),
        (["frontier", "x", "--points", "1"], "--points: 1 is not allowed; give 2 or more"),
        (["budget", "x", "4.25", "--menus"], "unrecognized arguments: --menus"),
        (["inspect", "x", "4.25"], "unrecognized arguments: 4.25"),
        (["budget", "x", "--axis", "2"], "--axis: invalid choice: 2"),
        (["store", "gc", "--keep-runs", "-1"], "--keep-runs: -1 is not allowed; give 0 or more"),
        (["store", "gc", "--keep-hours", "-0.5"], "--keep-hours: -0.5 is not allowed; give 0 or more"),
    ],
)
def test_arguments_that_make_no_sense_end_with_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
