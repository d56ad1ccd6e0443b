"""The tiny SD1, its random LoRAs and their spellings, from the adapters' tests; and comparing of weights."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, relative_l2


def _load(name: str, path: Path) -> Any:
    """A file as a module; folders of tests are no packages."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


_adapters = _load("kiln_tests_adapters_conftest", Path(__file__).parents[1] / "adapters" / "conftest.py")
tiny, make_lora, spell, save = _adapters.tiny, _adapters.make_lora, _adapters.spell, _adapters.save
baked, fused, cases, reference = _adapters.baked, _adapters.fused, _adapters.cases, _adapters.reference
sd2_shapes, sdxl_shapes, sd1_shapes = _adapters.sd2_shapes, _adapters.sdxl_shapes, _adapters.sd1_shapes


@pytest.fixture(scope="session")
def worst() -> Callable[[Any, Any], float]:
    """``worst(actual, expected)``: names, shapes, type, finite; then the largest relative distance."""

    def compare(actual: Any, expected: Any) -> float:
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert actual[key].shape == value.shape, key
            assert actual[key].dtype == np.float32, key
            assert np.isfinite(actual[key]).all(), key
        return max(relative_l2(actual[key], value) for key, value in expected.items())

    return compare


@pytest.fixture(scope="session")
def limit() -> Any:
    return THRESHOLDS["baked_weight_relative_l2"]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Callable[..., Path]:
    """``tiny_folder(tensors)``: the tiny model as a diffusers folder, with other values if given."""
    import json

    import safetensors.numpy

    count = iter(range(1000))

    def write(tensors: Any = None) -> Path:
        folder = tmp_path_factory.mktemp("model") / str(next(count))
        values = tensors or tiny.tensors
        stems = {"unet": "diffusion_pytorch_model", "text_encoder": "model"}
        configs = {"unet": dict(tiny.unet.config), "text_encoder": tiny.text_encoder.config.to_dict()}
        configs["unet"]["_class_name"] = "UNet2DConditionModel"
        configs["text_encoder"]["architectures"] = ["CLIPTextModel"]
        for network, stem in stems.items():
            (folder / network).mkdir(parents=True)
            safetensors.numpy.save_file(dict(values[network]), folder / network / f"{stem}.safetensors")
            (folder / network / "config.json").write_text(json.dumps(configs[network], default=str))
        (folder / "tokenizer").mkdir()
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
        return folder

    return write
