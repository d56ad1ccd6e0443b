"""Baked weights and names against InvokeAI's layers and converters; skipped where its package is not there.

``pip install --no-deps invokeai==6.14.2`` is enough: the layers themselves need torch alone, and the packages
around them, which need everything else, are not run. InvokeAI is wrong for IA3 of a convolution's outputs,
``dora_scale`` of the outputs and the sparse remainder, and reads neither OFT nor GLoRA.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2

torch = pytest.importorskip("torch")
LIMIT = THRESHOLDS["baked_weight_relative_l2"]
NAMES = [
    *("LoRA", "LoRA without alpha", "LoRA 1x1 as linear", "LoRA linear as 1x1", "LoCon", "CP"),
    *("LoHa", "LoHa without alpha", "LoHa conv", "LoHa 1x1", "LoHa Tucker"),
    *(
        "LoKr",
        "LoKr both factored",
        "LoKr first factored",
        "LoKr both whole",
        "LoKr larger first",
        "LoKr conv",
    ),
    *("LoKr conv factored", "LoKr of 2023", "LoKr Tucker"),
    *(
        "IA3 on the inputs",
        "IA3 on the outputs",
        "IA3 conv on the inputs",
        "difference",
        "difference conv",
        "norm",
    ),
    *("DoRA of the inputs", "DoRA conv of the inputs", "DoRA of PEFT"),
]
CHECKED = (*NAMES, "set")
_CACHE = "backend.model_manager.load.model_cache.torch_module_autocast"
_OMI = "model_manager.omi.vendor.convert.lora"


@pytest.fixture(scope="module")
def invokeai():
    """``invokeai(name)``: a module below ``invokeai.backend``, without the packages around it."""
    spec = importlib.util.find_spec("invokeai")
    if spec is None:
        pytest.skip("InvokeAI is not installed: pip install --no-deps invokeai==6.14.2")
    (root,) = [Path(place) for place in spec.submodule_search_locations or ()][:1]
    paths = ["", "backend", "backend.util", "backend.patches", "backend.patches.lora_conversions"]
    paths += ["backend.model_manager.omi"]
    paths += [".".join(_CACHE.split(".")[:end]) for end in range(2, 6)]
    before = set(sys.modules)
    for path in paths:
        package = types.ModuleType(f"invokeai.{path}".rstrip("."))
        package.__path__ = [str(root.joinpath(*path.split(".")))]
        sys.modules[package.__name__] = package
    log = types.ModuleType("invokeai.backend.util.logging")  # its own needs all of the application
    log.warning = logging.warning
    sys.modules[log.__name__] = log
    yield lambda name: importlib.import_module(f"invokeai.backend.{name}")
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_the_new_weight(invokeai, bake_one, cases, name, strength):
    weight, tensors = cases.make(name)
    actual, _ = bake_one(weight, tensors, strength)
    names = {"lora_magnitude_vector": "dora_magnitude"}
    state = {names.get(key, key): torch.from_numpy(np.array(value)) for key, value in tensors.items()}
    layer = invokeai("patches.layers.utils").any_lora_layer_from_state_dict(state)
    change = layer.get_parameters({"weight": torch.from_numpy(weight)}, strength)["weight"]
    assert LIMIT.holds(relative_l2(actual, weight + change.detach().numpy()))


def test_a_planted_error_is_seen(invokeai, bake_one, cases):
    weight, tensors = cases.make("LoKr")
    state = {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}
    layer = invokeai("patches.layers.utils").any_lora_layer_from_state_dict(state)
    change = layer.get_parameters({"weight": torch.from_numpy(weight)}, 1.0)["weight"].detach().numpy()
    assert not LIMIT.holds(relative_l2(bake_one(weight, tensors, 1.01)[0], weight + change))


def test_a_whole_value(invokeai, bake_one, cases):
    """InvokeAI has it for FLUX, always at full strength."""
    weight, tensors = cases.make("set")
    layer = invokeai("patches.layers.set_parameter_layer").SetParameterLayer(
        "weight", torch.from_numpy(tensors["set_weight"])
    )
    change = layer.get_parameters({"weight": torch.from_numpy(weight)}, 1.0)["weight"].numpy()
    assert LIMIT.holds(relative_l2(bake_one(weight, tensors)[0], weight + change))


WRONG = ["IA3 conv on the outputs", "DoRA of the outputs"]


@pytest.mark.parametrize("name", WRONG)
def test_where_invokeai_is_wrong(invokeai, bake_one, cases, name):
    """The factors of a convolution and the lengths of the outputs are laid along other axes."""
    weight, tensors = cases.make(name)
    bake_one(weight, tensors)
    state = {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}
    layer = invokeai("patches.layers.utils").any_lora_layer_from_state_dict(state)
    try:
        change = layer.get_parameters({"weight": torch.from_numpy(weight)}, 1.0)["weight"].detach().numpy()
    except RuntimeError:
        return
    assert not LIMIT.holds(relative_l2(bake_one(weight, tensors)[0], weight + change))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # of torch, asked by InvokeAI
def test_invokeai_takes_the_sparse_remainder_for_a_bias(invokeai, bake_one, cases):
    """It reads the values and their places rightly, and adds nothing of them to the weight."""
    weight, tensors = cases.make("sparse beside a LoRA")
    state = {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}
    layer = invokeai("patches.layers.utils").any_lora_layer_from_state_dict(state)
    scale, remainder = float(tensors["alpha"]) / 4, layer.get_bias(None).to_dense().numpy()
    low = layer.get_weight(torch.from_numpy(weight)).detach().numpy()
    actual, _ = bake_one(weight, tensors)
    assert LIMIT.holds(relative_l2(actual, weight + np.float32(scale) * (low + remainder)))
    assert not LIMIT.holds(relative_l2(actual, weight + np.float32(scale) * low))


def misplaced(index, names):
    """Those of ``{stem: (network, path)}`` that Kiln takes for another layer."""
    found = {stem: index.locate(stem) for stem in names}
    return [
        stem for stem, place in found.items() if not place or (place.network, place.module) != names[stem]
    ]


NETWORKS = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


@pytest.mark.parametrize("network", NETWORKS)
def test_the_names_of_onetrainer(invokeai, sdxl_shapes, network):
    """By the Open Model Initiative's converter, with which OneTrainer saves; InvokeAI holds a copy of it.

    Of its three names the legacy one is kohya's with diffusers' names; the newest has LDM's, as ComfyUI has.
    """
    from kiln.exporters.adapters.keys import ModuleIndex

    index, tables = ModuleIndex(sdxl_shapes), invokeai(f"{_OMI}.convert_sdxl_lora")
    convert = getattr(invokeai(f"{_OMI}.convert_lora_util"), "__convert")
    paths = [path for path in index.modules(network) if not re.search(r"norm|embeddings", path)]
    end, sets = ".lora_down.weight", tables.convert_sdxl_lora_key_sets()
    for target in ("diffusers", "legacy_diffusers", "omi"):
        names = {}
        for path in paths:
            (key,) = convert({f"{NETWORKS[network]}.{path}{end}": torch.ones(1)}, sets, "diffusers", target)
            names[key.removesuffix(end)] = (network, path)
        assert len(names) == len(paths) >= 72
        assert misplaced(index, names) == []
        comfyui = {re.sub("^unet", "diffusion_model", stem): place for stem, place in names.items()}
        assert misplaced(index, comfyui) == [] or target != "omi"
        swapped = dict(zip(names, [*list(names.values())[1:], names[next(iter(names))]], strict=True))
        assert len(misplaced(index, swapped)) == len(names)


def test_the_names_of_sdxl(invokeai, sdxl_shapes):
    """Every LDM name of a transformer that InvokeAI knows is the same layer under both names."""
    from kiln.exporters.adapters.keys import ModuleIndex

    convert = invokeai(
        "patches.lora_conversions.sdxl_lora_conversion_utils"
    ).convert_sdxl_keys_to_diffusers_format
    from kiln.exporters.ldm_names import ldm_unet_module_map

    index = ModuleIndex(sdxl_shapes)
    names = [name for name, path in ldm_unet_module_map(sdxl_shapes["unet"]).items() if "attentions" in path]
    stems = [f"lora_unet_{name.replace('.', '_')}" for name in names]
    assert len(stems) > 722
    for stem in stems:
        (theirs,) = convert({stem: None})
        assert theirs != stem
        assert index.locate(stem) == index.locate(theirs) is not None
