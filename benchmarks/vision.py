"""Strategies at equal bytes on an encoder of images that is trained here, in minutes of CPU: accuracy and divergence.

    python -m benchmarks.vision FOLDER [--steps 500] [--threads 1]
    python -m benchmarks.vision --sizes

A ViT of 6 layers is trained from a fixed seed on the first half of the 1,797 handwritten digits that scikit-learn
carries (8 × 8 grey values, enlarged to 16 × 16). It is calibrated on images of that half and judged on the other. A
model that FOLDER holds from an earlier call is taken as it is. `--sizes` prints what the matrices that MXQ's authors
quantized of two CLIP models take, from their shapes alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from lmq.formats.spec import QuantSpec
from lmq.images.prepared import ImageDraw, prepare_images

IMAGE, PATCH, BATCH, RATE, WARM_STEPS = 16, 4, 64, 2e-3, 50
BUDGETS = ("uniform b2g64", "uniform b3g64", "uniform b4g64")
CLIP_SHAPES = {"ViT-B-32": ((12, 768), (12, 512)), "ViT-H-14": ((32, 1280), (24, 1024))}
"""Layers and width of the tower of images and of that of texts."""
STRATEGIES = ("uniform", "sensi-boost", "kurt-boost", "mxq", "loss-aware")


def main() -> None:
    """Train, run the pipeline, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.sizes:
        print_sizes()
        return
    if arguments.folder is None:
        parser.error("give a folder for the model, its run and its store, or --sizes")
    folder: Path = arguments.folder.absolute()
    if not (folder / "model").is_dir():
        train(folder / "model", arguments.steps)
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(configuration(folder), sort_keys=False))
    subprocess.run([sys.executable, "-m", "lmq_flows.cli", "run", str(config)], check=True)
    print_table(json.loads((folder / "runs" / "vision" / "results.json").read_text()))


def print_sizes() -> None:
    """Bytes of `c_fc` and `c_proj` of both towers, which are four times as wide inside, as Markdown."""
    print("| model | weights | float16 | b4g64 | b3g64 |\n|---|---:|---:|---:|---:|")
    for name, towers in CLIP_SHAPES.items():
        matrices = [(layers, 4 * width * width, inputs) for layers, width in towers for inputs in (width, 4 * width)]
        weights = sum(layers * parameters for layers, parameters, _ in matrices)
        sizes = [
            sum(layers * spec.size_bytes(parameters, inputs) for layers, parameters, inputs in matrices)
            for spec in (QuantSpec(4, 64), QuantSpec(3, 64))
        ]
        print(f"| {name} | {weights:,} | {' | '.join(f'{size / 1e6:,.1f} MB' for size in (2 * weights, *sizes))} |")


def train(path: Path, steps: int) -> None:
    """Write the trained model and its processor to `path`."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = ViTConfig(**shape, intermediate_size=512, image_size=IMAGE, patch_size=PATCH, num_labels=10)
    model = ViTForImageClassification(config)
    model.config.id2label = {number: str(number) for number in range(10)}
    model.config.label2id = {str(number): number for number in range(10)}
    model.save_pretrained(path)
    ViTImageProcessorPil(size={"height": IMAGE, "width": IMAGE}).save_pretrained(path)
    images = prepare_images(ImageDraw(source="digits", part="first"), path)
    assert images.labels is not None
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    generator = torch.Generator().manual_seed(0)
    started = time.perf_counter()
    for step in range(steps):
        warm, cooled = min(1.0, (step + 1) / WARM_STEPS), 1 - step / steps
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(warm, cooled)
        chosen = torch.randint(len(images.pixels), (BATCH,), generator=generator)
        logits = model(images.pixels[chosen]).logits
        loss = nn.functional.cross_entropy(logits, images.labels[chosen])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    model.save_pretrained(path)


def configuration(folder: Path) -> dict[str, object]:
    """The run that is compared."""
    return {
        "name": "vision",
        "models": [{"name": "vit-digits", "source": str(folder / "model")}],
        "strategies": [*STRATEGIES, {"name": "uniform", "quantizer": "hqq"}],
        "budgets": list(BUDGETS),
        "images": {"source": "digits", "calibration": 128},
        "measure": {
            "menu": ["b2g128", "b2g64", "b2g32", "b3g64", "b3g32", "b4g64", "b4g32", "b5g64", "b6g64", "b8g64"]
        },
        "store": str(folder / "store"),
        "runs_dir": str(folder / "runs"),
    }


def print_table(results: list[dict[str, Any]]) -> None:
    """A row for every variant, as Markdown."""
    print("| budget | strategy | quantizer | bytes | top-1 | mean per-class recall | KL |")
    print("|---|---|---|---:|---:|---:|---:|")
    for row in results:
        kl = row["kl_divergence"]
        divergence = "–" if kl is None else f"{kl:.4f} ± {row['kl_divergence_stderr']:.4f}"
        scores = {score["task"]: score for score in row["tasks"]}
        top, recall = scores["top-1"], scores["mean per-class recall"]
        print(
            f"| {row['budget'] or '–'} | {str(row['strategy']).partition(' ')[0]} | {row['quantizer'] or '–'} "
            f"| {row['size_bytes']:,} | {100 * top['value']:.1f} ± {100 * top['stderr']:.1f} % "
            f"| {100 * recall['value']:.1f} % | {divergence} |"
        )


if __name__ == "__main__":
    main()
