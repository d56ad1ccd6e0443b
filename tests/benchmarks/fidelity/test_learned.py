"""LPIPS and CLIP score: the plumbing against the packages' own, with networks of random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kiln.benchmarks.fidelity.child import FidelityError
from kiln.benchmarks.fidelity.learned import (
    LearnedOptions,
    learned_rows,
    lpips_distance,
    measure_learned,
    open_clip,
    open_lpips,
)
from kiln.errors import UsageError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (2, 64, 64, 3), np.uint8)
WANTED = RNG.integers(0, 256, (2, 64, 64, 3), np.uint8)
PROMPTS = ("a red apple", "a cat")
TOKENIZER = Path(__file__).parents[3] / "exporters/data/sd1/tokenizer"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel of random weights with a real tokenizer."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**text, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokens = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPProcessor(transformers.CLIPImageProcessor(**size), tokens).save_pretrained(folder)
    return folder


def test_the_clip_score_is_that_of_the_model_itself(clip: Path, tmp_path: Path) -> None:
    """The oracle is CLIPModel's own forward: its logits are the cosine times a learned scale."""
    import torch

    np.savez(tmp_path / "images.npz", images=IMAGES, reference=WANTED)
    rows = learned_rows(tmp_path / "images.npz", PROMPTS, LearnedOptions(clip=str(clip)))
    model, processor = open_clip(str(clip))
    for row, made, wanted, prompt in zip(rows, IMAGES, WANTED, PROMPTS, strict=True):
        inputs = processor(text=[prompt], images=[made, wanted], return_tensors="pt", padding=True)
        with torch.inference_mode():
            cosines = (model(**inputs).logits_per_image / model.logit_scale.exp())[:, 0].tolist()
        expected = [100 * max(one, 0.0) for one in cosines]
        assert row["clip_score"] == pytest.approx(expected[0], abs=1e-3)
        assert row["clip_drop"] == pytest.approx(expected[1] - expected[0], abs=1e-3)
        assert -1 <= row["clip_image"] < 1 - 1e-6


def test_equal_images_lose_nothing(clip: Path) -> None:
    (row,) = measure_learned(IMAGES[:1], IMAGES[:1], PROMPTS[:1], LearnedOptions(clip=str(clip)))
    assert row["clip_drop"] == pytest.approx(0, abs=1e-4)
    assert row["clip_image"] == pytest.approx(1, abs=1e-5)


def test_lpips_is_that_of_torchmetrics(tmp_path: Path) -> None:
    pytest.importorskip("lpips")
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    oracle = pytest.importorskip("torchmetrics.functional.image.lpips")
    torch.manual_seed(0)
    alexnet = torchvision.models.alexnet(weights=None)
    torch.save(alexnet.state_dict(), tmp_path / "alexnet.pth")
    network = open_lpips(str(tmp_path / "alexnet.pth"))
    theirs = oracle._LPIPS(pretrained=True, net="alex", pnet_rand=True).eval()
    theirs.net.load_state_dict(network.net.state_dict())
    made, wanted = (torch.from_numpy(i[:1] / 127.5 - 1).float().permute(0, 3, 1, 2) for i in (IMAGES, WANTED))
    with torch.inference_mode():
        expected = float(theirs(made, wanted).item())
    found = lpips_distance(network, IMAGES[0], WANTED[0])
    assert found == pytest.approx(expected, rel=1e-5)
    assert found > 0
    assert lpips_distance(network, IMAGES[0], IMAGES[0]) == 0
    assert lpips_distance(network, IMAGES[1], WANTED[0]) != pytest.approx(expected, rel=1e-5)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("lpips")
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"has no features\.0\.weight"):
        open_lpips(str(tmp_path / "other.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UsageError, match="cannot be read as torch weights"):
        open_lpips(str(tmp_path / "text.pth"))
    with pytest.raises(UsageError, match=r"alexnet-owt-7be5be79\.pth from https://download"):
        open_lpips(str(tmp_path / "none.pth"))


def test_a_missing_package_or_network_says_what_to_do(tmp_path: Path) -> None:
    try:
        import lpips  # noqa: F401
    except (ImportError, RuntimeError):
        with pytest.raises(FidelityError, match=r"LPIPS needs the packages.*\[metrics\]"):
            measure_learned(IMAGES, WANTED, PROMPTS, LearnedOptions(lpips=str(tmp_path / "none.pth")))
    pytest.importorskip("transformers")
    with pytest.raises(UsageError, match="needs a folder with a CLIPModel"):
        open_clip(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="does not open as a CLIPModel"):
        open_clip(str(tmp_path))


def test_numbers_are_checked() -> None:
    with pytest.raises(UsageError, match="got 2 images, 1 references, 2 prompts"):
        measure_learned(IMAGES, WANTED[:1], PROMPTS, LearnedOptions())
