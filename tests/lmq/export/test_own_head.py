from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lmq.checkpoint.write import write_checkpoint
from lmq.export.gguf_tensors import plan_tensors, tensor_problems
from lmq.export.source import QuantizedCheckpoint
from lmq.formats.spec import QuantSpec
from lmq.model.discovery import discover
from lmq.quantizers import quantizer


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma2"])
def test_a_head_of_its_own_is_exported_or_refused(model_type: str, tmp_path: Path) -> None:
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}
    source = tmp_path / "source"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape, **heads)).save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    for number, head in enumerate((tensors["model.embed_tokens.weight"].clone(), torch.randn(512, 64))):
        save_file({**tensors, "lm_head.weight": head}, source / "model.safetensors", metadata={"format": "pt"})
        structure = discover(source, weights_sha256="0")
        choice = {info.id: QuantSpec(4, 64) for info in structure.modules}
        write_checkpoint(tmp_path / str(number), source, structure, choice, quantizer("rtn"))
        checkpoint = QuantizedCheckpoint(tmp_path / str(number))
        config = AutoConfig.from_pretrained(tmp_path / str(number), trust_remote_code=False)
        if model_type == "gemma2":  # llama.cpp knows it tied only
            refused = "the tensor lm_head.weight has no place in GGUF's gemma2"
            assert list(tensor_problems(checkpoint, config)) == ([refused] if number == 1 else [])
            continue
        names = [tensor.name for tensor in plan_tensors(checkpoint, config, "exact")]
        assert ("output.weight" in names) is (number == 1)
