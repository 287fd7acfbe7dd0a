import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmq.errors import InputError
from lmq.formats.packing import pack, unpack
from lmq.formats.spec import ALLOWED_BITS


@given(bits=st.sampled_from(ALLOWED_BITS), eights=st.integers(0, 40), seed=st.integers(0, 2**31))
def test_unpack_inverts_pack_in_exactly_the_bytes_of_the_bits(bits: int, eights: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (8 * eights,), dtype=torch.uint8, generator=generator)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (eights * bits,)
    assert torch.equal(unpack(packed, bits), codes)


@given(bits=st.sampled_from(ALLOWED_BITS), eights=st.integers(1, 40), data=st.data())
def test_any_range_unpacks_by_itself(bits: int, eights: int, data: st.DataObject) -> None:
    codes = torch.randint(0, 2**bits, (8 * eights,), dtype=torch.uint8, generator=torch.Generator().manual_seed(eights))
    start = data.draw(st.integers(0, 8 * eights))
    stop = data.draw(st.integers(start, 8 * eights))
    assert torch.equal(unpack(pack(codes, bits), bits, start, stop), codes[start:stop])


@pytest.mark.parametrize("bits", ALLOWED_BITS)
def test_layout_is_the_documented_one(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (64,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    c = codes.tolist()
    expected = {
        8: c,
        4: [c[i] | c[i + 32] << 4 for i in range(32)],
        2: [c[i] | c[i + 16] << 2 | c[i + 32] << 4 | c[i + 48] << 6 for i in range(16)],
        3: [sum((c[i + 16 * k] & 3) << 2 * k for k in range(4)) for i in range(16)]
        + [sum((c[i + 8 * k] >> 2) << k for k in range(8)) for i in range(8)],
        5: [c[i] & 15 | (c[i + 32] & 15) << 4 for i in range(32)]
        + [sum((c[i + 8 * k] >> 4) << k for k in range(8)) for i in range(8)],
        6: [c[i] & 15 | (c[i + 32] & 15) << 4 for i in range(32)]
        + [sum((c[i + 16 * k] >> 4) << 2 * k for k in range(4)) for i in range(16)],
    }
    assert pack(codes, bits).tolist() == expected[bits]


def test_non_contiguous_codes_pack_in_their_logical_order() -> None:
    codes = torch.randint(0, 8, (32, 16), dtype=torch.uint8).t()
    kept = codes.clone()
    assert torch.equal(unpack(pack(codes, 3), 3), codes.reshape(-1))
    assert torch.equal(codes, kept)


def test_bad_codes_are_refused() -> None:
    with pytest.raises(InputError, match="code 8 does not fit 3 bits; allowed: 0 to 7"):
        pack(torch.full((8,), 8, dtype=torch.uint8), 3)
    with pytest.raises(InputError, match=r"must be torch.uint8 and a multiple of 8 in number, not 8 of torch.int64"):
        pack(torch.zeros(8, dtype=torch.int64), 3)
    with pytest.raises(InputError, match="not 9 of"):
        pack(torch.zeros(9, dtype=torch.uint8), 4)
    with pytest.raises(InputError, match="codes of 7 bits cannot be packed"):
        pack(torch.zeros(8, dtype=torch.uint8), 7)
    with pytest.raises(InputError, match="packed 3-bit codes must be"):
        unpack(torch.zeros(8, dtype=torch.uint8), 3)
