"""Write a diffusers folder, or a LoRA for it, with random weights: full size, seeded, without torch.

    python -m kiln.benchmarks.random_models OUT [--seed 0] [--storage fp16] [--lora FILE]

Names and shapes are those of the graphs that Kiln ships, configs and tokenizer those of the family.
Nothing that an engine could fold away is written: biases are small, norm weights near one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from ..components import CONTRACTS, NETWORKS
from ..errors import KilnError, StorageError
from ..exporters.binding import weight_names
from ..exporters.families import FAMILIES
from ..exporters.graphs import find_graph
from ..exporters.parts import shipped_config, shipped_folder
from ..exporters.tensors import DTYPES
from ..exporters.weights import place, write_weights

Shapes = Mapping[str, tuple[int, ...]]

_STORAGE = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
WEIGHTS_FILE = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
_PIPELINE_FILES = ("model_index.json", "scheduler", "tokenizer")

# What kohya-ss/sd-scripts trains by default: linear layers and 1x1 convolutions of the UNet's
# transformers (its Transformer2DModel), and of CLIP's attentions and MLPs.
_UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
_TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def weight_shapes(network: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of an SD1 network and its shape, from the shipped graphs; both halves of a VAE."""
    config = shipped_config(network)
    shapes: dict[str, tuple[int, ...]] = {}
    for component, contract in CONTRACTS.items():
        if contract.network == network:
            shapes |= weight_names(find_graph(component, config))
    return shapes


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Float32 values under which activations stay finite; each tensor has a generator of its own.

    Matrices and kernels are scaled by ``1/sqrt(fan_in)`` (LeCun et al. 1998, Efficient BackProp), embeddings
    and biases by 0.02, and norm weights lie around one.
    """
    values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
    if len(shape) > 1 and "embeddings." not in name:
        return values / np.float32(np.sqrt(np.prod(shape[1:])))
    values *= np.float32(0.02)
    return values + np.float32(1) if len(shape) == 1 and name.endswith("weight") else values


def write_random_model(out: Path, *, seed: int = 0, storage: str = "fp16") -> Path:
    """Write a Stable Diffusion 1.5 folder in diffusers' layout; the same seed gives the same bytes.

    Returns:
        ``out``.

    Raises:
        StorageError: ``out`` exists and is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise StorageError(f"{out} exists and is not empty; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    shipped = shipped_folder(FAMILIES["sd1"])
    for name in _PIPELINE_FILES:
        copy = shutil.copytree if (shipped / name).is_dir() else shutil.copyfile
        copy(shipped / name, out / name)
    for network in NETWORKS:
        folder = out / network
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(shipped_config(network), indent=2) + "\n")
        shapes = weight_shapes(network)
        tensors = ((name, random_tensor(name, shape, seed)) for name, shape in _in_file_order(shapes))
        write_file(folder / WEIGHTS_FILE[network], _STORAGE[storage], shapes, tensors)
    return out


def random_lora(path: Path, rank: int = 16, seed: int = 0) -> Path:
    """Write a LoRA as kohya-ss/sd-scripts does, float16, for every layer it trains in UNet and text encoder.

    Layer changes have a tenth of the size of the weights they are added to.

    Returns:
        ``path``.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for network, prefix in (("unet", "lora_unet"), ("text_encoder", "lora_te")):
        for layer, shape in lora_layers(network).items():
            stem = f"{prefix}_{layer.replace('.', '_')}"
            shapes[f"{stem}.lora_down.weight"] = (rank, *shape[1:])
            shapes[f"{stem}.lora_up.weight"] = (shape[0], rank, *(1 for _ in shape[2:]))
            shapes[f"{stem}.alpha"] = ()
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = ((name, _lora_tensor(name, shape, rank, seed)) for name, shape in _in_file_order(shapes))
    write_file(path, "F16", shapes, tensors)
    return path


def lora_layers(network: str) -> dict[str, tuple[int, ...]]:
    """The layers a LoRA of SD1 changes, and the shapes of their weights."""
    ends = _UNET_LAYERS if network == "unet" else _TEXT_LAYERS
    inside = "attentions." if network == "unet" else "encoder.layers."
    endings = tuple(f".{end}.weight" for end in ends)
    return {
        name.removesuffix(".weight"): shape
        for name, shape in weight_shapes(network).items()
        if inside in name and name.endswith(endings)
    }


def _lora_tensor(name: str, shape: tuple[int, ...], rank: int, seed: int) -> np.ndarray:
    if name.endswith("alpha"):
        return np.full((), rank, np.float32)
    values = random_tensor(name, shape, seed)  # up and down are scaled by their fan-in
    return values * np.float32(0.1) if name.endswith("lora_up.weight") else values


def _in_file_order(shapes: Shapes) -> list[tuple[str, tuple[int, ...]]]:
    return sorted(shapes.items())  # ``place`` sorts tensors of one type by name


def write_file(path: Path, dtype: str, shapes: Shapes, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write a safetensors file that transformers and diffusers read.

    Args:
        path: the file.
        dtype: of all tensors, in safetensors' words.
        shapes: by name.
        tensors: names and values in the order of their names; cast to ``dtype``.

    Raises:
        StorageError: the disk refused, or the tensors come in another order.
    """
    header, placed = place((name, dtype, shape) for name, shape in shapes.items())

    def cast() -> Iterator[np.ndarray]:
        for (name, tensor), expected in zip(tensors, placed, strict=True):
            if name != expected:
                raise StorageError(f"{path}: {name} was to be written where {expected} belongs")
            yield tensor.astype(DTYPES[dtype])

    write_weights(path, _with_format(header), cast())


def _with_format(header: bytes) -> bytes:
    """The header with the metadata that transformers asks for; offsets in it are relative and stay."""
    entries = {"__metadata__": {"format": "pt"}, **json.loads(header[8:])}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def main(arguments: list[str] | None = None) -> int:
    """Write the folder and, if asked, a LoRA."""
    parser = argparse.ArgumentParser(description="Write SD1.5 with random weights in diffusers' layout.")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--storage", choices=_STORAGE, default="fp16")
    parser.add_argument("--lora", type=Path, metavar="FILE", help="also write a random LoRA for it")
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args(arguments)
    try:
        print(write_random_model(args.out, seed=args.seed, storage=args.storage))
        if args.lora:
            print(random_lora(args.lora, args.rank, args.seed))
    except KilnError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
