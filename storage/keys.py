"""Keys of artifacts: what was computed, by which version, from which content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. Sets and NaN are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def text_sha256(text: str) -> str:
    """Hex sha256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def artifact_key(stage: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, str | Sequence[str]]) -> str:
    """Key of what `stage` makes from `config` and the content digests of its inputs.

    Inputs are digests of content, so an input that was made again with the same bytes gives the same key.
    Nothing that differs between machines (paths, threads, devices) may be in `config`.
    """
    return text_sha256(canonical_json({"stage": stage, "version": version, "config": config, "inputs": inputs}))
