import logging
import re

import pytest

from lmq.errors import InputError, LmqError
from lmq_tasks import STAGES
from lmq_tasks.engine import BAD_INPUT, stage_task
from lmq_tasks.stage import Site, Stage


def outcome(monkeypatch: pytest.MonkeyPatch, store: str, error: Exception):
    def body(job):
        raise error

    monkeypatch.setitem(STAGES, "fails", Stage("fails", 1, "test/1", body))
    stage_task.cache_clear()
    site = Site(store_url=store).to_json()
    monkeypatch.setattr("lmq_tasks.engine.get_run_logger", lambda: logging.getLogger("task"))
    return stage_task("fails").fn("fails · m", [{"label": "m", "site": site, "config": {}, "inputs": {}}], total=1)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (IndexError("index out of range in self"), r"IndexError \(index out of range in self\)"),
        (ZeroDivisionError(), r"ZeroDivisionError \(without a message\)"),
        (RuntimeError("mat1 and mat2\nwith a second line"), r"RuntimeError \(mat1 and mat2\)"),
        (AttributeError("no attribute 'weight'"), r"AttributeError \(no attribute 'weight'\)"),
    ],
)
def test_what_lmq_does_not_expect_has_a_cause_a_place_and_a_next_step(tmp_path, monkeypatch, error, cause):
    state = outcome(monkeypatch, str(tmp_path / "store"), error)
    assert state.is_failed()
    assert "encountered an exception" not in state.message
    assert re.match(rf"fails m: {cause} at test_engine\.py:\d+", state.message)
    assert "Run again" in state.message


def test_messages_to_the_user_stay_as_they_are(tmp_path, monkeypatch):
    state = outcome(monkeypatch, str(tmp_path / "store"), InputError("give another place"))
    assert (state.name, state.message) == (BAD_INPUT, "fails m: give another place")
    assert outcome(monkeypatch, str(tmp_path / "other"), LmqError("broken")).message == "fails m: broken"
