"""Make bundles: export a checkpoint, or bake other adapters into a bundle that exists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle import Bundle, open_bundle
from ..errors import BundleError, KilnError, UsageError
from .adapters.base import AdapterRef
from .bundle_writer import BundleWriter, ExportReport, Judge, Progress
from .checkpoints import Checkpoint, open_checkpoint
from .embeddings.base import Embedding, EmbeddingRef
from .embeddings.bundles import add_embeddings, inside
from .embeddings.reading import read_embeddings
from .graphs import architecture_digest
from .quantization.plan import INT8_PRECISIONS
from .quantization.store import BUNDLE_FILE, read_calibration

if TYPE_CHECKING:
    from .quantization.produce import Int8Options

__all__ = ["STORAGES", "ExportReport", "ExportSpec", "Judge", "Progress", "bake", "export"]

STORAGES = ("auto", "fp32", "fp16", "bf16", *INT8_PRECISIONS)


@dataclass(frozen=True)
class ExportSpec:
    """What to export, and how.

    ``storage`` is the type floating weights are stored in; ``auto`` keeps the checkpoint's own.
    ``int8`` makes int8 of the large matrices and keeps the rest, ``int8-full`` also of the UNet's
    activations; the field ``int8`` says how that is calibrated and judged, None by ``Int8Options()``.
    ``vae`` and ``text_encoder`` name checkpoints to take those networks from. ``remember_source``
    writes the checkpoint's absolute path into the manifest, so that ``bake`` finds it again.
    ``cfg_scale`` is the guidance that ``generate`` uses for this model unless it is told one; None leaves
    that of a bundle that is exported again.
    ``embeddings`` are tokens of textual inversion to add.
    """

    model: Path
    output: Path
    adapters: tuple[AdapterRef, ...] = ()
    storage: str = "auto"
    name: str | None = None
    variant: str | None = None
    ema: bool = False
    vae: Path | None = None
    text_encoder: Path | None = None
    overwrite: bool = False
    remember_source: bool = True
    cfg_scale: float | None = None
    int8: Int8Options | None = None
    embeddings: tuple[EmbeddingRef, ...] = ()


def export(spec: ExportSpec, progress: Progress | None = None) -> ExportReport:
    """Bake a checkpoint and adapters into a bundle, torch-free for the architectures that ship.

    Some 110 MB of tensors wait in memory. The bundle appears under its name when it is complete.

    Raises:
        UsageError: an unknown storage type.
        CheckpointError: the checkpoint is unreadable, incomplete or of another family.
        AdapterError: an adapter is unreadable, of another family, or matches nothing.
        GraphError: an architecture that is not shipped, and torch is not there to trace it.
        StorageError: the output exists, or the disk refused.
        ParityError: int8 is too far from fp32.
        BackendUnavailable: int8 is to be measured, and no engine is here.
    """
    if spec.storage not in STORAGES:
        raise UsageError(f"unknown precision {spec.storage!r}; weights are stored as {', '.join(STORAGES)}")
    with open_checkpoint(
        spec.model, variant=spec.variant, ema=spec.ema, vae=spec.vae, text_encoder=spec.text_encoder
    ) as checkpoint:
        source: dict[str, Any] = {
            "path": None,
            "layout": checkpoint.layout,
            "fingerprint": checkpoint.fingerprint(),
        }
        if spec.remember_source:
            source["path"] = str(Path(spec.model).resolve())
            source["options"] = {
                "variant": spec.variant,
                "ema": spec.ema,
                "vae": str(spec.vae.resolve()) if spec.vae else None,
                "text_encoder": str(spec.text_encoder.resolve()) if spec.text_encoder else None,
            }
        name = spec.name or spec.output.resolve().name
        defaults = _defaults(checkpoint, spec)
        tokens = _read(spec.embeddings)
        make = partial(BundleWriter, checkpoint, progress=progress, defaults=defaults, embeddings=tokens)
        job = _Job(make, spec.adapters, spec.storage, spec.output, name, source, spec.overwrite)
        return _write(job, spec.int8)


def _defaults(checkpoint: Checkpoint, spec: ExportSpec) -> dict[str, Any]:
    """What ``generate`` does unless told: as asked for, else as the bundle says that is exported again."""
    own = open_bundle(checkpoint.path).manifest.get("defaults", {}) if checkpoint.layout == "bundle" else {}
    return own if spec.cfg_scale is None else {**own, "cfg_scale": spec.cfg_scale}


def bake(
    bundle: Bundle,
    output: Path,
    adapters: tuple[AdapterRef, ...],
    *,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    int8: Int8Options | None = None,
    embeddings: tuple[EmbeddingRef, ...] = (),
) -> ExportReport:
    """Make a new bundle with other adapters from one that exists, by rewriting weights only.

    The weights come from the checkpoint that the bundle remembers, or from the bundle itself when
    nothing is baked into it; a baked bundle whose checkpoint is gone cannot be unbaked. An int8 bundle stays
    one: its checkpoint's weights are baked and quantized anew, with the calibration that the bundle holds.

    Args:
        bundle: the bundle to start from.
        output: folder of the new one.
        adapters: what is baked in, in place of what is in there.
        name: what the new bundle calls itself; its folder's name if None.
        overwrite: replace a bundle at ``output``.
        progress: called while weights are written.
        int8: for an int8 bundle, how the new one is judged; None takes it without measuring.
        embeddings: tokens of textual inversion to add; those inside the bundle stay.

    Raises:
        BundleError: the checkpoint is gone or has changed, and the bundle has adapters or int8 inside.
        AdapterError: an adapter is unreadable, of another family, or matches nothing.
        StorageError: the output exists, or the disk refused.
    """
    with _unbaked(bundle) as checkpoint:
        storage = str(bundle.manifest.get("storage", "auto"))
        defaults = bundle.manifest.get("defaults", {})
        base = None if bundle.adapters else bundle
        own = () if checkpoint.path == bundle.path else inside(bundle)
        tokens = _new(_read(embeddings), own)
        make = partial(BundleWriter, checkpoint, progress=progress, defaults=defaults, embeddings=tokens)
        source = dict(bundle.manifest["source"])
        if checkpoint.path == bundle.path:
            source = {"path": str(bundle.path.resolve()), "layout": "bundle"}
            source["fingerprint"] = checkpoint.fingerprint()
        job = _Job(make, adapters, storage, output, name or output.resolve().name, source, overwrite, base)
        if storage in INT8_PRECISIONS and int8 is None:
            from .quantization.produce import Int8Options

            int8 = Int8Options(gate=False)
        kept = bundle.path / BUNDLE_FILE
        return _write(job, int8, kept if kept.is_file() else None)


def add_tokens(
    bundle: Bundle,
    output: Path,
    embeddings: tuple[EmbeddingRef, ...],
    *,
    name: str | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Make a bundle with more embeddings and nothing else changed: adapters and int8 stay as they are.

    Raises:
        AdapterError: an embedding is unreadable, of another family, or its name is taken.
        StorageError: the output exists, or the disk refused.
    """
    plan = add_embeddings(bundle, output, _read(embeddings), name=name, overwrite=overwrite)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    return ExportReport(output, size, (), embeddings={t.embedding.token: len(t.ids) for t in plan.tokens})


def _read(refs: tuple[EmbeddingRef, ...]) -> tuple[Embedding, ...]:
    return tuple(embedding for ref in refs for embedding in read_embeddings(ref))


def _new(asked: tuple[Embedding, ...], own: tuple[Embedding, ...]) -> tuple[Embedding, ...]:
    """The embeddings of a bundle, and those asked for that it does not have."""
    held = {(embedding.token, embedding.sha256) for embedding in own}
    return (*own, *(e for e in asked if (e.token, e.sha256) not in held))


@dataclass(frozen=True)
class _Job:
    """One bundle to write: by which writer, of what, and where."""

    make: Callable[..., BundleWriter]
    adapters: tuple[AdapterRef, ...]
    storage: str
    output: Path
    name: str
    source: Mapping[str, Any]
    overwrite: bool
    base: Bundle | None = None

    def write(self, writer: BundleWriter, output: Path, judge: Judge | None = None) -> ExportReport:
        """Let a writer write, here or elsewhere."""
        return writer.write(output, name=self.name, source=self.source, overwrite=self.overwrite, judge=judge)

    def write_float(self, folder: Path, *, adapted: bool) -> ExportReport:
        """The same model in the checkpoint's own types, with adapters or without."""
        return self.write(self.make(self.adapters if adapted else (), "auto"), folder)


def _write(job: _Job, int8: Int8Options | None, calibration: Path | None = None) -> ExportReport:
    """Write a bundle; one of int8 is planned, written and judged."""
    writer = job.make(job.adapters, job.storage, base=job.base)
    if job.storage not in INT8_PRECISIONS:
        return job.write(writer, job.output)
    from .quantization.produce import Int8Options, Model, int8_work

    model = Model(
        graphs=writer.graphs,
        fingerprint=job.source["fingerprint"],
        architecture=architecture_digest("unet", writer.configs["unet"]),
        adapted=bool(job.adapters),
        write_float=job.write_float,
        inherited=read_calibration(calibration) if calibration else None,
    )
    with int8_work(job.output, model, job.storage, int8 or Int8Options()) as work:
        writer.int8 = work.plan
        return job.write(writer, job.output, work.judge)


def _unbaked(bundle: Bundle) -> Checkpoint:
    """The checkpoint that ``bundle`` was made of, before any adapter."""
    source = bundle.manifest["source"]
    state = "is not known"
    if source.get("path"):
        path = Path(source["path"])
        try:
            checkpoint = open_checkpoint(path, **source.get("options", {}))
        except KilnError as exc:
            state = f"is gone ({exc})"
        else:
            if checkpoint.fingerprint() == source["fingerprint"]:
                return checkpoint
            checkpoint.close()
            state = f"has changed ({path})"
    int8 = bundle.manifest.get("storage") in INT8_PRECISIONS
    if not bundle.adapters and not int8:
        return open_checkpoint(bundle.path)
    inside = "adapters" if bundle.adapters else "int8 weights"
    raise BundleError(
        f"{bundle.path} has {inside} inside and cannot be unbaked: the checkpoint it was made of {state}. "
        "Export the checkpoint again: kiln export MODEL -o BUNDLE --lora ..."
    )
