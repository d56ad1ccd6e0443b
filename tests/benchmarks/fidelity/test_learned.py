"""LPIPS and CLIP score: the plumbing against the packages' own, with networks of random weights."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln.benchmarks.fidelity.child import FidelityError
from kiln.benchmarks.fidelity.learned import (
    ALEXNET_FILE,
    LearnedOptions,
    check_learned,
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


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AlexNet of random weights, in the form of torchvision's file; skips where torchvision does not load."""
    torch = pytest.importorskip("torch")
    for name in ("torchvision", "lpips"):
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError) as error:  # the latter when it was built for another torch
            pytest.skip(f"{name} does not load here: {error}")
    import torchvision

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hub") / "checkpoints" / ALEXNET_FILE
    path.parent.mkdir()
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), path)
    return path


def as_lpips_takes_it(images: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(images / 127.5 - 1).float().permute(0, 3, 1, 2)


def test_lpips_is_that_of_the_package_itself(
    alexnet: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The oracle is ``lpips.LPIPS`` as its README calls it; it finds the trunk where torchvision keeps it."""
    import lpips
    import torch

    monkeypatch.setattr(torch.hub, "_hub_dir", str(alexnet.parents[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchvision, about how the package asks for the weights
        direct = lpips.LPIPS(net="alex", verbose=False).eval()
    with torch.inference_mode():
        expected = direct(as_lpips_takes_it(IMAGES), as_lpips_takes_it(WANTED)).ravel().tolist()
    options = LearnedOptions(lpips=str(alexnet))
    found = [row["lpips"] for row in measure_learned(IMAGES, WANTED, PROMPTS, options)]
    assert found == pytest.approx(expected, rel=1e-5)
    assert all(value > 0 for value in found)
    (equal,) = measure_learned(IMAGES[:1], IMAGES[:1], PROMPTS[:1], options)
    assert equal["lpips"] == 0
    # The companion: other weights below the same layers are another distance.
    state = torch.load(alexnet, weights_only=True)
    state["features.3.weight"] = state["features.3.weight"] * 1.01
    torch.save(state, tmp_path / "other.pth")
    (other,) = measure_learned(
        IMAGES[:1], WANTED[:1], PROMPTS[:1], LearnedOptions(lpips=str(tmp_path / "other.pth"))
    )
    assert other["lpips"] != pytest.approx(expected[0], rel=1e-5)


def test_lpips_is_that_of_torchmetrics(alexnet: Path) -> None:
    import torch

    oracle = pytest.importorskip("torchmetrics.functional.image.lpips")
    network = open_lpips(str(alexnet))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = oracle._LPIPS(pretrained=True, net="alex", pnet_rand=True).eval()
    theirs.net.load_state_dict(network.net.state_dict())
    with torch.inference_mode():
        expected = float(theirs(as_lpips_takes_it(IMAGES[:1]), as_lpips_takes_it(WANTED[:1])).item())
    assert lpips_distance(network, IMAGES[0], WANTED[0]) == pytest.approx(expected, rel=1e-5)
    assert lpips_distance(network, IMAGES[1], WANTED[0]) != pytest.approx(expected, rel=1e-5)


def test_weights_of_another_network_are_refused(alexnet: Path, tmp_path: Path) -> None:
    import torch

    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"has no features\.0\.weight; expected torchvision's alexnet-owt"):
        open_lpips(str(tmp_path / "other.pth"))
    torch.save(torch.zeros(1), tmp_path / "tensor.pth")
    with pytest.raises(UsageError, match="holds a Tensor; expected tensors by name"):
        open_lpips(str(tmp_path / "tensor.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UsageError, match="cannot be read as torch weights"):
        open_lpips(str(tmp_path / "text.pth"))
    with pytest.raises(UsageError, match=r"is no file; get alexnet-owt-7be5be79\.pth"):
        open_lpips(str(tmp_path / "none.pth"))


def test_weights_that_cannot_be_fetched_say_where_they_may_come_from(
    alexnet: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):  # an address at which nobody listens
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(UsageError, match=r"cannot be fetched .* get alexnet-owt-7be5be79\.pth where"):
        open_lpips("hub")


def test_what_is_missing_is_said_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def installed(*names: str) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in names else None)

    check_learned(LearnedOptions())
    installed("torch", "transformers", "torchvision")
    with pytest.raises(UsageError, match=r"LPIPS needs the package lpips: pip install .*\[metrics\]"):
        check_learned(LearnedOptions(lpips="hub"))
    installed("lpips", "torchvision")
    with pytest.raises(UsageError, match="the CLIP score needs the package transformers and torch"):
        check_learned(LearnedOptions(clip="hub"))
    installed("lpips", "torchvision", "torch", "transformers")
    check_learned(LearnedOptions("hub", "hub"))
    with pytest.raises(UsageError, match=r"needs AlexNet's weights, and .*none\.pth is no file"):
        check_learned(LearnedOptions(lpips=str(tmp_path / "none.pth")))
    with pytest.raises(UsageError, match="needs a folder with a CLIPModel"):
        check_learned(LearnedOptions(clip=str(tmp_path / "none")))


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
