"""Which limit a figure of parity has: by level, metric and the precision that was in force."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...bundle import Bundle
from ...errors import UsageError
from ..parity import THRESHOLDS
from ..records.record import Effective, Gate, Requested

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int8-full")
# Of precisions that mix, as when one component falls back to fp32, the one that errs most counts.
_LOOSENESS = {name: rank for rank, name in enumerate(("fp32", "fp16", "bf16", "int8", "int8-full"))}
REPORTED = "reported"
# What a project says that does not tell what it computes in.
UNKNOWN = "unknown"


def judged_precision(effective: str, component: str, bundle: Bundle, against: Bundle | None = None) -> str:
    """The precision whose limits hold for one component.

    Against the same bundle the int8 weights are the same numbers on both sides, so what is judged is what the
    engine computes in; only ``int8-full``, where activations are rounded, has limits of its own. Against
    another bundle the storage is what differs: int8 is judged, anything else (another LoRA) is reported.

    Args:
        effective: ``fp32``, ``bf16`` or ``fp16`` as read back from the engine.
        component: its name.
        bundle: what ran.
        against: the reference's bundle, None for the same.

    Raises:
        UsageError: a precision without limits.
    """
    storage = str(bundle.manifest.get("storage"))
    whole = storage == "int8-full" and component == "unet"
    if against is not None and against.content_digest != bundle.content_digest:
        return storage if storage in ("int8", "int8-full") else REPORTED
    return _known("int8-full" if whole else effective)


def image_precision(requested: Requested, effective: Mapping[str, Effective] | None) -> str:
    """The precision whose limits hold for latents and images: the loosest that a component ran in.

    Args:
        requested: decides when nothing was read back.
        effective: what was in force, by component.

    Raises:
        UsageError: ``auto`` was asked for and what was in force is not given, or it has no limits.
    """
    if effective:
        return max((_known(one.precision) for one in effective.values()), key=_LOOSENESS.__getitem__)
    if requested.precision == "auto":
        raise UsageError(
            "latents and images are judged by the precision in force; with the precision auto, give what the "
            "components reported (effective=...)"
        )
    return _known(requested.precision)


def run_precision(
    bundle: Bundle,
    requested: Requested,
    effective: Mapping[str, Effective] | None = None,
    against: Bundle | None = None,
) -> str:
    """The precision whose limits hold for the latents and images of a whole run, or ``reported``.

    Args:
        bundle: what ran.
        requested: decides when nothing was read back.
        effective: what was in force, by component.
        against: the reference's bundle, None for the same.

    A project that does not tell its precision is reported and not judged: what was asked for proves nothing.

    Raises:
        UsageError: ``auto`` was asked for and what was in force is not given, or it has no limits.
    """
    if effective and any(one.precision == UNKNOWN for one in effective.values()):
        return REPORTED
    return judged_precision(image_precision(requested, effective), "unet", bundle, against)


def make_gate(level: str, where: str, metric: str, value: float, precision: str) -> Gate:
    """A gate with the limit of the table, or without one if the figure is only reported.

    A figure that is judged and is NaN does not pass.
    """
    shown = float(value) if math.isfinite(value) else None  # JSON has no word for it
    if metric == "nonfinite":  # no precision excuses it
        return Gate(level, where, metric, shown, 0.0, True, value == 0)
    found = THRESHOLDS.get(f"parity_{precision.replace('-', '_')}_{level}_{metric}")
    if found is None:
        return Gate(level, where, metric, shown, None, True, True)
    return Gate(level, where, metric, shown, found.limit, found.at_most, found.holds(value))


def _known(precision: str) -> str:
    if precision not in PRECISIONS:
        raise UsageError(f"there are no limits of parity for {precision!r}; known: {', '.join(PRECISIONS)}")
    return precision
