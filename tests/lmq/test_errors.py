from __future__ import annotations

import pytest

from lmq import errors
from lmq.errors import (
    DamagedFile,
    InfeasibleBudget,
    InputError,
    LmqError,
    NotFiniteError,
    UnsupportedModel,
    unknown_name,
)


@pytest.mark.parametrize(
    ("kind", "exit_code"),
    [(LmqError, 1), (DamagedFile, 1), (InputError, 2), (UnsupportedModel, 2), (NotFiniteError, 2)],
)
def test_exit_codes_tell_bad_input_from_failed_work(kind: type[LmqError], exit_code: int) -> None:
    assert kind.exit_code == exit_code
    assert str(kind("what was wrong")) == "what was wrong"


def test_every_error_derives_from_lmq_error() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) >= 6
    assert all(issubclass(kind, LmqError) for kind in kinds)


def test_an_infeasible_budget_names_the_feasible_range() -> None:
    error = InfeasibleBudget(1_000, 2_000, 30_000)
    assert error.exit_code == 2
    assert (error.budget_bytes, error.smallest_bytes, error.largest_bytes) == (1_000, 2_000, 30_000)
    assert "1,000 bytes is below the smallest feasible budget of 2,000 bytes" in str(error)
    assert "2,000 to 30,000 bytes" in str(error)


def test_an_unknown_name_comes_with_the_nearest_and_all_that_are_allowed() -> None:
    error = unknown_name("strategy", "unifrm", ["uniform", "mxq"])
    assert str(error) == "unknown strategy 'unifrm'; did you mean 'uniform'? (allowed: mxq, uniform)"


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    assert str(unknown_name("strategy", "zzz", ["mxq"])) == "unknown strategy 'zzz' (allowed: mxq)"
