"""Strategies: how an allocation is chosen. A new one is one file here and one line in `STRATEGIES`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from lmq.allocation.strategies.auto import Auto
from lmq.allocation.strategies.base import TRIALS, Measurements, Strategy
from lmq.allocation.strategies.boost import KurtBoost, RandomBoost, SensiBoost
from lmq.allocation.strategies.importance_weighted import AvssWeighted, BiWeighted
from lmq.allocation.strategies.kl import Kl
from lmq.allocation.strategies.loss_aware import LossAware
from lmq.allocation.strategies.mxq import KurtMilp, KurtScaled, Mxq, SensiMilp
from lmq.allocation.strategies.plan import Plan
from lmq.allocation.strategies.structural import Structural
from lmq.allocation.strategies.uniform import Uniform
from lmq.errors import InputError, unknown_name

__all__ = ["STRATEGIES", "TRIALS", "Auto", "Measurements", "Strategy", "strategy"]

STRATEGIES: dict[str, type[Strategy]] = {
    each.name: each
    for each in (
        Uniform,
        Structural,
        SensiBoost,
        KurtBoost,
        RandomBoost,
        Mxq,
        KurtScaled,
        SensiMilp,
        KurtMilp,
        AvssWeighted,
        BiWeighted,
        LossAware,
        Kl,
        Plan,
        Auto,
    )
}


def strategy(name: str, **options: Any) -> Strategy:
    """Make the strategy of this name with its options.

    Raises InputError for an unknown strategy or option, naming the nearest, and for a value that is not allowed.
    """
    if name not in STRATEGIES:
        raise unknown_name("strategy", name, STRATEGIES)
    chosen = STRATEGIES[name]
    allowed = {field.name: field for field in fields(chosen)}  # type: ignore[arg-type]
    for option, value in options.items():
        if not allowed:
            raise InputError(f"strategy {name!r} has no options; remove {option!r}")
        if option not in allowed:
            raise unknown_name(f"option of strategy {name!r}", option, allowed)
        expected = type(allowed[option].default)
        if type(value) is not expected:
            raise InputError(f"{option} = {value!r} of strategy {name!r} must be of type {expected.__name__}")
    return chosen(**options)
