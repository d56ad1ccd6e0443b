"""Plans which tensors of a model the adapters change, and computes the changed tensors one at a time.

All arithmetic is in float32: the base weight, plus every update in the order in which the adapters were
given. An update sees the running weight, so formats that depend on it compose in the same order.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ...errors import AdapterError
from .base import AdapterRef, WeightUpdate
from .block_strengths import BASE, unet_blocks
from .blocks import Change, Size, Workspace, bake_blocks
from .keys import TEXT, TEXT_2, UNET, ModuleIndex
from .match import Matched, Target, match_adapter
from .open import Adapter, open_adapter
from .report import AdapterReport

__all__ = ["AdapterReport", "BakePlan", "plan_bake"]


@dataclass(frozen=True)
class _Step:
    """One update of one tensor at its strength, and what to call it when it fails."""

    update: WeightUpdate
    strength: float
    label: str
    target: Target
    size: Size = field(default_factory=Size)

    def change(self, shape: tuple[int, ...]) -> Change:
        """The change by rows."""
        with np.errstate(over="ignore", invalid="ignore"):  # of values that are checked when they are added
            rows = self.update.rows(shape, self.strength)
        return Change(rows, self.overflow, self.size)

    def overflow(self) -> AdapterError:
        """The error to raise when the change is not finite."""
        return AdapterError(f"{self.label}: its change at strength {self.strength:g} overflows float32")


@dataclass(frozen=True)
class BakePlan:
    """Everything needed to bake: the updates of each tensor, and a report on each adapter.

    ``acting`` are the open adapters that act on some network, with the digests of their files.

    The adapter files stay open until ``close``, or until the plan is no longer used.
    """

    _reports: tuple[tuple[AdapterReport, tuple[_Step, ...]], ...]
    _steps: Mapping[Target, tuple[_Step, ...]]
    _close: Callable[[], None] = field(repr=False)
    _work: Workspace = field(default_factory=Workspace, repr=False)
    acting: tuple[tuple[Adapter, str], ...] = field(default=(), repr=False)

    @property
    def reports(self) -> tuple[AdapterReport, ...]:
        """One for each adapter in order, with the sizes of the changes that have been baked so far."""
        return tuple(
            replace(report, changes={".".join(s.target): s.size.relative for s in steps if s.size.seen})
            for report, steps in self._reports
        )

    def is_touched(self, network: str, name: str) -> bool:
        """Whether ``bake`` changes this tensor."""
        return (network, name) in self._steps

    def most_changes(self, network: str) -> int:
        """How many changes the tensor of a network gets that gets the most."""
        return max((len(steps) for target, steps in self._steps.items() if target[0] == network), default=0)

    def bake(self, network: str, name: str, tensor: np.ndarray) -> np.ndarray:
        """The tensor with all adapters added.

        Args:
            network: ``unet`` or ``text_encoder``.
            name: the tensor's name in diffusers' (transformers') names.
            tensor: its base value in the type it is stored in.

        Returns:
            A new float32 array of the same shape; the very same object when no adapter touches it.

        Raises:
            AdapterError: an update overflows float32, or its tensors hold NaN or infinity.
        """
        if not self.is_touched(network, name):
            return tensor
        baked = np.empty(tensor.shape, np.float32)
        self.bake_into(network, name, tensor, baked)
        return baked

    def bake_into(self, network: str, name: str, tensor: np.ndarray, out: np.ndarray) -> float:
        """Write a tensor that adapters touch, with all of them added, in the type of ``out``.

        Several threads may do so at once, each with another tensor.

        Args:
            network: ``unet`` or ``text_encoder``.
            name: the tensor's name in diffusers' (transformers') names.
            tensor: its base value in the type it is stored in.
            out: contiguous, of the same shape; may be ``tensor`` itself.

        Returns:
            The largest magnitude of the sum, in float32, before it was cast; NaN if one is NaN.

        Raises:
            AdapterError: an update overflows float32, or its tensors hold NaN or infinity.
        """
        changes = [step.change(tensor.shape) for step in self._steps[network, name]]
        return bake_blocks(tensor, changes, out, self._work)

    def close(self) -> None:
        """Close the adapter files; closing twice is allowed."""
        self._close()

    def __enter__(self) -> BakePlan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plan_bake(
    targets: Mapping[str, Mapping[str, tuple[int, ...]]],
    refs: Sequence[AdapterRef],
) -> BakePlan:
    """Match adapters to a model and check that they can be baked, before anything is written.

    Args:
        targets: for each network its tensors' names and shapes, in diffusers' names.
        refs: the adapters in the order in which they act; a file that occurs twice acts twice.

    Raises:
        AdapterError: a file is unreadable, is of another family or format, does not fit in shape, holds NaN
            or infinity, or matches nothing at all.
    """
    index = ModuleIndex(targets)
    blocks = _blocks(targets) if any(ref.blocks for ref in refs) else {}
    steps: dict[Target, list[_Step]] = {}
    reports = []
    with ExitStack() as stack:
        opened: dict[tuple[Path, int | None], Matched] = {}
        for ref in refs:
            key = _key(ref)
            if key not in opened:
                adapter = open_adapter(ref.path)
                stack.callback(adapter.source.close)
                opened[key] = match_adapter(adapter, index, ref.rank)
            own = []
            left_out: Counter[str] = Counter()
            for target, update, label in opened[key].updates:
                block = blocks.get(target)
                strength = ref.strength_in(target[0], block)
                if strength != 0:
                    own.append(_Step(update, strength, label, target))
                    steps.setdefault(target, []).append(own[-1])
                elif ref.blocks and block and block not in ref.blocks.listed:
                    left_out[block] += 1
            reports.append((_report(ref, opened[key], left_out), tuple(own)))
        closing = stack.pop_all()
    acting = [opened[_key(ref)] for ref in refs if ref.acts]
    plan = BakePlan(
        tuple(reports),
        {target: tuple(row) for target, row in steps.items()},
        closing.close,
        acting=tuple((matched.adapter, matched.digest) for matched in acting),
    )
    weakref.finalize(plan, closing.close)  # for callers that let the plan go without closing it
    return plan


def _blocks(targets: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[Target, str]:
    """The block of each tensor that lies in one."""
    found = {
        (network, name): BASE
        for network, names in targets.items()
        if network in (TEXT, TEXT_2)
        for name in names
    }
    return found | {(UNET, name): block for name, block in unet_blocks(targets.get(UNET, {})).items()}


def _key(ref: AdapterRef) -> tuple[Path, int | None]:
    """What two requests have in common that are the same modules of the same file."""
    return ref.path.resolve(), ref.rank


def _report(ref: AdapterRef, matched: Matched, left_out: Mapping[str, int]) -> AdapterReport:
    return AdapterReport(
        path=ref.path,
        digest=matched.digest,
        format=matched.format,
        unet_strength=ref.strength("unet"),
        text_encoder_strength=ref.strength("text_encoder"),
        matched_modules=matched.modules,
        unmatched_keys=tuple(matched.reasons),
        metadata=matched.adapter.metadata,
        matched_keys=matched.keys,
        reasons=matched.reasons,
        rank=ref.rank,
        blocks=ref.blocks,
        unlisted_blocks=dict(left_out),
    )
