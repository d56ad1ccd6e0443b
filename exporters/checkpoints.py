"""Opens a checkpoint lazily, whatever its layout, and shows its tensors under diffusers' names.

Layouts: a diffusers folder, a single safetensors file in LDM's layout, the same as a torch pickle, or a
Kiln bundle. The family is decided by names and shapes of the UNet's tensors, never by a file's name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from ..components import NETWORKS
from ..errors import CheckpointError
from .buffers import Buffers
from .digests import file_digest, file_fingerprint
from .families import FamilyMatch, identify_unet, readable_families, require_readable
from .fit import check_fit, check_vocabulary
from .folders import open_component
from .parts import Part, read_json, shipped_folder
from .pickles import TorchFile
from .single_files import SingleFile, read_single_file
from .structure import is_tiny_autoencoder
from .tensors import TensorInfo

Layout = Literal["diffusers", "ldm", "pickle", "bundle"]


class Checkpoint:
    """An open checkpoint: networks with their tensors, configs, tokenizer and scheduler config.

    ``has_ema`` and ``uses_ema`` say whether a single file holds an EMA copy of the UNet and whether that
    copy is what is read; ``ignored`` lists stored tensors that belong to no network.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        match: FamilyMatch,
        parts: Mapping[str, Part],
        tokenizer_dir: Path,
        scheduler_config: Mapping[str, Any],
        files: ExitStack | None = None,
        single: SingleFile | None = None,
    ) -> None:
        self.path = path
        self.layout: Layout = layout
        self.match = match
        self.family = match.family
        self.networks = tuple(network for network in NETWORKS if network in parts)
        self.tokenizer_dir = tokenizer_dir
        self.scheduler_config = dict(scheduler_config)
        self.has_ema = single.has_ema if single else False
        self.uses_ema = single.uses_ema if single else False
        self.ignored = single.ignored if single else ()
        self.parts = dict(parts)
        self._files = files or ExitStack()

    def adopt(self, files: ExitStack) -> None:
        """Take over closing the files that the parts read from."""
        self._files = files

    def _part(self, network: str) -> Part:
        if network not in self.parts:
            raise CheckpointError(
                f"{self.path}: holds no {network} (it has {', '.join(self.networks)}); "
                f"give one with {network}=PATH"
            )
        return self.parts[network]

    def tensors(self, network: str) -> dict[str, TensorInfo]:
        """Type and shape of each tensor of a network by diffusers name; offsets are those in its own file.

        Raises:
            CheckpointError: the checkpoint lacks this network.
        """
        return {name: entry.info for name, entry in self._part(network).entries.items()}

    def read(self, network: str, name: str, buffers: Buffers | None = None) -> np.ndarray:
        """One tensor in its stored type, in diffusers' shape; nobody else holds its memory.

        ``buffers`` lend that memory where the file allows it, and want it back.

        Raises:
            CheckpointError: there is no such network or tensor, or the file can no longer be read.
        """
        entry = self._part(network).entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: its {network} has no tensor {name!r}")
        return entry.read(buffers)

    def config(self, network: str) -> dict[str, Any]:
        """The diffusers or transformers config of a network; the VAE's always has ``scaling_factor``."""
        config = dict(self._part(network).config)
        if network == "vae":
            # Early configs leave it out and rely on the class's default.
            tiny = is_tiny_autoencoder(self._part(network).shapes)
            config.setdefault("scaling_factor", 1.0 if tiny else self.family.latent_scale)
        return config

    def files(self) -> tuple[Path, ...]:
        """Every weights file that is read from, in a fixed order."""
        found = (
            entry.source.path for network in self.networks for entry in self.parts[network].entries.values()
        )
        return tuple(dict.fromkeys(found))

    def digest(self) -> str:
        """SHA-256 over names, types, shapes, configs, tokenizer and every byte of the weights files."""
        return self._digest(file_digest)

    def fingerprint(self) -> str:
        """Like ``digest`` with sampled blocks in place of all bytes: cheap, for display and not for proof."""
        return self._digest(file_fingerprint)

    def _digest(self, of_file: Callable[[Path], str]) -> str:
        digest = hashlib.sha256()
        for line in self._description():
            digest.update(line.encode() + b"\n")
        tokenizer = sorted(path for path in self.tokenizer_dir.glob("*") if path.suffix in (".json", ".txt"))
        for path in (*self.files(), *tokenizer):
            digest.update(of_file(path).encode() + b"\n")
        return digest.hexdigest()

    def _description(self) -> Iterator[str]:
        """Everything but the bytes, and without any path: a moved checkpoint keeps its digest."""
        yield json.dumps(self.scheduler_config, sort_keys=True)
        for network in self.networks:
            yield f"{network} {json.dumps(self.config(network), sort_keys=True)}"
            for name, entry in sorted(self.parts[network].entries.items()):
                yield f"{name} {entry.stored} {entry.info.dtype} {entry.info.shape}"

    def close(self) -> None:
        """Close all files; closing twice is allowed."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    ema: bool = False,
    vae: str | os.PathLike[str] | None = None,
    text_encoder: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Open a checkpoint; no tensor is read yet.

    Args:
        path: a diffusers folder, a .safetensors or .ckpt file, or a Kiln bundle.
        variant: for folders, which of several weights to take (``fp16``).
        ema: for single files, take the EMA copy of the UNet.
        vae: a file or folder whose autoencoder replaces or supplies that of the checkpoint.
        text_encoder: the same for the text encoder.

    Raises:
        CheckpointError: the path is missing or unreadable, holds no UNet, or is of a family or variant
            this version does not read (named).
    """
    path = Path(path)
    extra = {"vae": vae, "text_encoder": text_encoder}
    companions = {network: Path(where) for network, where in extra.items() if where is not None}
    try:
        return _open(path, variant, ema, companions)
    except OSError as cause:  # a folder that may not be listed, a name too long for the system
        raise CheckpointError(f"{path}: cannot be read: {cause.strerror}") from cause


def _open(path: Path, variant: str | None, ema: bool, companions: Mapping[str, Path]) -> Checkpoint:
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or folder; expected a diffusers folder, a .safetensors or a .ckpt"
        )
    if (path / "kiln.json").is_file():
        from .bundle_checkpoint import bundle_checkpoint

        if variant is not None or ema or companions:
            raise CheckpointError(
                f"{path}: is a bundle; variant, EMA, VAE and text encoder are chosen on export"
            )
        return bundle_checkpoint(path)
    with ExitStack() as stack:
        if path.is_dir():
            if ema:
                raise CheckpointError(
                    f"{path}: is a folder, which has no EMA copy beside the weights; EMA is for single files"
                )
            found = _open_folder(path, variant, companions, stack)
        else:
            if variant is not None:
                raise CheckpointError(
                    f"{path}: is a single file; the variant {variant!r} can only be chosen in a folder"
                )
            found = _open_file(path, ema, companions, stack)
        check_fit(path, found.match, found.parts)
        if (
            "text_encoder" in found.parts
            and found.tokenizer_dir == shipped_folder(found.family) / "tokenizer"
        ):
            check_vocabulary(path, found.parts["text_encoder"])
        found.adopt(stack.pop_all())
        return found


def _open_folder(
    path: Path, variant: str | None, companions: Mapping[str, Path], stack: ExitStack
) -> Checkpoint:
    index = read_json(path / "model_index.json") if (path / "model_index.json").exists() else {}
    pipeline = str(index.get("_class_name", "no model_index.json"))
    if not (path / "unet").is_dir():
        if any((path / name).is_dir() for name in ("transformer", "prior")):
            raise CheckpointError(
                f"{path}: recognised as {pipeline}; this version reads {readable_families()}"
            )
        raise CheckpointError(f"{path}: holds no unet folder ({pipeline}); expected a diffusers folder")
    unet = open_component(path / "unet", "unet", variant, stack)
    match = _match(path, unet)
    if (path / "text_encoder_2").is_dir() or unet.config.get("addition_embed_type") is not None:
        raise CheckpointError(f"{path}: recognised as SDXL or its kin ({pipeline}); this version reads sd1")
    parts = {"unet": unet}
    for network in ("text_encoder", "vae"):
        if network not in companions and (path / network).is_dir():
            parts[network] = open_component(path / network, network, variant, stack)
    tokenizer = path / "tokenizer"
    parts, tokenizer = _with_companions(parts, tokenizer, companions, stack)
    if not tokenizer.is_dir():
        raise CheckpointError(f"{path}: has no tokenizer folder; the text encoder is useless without it")
    scheduler = path / "scheduler" / "scheduler_config.json"
    if not scheduler.exists():
        scheduler = shipped_folder(match.family) / "scheduler" / "scheduler_config.json"
    config = read_json(scheduler)
    return Checkpoint(path, "diffusers", match, parts, tokenizer, config)


def _open_file(path: Path, ema: bool, companions: Mapping[str, Path], stack: ExitStack) -> Checkpoint:
    single = read_single_file(path, ema, stack)
    if single.match is None:
        raise CheckpointError(
            f"{path}: holds no UNet (it holds {', '.join(single.parts)}); expected a whole model"
        )
    shipped = shipped_folder(single.match.family)
    parts = {network: part for network, part in single.parts.items() if network not in companions}
    parts, tokenizer = _with_companions(parts, shipped / "tokenizer", companions, stack)
    config = read_json(shipped / "scheduler" / "scheduler_config.json")
    said = single.source.metadata.get("modelspec.prediction_type", "")
    if "v_pred" in single.source.infos or said.startswith("v"):
        config["prediction_type"] = "v_prediction"
    layout: Layout = "pickle" if isinstance(single.source, TorchFile) else "ldm"
    return Checkpoint(path, layout, single.match, parts, tokenizer, config, single=single)


def _match(path: Path, unet: Part) -> FamilyMatch:
    try:
        match = identify_unet(unet.shapes)
        require_readable(match)
    except CheckpointError as cause:
        raise CheckpointError(f"{path}: {cause}") from cause
    return match


def _with_companions(
    parts: dict[str, Part], tokenizer: Path, companions: Mapping[str, Path], stack: ExitStack
) -> tuple[dict[str, Part], Path]:
    """Parts with the companions put in, and the tokenizer that belongs to the text encoder."""
    parts = dict(parts)
    for network, where in companions.items():
        parts[network] = open_companion(where, network, stack)
        if network == "text_encoder" and (where / "tokenizer").is_dir():
            tokenizer = where / "tokenizer"
    return parts, tokenizer


def open_companion(path: Path, network: str, stack: ExitStack) -> Part:
    """One network from elsewhere: a pipeline folder, a component folder, or a single file.

    Raises:
        CheckpointError: the path does not hold this network.
    """
    if path.is_dir():
        folder = path / network if (path / network).is_dir() else path
        return open_component(folder, network, None, stack)
    single = read_single_file(path, False, stack)
    if network not in single.parts:
        raise CheckpointError(f"{path}: holds no {network} (it holds {', '.join(single.parts)})")
    return single.parts[network]
