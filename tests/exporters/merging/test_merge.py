"""Merged checkpoints against the formula over whole state dicts, and opened by diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from kiln.errors import CheckpointError, StorageError, UsageError
from kiln.exporters.checkpoints import open_checkpoint
from kiln.exporters.ldm_names import unet_ldm_names, vae_ldm_name
from kiln.exporters.merging.block_weights import BlockWeights
from kiln.exporters.merging.merge import CheckpointMerge, merge_checkpoints
from kiln.exporters.merging.sums import Method

State = dict[str, np.ndarray]
FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


def load(path: Path) -> State:
    return safetensors.numpy.load_file(path)


def varied(folder: Path, target: Path, seed: int, dtype: Any = np.float32) -> Path:
    """The same model with other values."""
    shutil.copytree(folder, target)
    rng = np.random.default_rng(seed)
    for name in FILES.values():
        state = load(target / name)
        for key, value in state.items():
            if value.dtype == np.float32:
                state[key] = (value + 0.1 * rng.normal(size=value.shape)).astype(dtype)
        safetensors.numpy.save_file(state, target / name, {"format": "pt"})
    return target


def single(folder: Path, path: Path, extra: State | None = None, metadata: Any = None) -> Path:
    """A diffusers folder as one file in LDM's layout, with what such files hold besides."""
    state: State = {}
    unet = load(folder / FILES["unet"])
    state |= {f"model.diffusion_model.{ldm}": unet[name] for name, ldm in unet_ldm_names(unet).items()}
    for name, value in load(folder / FILES["vae"]).items():
        square = value.ndim == 2 and ".attentions." in name
        state[f"first_stage_model.{vae_ldm_name(name)}"] = value[:, :, None, None] if square else value
    for name, value in load(folder / FILES["text_encoder"]).items():
        state[f"cond_stage_model.transformer.{name}"] = value
    state["alphas_cumprod"] = np.linspace(1, 0, 1000, dtype=np.float32)
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(77)[None]
    safetensors.numpy.save_file(state | (extra or {}), path, metadata)
    return path


@pytest.fixture(scope="module")
def folders(small_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("models")
    return [small_sd1, *(varied(small_sd1, base / name, seed) for seed, name in enumerate("bc"))]


@pytest.fixture(scope="module")
def files(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("files")
    ema = {"model_ema.diffusion_modelx": np.zeros(2, np.float32)}
    said = {"modelspec.hash_sha256": "0xabc", "modelspec.author": "me"}
    return [
        single(folder, base / f"{n}.safetensors", ema if n == 0 else None, said)
        for n, folder in enumerate(folders)
    ]


def run(models: list[Path], output: Path, method: Method, **options: Any) -> Any:
    return merge_checkpoints(CheckpointMerge(tuple(map(str, models)), output, method, **options))


def expected(method: str, alpha: float, *states: State) -> State:
    """The formulas of stable-diffusion-webui's checkpoint merger, over whole state dicts, in float32."""
    one, two, *three = states
    if three:
        return {k: one[k] + np.float32(alpha) * (two[k] - three[0][k]) for k in one}
    return {k: np.float32(1 - alpha) * one[k] + np.float32(alpha) * two[k] for k in one}


def compare(actual: State, wanted: State) -> float:
    """Names, shapes, type, finite; then the largest difference."""
    assert actual.keys() == wanted.keys()
    assert {k: v.shape for k, v in actual.items()} == {k: v.shape for k, v in wanted.items()}
    assert {k: v.dtype for k, v in actual.items()} == {k: v.dtype for k, v in wanted.items()}
    return max(float(np.abs(actual[k].astype("f8") - v.astype("f8")).max()) for k, v in wanted.items())


METHODS = [
    ("weighted-sum", 0.3, 2),
    ("weighted-sum", 1.0, 2),
    ("add-difference", 0.8, 3),
    ("weighted-sum", -0.5, 2),
]


@pytest.mark.parametrize(("method", "alpha", "count"), METHODS)
def test_single_files(files: list[Path], tmp_path: Path, method: str, alpha: float, count: int) -> None:
    report = run(files[:count], tmp_path / "out.safetensors", Method(method, alpha))
    states = [load(path) for path in files[:count]]
    fixed = {
        k: states[0][k] for k in states[0] if k.startswith(("alphas", "model_ema")) or "position_ids" in k
    }
    wanted = expected(method, alpha, *({k: s[k] for k in s if k not in fixed} for s in states))
    wanted |= {k: v for k, v in fixed.items() if not k.startswith("model_ema")}
    actual = load(report.output)
    assert compare(actual, wanted) < 1e-6
    assert report.layout == "single file"
    assert report.copied == {"of no network": 2}
    assert sum(report.dropped.values()) == 1
    other = expected(method, alpha * 1.01, *({k: s[k] for k in s if k not in fixed} for s in states))
    assert compare({k: actual[k] for k in other}, other) > 1e-4, "another alpha is not seen"
    if alpha == 1.0:
        assert all(np.array_equal(actual[k], states[1][k]) for k in wanted if k not in fixed)


@pytest.mark.parametrize(("method", "alpha", "count"), METHODS[::2])
def test_folders(folders: list[Path], tmp_path: Path, method: str, alpha: float, count: int) -> None:
    report = run(folders[:count], tmp_path / "out", Method(method, alpha))
    for name in FILES.values():
        states = [load(folder / name) for folder in folders[:count]]
        assert compare(load(report.output / name), expected(method, alpha, *states)) < 1e-6
        other = expected(method, alpha * 1.01, *states)
        assert compare(load(report.output / name), other) > 1e-4, "another alpha is not seen"
    assert report.merged.keys() == FILES.keys()
    assert report.copied == {}


def test_diffusers_opens_the_folder(folders: list[Path], tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    report = run(folders[:2], tmp_path / "out", Method("weighted-sum", 0.5))
    opened = StableDiffusionPipeline.from_pretrained(report.output, local_files_only=True)
    for network in FILES:
        states = [load(folder / FILES[network]) for folder in folders[:2]]
        found = getattr(opened, network).state_dict()
        assert found.keys() >= states[0].keys()
        actual = {key: found[key].numpy() for key in states[0]}
        assert compare(actual, expected("weighted-sum", 0.5, *states)) < 1e-6
        assert compare(actual, expected("weighted-sum", 0.505, *states)) > 1e-4, "another alpha is not seen"


def test_diffusers_opens_the_file(folders: list[Path], files: list[Path], tmp_path: Path) -> None:
    """The names of the merged file through diffusers' own converters give the merge of the folders."""
    import torch
    from diffusers.loaders import single_file_utils as theirs

    report = run(files[:2], tmp_path / "out.safetensors", Method("weighted-sum", 0.25))
    state = {k: torch.from_numpy(v.copy()) for k, v in load(report.output).items()}
    for network, convert in (
        ("unet", theirs.convert_ldm_unet_checkpoint),
        ("vae", theirs.convert_ldm_vae_checkpoint),
    ):
        config = json.loads((folders[0] / network / "config.json").read_text())
        converted = {k: v.numpy() for k, v in convert(dict(state), config).items()}
        one, two = (load(folder / FILES[network]) for folder in folders[:2])
        assert compare(converted, expected("weighted-sum", 0.25, one, two)) < 1e-6
        assert compare(converted, expected("weighted-sum", 0.25, two, one)) > 1e-2, "swapped models"


def test_block_weights_by_tensor(folders: list[Path], tmp_path: Path) -> None:
    numbers = [0.9, *(n / 25 for n in range(25))]
    blocks = BlockWeights.parse(",".join(map(str, numbers)))
    report = run(folders[:2], tmp_path / "out", Method("weighted-sum", 0.5, blocks))
    found: dict[str, float] = {}
    for network, name in FILES.items():
        one, two = (load(folder / name) for folder in folders[:2])
        merged = load(report.output / name)
        for key, value in merged.items():
            change = (two[key] - one[key]).astype("f8")
            found[f"{network}.{key}"] = float(
                (value.astype("f8") - one[key]).ravel() @ change.ravel()
            ) / float((change**2).sum())
    for key, alpha in found.items():
        if not key.startswith("unet"):
            assert alpha == pytest.approx(0.9, abs=1e-5), key
    assert found["unet.conv_in.weight"] != pytest.approx(1 / 25, abs=1e-5), "the next block is not seen"
    for start, block in (("time_embedding.linear_1", 0), ("conv_in", 0), ("down_blocks.0.resnets.1", 2),
                         ("down_blocks.2.downsamplers.0.conv", 9), ("mid_block.attentions.0", 12),
                         ("up_blocks.0.upsamplers.0.conv", 15), ("up_blocks.3.resnets.2", 24), ("conv_out",
                         24)):  # fmt: skip
        mine = [alpha for key, alpha in found.items() if key.startswith(f"unet.{start}")]
        assert mine
        assert mine == pytest.approx([block / 25] * len(mine), abs=1e-5), start


def test_layouts_may_be_mixed_and_a_vae_missing(
    folders: list[Path], files: list[Path], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folders[1], bare)
    shutil.rmtree(bare / "vae")
    report = run([files[0], bare], tmp_path / "out.safetensors", Method("weighted-sum", 0.5))
    assert report.copied == {"vae: bare has none": len(load(folders[0] / FILES["vae"])), "of no network": 2}
    with open_checkpoint(report.output) as found, open_checkpoint(folders[0]) as first:
        one, two = first.read("unet", "conv_in.weight"), load(folders[1] / FILES["unet"])["conv_in.weight"]
        assert np.allclose(found.read("unet", "conv_in.weight"), (one + two) / 2, atol=1e-7)
        for name in first.tensors("vae"):
            assert np.array_equal(found.read("vae", name), first.read("vae", name))


def test_precision_and_metadata(files: list[Path], tmp_path: Path) -> None:
    report = run(files[:2], tmp_path / "out.safetensors", Method("weighted-sum", 0.5), precision="fp16")
    with safe_open(report.output, "numpy") as file:
        metadata = file.metadata()
        types = {file.get_slice(key).get_dtype() for key in file.keys() if key.startswith("model.")}  # noqa: SIM118
    assert types == {"F16"}
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert metadata["modelspec.merged_from"] == "0, 1"
    assert metadata["modelspec.author"] == "me"
    assert "modelspec.hash_sha256" not in metadata
    assert json.loads(metadata["kiln_recipe"])["models"] == ["0.safetensors", "1.safetensors"]
    assert str(files[0].parent) not in json.dumps(metadata)
    assert str(tmp_path) not in json.dumps(metadata)


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(
    folders: list[Path], files: list[Path], tmp_path: Path
) -> None:
    half = Method("weighted-sum", 0.5)
    state = load(files[1])
    gone = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight"
    cases: list[tuple[State, str]] = [
        ({k: v for k, v in state.items() if k != gone}, r"unet lacks 1 tensors.*attn2\.to_q\.weight"),
        (state | {gone: state[gone][:-1]}, r"1 tensors of the unet differ in shape.*\[64, 64\].*\[63, 64\]"),
        (state | {gone: state[gone] * np.nan}, r"attn2\.to_q\.weight becomes NaN"),
    ]
    out = tmp_path / "out.safetensors"
    for number, (tensors, says) in enumerate(cases):
        path = tmp_path / f"bad-{number}.safetensors"
        safetensors.numpy.save_file(tensors, path)
        with pytest.raises(CheckpointError, match=says):
            run([files[0], path], out, half)
        path.unlink()
    with pytest.raises(CheckpointError, match="F16 ends at 65504"):
        run(files, out, Method("add-difference", 1e7), precision="fp16")
    with pytest.raises(UsageError, match=r"-o NAME\.safetensors"):
        run(files[:2], tmp_path / "out", half)
    with pytest.raises(UsageError, match="-o FOLDER"):
        run(folders[:2], out, half)
    with pytest.raises(UsageError, match="add-difference takes A and B and C; 2 checkpoints"):
        run(files[:2], out, Method("add-difference", 1))
    with pytest.raises(UsageError, match="weighted-sum, add-difference"):
        Method("average", 0.5)
    with pytest.raises(UsageError, match="alpha nan"):
        Method("weighted-sum", float("nan"))
    with pytest.raises(UsageError, match="no-such"):
        run([files[0], Path("no-such")], out, half)
    assert list(tmp_path.iterdir()) == []


def test_only_what_kiln_wrote_is_replaced(folders: list[Path], files: list[Path], tmp_path: Path) -> None:
    half = Method("weighted-sum", 0.5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for overwrite, says in ((False, "--overwrite"), (True, "not a folder that Kiln wrote")):
        with pytest.raises(StorageError, match=says):
            run(folders[:2], tmp_path / "mine", half, overwrite=overwrite)
    run(folders[:2], tmp_path / "out", half)
    run(folders[:2], tmp_path / "out", half, overwrite=True)
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    with pytest.raises(StorageError, match="--overwrite"):
        run(files[:2], out, half)
    run(files[:2], out, half, overwrite=True)
    assert load(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out", "out.safetensors"]


def test_models_of_different_predictions_are_refused(
    folders: list[Path], tmp_path: Path, edit_scheduler: Callable[[Path], None]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folders[1], other)
    edit_scheduler(other)
    with pytest.raises(CheckpointError, match=r"predicts epsilon.*predicts v_prediction"):
        run([folders[0], other], tmp_path / "out", Method("weighted-sum", 0.5))


@pytest.fixture
def edit_scheduler() -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))

    return edit
