"""Allocation: which configuration every module gets under a byte budget."""

from lmq.allocation.solver import Solution, solve

__all__ = ["Solution", "solve"]
