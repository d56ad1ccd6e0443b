"""What stays in higher precision, of what was measured: another share needs no other measuring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ...errors import UsageError
from .qdq import Operand
from .sensitivity import groups_to_keep
from .store import Calibration

# Error of the UNet's output by quantized activations that is aimed at, relative L2 over the trajectory, and
# the share of the multiplications that may stay in higher precision for it.
TARGET_ERROR = 0.012
MOST_KEPT = 0.1


def keep(
    measured: Calibration, able: Sequence[Operand], group_of: Callable[[str], str], share: float
) -> Calibration:
    """A calibration with the layers to keep, and what that is expected to give.

    Args:
        measured: with the error and the multiplications of each group.
        able: what may be quantized.
        group_of: the group of a layer.
        share: of all multiplications, how much may be kept.
    """
    errors, costs = measured.sensitivity, measured.multiplications
    kept = set(groups_to_keep(errors, costs, TARGET_ERROR, share))
    rest = sum(error**2 for group, error in errors.items() if group not in kept) ** 0.5
    work = sum(costs[group] for group in kept) / sum(costs.values())
    facts = {"most_kept": share, "error_expected": _digits(rest), "kept_share": _digits(work)}
    layers = tuple(operand.layer for operand in able if group_of(operand.layer) in kept)
    return replace(measured, kept=layers, facts={**measured.facts, **facts})


def kept_anew(
    found: Calibration,
    able: Sequence[Operand],
    group_of: Callable[[str], str],
    share: float | None,
    where: str,
) -> Calibration:
    """A calibration that was not made now, for another share if one is asked for.

    Args:
        found: the calibration.
        able: what may be quantized.
        group_of: the group of a layer.
        share: of the multiplications that may be kept; None takes what the calibration has.
        where: the calibration in a message.

    Raises:
        UsageError: it does not say how many multiplications its groups are, so another share cannot be had.
    """
    if share is None or share == found.facts.get("most_kept"):
        return found
    if not found.counted:
        raise UsageError(
            f"{where} is of an earlier Kiln and says nothing of multiplications, which --most-kept "
            f"{share:g} is a share of; measure again with --recalibrate, or leave --most-kept out"
        )
    return keep(found, able, group_of, share)


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
