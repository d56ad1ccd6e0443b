"""A bundle read as a checkpoint: its weights files hold diffusers' tensors under diffusers' names."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from ..bundle import bundle_networks, open_bundle
from ..errors import CheckpointError
from .checkpoints import Checkpoint
from .families import identify_unet, require_readable
from .parts import Entry, Part
from .quantization.plan import INT8_PRECISIONS
from .tensors import TensorFile


def bundle_checkpoint(path: Path) -> Checkpoint:
    """Open the weights inside a bundle, adapters and all.

    Raises:
        BundleError: the bundle is damaged.
        CheckpointError: a weights file is unreadable, or the weights are int8.
    """
    bundle = open_bundle(path)
    if bundle.manifest.get("storage") in INT8_PRECISIONS:
        raise CheckpointError(
            f"{path} is an int8 bundle; int8 is made of the weights with all adapters added and never made "
            "twice. Export the checkpoint it was made of"
        )
    with ExitStack() as stack:
        parts: dict[str, Part] = {}
        for network, components in bundle_networks(bundle).items():
            entries: dict[str, Entry] = {}
            for component in components:
                file = TensorFile.open(bundle.source(component).weights_path, error=CheckpointError)
                stack.callback(file.close)
                entries |= {name: Entry(file, name, info) for name, info in file.infos.items()}
            parts[network] = Part(network, entries, bundle.config(components[0]), path)
        match = identify_unet(parts["unet"].shapes)
        require_readable(match)
        return Checkpoint(
            path, "bundle", match, parts, bundle.tokenizer_dir, bundle.scheduler_config, stack.pop_all()
        )
