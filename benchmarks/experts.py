"""Uniform and loss-aware bits at equal bytes on a mixture of experts that is trained here, in a few minutes of CPU.

    python -m benchmarks.experts FOLDER [--steps 500] [--threads 1]

An OLMoE of 4 layers, 8 experts each, two for every token, with a tokenizer of 1,024 tokens, is trained on the first
half of the documents that Python carries as its help (pydoc_data.topics), from a fixed seed. It is calibrated on that
half and judged on the other. A model that FOLDER holds from an earlier call is taken as it is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from lmq.text.calibration import TextSource, documents

VOCABULARY, LENGTH, BATCH, RATE, WARM_STEPS = 1024, 128, 8, 4e-3, 30
TEXT = "pydoc-topics"
BUDGETS = ("uniform b3g64", "uniform b4g64")
STRATEGIES = ("uniform", "structural", "mxq", "loss-aware")


def main() -> None:
    """Train, run the pipeline, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder: Path = arguments.folder.absolute()
    if not (folder / "model").is_dir():
        train(folder / "model", arguments.steps)
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(configuration(folder), sort_keys=False))
    subprocess.run([sys.executable, "-m", "lmq_flows.cli", "run", str(config)], check=True)
    print_table(json.loads((folder / "runs" / "experts" / "results.json").read_text()))


def train(path: Path, steps: int) -> None:
    """Write the trained model and its tokenizer to `path`."""
    texts = documents(TextSource(source=TEXT, part="first", seed=42), None)
    tokenizer = _tokenizer(texts)
    ids = torch.tensor([token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_token_id]])
    torch.manual_seed(0)
    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=1024,
            output_router_logits=True,
            router_aux_loss_coef=0.01,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    started = time.perf_counter()
    for step in range(steps):
        warm, cooled = min(1.0, (step + 1) / WARM_STEPS), 1 - step / steps
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(warm, 2 * cooled)
        batch = _batch(ids, generator)
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 25 == 24:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    model.config.output_router_logits = False
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def configuration(folder: Path) -> dict[str, object]:
    """The run that is compared."""
    return {
        "name": "experts",
        "models": [{"name": "olmoe-tiny", "source": str(folder / "model")}],
        "strategies": list(STRATEGIES),
        "budgets": list(BUDGETS),
        "quantizers": ["hqq", "fisher-gptq"],
        "measure": {"menu": ["b2g32", "b2g64", "b3g64", "b4g64", "b5g64", "b6g64", "b8g64"]},
        "calibration": {"source": TEXT, "part": "first", "sequences": 32, "sequence_length": 256},
        "evaluation": {"source": TEXT, "part": "second", "tokens": 8192, "window": 512, "stride": 256},
        "store": str(folder / "store"),
        "runs_dir": str(folder / "runs"),
    }


def print_table(results: list[dict[str, object]]) -> None:
    """A row for every variant, as Markdown."""
    print("| budget | strategy | quantizer | bytes | perplexity | KL |\n|---|---|---|---:|---:|---:|")
    for row in results:
        kl = row["kl_divergence"]
        divergence = "–" if kl is None else f"{kl:.4f} ± {row['kl_divergence_stderr']:.4f}"
        size = "–" if row["size_bytes"] is None else f"{row['size_bytes']:,}"
        print(
            f"| {row['budget'] or '–'} | {str(row['strategy']).partition(' ')[0]} | {row['quantizer'] or '–'} | {size} "
            f"| {row['perplexity']:.2f} | {divergence} |"
        )


def _batch(ids: Tensor, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=generator)
    return torch.stack([ids[start : start + LENGTH] for start in starts.tolist()])


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<eos>", eos_token="<eos>", pad_token="<eos>", model_max_length=1024
    )


if __name__ == "__main__":
    main()
