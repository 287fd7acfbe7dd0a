import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmq.errors import InputError
from lmq.formats.spec import ALLOWED_BITS, ALLOWED_GROUP_SIZES, MATRIX_HEADER_BYTES, STOPS, QuantSpec

PUBLISHED_STOPS = {
    "b2g128": "2.13",
    "b2g64": "2.25",
    "b2g32": "2.51",
    "b3g128": "3.13",
    "b3g64": "3.25",
    "b3g32": "3.51",
    "b4g128": "4.13",
    "b4g64": "4.25",
    "b4g32": "4.51",
    "b8g128": "8.13",
    "b8g64": "8.25",
    "b8g32": "8.51",
}


def test_stops_are_the_published_ones_by_size() -> None:
    assert {spec.name: f"{spec.bits_per_weight:.2f}" for spec in STOPS} == PUBLISHED_STOPS
    assert [spec.name for spec in STOPS] == list(PUBLISHED_STOPS)
    sizes = [spec.size_bytes(128 * 128) for spec in STOPS]
    assert sizes == sorted(sizes)


@given(
    st.sampled_from(ALLOWED_BITS), st.sampled_from(ALLOWED_GROUP_SIZES), st.integers(1, 200), st.sampled_from([1, 128])
)
def test_size_is_that_of_writing_every_number_one_after_the_other(
    bits: int, group_size: int, groups: int, meta_group_size: int
) -> None:
    spec = QuantSpec(bits, group_size, meta_group_size=meta_group_size)
    parameters = groups * group_size
    written_bits = 0
    for group in range(groups):
        written_bits += sum(bits for _ in range(group_size))
        written_bits += 8 + 8
        if group % meta_group_size == 0:
            written_bits += 16 + 16
    written_bits += 3 * 32
    assert spec.size_bytes(parameters) == math.ceil(written_bits / 8)
    assert spec.groups(parameters) == groups


@pytest.mark.parametrize("spec", STOPS, ids=str)
def test_size_of_a_large_matrix_is_its_bits_per_weight(spec: QuantSpec) -> None:
    parameters = 4096 * 4096
    assert spec.size_bytes(parameters) - MATRIX_HEADER_BYTES == parameters * spec.bits_per_weight / 8


@pytest.mark.parametrize("spec", STOPS, ids=str)
def test_names_are_read_back(spec: QuantSpec) -> None:
    assert QuantSpec.parse(f" {spec} ") == spec


@pytest.mark.parametrize("text", ["", "b4", "4g64", "b4g64x", "B4G64", "b4 g64", "uniform b4g64"])
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a configuration; write bits and group size as in 'b4g64'"):
        QuantSpec.parse(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 7, "group_size": 64}, r"bits = 7 is not a weight width; allowed: \(2, 3, 4, 5, 6, 8\)"),
        ({"bits": 4, "group_size": 48}, r"group_size = 48 is not allowed; allowed: \(16, 32"),
        ({"bits": 4, "group_size": 64, "meta_bits": 4}, "meta_bits = 4 is not allowed"),
        ({"bits": 4, "group_size": 64, "meta_group_size": 0}, "meta_group_size = 0 is not allowed"),
    ],
)
def test_fields_out_of_range_are_named(fields: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuantSpec(**fields)


def test_a_matrix_that_groups_do_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="b4g128 does not fit a matrix of 1,600 weights: not a multiple of"):
        QuantSpec(4, 128).size_bytes(1600)
