"""Names of layers against sd-mecha's tables of LoRA and LyCORIS keys, for every layer of full-size models.

It is not installed with the tests, as it brings matchers of strings along:
``pip install --no-deps sd-mecha==1.1.8 fuzzywuzzy python-Levenshtein Levenshtein rapidfuzz``.
"""

from __future__ import annotations

import pytest

from kiln.exporters.adapters.keys import TEXT, UNET, ModuleIndex

pytest.importorskip("torch")
pytest.importorskip("sd_mecha", reason="sd-mecha is not installed; the first lines of the file say how")

# The part of a stem that names the network; sd-mecha also has layers of the VAE, which Kiln never changes.
_NETWORKS = {"te": TEXT, "unet": UNET}


def stems(prefix: str) -> list[str]:
    """Stems of sd-mecha's keys for SD1 in diffusers' names, without the VAE's."""
    from sd_mecha.extensions import model_configs

    name = {"lora": "sd1-kohya_kohya_lora", "lycoris": "sd1-kohya_lycoris_lora"}[prefix]
    keys = model_configs.resolve(name).keys()
    found = {key.split(".")[0] for key in keys}
    return sorted(stem for stem in found if stem.split("_")[1] in _NETWORKS)


@pytest.mark.parametrize("prefix", ["lora", "lycoris"])
def test_every_layer_is_found(sd1_shapes, prefix):
    index = ModuleIndex(sd1_shapes)
    modules = {
        (network, name.replace(".", "_")) for network in (UNET, TEXT) for name in index.modules(network)
    }
    found = set()
    for stem in stems(prefix):
        _, part, underscored = stem.split("_", 2)
        location = index.locate(stem)
        assert location is not None, stem
        assert (location.network, location.module.replace(".", "_")) == (_NETWORKS[part], underscored)
        found.add((location.network, underscored))
    assert len(found) > 350
    # What is left are norms, whose weights are vectors.
    assert all("norm" in name for _, name in modules - found)


@pytest.mark.parametrize("prefix", ["lora", "lycoris"])
def test_a_name_that_is_wrong_is_not_found(sd1_shapes, prefix):
    index = ModuleIndex(sd1_shapes)
    for stem in stems(prefix)[::40]:
        assert index.locate(f"{stem}x") is None
