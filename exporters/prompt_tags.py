"""Take the ``<lora:...>`` tags out of a prompt and find the files they name.

Tags are those of AUTOMATIC1111/stable-diffusion-webui (modules/extra_networks.py). As there, a tag names a
file by its stem, or by the name that kohya-ss/sd-scripts wrote into it when it was trained
(``ss_output_name``), wherever in the folder it lies; and only the positive prompt has tags.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import KilnError, UsageError
from .adapters.base import AdapterRef
from .adapters.block_strengths import PRESETS
from .adapters.open import PEFT_FILES, read_metadata
from .adapters.spelling import EXTENSIONS, read_tag

TAG = re.compile(r"<(\w+):([^<>]+)>")
_LORA = ("lora", "lyco")  # the web UI's older extension for LyCORIS had a tag of its own
_MOST_FILES = 100_000
_MOST_NAMED = 12


@dataclass(frozen=True)
class AdapterFolder:
    """The adapters below a folder, by name; ``bundled`` are found without being in it."""

    path: Path | None
    bundled: Mapping[str, Path] = field(default_factory=dict)

    def find(self, name: str, tag: str) -> Path:
        """The file that a tag names.

        Looked for in turn: a path inside the folder, a file's stem, ``ss_output_name``, a bundled adapter.

        Raises:
            UsageError: there is none, or more than one.
        """
        if self.path is None:
            if name in self.bundled:
                return self.bundled[name]
            raise UsageError(f"the prompt asks for {tag}; say where the files are with --lora-dir FOLDER")
        if not self.path.is_dir():
            raise UsageError(f"--lora-dir {self.path} is not a folder")
        files = list(self._files())
        for names in (self._path_names, self._stems, self._titles):
            found = [file for file in files if name in names(file)]
            if len(found) > 1:
                listed = " and ".join(str(file.relative_to(self.path)) for file in found[:4])
                raise UsageError(
                    f"{tag} could be {listed}; name it by its path, such as <lora:folder/file:1>"
                )
            if found:
                return found[0]
        if name in self.bundled:
            return self.bundled[name]
        raise UsageError(
            f"{self.path} has no {name}.safetensors, which {tag} asks for; its adapters: {_listed(files)}"
        )

    def _files(self) -> Iterator[Path]:
        """Every adapter file, in a fixed order."""
        assert self.path is not None
        found = (path for path in self.path.rglob("*") if path.suffix.lower() in EXTENSIONS)
        for count, path in enumerate(sorted(found)):
            if count == _MOST_FILES:
                raise UsageError(f"{self.path} has more than {_MOST_FILES} files; name a folder of adapters")
            yield path

    def _path_names(self, file: Path) -> tuple[str, ...]:
        assert self.path is not None
        inside = file.relative_to(self.path)
        if len(inside.parts) == 1:
            return (file.name,)  # with its extension; a bare stem may be that of several files
        return inside.as_posix(), inside.with_suffix("").as_posix()

    def _stems(self, file: Path) -> tuple[str, ...]:
        return (stem_of(file),)

    def _titles(self, file: Path) -> tuple[str, ...]:
        try:
            return (read_metadata(file).get("ss_output_name", ""),)
        except KilnError:  # a file that nobody asked for may be broken; one that is asked for is opened later
            return ()


def stem_of(file: Path) -> str:
    """The name of an adapter: its file's, or that of the folder that PEFT made for it."""
    return file.parent.name if file.name in PEFT_FILES else file.stem


def _listed(files: list[Path]) -> str:
    stems = sorted({stem_of(file) for file in files})
    more = f" and {len(stems) - _MOST_NAMED} more" if len(stems) > _MOST_NAMED else ""
    return (", ".join(stems[:_MOST_NAMED]) or "none") + more


def take_tags(
    prompt: str, folder: AdapterFolder, presets: Mapping[str, str] = PRESETS
) -> tuple[str, tuple[AdapterRef, ...]]:
    """Take the tags out of a prompt.

    Args:
        prompt: as typed.
        folder: where names are looked up.
        presets: names of lists of block strengths, for ``lbw=``.

    Returns:
        The prompt without tags, and the adapters they name, in order; one that is named twice acts twice.

    Raises:
        UsageError: a tag of another kind, an unknown or ambiguous name, or a field that cannot be read.
    """
    found = []
    for match in TAG.finditer(prompt):
        tag = match[0]
        if match[1].lower() not in _LORA:
            raise UsageError(
                f"the prompt has the tag {tag[:80]}, which Kiln does not know; it knows <lora:NAME:STRENGTH>"
            )
        name, *fields = match[2].split(":")
        path = folder.find(name.strip(), tag)
        said = read_tag(fields, tag, presets)
        found.append(
            AdapterRef(
                path, 1.0 if said.unet is None else said.unet, said.text_encoder, said.rank, said.blocks
            )
        )
    return TAG.sub("", prompt).strip(), tuple(found)
