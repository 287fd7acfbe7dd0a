"""A checkpoint in the hands of other libraries: PEFT, transformers' pipeline."""

from itertools import cycle
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, pipeline

import lmq
from lmq.checkpoint.write import write_checkpoint
from lmq.errors import InputError
from lmq.formats.spec import STOPS
from lmq.lora import PackedLoraLinear, with_packed_layers
from lmq.model.discovery import discover
from lmq.quantizers import quantizer


@pytest.fixture(scope="module")
def checkpoint(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "q"
    structure = discover(tiny_qwen)
    choice = dict(zip((info.id for info in structure.modules), cycle(STOPS)))
    write_checkpoint(path, tiny_qwen, structure, choice, quantizer("rtn"))
    return path


def _config() -> LoraConfig:
    return with_packed_layers(LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
def test_adapters_train_and_codes_stay(checkpoint: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = lmq.load(checkpoint, dtype=torch.float32)
    assert base.hf_quantizer.is_trainable
    model = get_peft_model(base, _config())
    assert sum(isinstance(module, PackedLoraLinear) for module in model.modules()) == 8
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 8
    optimizer = torch.optim.Adam(trained, lr=0.02)
    tokens = torch.randint(512, (2, 16), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    with pytest.raises(InputError, match="cannot be merged into packed codes"):
        model.merge_and_unload()

    model.save_pretrained(tmp_path)
    config = with_packed_layers(PeftConfig.from_pretrained(tmp_path))
    again = PeftModel.from_pretrained(lmq.load(checkpoint, dtype=torch.float32), tmp_path, config=config)
    with torch.no_grad():
        assert torch.allclose(again(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits, atol=1e-5)


def test_dora_is_refused() -> None:
    with pytest.raises(InputError, match="use_dora"):
        with_packed_layers(LoraConfig(use_dora=True))


def test_text_generation_pipeline(checkpoint: Path) -> None:
    generate = pipeline("text-generation", model=str(checkpoint), tokenizer=AutoTokenizer.from_pretrained(checkpoint))
    (found,) = generate("the model", max_new_tokens=5, do_sample=False, return_full_text=False)
    unpacked = lmq.load(checkpoint, dense=True)
    inputs = generate.tokenizer("the model", return_tensors="pt")
    expected = unpacked.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert found["generated_text"] == generate.tokenizer.decode(expected, skip_special_tokens=True)
