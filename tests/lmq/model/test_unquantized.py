from __future__ import annotations

from pathlib import Path

import pytest

from lmq.model.discovery import discover
from lmq.model.unquantized import unquantized_parts


def test_parts_sum_to_what_the_structure_counts(tiny_model: Path) -> None:
    structure = discover(tiny_model)
    parts = unquantized_parts(tiny_model, structure)
    assert sum(part.parameters for part in parts) == structure.other_parameters
    assert sum(part.size_bytes for part in parts) == structure.other_bytes
    assert {part.name: part.tensors for part in parts}["lm_head"] == (0 if structure.tied_embeddings else 1)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        # 2 norms per layer and the last one; queries, keys and values have biases in Qwen2
        ("tiny_llama", {"embeddings": 512 * 64, "lm_head": 512 * 64, "norms": 9 * 64, "biases": 0}),
        ("tiny_qwen", {"embeddings": 512 * 64, "lm_head": 0, "norms": 9 * 64, "biases": 4 * (64 + 32 + 32)}),
    ],
)
def test_parts_are_what_the_architecture_has(
    model: str, expected: dict[str, int], request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(model)
    found = {part.name: part.parameters for part in unquantized_parts(path, discover(path))}
    assert found == {**expected, "other": 0, "beside": 0, "surplus": 0}
