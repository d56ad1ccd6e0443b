"""Write one random adapter of each family for SD1.5: real names, the module lists of real trainers, float16.

    python -m kiln.benchmarks.random_adapters OUT [--seed 0]

The lists are those of KohakuBlueleaf/LyCORIS's preset ``full``: every matrix and kernel of the UNet and of
the text encoder's layers, 282 and 72; IA3 and norms have lists of their own. A change is a tenth of the
weight or less.
"""

from __future__ import annotations

import argparse
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import KilnError
from .random_models import weight_shapes, write_file

Shape = tuple[int, ...]
_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}
_IA3 = ("to_k", "to_v", "k_proj", "v_proj", "ff.net.2", "mlp.fc2")
_SMALL, _ROTATION = 0.1, 0.02
_BLOCK, _BUTTERFLY, _STAGES = 64, 8, 4  # all divide every width of SD1.5


@dataclass(frozen=True)
class Family:
    """How one family stores a layer: the tensors of a weight's shape, and which layers it changes."""

    name: str
    tensors: Callable[[Shape], dict[str, Shape]]
    layers: Callable[[str, Shape], bool] = lambda name, shape: len(shape) > 1


def _point(shape: Shape) -> Shape:
    """The kernel of one that a factor beside a kernel has."""
    return (1,) * (len(shape) - 2)


def _locon(shape: Shape, rank: int = 16) -> dict[str, Shape]:
    up = (shape[0], rank, *_point(shape))
    return {"lora_down.weight": (rank, *shape[1:]), "lora_up.weight": up, "alpha": ()}


def _loha(shape: Shape, rank: int = 8) -> dict[str, Shape]:
    left, right = (shape[0], rank), (rank, math.prod(shape[1:]))
    return {"hada_w1_a": left, "hada_w1_b": right, "hada_w2_a": left, "hada_w2_b": right, "alpha": ()}


def _lokr(shape: Shape, rank: int = 16) -> dict[str, Shape]:
    """A first half of 4 by 4, which divides every width, the latents' too; the second of low rank."""
    columns = math.prod(shape[1:]) // 4
    return {"lokr_w1": (4, 4), "lokr_w2_a": (shape[0] // 4, rank), "lokr_w2_b": (rank, columns), "alpha": ()}


def _ia3(shape: Shape) -> dict[str, Shape]:
    return {"weight": (shape[0],), "on_input": ()}


def _glora(shape: Shape, rank: int = 8) -> dict[str, Shape]:
    point = _point(shape)
    return {
        "a1.weight": (shape[1], rank, *point),
        "a2.weight": (rank, shape[1], *point),
        "b1.weight": (shape[0], rank, *point),
        "b2.weight": (rank, *shape[1:]),
        "alpha": (),
    }


def _oft(shape: Shape) -> dict[str, Shape]:
    size = math.gcd(shape[0], _BLOCK)
    return {"oft_blocks": (shape[0] // size, size, size), "alpha": ()}


def _boft(shape: Shape) -> dict[str, Shape]:
    return {"oft_blocks": (_STAGES, shape[0] // _BUTTERFLY, _BUTTERFLY, _BUTTERFLY), "alpha": ()}


def _dora_inputs(shape: Shape) -> dict[str, Shape]:
    return {**_locon(shape), "dora_scale": (1, shape[1], *_point(shape))}


def _dora_outputs(shape: Shape) -> dict[str, Shape]:
    return {**_loha(shape), "dora_scale": (shape[0], 1, *_point(shape))}


def _norm(shape: Shape) -> dict[str, Shape]:
    return {"w_norm": shape, "b_norm": shape}


FAMILIES = (
    Family("LoCon", _locon),
    Family("LoHa", _loha),
    Family("LoKr", _lokr, lambda name, shape: len(shape) > 1 and shape[1] % 4 == 0),
    Family("IA3", _ia3, lambda name, shape: name.endswith(_IA3)),
    Family("GLoRA", _glora),
    Family("OFT", _oft),
    Family(
        "BOFT", _boft, lambda name, shape: len(shape) > 1 and shape[0] % (_BUTTERFLY << (_STAGES - 1)) == 0
    ),
    Family("DoRA of the inputs", _dora_inputs),
    Family("DoRA over LoHa", _dora_outputs),
    Family("norms", _norm, lambda name, shape: len(shape) == 1),
)


def random_adapter(path: Path, family: Family, seed: int = 0) -> Path:
    """Write the adapter of one family.

    Returns:
        ``path``.
    """
    shapes: dict[str, Shape] = {}
    layers: dict[str, Shape] = {}
    for network, layer, shape in modules(family):
        stem = f"{_PREFIXES[network]}_{layer.replace('.', '_')}"
        layers[stem] = shape
        shapes |= {f"{stem}.{name}": size for name, size in family.tensors(shape).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "F16", shapes, _values(shapes, layers, seed))
    return path


def modules(family: Family) -> Iterator[tuple[str, str, Shape]]:
    """Network, path and weight's shape of every layer that an adapter of the family changes."""
    for network in _PREFIXES:
        for name, shape in weight_shapes(network).items():
            layer = name.removesuffix(".weight")
            inside = network == "unet" or ".layers." in name
            if layer != name and inside and family.layers(layer, shape):
                yield network, layer, shape


def _values(
    shapes: Mapping[str, Shape], layers: Mapping[str, Shape], seed: int
) -> Iterator[tuple[str, np.ndarray]]:
    for name, shape in sorted(shapes.items()):
        stem, _, parameter = name.partition(".")
        values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
        yield name, np.asarray(_scaled(parameter, values, layers[stem]), np.float32)


def _scaled(parameter: str, values: np.ndarray, weight: Shape) -> np.ndarray:
    """Values of the sizes that training leaves, for a weight whose rows have the length one."""
    if parameter == "alpha":
        return np.float32(4) * np.ones_like(values)
    if parameter == "on_input":
        return np.zeros_like(values)
    if parameter == "dora_scale":  # the length of a row, or of a column, of the random model
        length = 1.0 if values.shape[0] == weight[0] and values.shape[1] == 1 else weight[0] / weight[1]
        return np.float32(math.sqrt(length)) * (1 + _ROTATION * values)
    if parameter == "oft_blocks":
        return np.float32(_ROTATION) * values
    if parameter in ("weight", "w_norm", "b_norm"):
        return np.float32(_SMALL) * values
    if parameter in ("hada_w1_b", "lokr_w1"):
        return values
    # Of a product of several factors one is small; the others keep the size of what they multiply.
    if parameter in ("hada_w1_a", "hada_w2_a", "lokr_w2_a"):
        return values / np.float32(math.sqrt(values.shape[1]))
    return values * np.float32(_SMALL / math.sqrt(max(1, math.prod(values.shape[1:]))))


def write_all(out: Path, seed: int = 0) -> dict[str, Path]:
    """One adapter of each family, by the family's name."""
    return {
        family.name: random_adapter(out / f"{family.name.replace(' ', '-')}.safetensors", family, seed)
        for family in FAMILIES
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the adapters."""
    parser = argparse.ArgumentParser(description="Write a random adapter of each family for SD1.5.")
    parser.add_argument("out", type=Path, help="the folder to write them into")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        for path in write_all(args.out, args.seed).values():
            print(path)
    except KilnError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
