"""Errors that say what was wrong, what is allowed and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LmqError(Exception):
    """Base of every error lmq raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(LmqError):
    """What the user gave cannot be used: nothing was started, or nothing was left half-written."""

    exit_code = 2


class UnsupportedModel(InputError):
    """The model holds something lmq cannot quantize; the message names it."""


class NotFiniteError(InputError):
    """A tensor holds NaN or infinity; the message names the tensor and the count."""


class InfeasibleBudget(InputError):
    """No allocation fits the budget; carries the smallest and largest size that any allocation has, in bytes."""

    def __init__(self, budget_bytes: int, smallest_bytes: int, largest_bytes: int, what: str = "the budget"):
        self.budget_bytes = budget_bytes
        self.smallest_bytes = smallest_bytes
        self.largest_bytes = largest_bytes
        super().__init__(
            f"{what} of {budget_bytes:,} bytes is below the smallest feasible budget of {smallest_bytes:,} bytes "
            f"(feasible: {smallest_bytes:,} to {largest_bytes:,} bytes); "
            "raise the budget or add smaller configurations to the menu"
        )


class DamagedFile(LmqError):
    """A file that lmq wrote is missing, truncated or altered; the message names it."""


def unknown_name(what: str, value: str, allowed: Iterable[str]) -> InputError:
    """Error for a name that is not one of `allowed`, naming the nearest one."""
    names = sorted(allowed)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return InputError(f"unknown {what} {value!r}{hint} (allowed: {', '.join(names)})")
