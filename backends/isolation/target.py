"""Find a backend in another process: by its registered name, or by the class that the parent has it from."""

from __future__ import annotations

import importlib

from .. import registry
from ..base import Backend


def target_of(backend: Backend) -> str:
    """``module:class`` of a backend."""
    return f"{type(backend).__module__}:{type(backend).__qualname__}"


def load_backend(name: str, target: str = "") -> Backend:
    """The registered backend of a name; one that is not registered here is made from ``target``.

    Raises:
        UsageError: there is no backend of that name, and no target.
    """
    if name in registry.names() or not target:
        return registry.get_backend(name)
    module, _, kind = target.partition(":")
    backend: Backend = getattr(importlib.import_module(module), kind)()
    return backend
