from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmq.errors import InputError
from lmq.measurement.module_errors import ModuleStatistics, traced_statistics
from lmq.measurement.second_moments import second_moments
from lmq.measurement.token_fisher import ModuleTrace

TOKENS = 40


def random_tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


INPUTS = random_tensor(TOKENS, 12, seed=0)
TRACES = {
    "q": ModuleTrace(INPUTS, random_tensor(TOKENS, 6, seed=1)),
    "k": ModuleTrace(INPUTS, random_tensor(TOKENS, 3, seed=2)),
    "down": ModuleTrace(random_tensor(TOKENS, 5, seed=3), random_tensor(TOKENS, 4, seed=4)),
}


@pytest.mark.parametrize("kind", TRACES)
def test_costs_are_those_of_loops_over_the_tokens(kind: str) -> None:
    trace = TRACES[kind]
    error = random_tensor(trace.gradients.shape[1], trace.inputs.shape[1], seed=5)
    found = dict(traced_statistics(TRACES))[kind].costs(error)
    inputs, gradients, changed = trace.inputs.double(), trace.gradients.double(), error.double()
    sizes = gradients.square().sum(1)
    squares = [(changed @ x) ** 2 for x in inputs]
    mean_squared_gradient = gradients.square().mean(0)
    diagonal = sum(float(mean_squared_gradient @ square) for square in squares)
    weighted = sum(float(mean_squared_gradient @ square) * float(w) for square, w in zip(squares, sizes, strict=True))
    slope = sum(float(g @ changed @ x) for g, x in zip(gradients, inputs, strict=True))
    assert found["input_error"] == pytest.approx(float(torch.stack(squares).mean()), rel=1e-5)
    assert found["fisher_diagonal"] == pytest.approx(diagonal, rel=1e-5)
    assert found["fisher_weighted"] == pytest.approx(weighted * TOKENS / float(sizes.sum()), rel=1e-5)
    assert found["delta_loss"] == pytest.approx(abs(slope), rel=1e-4)


def test_modules_of_one_input_share_its_moments() -> None:
    statistics = dict(traced_statistics(TRACES))
    assert statistics["q"].moments is statistics["k"].moments
    assert statistics["q"].moments is not statistics["down"].moments


def test_without_gradients_what_needs_them_is_not_measured() -> None:
    found = ModuleStatistics(second_moments(INPUTS)).costs(random_tensor(6, 12, seed=5))
    assert found["input_error"] is not None
    assert found["fisher_diagonal"] is found["fisher_weighted"] is found["delta_loss"] is None


def test_gradients_of_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="not all 0"):
        list(traced_statistics({"q": ModuleTrace(INPUTS, torch.zeros(TOKENS, 6))}))
