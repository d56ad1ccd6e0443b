"""Make an int8 bundle: calibrate if asked for, write it, measure it, and let it pass or not."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ...bundle import Bundle, open_bundle
from ...errors import ParityError, UsageError
from .calibrate import Fit, Watched, measure_fit, watch
from .engines import open_graph
from .gate import GATE_WORK, check_parity, measure_parity
from .keeping import MOST_KEPT, keep, kept_anew
from .multiplications import multiplications
from .plan import (
    FULL,
    Int8Plan,
    decoder_activations,
    full_plan,
    unet_activations,
    weight_sites,
    weights_plan,
)
from .qdq import Operand, Site
from .sensitivity import (
    SWITCHES,
    coarse_group,
    fine_group,
    grouped,
    measure_sensitivity,
    switched_graph,
)
from .store import Calibration, check_calibration, kept_path, read_calibration, save_calibration
from .trajectories import CALIBRATION_PROMPTS, FEW, Work, diagonal

if TYPE_CHECKING:
    import onnx

log = logging.getLogger(__name__)

# A network above this is measured by whole blocks and at fewer points: a run takes seconds.
_LARGE = 200_000_000


@dataclass(frozen=True)
class Int8Options:
    """How an int8 bundle is calibrated and judged.

    ``calibration`` is a file made earlier, else the one of the bundle that is baked, else this machine's for
    the checkpoint, else it is measured. ``recalibrate`` measures on the model at hand, adapters and all.
    ``prompts`` are drawn to calibrate; ``most_kept`` is the share of the UNet's multiplications that may stay
    in higher precision where int8 hurts, None for the usual one. ``gate`` measures the parity with fp32 and
    refuses what is below the limits, or below ``min_parity`` in decibels of PSNR if that is given.

    Raises:
        UsageError: ``most_kept`` is no share.
    """

    calibration: Path | None = None
    recalibrate: bool = False
    prompts: tuple[str, ...] = CALIBRATION_PROMPTS
    steps: int = 8
    size: int | None = None
    most_kept: float | None = None
    gate: bool = True
    min_parity: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share_kept <= 1:  # nor is NaN
            raise UsageError(f"--most-kept is {self.most_kept}; expected a share from 0 to 1")

    @property
    def work(self) -> Work:
        """What is drawn to calibrate."""
        return Work(self.prompts, self.steps, self.size)

    @property
    def share_kept(self) -> float:
        """``most_kept``, or the usual one."""
        return MOST_KEPT if self.most_kept is None else self.most_kept


class WriteFloat(Protocol):
    """Writes the model in floating point into a folder, with its adapters or without."""

    def __call__(self, folder: Path, *, adapted: bool) -> object: ...


@dataclass(frozen=True)
class Model:
    """What is to be made int8.

    ``graphs`` are by component, ``fingerprint`` is the base checkpoint's and ``architecture`` the UNet's.
    ``adapted`` says whether adapters change it. ``inherited`` is the calibration of the bundle being baked.
    """

    graphs: Mapping[str, onnx.ModelProto]
    fingerprint: str
    architecture: str
    adapted: bool
    write_float: WriteFloat
    inherited: Calibration | None = None


class Int8Work:
    """One int8 bundle in the making: the plan first, then the judgement of what was written."""

    def __init__(self, model: Model, precision: str, options: Int8Options, scratch: Path) -> None:
        self.model, self.precision, self.options, self._scratch = model, precision, options, scratch
        self._measured_here = False
        self.fit: Fit | None = None

    @cached_property
    def plan(self) -> Int8Plan:
        """What becomes int8; calibrates when there is no calibration yet.

        Raises:
            UsageError: the calibration given belongs to another checkpoint.
            BackendUnavailable: no engine is here to calibrate with.
        """
        chosen = {c: weight_sites(c, graph) for c, graph in self.model.graphs.items()}
        if self.precision != FULL:
            return weights_plan(chosen)
        if not chosen["unet"]:
            raise UsageError("the UNet is too small for int8; export it as fp16")
        able = {
            "unet": unet_activations(self.model.graphs["unet"], chosen["unet"]),
            "vae_decoder": decoder_activations(chosen["vae_decoder"]),
        }
        return full_plan(chosen, able, self._calibration(chosen["unet"], able))

    def judge(self, folder: Path) -> dict[str, Any]:
        """Measure the bundle in ``folder``; what goes into its manifest.

        Raises:
            ParityError: it is too far from fp32, or the calibration does not fit the adapters.
        """
        facts: dict[str, Any] = {}
        if not self.options.gate:
            return facts
        if self.plan.calibration is not None and self.model.adapted and not self._measured_here:
            facts["fit"] = self._check_fit()
        reference = self._float(adapted=self.model.adapted)
        prompts = GATE_WORK.prompts[: FEW if _is_large(self.plan.chosen["unet"]) else None]
        work = Work(prompts, GATE_WORK.steps, self.options.size)
        found = measure_parity(reference, open_bundle(folder), work)
        log.info("%s against fp32: %s", self.precision, found)
        facts["parity"] = found.facts()
        check_parity(found, self.precision, self.options.min_parity)
        return facts

    def _check_fit(self) -> dict[str, float]:
        """Whether a calibration of the base fits the model with adapters, on a few steps of one prompt."""
        calibration = self.plan.calibration
        assert calibration is not None
        used = self.plan.quantized_activations("unet")
        work = Work(self.options.prompts[:1], min(4, self.options.steps), self.options.size)
        self.fit = measure_fit(calibration.ranges, watch(self._float(adapted=True), used, work).observed)
        misfit = self.fit.misfits()
        if misfit and self.options.min_parity is None:
            raise ParityError(f"the calibration of the base model does not fit: {misfit}; use --recalibrate")
        return {"saturated_share": self.fit.saturated, "range_ratio": self.fit.ratio}

    def _calibration(self, chosen: Sequence[Site], able: Mapping[str, tuple[Operand, ...]]) -> Calibration:
        model, given = self.model, self.options.calibration
        group_of = _grouping(chosen)
        if given is not None:
            found = read_calibration(given)
            check_calibration(found, model.architecture, model.fingerprint, str(given))
            return kept_anew(found, able["unet"], group_of, self.options.most_kept, str(given))
        kept = kept_path(model.architecture, model.fingerprint)
        if self.options.recalibrate:
            self._measured_here = True
            return self._measure(chosen, able, adapted=model.adapted)
        inherited = model.inherited
        if inherited and (inherited.architecture, inherited.fingerprint) == (
            model.architecture,
            model.fingerprint,
        ):
            where = "the calibration of the bundle"
            return kept_anew(inherited, able["unet"], group_of, self.options.most_kept, where)
        cached = self._from_cache(kept, decoder=bool(able["vae_decoder"]))
        if cached is not None:
            return kept_anew(cached, able["unet"], group_of, self.options.share_kept, str(kept))
        made = self._measure(chosen, able, adapted=False)
        with contextlib.suppress(OSError):  # a cache that cannot be written costs the measuring next time
            save_calibration(made, kept)
        return made

    def _asked(self) -> dict[str, object]:
        """What the options say of the measuring; another answer is another calibration."""
        work = self.options.work
        return {"prompts": list(work.prompts), "steps": work.steps, "size": work.size}

    def _from_cache(self, kept: Path, *, decoder: bool) -> Calibration | None:
        """This machine's calibration of the checkpoint, None if there is none that was measured as asked."""
        if not kept.is_file():
            return None
        try:
            found = read_calibration(kept)
            check_calibration(found, self.model.architecture, self.model.fingerprint, str(kept))
        except UsageError as exc:
            log.warning("a cached calibration is thrown away and made again: %s", exc)
            return None
        if not found.counted or (decoder and not found.decoder_ranges):  # an earlier Kiln's
            return None
        asked = self._asked().items()
        return found if all(found.facts.get(key) == value for key, value in asked) else None

    def _measure(
        self, chosen: Sequence[Site], able: Mapping[str, tuple[Operand, ...]], *, adapted: bool
    ) -> Calibration:
        bundle, group_of, unet = self._float(adapted=adapted), _grouping(chosen), able["unet"]
        watched = watch(bundle, unet, self.options.work, able["vae_decoder"])
        count = 2 if _is_large(chosen) else 8
        errors, together, points = self._sensitivity(bundle, unet, watched, group_of, count)
        batch, sizes = len(watched.feeds[0]["sample"]), watched.observed.sizes
        costs = grouped(multiplications(self.model.graphs["unet"], chosen, unet, sizes, batch), group_of)
        facts = {
            **self._asked(),
            "runs": len(watched.feeds),
            "sample": list(np.shape(watched.feeds[0]["sample"])),
            "points": points,
            "error_all_quantized": float(f"{together:.4g}"),
            "adapted": adapted,
        }
        measured = Calibration(
            self.model.architecture,
            self.model.fingerprint,
            watched.observed.ranges(),
            sensitivity={group: float(f"{error:.4g}") for group, error in errors.items()},
            facts=facts,
            multiplications=costs,
            decoder_ranges=watched.decoder.ranges() if watched.decoder else {},
        )
        return keep(measured, unet, group_of, self.options.share_kept)

    def _sensitivity(
        self,
        bundle: Bundle,
        able: tuple[Operand, ...],
        watched: Watched,
        group_of: Callable[[str], str],
        count: int,
    ) -> tuple[dict[str, float], float, int]:
        import onnx

        graph_path = bundle.source("unet").graph_path
        graph, groups = switched_graph(
            onnx.load(graph_path, load_external_data=False),
            able,
            watched.observed.ranges(),
            group_of,
        )
        places = diagonal(len(self.options.prompts), len(watched.feeds) // len(self.options.prompts), count)
        points = [watched.feeds[i] for i in places]
        shapes = {name: array.shape for name, array in points[0].items()} | {SWITCHES: (len(groups),)}
        path = graph_path.with_name("switched.onnx")
        try:
            run = open_graph(graph, path, shapes)
            errors, together = measure_sensitivity(run, groups, points, [watched.outputs[i] for i in places])
        finally:
            path.unlink(missing_ok=True)
        return errors, together, len(points)

    def _float(self, *, adapted: bool) -> Bundle:
        folder = self._scratch / ("adapted" if adapted else "base")
        if not folder.exists():
            self.model.write_float(folder, adapted=adapted)
        return open_bundle(folder)


def _is_large(chosen: Sequence[Site]) -> bool:
    return sum(int(np.prod(site.shape)) for site in chosen) > _LARGE


def _grouping(chosen: Sequence[Site]) -> Callable[[str], str]:
    return coarse_group if _is_large(chosen) else fine_group


@contextlib.contextmanager
def int8_work(output: Path, model: Model, precision: str, options: Int8Options) -> Iterator[Int8Work]:
    """An ``Int8Work`` with room for the weights in floating point, beside ``output``; removed at the end."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.int8-", dir=output.parent) as scratch:
        yield Int8Work(model, precision, options, Path(scratch))
