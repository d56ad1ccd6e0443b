"""Where Kiln keeps what it can make again: traced graphs, compiled models, bundles of other models."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """The folder for one kind of cached file; ``KILN_CACHE`` moves all of them. Not created here."""
    root = os.environ.get("KILN_CACHE")
    if root:
        return Path(root) / kind
    import platformdirs

    return Path(platformdirs.user_cache_dir("kiln")) / kind
