from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from lmq.errors import InputError
from lmq.formats.spec import QuantSpec
from lmq.model.structure import ModuleId, ModuleInfo
from lmq.report.study import (
    CostPair,
    Setting,
    agreements,
    cost_qualities,
    models_by_layers,
    sample_pairs,
    summarize_agreements,
)

SPECS = [QuantSpec(3, 64), QuantSpec(4, 64)]
MODULES = [
    ModuleInfo(ModuleId(layer, kind), 64, 64, "attn_in")
    for layer in range(5)
    for kind in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
]


def setting(text: str = "a", quantizer: str = "hqq", configuration: str = "b4g64", model: str = "m") -> Setting:
    return Setting(model=model, text=text, quantizer=quantizer, configuration=configuration)


def profile(seed: int, layers: int = 8) -> list[float]:
    return np.random.default_rng(seed).lognormal(size=layers).tolist()


def test_settings_that_differ_in_one_dimension_are_compared_as_scipy_does() -> None:
    profiles = {
        setting(): {"attn_in": profile(0), "mlp_down": profile(1)},
        setting(text="b"): {"attn_in": profile(2), "mlp_down": profile(3)},
        setting(quantizer="nf4"): {"attn_in": profile(4), "mlp_down": profile(5)},
    }
    found = agreements(profiles)
    assert [(item.dimension, item.part) for item in found] == [
        ("text", "attn_in"),
        ("text", "mlp_down"),
        ("quantizer", "attn_in"),
        ("quantizer", "mlp_down"),
    ]
    assert found[1].profiles == pytest.approx(spearmanr(profile(1), profile(3)).statistic)
    ratios = [[after / before for before, after in pairwise(profile(seed))] for seed in (1, 3)]
    assert found[1].steps == pytest.approx(spearmanr(*ratios).statistic)


def test_models_of_different_depth_are_not_compared_but_named() -> None:
    profiles = {setting(model=name): {"attn_in": profile(1, layers)} for name, layers in (("a", 6), ("b", 8), ("c", 6))}
    assert [(item.first.model, item.second.model) for item in agreements(profiles)] == [("a", "c")]
    assert models_by_layers(profiles) == {6: ["a", "c"], 8: ["b"]}


def test_layers_that_were_not_measured_do_not_count() -> None:
    rising = [1.0, None, 3.0, 4.0, 5.0]
    (found,) = agreements({setting(): {"attn_in": rising}, setting(text="b"): {"attn_in": [1.0, 9.0, 3.0, 0.0, 5.0]}})
    assert found.profiles == pytest.approx(spearmanr([1, 3, 4, 5], [1, 3, 0, 5]).statistic)
    assert found.steps is None  # 4 / 3 alone is a ratio of both


def test_summaries_average_over_what_else_was_varied() -> None:
    profiles = {
        setting(text=text, quantizer=quantizer): {"attn_in": profile(seed), "mlp_down": profile(seed + 10)}
        for seed, (text, quantizer) in enumerate([("a", "hqq"), ("b", "hqq"), ("a", "rtn"), ("b", "rtn")])
    }
    text, quantizer = summarize_agreements(agreements(profiles))
    assert (text.dimension, text.first, text.second) == ("text", "a", "b")
    assert (quantizer.dimension, quantizer.first, quantizer.second) == ("quantizer", "hqq", "rtn")
    by_part = [
        [spearmanr(profile(seed + part), profile(seed + 1 + part)).statistic for seed in (0, 2)] for part in (0, 10)
    ]
    assert text.by_part["attn_in"] == pytest.approx(np.mean(by_part[0]))
    assert text.profiles == pytest.approx(np.mean(by_part))
    assert text.lowest == pytest.approx(np.min(by_part))


@given(count=st.integers(1, 40), seed=st.integers(0, 10))
def test_sampled_pairs_are_distinct_and_even_over_kinds(count: int, seed: int) -> None:
    drawn = sample_pairs(MODULES, SPECS, count, seed)
    assert len(drawn) == len(set(drawn)) == min(count, len(MODULES) * len(SPECS))
    assert drawn == sample_pairs(MODULES, SPECS, count, seed)
    per_kind = [sum(module.kind == kind for module, _ in drawn) for kind in {module.id.kind for module in MODULES}]
    assert max(per_kind) - min(per_kind) <= 1


def test_other_seeds_draw_other_pairs_and_none_are_refused() -> None:
    assert sample_pairs(MODULES, SPECS, 6, 0) != sample_pairs(MODULES, SPECS, 6, 1)
    with pytest.raises(InputError, match="0 pairs cannot be drawn; ask for 1 or more"):
        sample_pairs(MODULES, SPECS, 0, 0)


def cost_pairs(count: int = 24) -> list[CostPair]:
    generator = np.random.default_rng(3)
    drawn = []
    for module, spec in sample_pairs(MODULES, SPECS, count, 0):
        exact = float(generator.lognormal()) * 10.0**-spec.bits
        noisy = exact * float(generator.lognormal(sigma=1.0))
        cheap = {"noisy": noisy, "bits": 2.0**-spec.bits, "same": exact**2, "opposite": -exact}
        drawn.append(CostPair(module=module, spec=spec, exact=exact, exact_stderr=None, cheap=cheap))
    return drawn


def test_costs_are_ordered_by_their_rank_correlation_with_the_exact_one() -> None:
    pairs = cost_pairs()
    found = {quality.cost: quality for quality in cost_qualities(pairs)}
    assert list(found) == ["same", "noisy", "bits", "opposite"] or list(found) == ["same", "bits", "noisy", "opposite"]
    assert found["same"].rho == pytest.approx(1)
    assert found["same"].rho_stderr == pytest.approx(0, abs=1e-12)
    assert found["opposite"].within == pytest.approx(-1)
    exact, noisy = [pair.exact for pair in pairs], [pair.cheap["noisy"] for pair in pairs]
    assert found["noisy"].rho == pytest.approx(spearmanr(noisy, exact).statistic)
    within = [
        spearmanr(*zip(*((p.cheap["noisy"], p.exact) for p in pairs if p.spec == spec), strict=True)).statistic
        for spec in SPECS
    ]
    assert found["noisy"].within == pytest.approx(np.mean(within))
    assert found["bits"].within is None  # the same for all pairs of a configuration


def test_the_standard_error_is_that_of_resampled_pairs() -> None:
    pairs = cost_pairs()
    (found,) = [q for q in cost_qualities(pairs, resamples=400, seed=5) if q.cost == "noisy"]
    generator = np.random.default_rng(8)
    values = np.array([[pair.cheap["noisy"], pair.exact] for pair in pairs])
    resampled = [spearmanr(values[generator.integers(0, len(pairs), len(pairs))]).statistic for _ in range(400)]
    assert found.rho_stderr == pytest.approx(np.std(resampled, ddof=1), rel=0.2)
    assert math.isfinite(found.rho_stderr)


def test_a_cost_that_some_pair_lacks_is_left_out() -> None:
    first, *rest = cost_pairs(6)
    without = CostPair(
        module=first.module, spec=first.spec, exact=first.exact, exact_stderr=None, cheap={"same": first.cheap["same"]}
    )
    assert [quality.cost for quality in cost_qualities([without, *rest])] == ["same"]
