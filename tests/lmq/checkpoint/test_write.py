import json
import shutil
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmq.checkpoint.write import (
    assemble_checkpoint,
    quantize_layer,
    quantized_bytes,
    read_quantization_config,
    save_layer,
    verify_checkpoint,
    write_checkpoint,
)
from lmq.errors import DamagedFile, InputError
from lmq.formats.packing import unpack
from lmq.formats.spec import STOPS, QuantSpec
from lmq.measurement.grids import fit_grids
from lmq.model.discovery import discover
from lmq.model.structure import ModelStructure, ModuleId
from lmq.model.tensors import read_headers, read_tensors
from lmq.quantizers import quantizer

HQQ = quantizer("hqq")


def _mixed(structure: ModelStructure) -> dict[ModuleId, QuantSpec]:
    return dict(zip((info.id for info in structure.modules), cycle(STOPS)))


def _all_tensors(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(read_headers(path).values())


def _bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def written(tiny_qwen: Path, tmp_path: Path) -> Path:
    structure = discover(tiny_qwen)
    write_checkpoint(tmp_path / "out", tiny_qwen, structure, _mixed(structure), HQQ)
    return tmp_path / "out"


@pytest.mark.parametrize("spec", [*STOPS, QuantSpec(5, 64), QuantSpec(6, 64)], ids=str)
def test_quantized_bytes_are_those_of_the_configurations(spec: QuantSpec, tiny_qwen: Path, tmp_path: Path) -> None:
    structure = discover(tiny_qwen)
    allocation = dict.fromkeys((info.id for info in structure.modules), spec)
    write_checkpoint(tmp_path / "out", tiny_qwen, structure, allocation, quantizer("rtn"))
    assert quantized_bytes(tmp_path / "out") == sum(spec.size_bytes(info.parameters) for info in structure.modules)
    verify_checkpoint(tmp_path / "out")


def test_codes_are_on_the_grids_and_the_rest_is_copied_bit_for_bit(tiny_model: Path, tmp_path: Path) -> None:
    structure = discover(tiny_model)
    allocation = _mixed(structure)
    left_out = structure.modules[3].id
    del allocation[left_out]
    write_checkpoint(tmp_path / "out", tiny_model, structure, allocation, HQQ)
    source, tensors = _all_tensors(tiny_model), _all_tensors(tmp_path / "out")
    for module, spec in allocation.items():
        path = structure.path(module)
        weight = source.pop(f"{path}.weight")
        grid = fit_grids(weight, [spec], HQQ)[spec]
        codes = unpack(tensors.pop(f"{path}.codes"), spec.bits).view(-1, spec.group_size)
        assert torch.equal(codes, grid.codes(weight))
        for name, tensor in grid.to_tensors().items():
            assert torch.equal(tensors.pop(f"{path}.{name}"), tensor)
    assert tensors.keys() == source.keys()
    assert f"{structure.path(left_out)}.weight" in tensors
    for name, tensor in tensors.items():
        assert tensor.dtype == source[name].dtype
        assert torch.equal(tensor, source[name])


def test_configuration_and_companions(written: Path, tiny_qwen: Path) -> None:
    structure = discover(tiny_qwen)
    config = json.loads((written / "config.json").read_text())
    fields = config.pop("quantization_config")
    assert config == json.loads((tiny_qwen / "config.json").read_text())
    assert (fields["quant_method"], fields["format_version"], fields["axis"]) == ("lmq", 2, 1)
    assert fields["quantizer"] == HQQ.describe()
    info = structure.modules[1]
    path = structure.path(info.id)
    shape = [info.out_features, info.in_features]
    expected = {"shape": shape, "bits": 2, "group_size": 64, "meta_bits": 8, "meta_group_size": 128}
    assert fields["modules"][path] == expected
    assert read_quantization_config(written).specs[path] == QuantSpec(2, 64)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (written / name).read_bytes() == (tiny_qwen / name).read_bytes()


def test_shards_hold_the_same_tensors(written: Path, tiny_qwen: Path, tmp_path: Path) -> None:
    structure = discover(tiny_qwen)
    limit = 40_000
    write_checkpoint(tmp_path / "sharded", tiny_qwen, structure, _mixed(structure), HQQ, max_shard_bytes=limit)
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        tensors = load_file(shard)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= limit or len(tensors) == 1
    whole, sharded = _all_tensors(written), _all_tensors(tmp_path / "sharded")
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    verify_checkpoint(tmp_path / "sharded")
    shards[1].unlink()
    with pytest.raises(InputError, match=shards[1].name):
        verify_checkpoint(tmp_path / "sharded")


def test_sharded_sources_are_read(written: Path, tiny_qwen: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(tiny_qwen).save_pretrained(source, max_shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    structure = discover(source)
    write_checkpoint(tmp_path / "again", source, structure, _mixed(structure), HQQ)
    first, second = _all_tensors(written), _all_tensors(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_layer_by_layer_gives_the_same_bytes(written: Path, tiny_qwen: Path, tmp_path: Path) -> None:
    structure = discover(tiny_qwen)
    allocation = _mixed(structure)
    source = _all_tensors(tiny_qwen)
    files = []
    for layer in reversed(range(structure.layers)):
        weights = {info.id: source[f"{structure.path(info.id)}.weight"] for info in structure.in_layer(layer)}
        grids = {
            module: fit_grids(weight, [allocation[module], QuantSpec(8, 16)], HQQ) for module, weight in weights.items()
        }
        files.append(tmp_path / f"layer-{layer}.safetensors")
        save_layer(files[-1], quantize_layer(structure, weights, grids, allocation))
    assemble_checkpoint(tmp_path / "assembled", tiny_qwen, structure, allocation, files, quantizer=HQQ)
    assert _bytes(tmp_path / "assembled") == _bytes(written)


def test_interrupted_writing_leaves_nothing(tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lmq.checkpoint.write.copy_companions", interrupt)
    structure = discover(tiny_qwen)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "out", tiny_qwen, structure, _mixed(structure), HQQ)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_place_is_not_overwritten(written: Path, tiny_qwen: Path) -> None:
    structure = discover(tiny_qwen)
    before = _bytes(written)
    with pytest.raises(InputError, match="exists already"):
        write_checkpoint(written, tiny_qwen, structure, _mixed(structure), HQQ)
    assert _bytes(written) == before


def test_layers_that_do_not_fit_the_choice_are_refused(tiny_qwen: Path, tmp_path: Path) -> None:
    structure = discover(tiny_qwen)
    first, second = (info.id for info in structure.modules[:2])
    weight = _all_tensors(tiny_qwen)[f"{structure.path(first)}.weight"]
    spec, other = QuantSpec(4, 64), QuantSpec(4, 32)
    file = tmp_path / "layer.safetensors"
    grids = {first: fit_grids(weight, [spec], HQQ)}
    save_layer(file, quantize_layer(structure, {first: weight}, grids, {first: spec}))

    def assemble(allocation: dict[ModuleId, QuantSpec], files: list[Path]) -> None:
        assemble_checkpoint(tmp_path / "out", tiny_qwen, structure, allocation, files, quantizer=HQQ)

    with pytest.raises(InputError, match=r"layer.safetensors: .*scale_codes is U8 \[64\] where .* U8 \[128\]"):
        assemble({first: other}, [file])
    with pytest.raises(InputError, match=r"layer files lack the tensor .*codes"):
        assemble({first: spec, second: spec}, [file])
    with pytest.raises(InputError, match="a module without a chosen configuration"):
        assemble({}, [file])
    with pytest.raises(InputError, match="layer 99 x, which the model does not have"):
        assemble({ModuleId(99, "x"): spec}, [])
    with pytest.raises(InputError, match=f"no grid for {first} at b4g32"):
        quantize_layer(structure, {first: weight}, grids, {first: other})
    with pytest.raises(InputError, match=f"no grid for {first} at no chosen configuration"):
        quantize_layer(structure, {first: weight}, grids, {})
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DamagedFile, match=r"layer.safetensors is not a readable quantized layer"):
        assemble({first: spec}, [file])
    assert not (tmp_path / "out").exists()


def test_quantized_sources_are_refused(written: Path, tiny_qwen: Path, tmp_path: Path) -> None:
    structure = discover(tiny_qwen)
    shutil.copyfile(written / "config.json", tmp_path / "config.json")
    shutil.copyfile(tiny_qwen / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="is quantized already"):
        write_checkpoint(tmp_path / "twice", tmp_path, structure, _mixed(structure), HQQ)
    with pytest.raises(InputError, match="is not a checkpoint written by lmq"):
        quantized_bytes(tiny_qwen)


def test_damage_is_named(written: Path) -> None:
    weights = written / "model.safetensors"
    intact, config = load_file(weights), (written / "config.json").read_text()
    name = next(name for name in sorted(intact) if name.endswith(".zero_codes"))

    save_file({key: tensor for key, tensor in intact.items() if key != name}, weights)
    with pytest.raises(DamagedFile, match=f"lacks the tensor {name}"):
        verify_checkpoint(written)
    save_file({**intact, name: intact[name][:-1].clone()}, weights)
    with pytest.raises(DamagedFile, match=rf"model.safetensors: {name} is U8 \[\d+\] where its configuration needs U8"):
        verify_checkpoint(written)
    save_file(intact, weights)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"model.safetensors is truncated or damaged"):
        verify_checkpoint(written)
    save_file(intact, weights)

    (written / "config.json").write_text(config.replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(InputError, match="format version 3, this lmq reads version 2"):
        verify_checkpoint(written)
    (written / "config.json").write_text(config.replace('"axis": 1,', "", 1))
    with pytest.raises(DamagedFile, match="damaged quantization_config"):
        verify_checkpoint(written)
    (written / "config.json").write_text(config[:-20])
    with pytest.raises(DamagedFile, match="is not JSON"):
        verify_checkpoint(written)
    (written / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config.json"):
        verify_checkpoint(written)
