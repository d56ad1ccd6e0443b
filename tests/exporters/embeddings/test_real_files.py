"""Embeddings that people trained and published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kiln.errors import AdapterError
from kiln.exporters.embeddings.base import EmbeddingRef
from kiln.exporters.embeddings.plan import plan_tokens
from kiln.exporters.embeddings.reading import read_embeddings
from kiln.exporters.inspection import inspect_path

DATA = Path(__file__).parents[3].parent / "shared" / "data"
FILES = {
    "embeddings/learned_embeds.bin": ("<birb-style>", 1, 768, "SD1"),
    "embeddings/test_embedding.safetensors": ("test_embedding", 5, 768, "SD1"),
    "embeddings/flora.pt": ("flora", 4, 1024, "SD2"),
    "adapters/lora_kiriko2.ti.pt": ("<krk>", 1, 768, "SD1"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_published_file(name: str) -> None:
    path = DATA / name
    if not path.is_file():
        pytest.skip("the shared sample data is not here")
    torch = pytest.importorskip("torch")
    token, count, width, family = FILES[name]
    (found,) = read_embeddings(EmbeddingRef(path))
    assert (found.token, found.count, found.family) == (token, count, family)
    assert found.vectors["text_encoder"].shape == (count, width)
    if path.suffix == ".safetensors":
        import safetensors.torch

        stored = safetensors.torch.load_file(path)["emb_params"]
    else:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        stored = loaded["string_to_param"]["*"] if "string_to_param" in loaded else loaded[token]
    expected = stored.detach().float().numpy().reshape(count, width)
    np.testing.assert_array_equal(found.vectors["text_encoder"], expected)
    own, other = (768, 1024) if width == 768 else (1024, 768)
    assert plan_tokens([found], {"text_encoder": (49408, own)}, {}).rows == count
    with pytest.raises(AdapterError, match=f"is for {family}: its vectors are {width} wide"):
        plan_tokens([found], {"text_encoder": (49408, other)}, {})
    said = inspect_path(path)
    assert (said["kind"], said["embeddings"][0]["vectors"]) == ("embedding", count)
