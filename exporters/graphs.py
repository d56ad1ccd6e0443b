"""Find the graph of an architecture: shipped with Kiln, cached on this machine, or traced now.

A graph belongs to an architecture, not to a model, and is looked up by the digest of what in the
config decides it. Checkpoint configs differ in what they leave out, so values that equal the
default of the class are dropped before the digest is taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import lzma
import os
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GraphError

if TYPE_CHECKING:
    import onnx

# Raised whenever the same config would give another graph.
TRACER_VERSION = 1

# What in a CLIP config decides the graph; the rest is about training and generation.
_CLIP_KEYS = (
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)
# Vocabularies of the text encoders that ship. A longer one, of an encoder that learnt tokens, only makes the
# embedding table longer: it is looked up under these, so that nothing has to be traced.
_VOCABULARIES = (49408, 3271)
_TABLE = "text_model.embeddings.token_embedding.weight"
# What in a diffusers config does not decide the graph.
_NOT_IN_GRAPH = frozenset(
    [
        "sample_size",
        "scaling_factor",
        "shift_factor",
        "force_upcast",
        "latents_mean",
        "latents_std",
        "latent_magnitude",
        "latent_shift",
        "dropout",
    ]
)


@cache
def _defaults() -> dict[str, dict[str, Any]]:
    text = (resources.files(__package__) / "data/config_defaults.json").read_text()
    defaults: dict[str, dict[str, Any]] = json.loads(text)
    return defaults


def architecture(component: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that decides the graph, without values that equal the class's defaults.

    Raises:
        GraphError: the config is of a class that Kiln does not trace.
    """
    if component == "text_encoder":
        defaults = _defaults()["CLIPTextConfig"]
        return {key: config.get(key, defaults[key]) for key in _CLIP_KEYS}
    name = config.get("_class_name")
    if name not in _defaults():
        known = ", ".join(sorted(_defaults()))
        raise GraphError(f"the {component} is a {name!r}; Kiln knows {known}")
    defaults = _defaults()[str(name)]
    kept = {
        key: value
        for key, value in config.items()
        if key in defaults and key not in _NOT_IN_GRAPH and value != defaults[key]
    }
    if name == "AutoencoderTiny" or component != "unet":
        # Each half of a VAE is a graph of its own and knows nothing of the other half.
        other = "encoder" if component == "vae_decoder" else "decoder"
        kept = {key: value for key, value in kept.items() if not _belongs_to(key, other)}
    return {"_class_name": name, **dict(sorted(kept.items()))}


def _belongs_to(key: str, half: str) -> bool:
    block_types = "down_block_types" if half == "encoder" else "up_block_types"
    return key.startswith(f"{half}_block") or key in (f"num_{half}_blocks", block_types)


def architecture_digest(component: str, config: Mapping[str, Any]) -> str:
    """16 hex digits that name the graph of ``component`` for this config."""
    facts = [TRACER_VERSION, component, architecture(component, config)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def find_graph(component: str, config: Mapping[str, Any]) -> onnx.ModelProto:
    """The graph of ``component`` for this config, its initializers without data.

    Raises:
        GraphError: the graph is not shipped, not cached, and cannot be traced here.
    """
    graph = _stored_graph(component, architecture_digest(component, config))
    if graph is None and component == "text_encoder":
        graph = _other_vocabulary(component, config)
    if graph is not None:
        return graph
    from .tracing import trace

    graph = trace(component, config)
    # A cache that cannot be written costs the tracing again next time and nothing else.
    with contextlib.suppress(OSError):
        save_graph(graph, _cache_folder() / f"{component}-{architecture_digest(component, config)}.onnx.xz")
    return graph


def _other_vocabulary(component: str, config: Mapping[str, Any]) -> onnx.ModelProto | None:
    """The graph of a text encoder with another number of tokens, its table as long as ``config`` says."""
    for size in _VOCABULARIES:
        graph = _stored_graph(component, architecture_digest(component, {**config, "vocab_size": size}))
        if graph is not None:
            table = next(tensor for tensor in graph.graph.initializer if tensor.name == _TABLE)
            table.dims[0] = int(config["vocab_size"])
            return graph
    return None


def _stored_graph(component: str, digest: str) -> onnx.ModelProto | None:
    """A graph that ships or lies in the cache, None when there is none."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    for folder in (shipped_folder(), _cache_folder()):
        for path in folder.glob(f"*{component}-{digest}.onnx.xz"):
            try:
                return onnx.load_model_from_string(lzma.decompress(path.read_bytes()))
            except (lzma.LZMAError, DecodeError, OSError, ValueError) as exc:
                raise GraphError(f"{path} cannot be read ({exc}); delete it, and it is made again") from exc
    return None


def save_graph(graph: onnx.ModelProto, path: Path) -> None:
    """Write a graph compressed, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(lzma.compress(graph.SerializeToString(deterministic=True), preset=9))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def shipped_folder() -> Path:
    """Where the graphs lie that ship with Kiln."""
    return Path(str(resources.files(__package__) / "data/graphs"))


def _cache_folder() -> Path:
    from ..cache import cache_folder

    return cache_folder("graphs")
