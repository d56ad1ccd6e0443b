"""Lists of block weights: whose tensor gets which number."""

from __future__ import annotations

import re

import pytest

from kiln.errors import UsageError
from kiln.exporters.ldm_names import ldm_unet_name, sd1_ldm_unet_modules
from kiln.exporters.merging.block_weights import BlockWeights

NUMBERS = [n / 100 for n in range(25)]


def mbw_index(ldm_name: str) -> int:
    """The rule of bbc-mc/sdweb-merge-block-weighted-gui, on LDM's names, restated."""
    name = f"model.diffusion_model.{ldm_name}"
    if "time_embed" in name:
        return 0
    if ".out." in name:
        return 24
    for pattern, first in ((r"\.input_blocks\.(\d+)\.", 0), (r"\.output_blocks\.(\d+)\.", 13)):
        if match := re.search(pattern, name):
            return first + int(match[1])
    assert ".middle_block." in name
    return 12


def test_every_layer_of_sd1_gets_the_number_of_its_block() -> None:
    names = {f"{module}.weight": ldm_unet_name(f"{module}.weight") for module in sd1_ldm_unet_modules()}
    weights = BlockWeights.parse(",".join(map(str, NUMBERS)))
    assert weights.base is None
    found = weights.by_tensor(new for new in names.values() if new)
    expected = {new: NUMBERS[mbw_index(ldm)] for ldm, new in names.items() if new}
    assert found == expected
    assert set(found.values()) == set(NUMBERS)
    shifted = BlockWeights.parse(",".join(map(str, NUMBERS[1:] + NUMBERS[:1]))).by_tensor(found)
    assert shifted != expected


def test_of_26_the_first_is_that_of_everything_else() -> None:
    weights = BlockWeights.parse(",".join(map(str, [0.9, *NUMBERS])))
    assert weights.base == 0.9
    assert list(weights.blocks.values()) == NUMBERS


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0.5", "1 block weights; expected 25 .* or 26"),
        (",".join(["1"] * 17), "17 block weights"),
        (",".join(["1"] * 24 + ["x"]), "'x'.*no finite number|block weight 'x'"),
        (",".join(["1"] * 24 + ["nan"]), "'nan'"),
        ("", "block weight ''"),
    ],
)
def test_another_list_is_a_usage_error(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        BlockWeights.parse(text)
