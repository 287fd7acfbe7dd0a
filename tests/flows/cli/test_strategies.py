"""`lmq strategies`."""

from __future__ import annotations

import pytest

from lmq_flows.cli import main


def test_strategies_are_listed_with_their_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["strategies"]) == 0
    printed = capsys.readouterr().out
    for name in ("uniform", "sensi-boost", "kurt-boost", "mxq", "loss-aware"):
        assert name in printed
