import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from lmq.errors import InputError
from lmq.evaluation.perplexity import Window, full_windows, mean_estimate, strided_perplexity
from tests.lmq.evaluation.plain_perplexity import plain_perplexity


@pytest.mark.parametrize(("window", "stride"), [(24, 8), (24, 24), (32, 16), (16, 5), (100, 50)])
def test_perplexity_equals_the_loop_of_the_transformers_documentation(
    tiny_llama: Path, window: int, stride: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    token_ids = torch.randint(2, 500, (107,), generator=torch.Generator().manual_seed(5))
    windows = full_windows(len(token_ids), window, stride)
    nll_sums = []
    for part in windows:
        with torch.no_grad():
            logits = model(token_ids[None, part.start : part.end]).logits[0, :-1].double()
        nll = torch.nn.functional.cross_entropy(logits, token_ids[part.start + 1 : part.end], reduction="none")
        nll_sums.append(nll[-part.scored :].sum().item())
    expected = plain_perplexity(model, token_ids[: windows[-1].end], window, stride)
    assert strided_perplexity(windows, nll_sums).value == pytest.approx(expected, rel=1e-5)


def test_windows_and_what_they_score() -> None:
    assert full_windows(11, 4, 3) == [Window(0, 4, 4), Window(3, 7, 3), Window(6, 10, 3)]
    assert [window.scored for window in full_windows(11, 4, 3)] == [3, 3, 3]
    assert [window.scored for window in full_windows(8, 4, 4)] == [3, 3]


@given(st.integers(2, 40), st.data())
def test_windows_count_every_token_up_to_the_last_full_window_once(window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    tokens = data.draw(st.integers(window, 200))
    windows = full_windows(tokens, window, stride)
    assert sum(part.fresh for part in windows) == windows[-1].end
    assert tokens - windows[-1].end < stride
    assert all(part.end - part.start == window and part.scored >= 1 for part in windows)


@pytest.mark.parametrize(
    ("tokens", "window", "stride", "message"),
    [
        (99, 100, 50, "has 99 tokens, fewer than one window of 100; give a longer text"),
        (99, 10, 11, "stride = 11 does not fit a window of 10; allowed: 1 to 10"),
        (99, 10, 0, "stride = 0 does not fit"),
        (99, 1, 1, "window = 1 is too small"),
    ],
)
def test_windows_that_cannot_be_made_are_refused(tokens: int, window: int, stride: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        full_windows(tokens, window, stride)


def test_standard_errors_equal_numpys() -> None:
    windows = full_windows(60, 20, 10)
    nll_sums = np.random.default_rng(0).uniform(20, 60, len(windows))
    means = nll_sums / [window.scored for window in windows]
    stderr = means.std(ddof=1) / np.sqrt(len(means))
    found = strided_perplexity(windows, nll_sums.tolist())
    assert found.stderr == pytest.approx(found.value * stderr, rel=1e-12)
    weights = [window.scored for window in windows]
    estimate = mean_estimate(means.tolist(), weights)
    assert estimate.value == pytest.approx(np.average(means, weights=weights), rel=1e-12)
    assert estimate.stderr == pytest.approx(stderr, rel=1e-12)


def test_one_window_has_no_standard_error() -> None:
    assert strided_perplexity([Window(0, 5, 5)], [4.0]).stderr is None
    assert mean_estimate([2.0]).stderr is None


@pytest.mark.parametrize("nll", [800.0, 1e300, math.inf])
def test_perplexity_beyond_the_largest_float_is_infinite(nll: float) -> None:
    windows = full_windows(30, 10, 10)
    found = strided_perplexity(windows, [9 * nll, 9 * nll, 0.0])
    if nll == 800.0:
        assert found.value == pytest.approx(math.exp(1600 / 3))
    else:
        assert (found.value, found.stderr) == (math.inf, None)
    assert strided_perplexity(windows, [9 * nll] * 3).value == math.inf


@pytest.mark.parametrize("values", [[1e200, -1e200], [math.inf, 1.0]])
def test_a_standard_error_that_is_not_finite_is_none(values: list[float]) -> None:
    assert mean_estimate(values).stderr is None
