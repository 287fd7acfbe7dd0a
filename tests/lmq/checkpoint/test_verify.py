import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lmq
from lmq.checkpoint.verify import checkpoint_sizes, find_damage, quantized_bytes, verify_checkpoint
from lmq.checkpoint.write import write_checkpoint
from lmq.errors import DamagedFile, InputError, LmqError
from lmq.formats.spec import STOPS
from lmq.model.discovery import discover
from lmq.model.tensors import read_headers, read_tensors
from lmq.quantizers import quantizer

SHARD_BYTES = 60_000


@pytest.fixture(scope="module")
def made(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of all configurations, in several shards; not to be changed."""
    path = tmp_path_factory.mktemp("made") / "q"
    structure = discover(tiny_qwen)
    choice = dict(zip((info.id for info in structure.modules), cycle(STOPS)))
    write_checkpoint(path, tiny_qwen, structure, choice, quantizer("rtn"), max_shard_bytes=SHARD_BYTES)
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "q")


def _flip(file: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1 << bit
    file.write_bytes(content)


def _data(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_flipped_bit_is_named_with_its_file_and_tensor(checkpoint: Path) -> None:
    assert list(find_damage(checkpoint)) == []
    shard = sorted(checkpoint.glob("*.safetensors"))[-1]
    before = {name: _data(tensor) for name, tensor in load_file(shard).items()}
    _flip(shard, shard.stat().st_size - 1)
    changed = [name for name, tensor in load_file(shard).items() if _data(tensor) != before[name]]
    assert len(changed) == 1
    (damage,) = find_damage(checkpoint)
    assert damage.startswith(f"{shard}: {changed[0]} is not what was written")
    verify_checkpoint(checkpoint)  # headers alone are right
    with pytest.raises(DamagedFile, match=changed[0]):
        lmq.load(checkpoint, verify=True)


def test_every_file_is_covered(checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("added by a run")
    assert list(find_damage(checkpoint)) == []
    _flip(checkpoint / "tokenizer.json", 100)
    (checkpoint / "generation_config.json").unlink()
    damages = sorted(find_damage(checkpoint))
    assert [damage.split(" is ")[0] for damage in damages] == [
        str(checkpoint / "generation_config.json"),
        str(checkpoint / "tokenizer.json"),
    ]
    (checkpoint / "checksums.json").write_text("{}")
    with pytest.raises(DamagedFile, match=r"checksums.json does not hold sha256 digests"):
        list(find_damage(checkpoint))


def test_checkpoints_without_checksums_open_and_are_checked_by_their_headers(checkpoint: Path) -> None:
    (checkpoint / "checksums.json").unlink()
    assert list(find_damage(checkpoint)) == []
    lmq.load(checkpoint, verify=True)
    shard = sorted(checkpoint.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    name = next(name for name in sorted(tensors) if name.endswith(".codes"))
    save_file({**tensors, name: tensors[name].view(torch.int8)}, shard, metadata={"format": "pt"})
    with pytest.raises(DamagedFile, match=rf"{shard.name}: {name} is I8 .* where its configuration needs U8"):
        lmq.load(checkpoint)
    tensors.pop(name)
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(DamagedFile, match=f"lacks the tensor {name}"):
        lmq.load(checkpoint)


def test_missing_and_foreign_shards_are_named(checkpoint: Path) -> None:
    index = checkpoint / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    moved = dict(content["weight_map"])
    name, shard = sorted(moved.items())[0]
    other = max(moved.values())
    moved[name] = other
    index.write_text(json.dumps({**content, "weight_map": moved}))
    with pytest.raises(DamagedFile, match=f"{other} lacks the tensor {name}"):
        verify_checkpoint(checkpoint)
    index.write_text(json.dumps({**content, "weight_map": {**moved, name: "../elsewhere.safetensors"}}))
    with pytest.raises(InputError, match=r"'../elsewhere.safetensors', which is not a file of the model"):
        verify_checkpoint(checkpoint)
    index.write_text(json.dumps(content))
    (checkpoint / shard).unlink()
    with pytest.raises(InputError, match=rf"lacks 1 of \d+ shards .{shard}"):
        verify_checkpoint(checkpoint)


def test_bytes_of_all_parts_add_up_to_the_files(made: Path, tiny_qwen: Path) -> None:
    sizes = checkpoint_sizes(made)
    assert sizes.total_bytes == sum(file.stat().st_size for file in made.iterdir())
    structure = discover(tiny_qwen)
    counted = sum(spec.size_bytes(info.parameters) for info, spec in zip(structure.modules, cycle(STOPS)))
    assert sizes.quantized_bytes == quantized_bytes(made) == counted
    tensors = read_tensors(read_headers(made).values())
    assert sizes.quantized_bytes + sizes.unquantized_bytes == sum(tensor.nbytes for tensor in tensors.values())
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in made.glob("*.safetensors"))
    assert sizes.header_bytes == headers


_WRITE = """
import os, sys, traceback
from itertools import cycle
from pathlib import Path
from lmq.checkpoint.write import write_checkpoint
from lmq.model.discovery import discover
from lmq.formats.spec import STOPS
from lmq.quantizers import quantizer
source = Path(sys.argv[1])
structure = discover(source)
choice = dict(zip((info.id for info in structure.modules), cycle(STOPS)))
for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            write_checkpoint(Path(line[:-1]), source, structure, choice, quantizer("rtn"), max_shard_bytes=60_000)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def writer(tiny_qwen: Path) -> Iterator[subprocess.Popen[str]]:
    """Writes a checkpoint to every path that it is told, in a process of its own: tells its number, then its end."""
    environment = {**os.environ, "PYTHONHASHSEED": "4242", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _WRITE, str(tiny_qwen)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def _start(writer: subprocess.Popen[str], target: Path) -> int:
    """Have a process write to `target`; returns its number."""
    assert writer.stdin is not None
    writer.stdin.write(f"{target}\n")
    writer.stdin.flush()
    return _next_number(writer)


def _next_number(writer: subprocess.Popen[str]) -> int:
    assert writer.stdout is not None
    return int(writer.stdout.readline())


def test_another_process_writes_the_same_bytes(made: Path, writer: subprocess.Popen[str], tmp_path: Path) -> None:
    _start(writer, tmp_path / "q")
    assert _next_number(writer) == 0
    assert {file.name: file.read_bytes() for file in (tmp_path / "q").iterdir()} == {
        file.name: file.read_bytes() for file in made.iterdir()
    }


@pytest.mark.parametrize("sign", [".q.layers.*/layer-00002*", ".q.*/q/model-00002*", ".q.*/q/config.json"])
def test_a_killed_writer_leaves_nothing_that_looks_complete(
    tiny_qwen: Path, writer: subprocess.Popen[str], tmp_path: Path, sign: str
) -> None:
    """Killed when the third layer, the second shard and the configuration of the source have appeared."""
    process = _start(writer, tmp_path / "q")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(sign)):
        assert Path(f"/proc/{process}").exists(), "the writer was done before it could be killed"
        assert time.monotonic() < deadline
    with contextlib.suppress(ProcessLookupError):  # it may end before the signal comes
        os.kill(process, signal.SIGKILL)
    assert _next_number(writer) == -signal.SIGKILL or (tmp_path / "q").exists()
    if (tmp_path / "q").exists():  # the kill came after the last rename: then it must be whole
        assert list(find_damage(tmp_path / "q")) == []
        return
    with pytest.raises(LmqError):
        verify_checkpoint(tmp_path / "q")
    structure = discover(tiny_qwen)
    choice = dict(zip((info.id for info in structure.modules), cycle(STOPS)))
    write_checkpoint(tmp_path / "q", tiny_qwen, structure, choice, quantizer("rtn"))  # what is left does not disturb
    assert list(find_damage(tmp_path / "q")) == []


MUTATIONS = 2000


def test_no_mutation_crashes_the_reader_or_passes_unnoticed(tiny_qwen: Path, tmp_path: Path) -> None:
    """Each changes some bytes of one file; what is read must be refused, reported, or equal what was written."""
    path = tmp_path / "q"
    structure = discover(tiny_qwen)
    module = structure.modules[0]
    choice = {module.id: STOPS[4]}
    write_checkpoint(path, tiny_qwen, structure, choice, quantizer("rtn"))
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (path / file).unlink(missing_ok=True)
    recorded = json.loads((path / "checksums.json").read_text())
    recorded["files"] = {"config.json": recorded["files"]["config.json"]}
    _keep_few_tensors(path, structure.path(module.id), recorded)
    assert list(find_damage(path)) == []
    written = read_tensors(read_headers(path).values())
    originals = {name: (path / name).read_bytes() for name in ("model.safetensors", "config.json", "checksums.json")}
    generator = random.Random(5)
    outcomes = {"refused": 0, "reported": 0, "harmless": 0}
    for _ in range(MUTATIONS):
        name = generator.choice(("model.safetensors", "model.safetensors", "config.json", "checksums.json"))
        (path / name).write_bytes(_mutated(originals[name], generator, is_weights=name == "model.safetensors"))
        try:
            outcome = "reported" if list(find_damage(path)) else "harmless"
        except LmqError:
            outcome = "refused"
        outcomes[outcome] += 1
        if outcome == "harmless":
            assert name != "config.json" or (path / name).read_bytes() == originals[name]
            found = read_tensors(read_headers(path).values())
            assert found.keys() == written.keys()
            assert all(torch.equal(found[key].view(torch.uint8), written[key].view(torch.uint8)) for key in written)
        (path / name).write_bytes(originals[name])
    assert min(outcomes["refused"], outcomes["reported"]) > MUTATIONS // 20, outcomes


def _keep_few_tensors(path: Path, module_path: str, recorded: dict[str, dict[str, object]]) -> None:
    """Small enough to be read two thousand times: the quantized matrix, and a norm."""
    tensors = load_file(path / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if key.startswith(module_path) or key == "model.norm.weight"}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    recorded["tensors"] = {name: recorded["tensors"][name] for name in kept}
    (path / "checksums.json").write_text(json.dumps(recorded))


def _mutated(content: bytes, generator: random.Random, *, is_weights: bool) -> bytes:
    """Flipped bits, bytes changed, cut out or put in, a truncated or longer file; half of them in the header."""
    changed = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little") if is_weights else len(content)
    end = header if generator.random() < 0.5 else len(content)
    at = generator.randrange(end)
    kind = generator.randrange(7)
    if kind == 0:
        changed[at] ^= 1 << generator.randrange(8)
    elif kind == 1:
        changed[at] = generator.randrange(256)
    elif kind == 2:
        del changed[at : at + generator.randrange(1, 9)]
    elif kind == 3:
        changed[at:at] = generator.randbytes(generator.randrange(1, 9))
    elif kind == 4:
        del changed[at:]
    elif kind == 5:
        changed += generator.randbytes(generator.randrange(1, 9))
    else:  # digits and words that parse: the mutations that a reader is most likely to believe
        digits = [index for index in range(end) if chr(changed[index]).isdigit()]
        if digits:
            changed[generator.choice(digits)] = ord(generator.choice("0123456789"))
    return bytes(changed)
