"""Opens an adapter file: which tensors belong together, and what its metadata says; needs no base model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import AdapterError
from ..file_kinds import is_pickle, open_regular
from ..pickles import TorchFile
from ..tensors import TensorFile, TensorSource
from .formats import format_name, split_key
from .keys import dialect_of
from .scaling import CONFIG_NAME, Scaling, read_scaling

MAX_KEYS = 200_000  # the largest SDXL files of full coverage have about 6,000
MAX_ELEMENTS = 2**31  # 8 GiB in float32; a rank-1024 SD1 LoRA has a fifth of that
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
_METADATA = (
    "ss_base_model_version",
    "ss_v2",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "ss_output_name",
    "ss_sd_model_name",
    "ss_clip_skip",
    "sshs_model_hash",
    "modelspec.architecture",
    "modelspec.title",
    "modelspec.trigger_phrase",
    "modelspec.prediction_type",
)


@dataclass(frozen=True)
class AdapterModule:
    """Tensors that share a stem: parameter name -> key; ``format`` is None when none is known for them."""

    stem: str
    keys: Mapping[str, str]
    format: str | None
    dialect: str


@dataclass(frozen=True)
class Adapter:
    """An open adapter file, grouped into modules.

    ``loose_keys`` end in no suffix that Kiln knows. ``scalings`` are the rules of a PEFT configuration, by
    network, the empty name meaning all.
    """

    path: Path
    source: TensorSource
    modules: tuple[AdapterModule, ...]
    loose_keys: tuple[str, ...]
    scalings: Mapping[str, Scaling]

    @property
    def metadata(self) -> dict[str, str]:
        """The part of the metadata that says what the adapter is; long values are cut."""
        return {name: self.source.metadata[name][:200] for name in _METADATA if name in self.source.metadata}

    @property
    def formats(self) -> Counter[str]:
        """How many modules there are of each format."""
        return Counter(module.format for module in self.modules if module.format)

    def scaling(self, network: str) -> Scaling:
        """What the configuration says about a network."""
        return self.scalings.get(network) or self.scalings.get("") or Scaling()


def open_adapter(path: Path) -> Adapter:
    """Open a ``.safetensors`` or torch file, or the folder that PEFT's ``save_pretrained`` wrote.

    The caller closes ``Adapter.source``.

    Raises:
        AdapterError: the file is missing or damaged, is not an adapter at all, holds more than the limits
            allow, or names one parameter twice.
    """
    path = _file_of(Path(path))
    source = _open_source(path)
    try:
        _check_limits(source)
        modules, loose = _group(path, source.infos)
        peft = any(module.dialect == "peft" for module in modules)
        return Adapter(path, source, modules, loose, read_scaling(path, source.metadata, peft))
    except BaseException:
        source.close()
        raise


def _file_of(path: Path) -> Path:
    """The file itself, or the weights in a folder."""
    if not path.is_dir():
        return path
    found = next((path / name for name in PEFT_FILES if (path / name).is_file()), None)
    if found is None:
        raise AdapterError(
            f"{path}: is a folder without {' or '.join(PEFT_FILES)}; give the adapter file itself"
        )
    return found


def weights_and_config(path: Path) -> tuple[Path, ...]:
    """Every file that decides what an adapter does: its weights, and PEFT's configuration beside them.

    Raises:
        AdapterError: a folder without weights that PEFT would write.
    """
    file = _file_of(path)
    config = file.with_name(CONFIG_NAME)
    return (file, config) if config.is_file() else (file,)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a ``.safetensors`` file, from its header; a torch file has none.

    Raises:
        AdapterError: the file is damaged.
    """
    if path.suffix.lower() != ".safetensors":
        return {}
    source = TensorFile.open(path, error=AdapterError)
    try:
        return dict(source.metadata)
    finally:
        source.close()


def _open_source(path: Path) -> TensorSource:
    stream, _ = open_regular(path, AdapterError)
    with stream:
        head = stream.read(64)
    if is_pickle(head):
        return TorchFile.open(path, error=AdapterError)
    return TensorFile.open(path, error=AdapterError)


def _check_limits(source: TensorSource) -> None:
    if not source.infos:
        raise AdapterError(f"{source.path}: holds no tensors")
    if len(source.infos) > MAX_KEYS:
        raise AdapterError(f"{source.path}: holds {len(source.infos)} tensors; expected at most {MAX_KEYS}")
    elements = sum(info.size for info in source.infos.values())
    if elements > MAX_ELEMENTS:
        raise AdapterError(
            f"{source.path}: holds {elements} numbers, at most {MAX_ELEMENTS} are read; is it a checkpoint?"
        )


def _group(path: Path, keys: Iterable[str]) -> tuple[tuple[AdapterModule, ...], tuple[str, ...]]:
    grouped: dict[str, dict[str, str]] = {}
    dialects: dict[str, str] = {}
    loose = []
    for key in keys:
        split = split_key(key)
        if split is None:
            loose.append(key)
            continue
        parameters = grouped.setdefault(split.stem, {})
        if split.parameter in parameters:
            raise AdapterError(f"{path}: {parameters[split.parameter]!r} and {key!r} name the same parameter")
        parameters[split.parameter] = key
        if split.parameter != "alpha":
            dialects.setdefault(split.stem, dialect_of(split.stem, split.suffix))
    modules = []
    for stem, parameters in grouped.items():
        modules.append(AdapterModule(stem, parameters, format_name(parameters), dialects.get(stem, "")))
    return tuple(modules), tuple(loose)
