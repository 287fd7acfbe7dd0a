"""Memory and speed of a model as it is served: opened by a process of its own, which generates some tokens.

Figures are of one machine at one moment, which `host` names; nothing that is compared byte for byte holds them.
Memory is what the model adds to a process that has imported everything already. On a GPU it is what torch allocates.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmq.errors import LmqError

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PAGE_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Performance:
    """What a model takes; None where the system does not tell.

    `memory_resident_bytes` after opening, with every weight read; `peak_generation_bytes` while it takes in the prompt
    and generates; tokens per second of one sequence, prompt and generation apart.
    """

    memory_resident_bytes: int | None
    peak_generation_bytes: int | None
    prompt_tokens_per_second: float
    generation_tokens_per_second: float
    prompt_tokens: int
    generated_tokens: int
    host: str


def measure_performance(
    path: Path, *, prompt_tokens: int = 128, generated_tokens: int = 16, device: str = "cpu", threads: int = 1
) -> Performance:
    """Open a model directory in a fresh process and generate after a prompt of random tokens.

    Raises LmqError where that process fails, with its last words.
    """
    options = {"prompt": prompt_tokens, "generated": generated_tokens, "device": device, "threads": threads}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "lmq.evaluation.performance", str(path), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise LmqError(f"the process that measures memory and speed of {path} failed: {words}")
    return Performance(**json.loads(done.stdout.splitlines()[-1]))


@torch.no_grad()
def _measure(path: Path, prompt_tokens: int, generated_tokens: int, device: str, threads: int) -> Performance:
    from lmq.checkpoint.open import open_model_directory
    from lmq.model.discovery import embedding_shape

    torch.set_num_threads(threads)
    load = _load_average()
    _import_all(path)
    memory = _GpuMemory(device) if device.startswith("cuda") else _ProcessMemory()
    model: Any = open_model_directory(path, device=device)
    _read_all(model)
    resident = memory.added()
    vocabulary = embedding_shape(model)[0]
    prompt = torch.randint(vocabulary, (1, prompt_tokens), generator=torch.Generator().manual_seed(0)).to(device)
    memory.forget_peak()
    _generate(model, prompt[:, :2], 1)  # what is set up once is not timed
    prompt_s, generation_s = _generate(model, prompt, generated_tokens)
    dtype = str(model.dtype).removeprefix("torch.")
    return Performance(
        memory_resident_bytes=resident,
        peak_generation_bytes=memory.peak_added(),
        prompt_tokens_per_second=prompt_tokens / prompt_s,
        generation_tokens_per_second=generated_tokens / generation_s,
        prompt_tokens=prompt_tokens,
        generated_tokens=generated_tokens,
        host=f"{_processor(device)}, {_threads(device, threads)}{load}{dtype}, torch {torch.__version__}",
    )


def _import_all(path: Path) -> None:
    """Import what opening the model will, and make it once without memory: code is not what is measured."""
    import accelerate  # noqa: F401

    import lmq.checkpoint.write  # noqa: F401
    from lmq.model.auto_class import auto_class_of
    from lmq.model.skeleton import read_model_config

    config = read_model_config(path)
    with torch.device("meta"):
        auto_class_of(config).from_config(config, trust_remote_code=False)
    torch.nn.functional.linear(torch.ones(1, 8), torch.ones(8, 8))


def _generate(model: Any, prompt: Tensor, tokens: int) -> tuple[float, float]:
    """Seconds for the prompt, which gives the first token, and for the most likely `tokens` after it."""
    started = time.perf_counter()
    output = model(prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1].argmax(-1, keepdim=True)
    token.item()  # a GPU works behind the clock's back
    between = time.perf_counter()
    for _ in range(tokens):
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1].argmax(-1, keepdim=True)
    token.item()
    return between - started, time.perf_counter() - between


def _read_all(model: Any) -> None:
    """Touch every page of the weights: files are mapped into memory, and resident only once they are read."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel():
            tensor.detach().reshape(-1).view(torch.uint8)[::_PAGE_BYTES].sum()


class _ProcessMemory:
    """Resident memory of this process above what it had at the start (Linux; elsewhere unknown)."""

    def __init__(self) -> None:
        self._start = _status_bytes("VmRSS")
        self._peak_is_ours = False

    def added(self) -> int | None:
        now = _status_bytes("VmRSS")
        return None if now is None or self._start is None else now - self._start

    def forget_peak(self) -> None:
        """Opening may have taken more than generating will."""
        try:
            _CLEAR.write_text("5")
            self._peak_is_ours = True
        except OSError:
            self._peak_is_ours = False

    def peak_added(self) -> int | None:
        peak = _status_bytes("VmHWM")
        return peak - self._start if self._peak_is_ours and peak is not None and self._start is not None else None


class _GpuMemory:
    """Memory that torch has allocated on a GPU."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._start = torch.cuda.memory_allocated(self._device)

    def added(self) -> int | None:
        return torch.cuda.memory_allocated(self._device) - self._start

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_added(self) -> int | None:
        return torch.cuda.max_memory_allocated(self._device) - self._start


def _status_bytes(name: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _processor(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _threads(device: str, threads: int) -> str:
    if device.startswith("cuda"):
        return ""
    return f"{threads} thread{'s' if threads > 1 else ''} of {os.cpu_count()} cores, "


def _load_average() -> str:
    """How busy the machine was before: other work makes the speed worse, never the memory."""
    try:
        return f"load {os.getloadavg()[0]:.1f}, "
    except (OSError, AttributeError):
        return ""


def main() -> int:
    """Measure here and print the figures as one line of JSON."""
    parser = argparse.ArgumentParser(prog="lmq.evaluation.performance", description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--device", default="cpu")
    for name in ("prompt", "generated", "threads"):
        parser.add_argument(f"--{name}", type=int, default=1)
    given = parser.parse_args()
    try:
        found = _measure(given.path, given.prompt, given.generated, given.device, given.threads)
    except LmqError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(asdict(found)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
