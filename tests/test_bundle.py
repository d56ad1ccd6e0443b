"""A bundle is opened only when every byte is as it was written, and opens in Optimum as it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kiln import bundle as module
from kiln.benchmarks.parity import THRESHOLDS, psnr_db
from kiln.bundle import is_bundle, open_bundle
from kiln.components import COMPONENTS
from kiln.errors import BundleError
from kiln.exporters.resolve import bundled_models

FILES = [
    *(f"{c}/{name}" for c in COMPONENTS for name in ("model.onnx", "weights.safetensors", "config.json")),
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"tokenizer/{name}.json" for name in ("vocab", "tokenizer_config", "special_tokens_map")),
    "tokenizer/merges.txt",
]
IMAGE = THRESHOLDS["sampler_image_psnr_db"]


@pytest.fixture(scope="module")
def kept(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that tests damage and repair."""
    return Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("kept") / "b"))


@pytest.fixture
def damaged(kept: Path) -> Any:
    """``damaged(name, change)`` rewrites a file until the test ends."""
    before: dict[Path, bytes] = {}

    def damage(name: str, change: Callable[[bytes], bytes]) -> None:
        path = kept / name
        before.setdefault(path, path.read_bytes())
        path.write_bytes(change(before[path]))

    yield damage
    for path, data in before.items():
        path.write_bytes(data)


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def test_a_whole_bundle_opens(tiny_bundle: Path) -> None:
    for verify in ("full", "stamped"):
        opened = open_bundle(tiny_bundle, verify=verify)
        assert opened.components == COMPONENTS
        assert opened.family == "sd1"
        assert opened.name == "tiny"
    assert set(opened.manifest["files"]) == set(FILES)


@pytest.mark.parametrize("small", [True, False], ids=["read", "stamped"])
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_refused(
    kept: Path, damaged: Any, monkeypatch: pytest.MonkeyPatch, name: str, small: bool
) -> None:
    if not small:
        monkeypatch.setattr(module, "_ALWAYS_READ_BYTES", 0)
    open_bundle(kept)
    damaged(name, flip)
    with pytest.raises(BundleError, match=rf"{name} is damaged: its SHA-256"):
        open_bundle(kept)
    with pytest.raises(BundleError, match="is damaged"):
        open_bundle(kept, verify="full")


@pytest.mark.parametrize("name", ["unet/model.onnx", "vae_decoder/weights.safetensors"])
def test_another_size_is_refused(kept: Path, damaged: Any, name: str) -> None:
    damaged(name, lambda data: data + b"\0")
    with pytest.raises(BundleError, match=r"bytes, the manifest says"):
        open_bundle(kept)
    damaged(name, lambda data: data[:-1])
    with pytest.raises(BundleError, match=r"bytes, the manifest says"):
        open_bundle(kept)


def test_a_missing_file_is_named(kept: Path, damaged: Any) -> None:
    damaged("tokenizer/merges.txt", lambda data: data)
    (kept / "tokenizer/merges.txt").unlink()
    with pytest.raises(BundleError, match=r"is incomplete: tokenizer/merges.txt is missing"):
        open_bundle(kept)
    (kept / "tokenizer/merges.txt").mkdir()
    try:
        with pytest.raises(BundleError, match=r"merges.txt"):
            open_bundle(kept)
    finally:
        (kept / "tokenizer/merges.txt").rmdir()


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        manifest = json.loads(data)
        change(manifest)
        return json.dumps(manifest).encode()

    return edit


FACTS = {"size": 4, "sha256": "0" * 64}
MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (lambda m: m.update(format_version=2), "bundle format 2, this Kiln reads 1; export it again"),
    "no version": (lambda m: m.pop("format_version"), "bundle format None"),
    "no name": (lambda m: m.pop("name"), "has no name of the type str"),
    "no files": (lambda m: m.update(files=[]), "has no files of the type dict"),
    "outside": (lambda m: m["files"].update({"../secret": FACTS}), "lies outside the bundle"),
    "inside out": (lambda m: m["files"].update({"unet/../../secret": FACTS}), "lies outside the bundle"),
    "absolute": (lambda m: m["files"].update({"/etc/passwd": FACTS}), "lies outside the bundle"),
    "nul": (lambda m: m["files"].update({"a\0b": FACTS}), "lies outside the bundle"),
    "no size": (lambda m: m["files"]["unet/model.onnx"].pop("size"), "no size and digest of 'unet/model"),
    "unlisted": (lambda m: m["files"].pop("unet/weights.safetensors"), "no size and digest of 'unet/weights"),
    "no tokenizer": (lambda m: m["files"].pop("tokenizer/vocab.json"), "no size and digest of 'tokenizer"),
    "component": (lambda m: m["components"].update({"../x": {}}), "the component '../x'"),
    "adapter": (lambda m: m.update(adapters=[{"name": "x"}]), "describes an adapter by other facts"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_lies_is_refused(kept: Path, damaged: Any, case: str) -> None:
    change, text = MANIFESTS[case]
    (kept.parent / "secret").write_text("1234")
    damaged("kiln.json", edited(change))
    with pytest.raises(BundleError, match=text):
        open_bundle(kept)


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format_version": 1'])
def test_a_manifest_that_is_no_json_object_is_refused(kept: Path, damaged: Any, data: bytes) -> None:
    damaged("kiln.json", lambda _: data)
    with pytest.raises(BundleError, match=r"kiln\.json"):
        open_bundle(kept)


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    assert not is_bundle(tmp_path)
    with pytest.raises(BundleError, match=r"is not a bundle.*kiln export MODEL"):
        open_bundle(tmp_path)


def test_stamps_spare_the_reading_until_a_file_is_touched(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = module.file_sha256
    monkeypatch.setenv("KILN_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_ALWAYS_READ_BYTES", 100_000)
    monkeypatch.setattr(module, "file_sha256", lambda path: read.append(path.name) or real(path))

    def opened(verify: str = "stamped") -> set[str]:
        read.clear()
        open_bundle(kept, verify=verify)
        return set(read)

    large = {p.name for p in kept.rglob("*") if p.is_file() and p.stat().st_size > 100_000}
    assert "weights.safetensors" in large
    first = opened()
    assert len(read) == len(FILES)
    assert first >= large
    opened()
    count = sum(p.stat().st_size <= 100_000 for p in map(kept.joinpath, FILES))
    assert len(read) == count < len(FILES)
    opened("full")
    assert len(read) == len(FILES)
    stat = (kept / "unet/weights.safetensors").stat()
    os.utime(kept / "unet/weights.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # changes ctime only
    opened()
    assert len(read) == count + 1
    (tmp_path / "verified/stamps.json").write_text("{]")
    opened()
    assert len(read) == len(FILES)


def test_stamps_that_cannot_be_kept_are_done_without(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(module, "_ALWAYS_READ_BYTES", 0)
    assert open_bundle(kept).components == COMPONENTS


def test_digests_follow_the_weights(tiny_bundle: Path, tiny_sd1: Path, tmp_path: Path) -> None:
    from kiln.exporters.export import ExportSpec, export

    export(ExportSpec(tiny_sd1, tmp_path / "again"))
    export(ExportSpec(tiny_sd1, tmp_path / "half", storage="fp16"))
    one, again, half = map(open_bundle, (tiny_bundle, tmp_path / "again", tmp_path / "half"))
    assert one.content_digest == again.content_digest != half.content_digest
    assert one.digest("unet") == again.digest("unet") != half.digest("unet")


def draw(pipeline: Any, latents: np.ndarray, torch: Any, steps: int = 4) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a red apple",
        negative_prompt="green",
        num_inference_steps=steps,
        guidance_scale=5.0,
        latents=torch.from_numpy(latents),
        output_type="np",
    ).images[0]
    return np.asarray((image * 255).round(), np.uint8)


def open_in_optimum(folder: Path, name: str) -> Any:
    runtime = pytest.importorskip("optimum.onnxruntime")
    return getattr(runtime, name).from_pretrained(folder)


def check_pictures(pipeline: Any, latents: np.ndarray, expected: np.ndarray) -> None:
    """The pipeline draws what is expected; not from other latents, and not in another number of steps."""
    torch = pytest.importorskip("torch")
    actual = draw(pipeline, latents, torch)
    assert actual.shape == expected.shape
    assert expected.std() > 10
    assert IMAGE.holds(psnr_db(actual, expected))
    assert not IMAGE.holds(psnr_db(draw(pipeline, np.roll(latents, 1, axis=3), torch), expected))
    assert not IMAGE.holds(psnr_db(draw(pipeline, latents, torch, steps=5), expected))


@pytest.fixture(scope="module")
def drawn_by_diffusers(tiny_sd1: Path) -> tuple[np.ndarray, np.ndarray]:
    """Latents, and the picture that diffusers' own pipeline draws from them."""
    torch = pytest.importorskip("torch")
    from diffusers import StableDiffusionPipeline

    latents = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
    return latents, draw(StableDiffusionPipeline.from_pretrained(tiny_sd1), latents, torch)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["ORTDiffusionPipeline", "ORTStableDiffusionPipeline"])
def test_optimum_opens_a_bundle_and_draws_what_diffusers_does(
    tiny_bundle: Path, drawn_by_diffusers: tuple[np.ndarray, np.ndarray], name: str
) -> None:
    latents, expected = drawn_by_diffusers
    pipeline = open_in_optimum(tiny_bundle, name)
    assert type(pipeline).__name__ == "ORTStableDiffusionPipeline"
    assert expected.shape == (128, 128, 3)
    check_pictures(pipeline, latents, expected)


def diffusers_pipeline(folder: Path) -> Any:
    """diffusers' own pipeline with the tensors and configs inside a bundle."""
    import diffusers
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    opened = open_bundle(folder)
    networks = {
        "unet": diffusers.UNet2DConditionModel.from_config(opened.config("unet")),
        "vae": getattr(diffusers, opened.config("vae_decoder")["_class_name"]).from_config(
            opened.config("vae_decoder")
        ),
        "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(opened.config("text_encoder"))),
    }
    parts = {"unet": ("unet",), "vae": ("vae_decoder", "vae_encoder"), "text_encoder": ("text_encoder",)}
    for name, network in networks.items():
        state = {}
        for part in parts[name]:
            state |= load_file(folder / part / "weights.safetensors")
        network.load_state_dict(state, strict=True)
    scheduler = getattr(diffusers, opened.scheduler_config["_class_name"])
    return diffusers.StableDiffusionPipeline(
        **{name: network.float().eval() for name, network in networks.items()},
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=scheduler.from_config(opened.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("model", ["emoji"])
def test_optimum_opens_the_bundled_model(model: str) -> None:
    torch = pytest.importorskip("torch")
    folder = bundled_models().get(model)
    if folder is None:
        pytest.skip("the bundled model is not in this checkout")
    pipeline = open_in_optimum(folder, "ORTDiffusionPipeline")
    reference = diffusers_pipeline(folder)
    size = int(open_bundle(folder).config("unet")["sample_size"])
    latents = np.random.default_rng(0).standard_normal((1, 4, size, size)).astype(np.float32)
    check_pictures(pipeline, latents, draw(reference, latents, torch))
