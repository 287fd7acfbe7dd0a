"""One thread at a time builds or opens models with transformers.

While `from_pretrained` and `from_config` are at work they replace methods of transformers' own classes and put them
back afterwards (weight tying is switched off, initialisation is left out). Two threads at once can put back what the
other one has replaced: then no model of the process ties its weights any more.
"""

from __future__ import annotations

import threading

TRANSFORMERS_LOCK = threading.RLock()
"""Held while transformers builds or opens a model."""
