"""What the report takes of a run: the names of its inputs, the same for the flow that gives them and the stage."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class InputsOf:
    """Names of the report's inputs that belong to one model or to one variant."""

    owner: str

    @classmethod
    def model(cls, name: str) -> InputsOf:
        """Those of a model: `structure`, `all` of its artifacts, `outliers`, and a table per measurement."""
        return cls(name)

    @classmethod
    def variant(cls, number: int) -> InputsOf:
        """Those of a variant, by its place among the variants of the report's configuration."""
        return cls(f"variant {number}")

    def part(self, name: str) -> str:
        """Name of one input: of a variant `allocation`, `checkpoint`, `evaluation` or `performance`."""
        return f"{self.owner} {name}"

    def task(self, name: str) -> str:
        """Name of the input that holds the scores of a zero-shot task."""
        return self.part(f"task {name}")
