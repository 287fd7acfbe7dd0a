"""One thread at a time imports transformers, and builds or opens models with it.

It is imported where it is used, as that takes seconds. Threads that import it at once can see half of a module.

While `from_pretrained` and `from_config` are at work they replace methods of transformers' own classes and put them
back afterwards (weight tying is switched off, initialisation is left out). Two threads at once can put back what the
other one has replaced: then no model of the process ties its weights any more.
"""

from __future__ import annotations

import threading

TRANSFORMERS_LOCK = threading.RLock()
"""Held while transformers is imported, and while it builds or opens a model."""
