"""Lists of keys of real files: every key of each is applied to the architecture that it is for."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.formats import split_key
from kiln.exporters.adapters.keys import ModuleIndex
from kiln.exporters.adapters.plan import plan_bake

# The lists that make up a file -> family and how many modules of each network they change.
LISTS = {
    ("model-toolkit/LoRA-v1-UNET.txt", "model-toolkit/LoRA-v1-CLIP.txt"): (
        "sd1",
        {"unet": 192, "text_encoder": 72},
    ),
    ("model-toolkit/LoRA-v1A-UNET.txt", "model-toolkit/LoRA-v1A-CLIP.txt"): (
        "sd1",
        {"unet": 192, "text_encoder": 72},
    ),
    ("invokeai/shinkai_makoto_offset.json",): ("sd1", {"unet": 192, "text_encoder": 72}),
    ("invokeai/Alien_Style.json",): ("sdxl", {"unet": 722, "text_encoder": 72, "text_encoder_2": 192}),
}


def shapes_in(path):
    """Key -> shape of a list; -1 stands for the rank."""
    if path.suffix == ".json":
        return {key: entry["shape"] for key, entry in json.loads(path.read_text()).items()}
    lines = filter(None, path.read_text().split("\n"))
    return {key: json.loads(shape) for key, shape in (line.split(" ", 1) for line in lines)}


def tensors_of(shapes):
    """Small tensors of these names: rank 1 in place of the file's, which changes nothing here."""
    tensors = {}
    for key, shape in shapes.items():
        parameter = split_key(key).parameter
        size = list(shape)
        if parameter in ("down", "up"):
            size[0 if parameter == "down" else 1] = 1
        tensors[key] = np.full(size, 0.01, np.float16)
    return tensors


@pytest.mark.parametrize("lists", LISTS, ids=lambda lists: lists[0].split("/")[1].split(".")[0])
def test_every_key_of_a_real_list_is_applied(request, shared, save, lists):
    family, modules = LISTS[lists]
    shapes = {key: shape for name in lists for key, shape in shapes_in(shared / "keys" / name).items()}
    stems = {split_key(key).stem for key in shapes}
    targets = request.getfixturevalue(f"{family}_shapes")
    with plan_bake(targets, [AdapterRef(save(tensors_of(shapes)))]) as plan:
        (report,) = plan.reports
        touched = [
            key for network, names in targets.items() for key in names if plan.is_touched(network, key)
        ]
    assert report.unmatched_keys == ()
    assert report.matched_keys == len(shapes)
    assert dict(report.matched_modules) == modules
    assert len(touched) == len(stems) == sum(modules.values())


def test_a_key_that_names_no_layer_is_seen(sd1_shapes, shared, save):
    shapes = shapes_in(shared / "keys" / "invokeai" / "shinkai_makoto_offset.json")
    renamed = {key.replace("down_blocks_0", "down_blocks_9"): shape for key, shape in shapes.items()}
    with plan_bake(sd1_shapes, [AdapterRef(save(tensors_of(renamed)))]) as plan:
        assert len(plan.reports[0].unmatched_keys) == sum("down_blocks_9" in key for key in renamed) > 0


def test_every_list_of_a_lora_is_in_the_table(shared):
    """What else lies there are checkpoints, whose keys other tests read."""
    found = {
        str(path.relative_to(shared / "keys"))
        for path in (shared / "keys").rglob("*")
        if path.suffix in (".txt", ".json") and "lora" in path.read_text().lower()
    }
    assert found == {name for lists in LISTS for name in lists}


BASES = {"sd1-kohya": "sd1", "sdxl-kohya": "sdxl", "sdxl-kohya_but_diffusers": "sdxl"}


@pytest.mark.parametrize("name", BASES)
def test_every_layer_that_sd_mecha_knows_by_kohyas_name_is_found(request, shared, name):
    """Its lists of whole models in kohya's words: each matrix and kernel is one layer of the same shape."""
    yaml = pytest.importorskip("yaml")
    parts = yaml.safe_load((shared / "keys" / "sd-mecha" / f"{name}.yaml").read_text())["components"]
    index = ModuleIndex(request.getfixturevalue(f"{BASES[name]}_shapes"))
    names = {
        key: entry["shape"]
        for part, keys in parts.items()
        if part != "vae"
        for key, entry in keys.items()
        if key.endswith(".weight") and len(entry["shape"]) >= 2
    }
    found = {}
    for key, shape in names.items():
        location = index.locate("lora_" + key.removesuffix(".weight").replace(".", "_"))
        assert location is not None, key
        assert list(index.shapes[location.tensor("weight")]) == shape, key
        found[location] = key
    assert len(found) == len(names)
    matrices = [key for key, shape in index.shapes.items() if key[1].endswith(".weight") and len(shape) >= 2]
    assert len(found) == len(matrices)
