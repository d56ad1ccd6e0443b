"""Every error that Kiln raises on purpose.

KilnError
├── UsageError            the request itself cannot be: a size, a name, an option
├── CheckpointError       weights that cannot be read, or are of no family Kiln knows
├── AdapterError          a LoRA-like file that cannot be read, or does not fit
├── GraphError            an architecture that cannot be traced, or a graph that is not as promised
├── BundleError           a bundle that is damaged, incomplete or of another version
├── StorageError          the disk: full, read-only, missing
├── BackendError
│   ├── BackendUnavailable    the engine or device is not there
│   └── SessionError          the engine refused a graph or failed while running
├── ParityError           an int8 bundle is too far from the same weights in fp32
└── InvalidOutputError    a network gave NaN, or the image is flat

A message says what was received, what was expected and what to do about it. The command line
prints it as one line and exits with ``exit_code``: 2 for a usage error, 1 for all others.
"""

from __future__ import annotations


class KilnError(Exception):
    """Root of the tree; the text is meant for the user."""

    exit_code = 1


class UsageError(KilnError):
    """The request cannot be carried out as asked; nothing was started."""

    exit_code = 2


class CheckpointError(KilnError):
    """A checkpoint is unreadable, incomplete, or of no supported family."""


class AdapterError(KilnError):
    """An adapter is unreadable, belongs to another family, or matches nothing."""


class GraphError(KilnError):
    """A graph cannot be made for an architecture, or differs from what it promises."""


class BundleError(KilnError):
    """A bundle is damaged, incomplete, or of a format version this Kiln does not read."""


class StorageError(KilnError):
    """The disk refused: full, read-only, or gone."""


class BackendError(KilnError):
    """An engine could not do what was asked."""


class BackendUnavailable(BackendError):
    """The engine or its device is not on this machine; the text says why."""


class SessionError(BackendError):
    """The engine refused a graph or failed while running it."""


class ParityError(KilnError):
    """Something was measured against fp32 and is too far from it; the text has the figures."""


class InvalidOutputError(KilnError):
    """A component produced NaN or infinity, or an image came out in one flat colour."""
