"""Names made from labels, as a file system takes them."""

from __future__ import annotations

import re


def slug(text: str) -> str:
    """Lower-case letters, digits and dashes, fit for a file name: `sensi-boost-uniform-b4g64`."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
