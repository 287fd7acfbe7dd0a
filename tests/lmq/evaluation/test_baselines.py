"""Baselines against whole models whose weights were rounded by hand."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lmq.checkpoint.write import quantized_bytes, write_checkpoint
from lmq.errors import InputError
from lmq.evaluation.baselines import RoundedBaseline
from lmq.evaluation.windows import last_states
from lmq.formats.nf4 import NF4_LEVELS
from lmq.formats.spec import QuantSpec
from lmq.model.discovery import discover
from lmq.model.streaming import StreamedModel
from lmq.quantizers import quantizer


@pytest.mark.parametrize(
    ("text", "label"),
    [("rtn", "rtn b4g64"), ("rtn b3g128", "rtn b3g128"), ("nf4", "nf4 g64"), ("nf4  g32", "nf4 g32")],
)
def test_names(text: str, label: str) -> None:
    assert RoundedBaseline.parse(text).label == label
    assert RoundedBaseline.parse(label).label == label


@pytest.mark.parametrize("text", ["gptq", "rtn g64", "nf4 b4g64", "nf4 g7", "rtn b7g64"])
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        RoundedBaseline.parse(text)


def nf4_by_hand(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    groups = weight.double().reshape(-1, group_size)
    largest = groups.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float64)
    nearest = ((groups / largest)[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * largest).reshape(weight.shape).float()


def test_states_are_those_of_a_model_rounded_by_hand(tiny_qwen: Path) -> None:
    structure = discover(tiny_qwen, weights_sha256="0")
    tokens = torch.randint(2, 500, (2, 12), generator=torch.Generator().manual_seed(1))
    baseline = RoundedBaseline.parse("nf4")
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen, dtype=torch.float32).eval()
    for module in structure.modules:
        linear = model.get_submodule(structure.path(module.id))
        linear.weight = nn.Parameter(nf4_by_hand(linear.weight.detach(), 64))
    streamed = StreamedModel.open(tiny_qwen, structure)
    with torch.no_grad():
        found = streamed.head_logits(last_states(streamed, tokens, baseline.preparation(structure)))
        torch.testing.assert_close(found, model(tokens).logits, rtol=1e-4, atol=1e-4)
        whole = AutoModelForCausalLM.from_pretrained(tiny_qwen, dtype=torch.float32).eval()
        baseline.round_model(whole, structure)
        torch.testing.assert_close(whole(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_rtn_has_the_weights_and_the_size_of_its_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    structure = discover(tiny_llama, weights_sha256="0")
    choice = {module.id: QuantSpec(3, 64) for module in structure.modules}
    write_checkpoint(tmp_path / "out", tiny_llama, structure, choice, quantizer("rtn"))
    baseline = RoundedBaseline.parse("rtn b3g64")
    assert baseline.size_bytes(structure) == quantized_bytes(tmp_path / "out")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    rounded = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    baseline.round_model(rounded, structure)
    for module in structure.modules:
        path = structure.path(module.id)
        torch.testing.assert_close(rounded.get_submodule(path).weight, stored.get_submodule(path).dequantize())


def test_nf4_takes_four_bits_and_a_divisor_per_group(tiny_llama: Path) -> None:
    structure = discover(tiny_llama, weights_sha256="0")
    assert RoundedBaseline.parse("nf4").size_bytes(structure) * 8 == 4.5 * structure.parameters
    assert RoundedBaseline.parse("nf4 g128").size_bytes(structure) * 8 == 4.25 * structure.parameters


def test_groups_that_do_not_divide_a_matrix_are_named(tiny_llama: Path) -> None:
    structure = discover(tiny_llama, weights_sha256="0")
    RoundedBaseline.parse("nf4 g128").check_fits(structure)
    odd = RoundedBaseline(QuantSpec(4, 256))
    odd.check_fits(structure)
    small = type(structure)(
        **{**vars(structure), "modules": (type(structure.modules[0])(structure.modules[0].id, 3, 40, "attn_in"),)}
    )
    with pytest.raises(InputError, match=r"rtn b4g256 does not fit .*120 weights that groups of 256 do not divide"):
        odd.check_fits(small)
