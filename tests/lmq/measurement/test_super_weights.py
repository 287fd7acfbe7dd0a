import pytest
import torch

from lmq.errors import InputError, NotFiniteError
from lmq.measurement.super_weights import SUPER_WEIGHTS_SCHEMA, Spike, find_spike, super_weight_row
from lmq.model.structure import ModuleId
from lmq.tables import read_rows, write_rows

MODULE = ModuleId(2, "mlp.down_proj")


def states(tokens: int, features: int) -> torch.Tensor:
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [900.0, -900.0])
def test_the_spike_is_the_element_of_largest_size(dtype: torch.dtype, value: float) -> None:
    spiked = states(50, 30).to(dtype)
    spiked[7, 11] = value
    rms = spiked.double().square().mean().sqrt().item()
    assert find_spike(spiked) == Spike(900.0, 11, 7, pytest.approx(900 / rms, rel=1e-9))


def test_equals_give_the_first_and_zeros_have_no_ratio() -> None:
    assert find_spike(torch.tensor([[1.0, -2.0], [2.0, 0.0]])) == Spike(2.0, 1, 0, pytest.approx(2 / 1.5))
    assert find_spike(torch.zeros(3, 4)) == Spike(0.0, 0, 0, None)


def test_a_super_weight_is_where_the_spikes_of_input_and_output_meet(tmp_path) -> None:
    weight = 0.01 * states(40, 96)
    weight[17, 60] = 5.0
    inputs = states(64, 96)
    inputs[3, 60] = 200.0
    row = super_weight_row(MODULE, inputs, inputs @ weight.t())
    assert (row["output_channel"], row["input_channel"]) == (17, 60)
    assert row["input_token"] == row["output_token"] == 3
    assert row["input_spike"] == 200.0
    assert row["output_spike"] == pytest.approx(1000, rel=0.01)
    assert row["output_rms_ratio"] > 30
    write_rows(tmp_path / "s.parquet", SUPER_WEIGHTS_SCHEMA, [row])
    assert read_rows(tmp_path / "s.parquet", SUPER_WEIGHTS_SCHEMA) == [row]


def test_states_without_a_spike_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"the inputs of layer 2 mlp.down_proj of shape \[0, 4\] have no spike"):
        super_weight_row(MODULE, torch.empty(0, 4), torch.ones(2, 4))
    with pytest.raises(InputError, match=r"of shape \[1, 2, 4\] have no spike; pass \[tokens, features\]"):
        find_spike(torch.ones(1, 2, 4))
    with pytest.raises(NotFiniteError, match=r"the outputs of layer 2 mlp.down_proj holds 1 elements of 8"):
        super_weight_row(MODULE, torch.ones(2, 4), torch.tensor([[1.0, 2, 3, torch.inf], [1.0, 2, 3, 4]]))
