"""`lmq completion`: what bash makes of the script, and that no command is forgotten."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lmq_flows.cli import COMMANDS, main
from lmq_flows.cli.completion import SHELLS


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_names_every_command_and_its_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for name in COMMANDS:
        assert name in script
    assert "fit-gpu" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lmq", "qua"], {"quantize"}),
        (["lmq", "quantize", "--fit"], {"--fit-gpu"}),
        (["lmq", "quantize", "--effort", "b"], {"best"}),
        (["lmq", "store", "ver"], {"verify"}),
        (["lmq", "run", "my-"], {"my-run.yaml"}),
        (["lmq", "quantize", "--plan", "my-"], {"my-run.yaml"}),
    ],
    ids=" ".join,
)
def test_bash_completes(
    words: list[str], expected: set[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash on this machine")
    (tmp_path / "my-run.yaml").touch()
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    ask = f"""
COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}
$(complete -p lmq | sed -E 's/.*-F ([^ ]+).*/\\1/') lmq {words[-1]} {words[-2]}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script + ask], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert {line.strip() for line in done.stdout.splitlines()} == expected


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["completion", "csh"])
    assert "choose from" in capsys.readouterr().err
