"""Where a model comes from, where its files lie on this machine, and what identifies its content."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import huggingface_hub
import torch

from lmq.errors import InputError
from lmq.model.companions import COMPANION_PATTERNS, OTHER_WEIGHTS, TEMPLATES_FOLDER, companion_files
from lmq.model.tensors import INDEX_FILE, weight_files
from lmq.model.transformers_lock import TRANSFORMERS_LOCK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_NOT_DOWNLOADED = ["*/*", "consolidated*.safetensors", *OTHER_WEIGHTS]
_INSTEAD = "pass the path of a local model directory, a .gguf file or package:NAME/FILE instead"


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """What the user wrote: `kind` is "hub", "directory", "gguf" or "package".

    `place` is the hub id, the path, or `NAME/FILE` of a file inside an installed Python package.
    `sha256` is what a single-file source must have, where it was given.
    """

    kind: str
    place: str
    revision: str | None = None
    sha256: str | None = None

    @classmethod
    def parse(cls, text: str, sha256: str | None = None) -> ModelSource:
        """Read `org/name[@revision]`, a directory, a `.gguf` file or `package:NAME/FILE`.

        A directory that exists wins over a hub id of the same form. Raises InputError for anything else.
        """
        if text.startswith("package:"):
            source = cls(kind="package", place=text.removeprefix("package:"), sha256=sha256)
            if not re.fullmatch(r"[A-Za-z_]\w*/.+", source.place):
                raise InputError(f"{text!r} does not name a file of a package; write package:NAME/FILE")
        elif text.endswith(".gguf"):
            source = cls(kind="gguf", place=text, sha256=sha256)
        elif text.startswith(("/", ".", "~")) or Path(text).is_dir():
            source = cls(kind="directory", place=text, sha256=sha256)
        elif match := _HUB_ID.fullmatch(text):
            source = cls(kind="hub", place=match["repository"], revision=match["revision"], sha256=sha256)
        else:
            raise InputError(
                f"{text!r} is not a model{nearest_sibling(Path(text))}; give a hub id (org/name), "
                "a directory, a .gguf file or package:NAME/FILE"
            )
        if sha256 is not None and source.kind in ("hub", "directory"):
            raise InputError(f"sha256 was given for {text!r}, which is not a single file; remove it")
        return source


@dataclass(frozen=True, kw_only=True)
class LocatedModel:
    """A model on this machine. `path` is a directory of safetensors, or a GGUF file when `kind` is "gguf".

    `files` are those that make its identity: its weights, and all that comes with them into a checkpoint.
    `revision` is the commit of a hub model.
    """

    kind: str
    path: Path
    files: tuple[Path, ...]
    revision: str | None = None


def locate(source: ModelSource) -> LocatedModel:
    """Find the files of a model, downloading a hub model when it is not in the hub's cache.

    Raises InputError when they are missing, or when a single file's sha256 is not the expected one.
    """
    if source.kind == "hub":
        path = _download(source)
        return LocatedModel(kind="hub", path=path, files=_model_files(path), revision=path.name)
    if source.kind == "directory":
        path = Path(source.place).expanduser()
        if not path.is_dir():
            raise InputError(f"there is no model directory {path}{nearest_sibling(path)}")
        return LocatedModel(kind="directory", path=path, files=_model_files(path))
    path = _package_file(source.place) if source.kind == "package" else Path(source.place).expanduser()
    if not path.is_file():
        raise InputError(f"there is no file {path}{nearest_sibling(path)}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} is not a GGUF file: it does not begin with 'GGUF'; download it again")
    if source.sha256 is not None and (found := _sha256(path)) != source.sha256.lower():
        raise InputError(f"{path} has sha256 {found}, not {source.sha256} as expected; download it again")
    return LocatedModel(kind="gguf", path=path, files=(path,))


def source_digest(located: LocatedModel, cache_path: Path | None = None) -> str:
    """Sha256 that identifies a model's content: over the sorted (name, sha256) of its files, never their path.

    With `cache_path`, the sha256 of each file is kept there by path, size and modification time.
    """
    cache = _read_cache(cache_path)
    found = [(path, _cache_entry(path, cache)) for path in located.files]
    # two files may be links to one, as in the hub's cache
    entries = {str(path.resolve()): entry for path, entry in found}
    is_file = located.kind == "gguf"
    names = ["model.gguf" if is_file else path.relative_to(located.path).as_posix() for path, _ in found]
    pairs = sorted((name, entry["sha256"]) for name, (_, entry) in zip(names, found, strict=True))
    if cache_path is not None and any(cache.get(path) != entry for path, entry in entries.items()):
        _write_atomically(cache_path, json.dumps({**cache, **entries}, indent=1, sort_keys=True))
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def needs_conversion(located: LocatedModel) -> bool:
    """Whether the model must be written as safetensors before it can be read block by block."""
    return located.kind == "gguf"


def convert_gguf(path: Path, out_dir: Path, dtype: torch.dtype | None = None) -> None:
    """Write a GGUF file's model and tokenizer as a safetensors directory `out_dir`, which must not hold files.

    Without `dtype` the weights are kept exactly, in the smallest of float16, bfloat16 and float32 that holds
    every value: float32 for the quantized types (a Q4_1 weight is a product of a 16-bit scale and a code plus a
    16-bit minimum, which neither 16-bit type holds). With `dtype` they are rounded to it, at half the size.
    Nothing is left behind when it fails.
    Raises InputError for a file that transformers cannot read.
    """
    # transformers takes seconds to import, which only this function needs
    with TRANSFORMERS_LOCK:
        from transformers import AutoModelForCausalLM, AutoTokenizer

    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise InputError(f"{out_dir} exists already; remove it or give another place")
    _log.info("reading %s", path)
    try:
        with TRANSFORMERS_LOCK:
            model: Any = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
            )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except (ValueError, OSError, LookupError, NotImplementedError) as error:
        raise InputError(f"{path} cannot be read as a GGUF model: {error}; is it complete, and supported?") from error
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    dtype = dtype or _smallest_lossless_dtype(model)
    _log.info("writing %s as %s", out_dir, dtype)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        temporary.chmod(0o755)
        model.to(dtype).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.replace(out_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _smallest_lossless_dtype(model: PreTrainedModel) -> torch.dtype:
    for dtype in (torch.float16, torch.bfloat16):
        if all(torch.equal(parameter.to(dtype).float(), parameter) for parameter in model.parameters()):
            return dtype
    return torch.float32


def _download(source: ModelSource) -> Path:
    wanted_patterns = ["*.safetensors", *COMPANION_PATTERNS]
    try:
        snapshot = huggingface_hub.snapshot_download(
            source.place, revision=source.revision, allow_patterns=wanted_patterns, ignore_patterns=_NOT_DOWNLOADED
        )
        huggingface_hub.snapshot_download(
            source.place, revision=Path(snapshot).name, allow_patterns=[f"{TEMPLATES_FOLDER}/*.jinja"]
        )
    except (OSError, ValueError, httpx.HTTPError) as error:
        wanted = source.place if source.revision is None else f"{source.place}@{source.revision}"
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{wanted!r} is not a local directory and could not be fetched from the hub ({reason}); "
            f"check the name and the network, or {_INSTEAD}"
        ) from error
    return Path(snapshot)


def _model_files(model_dir: Path) -> tuple[Path, ...]:
    config = model_dir / "config.json"
    if not config.is_file():
        raise InputError(f"{model_dir} has no config.json; is it a model directory?")
    weights = weight_files(model_dir)
    index = [model_dir / INDEX_FILE] if len(weights) > 1 and (model_dir / INDEX_FILE).is_file() else []
    others = [path for path in companion_files(model_dir) if path != config]
    return (config, *weights, *index, *others)


def _package_file(place: str) -> Path:
    """Path of `NAME/FILE` inside an installed package, which is located but never imported."""
    package, _, file = place.partition("/")
    if ".." in Path(file).parts or Path(file).is_absolute():
        raise InputError(f"package:{place} leads out of the package; name a file inside it")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"there is no Python package {package!r} here; install it, or {_INSTEAD}")
    return Path(next(iter(spec.submodule_search_locations))) / file


def nearest_sibling(path: Path) -> str:
    """For the end of an error about a missing path: the file beside it with the nearest name, if there is one."""
    if not path.parent.is_dir():
        return f" (nor {path.parent})"
    names = [sibling.name for sibling in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cache_entry(path: Path, cache: dict[str, Any]) -> dict[str, Any]:
    status = path.stat()
    cached = cache.get(str(path.resolve()))
    stamp = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if cached is not None and stamp.items() <= cached.items() and "sha256" in cached:
        return cached
    return {**stamp, "sha256": _sha256(path)}


def _read_cache(cache_path: Path | None) -> dict[str, Any]:
    """The cached digests; a missing or damaged cache is an empty one, since it can always be made again."""
    if cache_path is None or not cache_path.is_file():
        return {}
    try:
        cache = json.loads(cache_path.read_text())
    except ValueError:
        _log.warning("%s is damaged and is made again", cache_path)
        return {}
    return {path: entry for path, entry in cache.items() if isinstance(entry, dict)} if isinstance(cache, dict) else {}


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    Path(temporary).replace(path)
