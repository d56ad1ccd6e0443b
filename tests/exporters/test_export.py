"""Exporting: every tensor arrives in the type asked for, and nothing is left of an export that fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from kiln.bundle import open_bundle
from kiln.components import COMPONENTS, CONTRACTS
from kiln.errors import AdapterError, CheckpointError, StorageError, UsageError
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.export import ExportSpec, export

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture(scope="module")
def folder_in(
    tiny_sd1: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A diffusers folder of the tiny model in a type; ``tiny_bundle`` is asked for to have its graphs."""
    made: dict[str, Path] = {"fp32": tiny_sd1}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "sd1"
            shutil.copytree(tiny_sd1, made[kind])
            for network, name in WEIGHTS.items():
                path = made[kind] / network / name
                tensors = safetensors_torch.load_file(path)
                safetensors_torch.save_file({k: v.to(TYPES[kind]) for k, v in tensors.items()}, path)
        return made[kind]

    return make


def bits(tensor: Any) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8 if tensor.ndim else tensor.dtype).numpy()


def differing(folder: Path, bundle: Path, kind: str) -> list[str]:
    """Tensors of a bundle that are not, bit for bit, what torch makes of the folder's."""
    wrong = []
    for component in COMPONENTS:
        network = CONTRACTS[component].network
        source = safetensors_torch.load_file(folder / network / WEIGHTS[network])
        found = safetensors_torch.load_file(bundle / component / "weights.safetensors")
        assert found.keys() <= source.keys()
        for name, tensor in found.items():
            expected = source[name].to(TYPES[kind])
            assert tensor.dtype == expected.dtype
            assert tensor.shape == expected.shape
            if not np.array_equal(bits(tensor), bits(expected)):
                wrong.append(name)
    return wrong


@pytest.mark.parametrize("storage", ["auto", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", TYPES)
def test_tensors_are_what_torch_makes_of_them(
    folder_in: Callable[[str], Path], tmp_path: Path, kind: str, storage: str
) -> None:
    folder = folder_in(kind)
    report = export(ExportSpec(folder, tmp_path / "b", storage=storage))
    stored = kind if storage == "auto" else storage
    assert differing(folder, tmp_path / "b", stored) == []
    bundle = open_bundle(tmp_path / "b", verify="full")
    code = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}[stored]
    for component in COMPONENTS:
        assert set(bundle.manifest["components"][component]["storage"]) == {code}
        onnx.checker.check_model(str(tmp_path / "b" / component / "model.onnx"), full_check=True)
    assert report.size_bytes == sum(
        p.stat().st_size for p in (tmp_path / "b").rglob("*") if p.is_file() and p.name != "kiln.json"
    )
    listed = {p.relative_to(tmp_path / "b").as_posix() for p in (tmp_path / "b").rglob("*") if p.is_file()}
    assert listed == set(bundle.manifest["files"]) | {"kiln.json"}


def test_a_planted_bit_is_seen(folder_in: Callable[[str], Path], tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "b"
    shutil.copytree(tiny_bundle, copy)
    path = copy / "unet/weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert len(differing(folder_in("fp32"), copy, "fp32")) == 1


def test_graphs_of_one_architecture_are_one_file(folder_in: Callable[[str], Path], tmp_path: Path) -> None:
    """What the weights are does not show in the graph; the type they are stored in does."""
    for name, kind in (("a", "fp16"), ("b", "fp16"), ("c", "fp32")):
        export(ExportSpec(folder_in(kind), tmp_path / name))
    graphs = [(tmp_path / name / "unet/model.onnx").read_bytes() for name in "abc"]
    assert graphs[0] == graphs[1] != graphs[2]


def test_a_type_too_small_is_refused(tiny_sd1: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sd1"
    shutil.copytree(tiny_sd1, folder)
    path = folder / "unet" / WEIGHTS["unet"]
    tensors = safetensors_torch.load_file(path)
    tensors["conv_out.bias"][0] = 70000
    safetensors_torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"conv_out\.bias .*7e\+04.*--precision fp32 or bf16"):
        export(ExportSpec(folder, tmp_path / "b", storage="fp16"))
    assert [p.name for p in tmp_path.iterdir()] == ["sd1"]
    export(ExportSpec(folder, tmp_path / "b", storage="bf16"))


def test_float64_is_stored_as_fp32_and_refused_beyond_it(
    tiny_sd1: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sd1"
    shutil.copytree(tiny_sd1, folder)
    path = folder / "unet" / WEIGHTS["unet"]
    tensors = safetensors_torch.load_file(path)
    tensors["conv_out.bias"] = tensors["conv_out.bias"].double() / 3
    safetensors_torch.save_file(tensors, path)
    export(ExportSpec(folder, tmp_path / "b"))
    found = safetensors_torch.load_file(tmp_path / "b/unet/weights.safetensors")["conv_out.bias"]
    assert torch.equal(found, tensors["conv_out.bias"].float())
    tensors["conv_out.bias"][0] = 1e39
    safetensors_torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"conv_out\.bias has a value of 1e\+39"):
        export(ExportSpec(folder, tmp_path / "c"))


def test_a_missing_vae_is_asked_for_and_taken_from_elsewhere(
    tiny_sd1: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_sd1, tmp_path / "sd1", ignore=lambda path, names: {"vae"} & set(names))
    with pytest.raises(CheckpointError, match=r"has no vae; give --vae FILE"):
        export(ExportSpec(tmp_path / "sd1", tmp_path / "b"))
    export(ExportSpec(tmp_path / "sd1", tmp_path / "b", vae=tiny_sd1))
    for component in COMPONENTS:
        name = f"{component}/weights.safetensors"
        assert (tmp_path / "b" / name).read_bytes() == (tiny_bundle / name).read_bytes()
    options = open_bundle(tmp_path / "b").manifest["source"]["options"]
    assert options["vae"] == str(tiny_sd1)


def test_a_scheduler_without_class_is_refused(tiny_sd1: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sd1"
    shutil.copytree(tiny_sd1, folder)
    (folder / "scheduler/scheduler_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="names no _class_name"):
        export(ExportSpec(folder, tmp_path / "b"))
    assert [p.name for p in tmp_path.iterdir()] == ["sd1"]


def test_a_config_of_another_model_is_refused(tiny_sd1: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sd1"
    shutil.copytree(tiny_sd1, folder)
    path = folder / "text_encoder" / WEIGHTS["text_encoder"]
    tensors = safetensors_torch.load_file(path)
    del tensors["text_model.final_layer_norm.bias"]
    safetensors_torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"final_layer_norm\.bias"):
        export(ExportSpec(folder, tmp_path / "b"))
    assert not (tmp_path / "b").exists()


def test_an_adapter_that_matches_nothing_is_an_error(
    tiny_sd1: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    tensors = {f"lora_unet_nowhere.lora_{side}.weight": torch.ones(2, 2) for side in ("down", "up")}
    safetensors_torch.save_file(tensors, tmp_path / "no.safetensors")
    with pytest.raises(AdapterError, match="none of its 2 tensors matches"):
        export(ExportSpec(tiny_sd1, tmp_path / "out/b", (AdapterRef(tmp_path / "no.safetensors"),)))
    assert [p.name for p in tmp_path.iterdir()] == ["no.safetensors"]


def test_an_unknown_type_is_a_usage_error(tiny_sd1: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown precision 'int3'"):
        export(ExportSpec(tiny_sd1, tmp_path / "b", storage="int3"))


def test_an_existing_target_is_kept(tiny_sd1: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/mine.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(StorageError, match="exists"):
            export(ExportSpec(tiny_sd1, tmp_path / "b", overwrite=overwrite))
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["mine.txt"]


def test_the_source_is_written_only_when_it_may_be(tiny_sd1: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    assert open_bundle(tiny_bundle).manifest["source"]["path"] == str(tiny_sd1)
    export(ExportSpec(tiny_sd1, tmp_path / "b", remember_source=False))
    assert str(tiny_sd1) not in json.dumps(dict(open_bundle(tmp_path / "b").manifest))


def test_progress_counts_every_byte(tiny_sd1: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    export(
        ExportSpec(tiny_sd1, tmp_path / "b"), lambda name, *counts: seen.setdefault(name, []).append(counts)
    )
    assert list(seen) == list(COMPONENTS)
    for counts in seen.values():
        assert [done for done, _ in counts] == sorted({done for done, _ in counts})
        assert counts[-1][0] == counts[-1][1]


def test_a_bundle_keeps_its_guidance_when_it_is_exported_again(
    tiny_sd1: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    export(ExportSpec(tiny_sd1, tmp_path / "first", cfg_scale=3.5))
    export(ExportSpec(tmp_path / "first", tmp_path / "again"))
    export(ExportSpec(tmp_path / "first", tmp_path / "other", cfg_scale=5.0))
    export(ExportSpec(tiny_sd1, tmp_path / "none"))
    found = {name: open_bundle(tmp_path / name).manifest["defaults"] for name in ("again", "other", "none")}
    assert found == {"again": {"cfg_scale": 3.5}, "other": {"cfg_scale": 5.0}, "none": {}}
