import numpy as np
import pytest

from lmq.report.equal_bytes import equal_bytes
from lmq.report.results import VariantResult


def variant(strategy, size_bytes, perplexity):
    return VariantResult(
        model="m", strategy=strategy, budget=f"{size_bytes} B", size_bytes=size_bytes, perplexity=perplexity
    )


UNIFORM = [variant("uniform", 300, 40.0), variant("uniform", 200, 90.0), variant("uniform", 400, 35.0)]


@pytest.mark.parametrize("size", [200, 210, 300, 385, 400])
def test_uniform_at_equal_bytes_is_interpolated_in_log_perplexity(size):
    [found] = equal_bytes([*UNIFORM, variant("mxq", size, 30.0)])
    expected = float(np.exp(np.interp(size, [200, 300, 400], np.log([90.0, 40.0, 35.0]))))
    assert found.uniform_perplexity == pytest.approx(expected)
    assert found.relative == pytest.approx(30.0 / expected - 1)
    assert found.smaller.size_bytes <= size <= found.larger.size_bytes


def test_nothing_is_said_beyond_what_was_measured():
    outside = [variant("sensi-boost", 401, 30.0), variant("mxq", 199, 95.0), variant("mxq", 250, None)]
    full = VariantResult(model="m", strategy="full-precision", size_bytes=300, perplexity=20.0)
    assert equal_bytes([*UNIFORM, *outside, full]) == []
    assert equal_bytes([UNIFORM[0], variant("mxq", 350, 30.0)]) == []
    assert len(equal_bytes([UNIFORM[0], variant("mxq", 300, 30.0)])) == 1
