import copy
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import lmq
from lmq.checkpoint.write import write_checkpoint
from lmq.errors import DamagedFile, InputError
from lmq.formats.packed_layer import QuantizedLinear
from lmq.formats.spec import STOPS
from lmq.measurement.grids import fit_grids
from lmq.model.discovery import discover
from lmq.quantizers import quantizer

TOKENS = torch.tensor([[5, 17, 300, 42, 7, 99, 511, 256]])
MANY_TOKENS = TOKENS.repeat(1, 2)
"""More than are multiplied with the codes as they are: for those the weights are rounded to half precision."""


Quantize = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def quantize(tmp_path_factory: pytest.TempPathFactory) -> Quantize:
    """Writes a mixed checkpoint, made once for all tests; returns the dense model with the weights it should have."""

    @cache
    def made(source: Path, axis: int) -> tuple[Path, PreTrainedModel]:
        path = tmp_path_factory.mktemp("made") / "q"
        return path, _quantize(source, path, axis)

    def write(source: Path, path: Path, axis: int = 1) -> PreTrainedModel:
        checkpoint, dense = made(source, axis)
        shutil.copytree(checkpoint, path)
        return copy.deepcopy(dense)

    return write


def _quantize(source: Path, path: Path, axis: int) -> PreTrainedModel:
    structure, fitted_by = discover(source), quantizer("hqq", axis=axis)
    choice = dict(zip((info.id for info in structure.modules), cycle(STOPS)))
    write_checkpoint(path, source, structure, choice, fitted_by)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for module, spec in choice.items():
        weight = dense.get_submodule(structure.path(module)).weight.data
        weight.copy_(fit_grids(weight, [spec], fitted_by)[spec].round_trip(weight))
    return dense


def _open(path: Path) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model(input_ids=tokens).logits


@pytest.mark.parametrize("axis", [0, 1])
def test_logits_are_those_of_the_dense_model_with_the_same_weights(
    tiny_model: Path, tmp_path: Path, quantize: Quantize, axis: int
) -> None:
    dense = quantize(tiny_model, tmp_path / "q", axis)
    model = _open(tmp_path / "q")
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    expected = _logits(dense)
    assert float(expected.std()) > 0.1
    assert torch.allclose(_logits(model), expected, atol=1e-5 * float(expected.abs().max()))


def test_generation_and_tied_embeddings(tiny_qwen: Path, tmp_path: Path, quantize: Quantize) -> None:
    dense = quantize(tiny_qwen, tmp_path / "q")
    model = _open(tmp_path / "q")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    generated = model.generate(TOKENS, **settings)
    assert torch.equal(generated, dense.generate(TOKENS, **settings))
    assert generated.shape[1] > TOKENS.shape[1]


def test_a_saved_model_opens_again(tiny_qwen: Path, tmp_path: Path, quantize: Quantize) -> None:
    quantize(tiny_qwen, tmp_path / "q")
    model = _open(tmp_path / "q")
    model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "checksums.json").exists()
    before, after = load_file(tmp_path / "q" / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():  # bit for bit, NaN or not
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), after[name].reshape(-1).view(torch.uint8)), name
    assert torch.equal(_logits(_open(tmp_path / "again")), _logits(model))
    assert torch.equal(_logits(lmq.load(tmp_path / "again")), _logits(model))


def test_load_dense(tiny_llama: Path, tmp_path: Path, quantize: Quantize) -> None:
    dense = quantize(tiny_llama, tmp_path / "q")
    unpacked = lmq.load(tmp_path / "q", dense=True)
    assert not any(isinstance(module, QuantizedLinear) for module in unpacked.modules())
    assert not hasattr(unpacked.config, "quantization_config")
    assert torch.allclose(_logits(unpacked), _logits(dense), atol=1e-4)


@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_load_in_half_precision(
    tiny_qwen: Path, tmp_path: Path, quantize: Quantize, dtype: torch.dtype, is_dense: bool
) -> None:
    quantize(tiny_qwen, tmp_path / "q").save_pretrained(tmp_path / "dense")
    half = lmq.load(tmp_path / "q", dtype=dtype, dense=is_dense)
    assert half.dtype == dtype
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype).eval()
    assert torch.equal(_logits(half, MANY_TOKENS), _logits(expected, MANY_TOKENS))


def test_the_base_model_opens(tiny_llama: Path, tmp_path: Path, quantize: Quantize) -> None:
    dense = quantize(tiny_llama, tmp_path / "q")
    base = AutoModel.from_pretrained(tmp_path / "q").eval()
    with torch.no_grad():
        states = base(input_ids=TOKENS).last_hidden_state
        expected = dense.model(input_ids=TOKENS).last_hidden_state
    assert torch.allclose(states, expected, atol=1e-4)


def test_newer_formats_and_other_models_are_refused(tiny_llama: Path, tmp_path: Path, quantize: Quantize) -> None:
    quantize(tiny_llama, tmp_path / "q")
    config = (tmp_path / "q" / "config.json").read_text()
    (tmp_path / "q" / "config.json").write_text(config.replace('"format_version": 2', '"format_version": 7'))
    for opened_by in (lmq.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(InputError, match="format version 7"):
            opened_by(tmp_path / "q")
    wrong = json.loads(config)
    wrong["intermediate_size"] = 96
    (tmp_path / "q" / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(InputError, match=r"mlp.* is \[.*128.*\] where LlamaForCausalLM has \[.*96.*\]"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    (tmp_path / "q" / "config.json").write_text(config.replace("layers.0.mlp.up_proj", "layers.0.mlp.x_proj"))
    with pytest.raises(DamagedFile, match=r"lacks the tensor model.layers.0.mlp.x_proj.codes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "q")


def test_lost_tensors_are_an_error_and_not_made_up(tiny_llama: Path, tmp_path: Path, quantize: Quantize) -> None:
    quantize(tiny_llama, tmp_path / "q")
    weights = tmp_path / "q" / "model.safetensors"
    intact = load_file(weights)

    def without(name: str) -> None:
        save_file({key: value for key, value in intact.items() if key != name}, weights, metadata={"format": "pt"})

    without("model.layers.1.self_attn.q_proj.zero_codes")
    for opened_by in (lmq.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(DamagedFile, match=r"lacks the tensor model.layers.1.self_attn.q_proj.zero_codes"):
            opened_by(tmp_path / "q")
    without("model.norm.weight")
    with pytest.raises(DamagedFile, match=r"missing_keys model.norm.weight"):
        lmq.load(tmp_path / "q")
    with pytest.raises(DamagedFile, match=r"lacks the tensor model.norm.weight"):
        lmq.load(tmp_path / "q", verify=True)


def test_importing_again_registers_once() -> None:
    importlib.reload(lmq)
    assert lmq.__version__


FIRST_IMPORTS = ("lmq", "lmq.checkpoint.hf")
REGISTERED_AFTER = """
import importlib, os, sys
import hqq.core.quantize  # most of what transformers takes long to import; imported once for all
assert not {"lmq", "transformers"} & sys.modules.keys()
for module in sys.argv[1:]:
    if not (child := os.fork()):
        importlib.import_module(module)
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        print(module, "lmq" in AUTO_QUANTIZER_MAPPING, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def registered_after() -> str:
    """What processes say that import a module of lmq before transformers, a line each."""
    command = [sys.executable, "-c", REGISTERED_AFTER, *FIRST_IMPORTS]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("module", FIRST_IMPORTS)
def test_the_method_is_registered_when_lmq_is_imported_before_transformers(registered_after: str, module: str) -> None:
    assert f"{module} True" in registered_after.splitlines()


def test_importing_lmq_alone_imports_neither_torch_nor_prefect() -> None:
    script = "import sys, lmq\nassert not {'torch', 'transformers', 'prefect'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True)
