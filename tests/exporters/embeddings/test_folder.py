"""A folder of embeddings, and the commands that take them."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import save_file

from kiln.errors import UsageError
from kiln.exporters.embeddings.base import EmbeddingRef
from kiln.exporters.embeddings.folder import embeddings_named
from kiln.exporters.resolve import bundled_models
from kiln.runtime.tokenizer import names_in

Run = Callable[..., Result]


def vectors(count: int = 2, width: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width), scale=0.3).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two that fit the bundled model, one of SD1, one with a token, one broken, and what is no embedding."""
    (tmp_path / "e/sub").mkdir(parents=True)
    save_file({"emb_params": vectors()}, tmp_path / "e/EasyToy.safetensors")
    save_file({"emb_params": vectors(seed=1)}, tmp_path / "e/sub/badhand.safetensors")
    save_file({"emb_params": vectors(width=768)}, tmp_path / "e/wide.safetensors")
    save_file({"<birb>": vectors(1, seed=2)[0]}, tmp_path / "e/learned_embeds.safetensors")
    (tmp_path / "e/broken.pt").write_bytes(b"PK\x03\x04 <birb> and no more")
    (tmp_path / "e/apple.txt").touch()
    return tmp_path / "e"


def named(folder: Path, prompts: str) -> list[tuple[str, str | None]]:
    found = embeddings_named(folder, prompts, lambda name: names_in(prompts, name))
    return [(ref.path.name, ref.token) for ref in found]


def test_a_prompt_takes_what_it_names(folder: Path) -> None:
    assert named(folder, "red apple") == []
    assert named(folder, "an easytoy\nbadhand, ugly") == [
        ("EasyToy.safetensors", "EasyToy"),
        ("badhand.safetensors", "badhand"),
    ]
    assert named(folder, "a <birb>.") == [("learned_embeds.safetensors", "<birb>")]
    assert named(folder, "a birb, easytoys") == []
    assert named(folder, "broken") == [
        ("broken.pt", "broken")
    ]  # asked for by name: it is opened, and refused


def test_a_folder_that_is_not_there_or_ambiguous(folder: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        named(folder / "none", "x")
    save_file({"emb_params": vectors()}, folder / "sub/EasyToy.safetensors")
    assert named(folder, "red apple") == []
    with pytest.raises(UsageError, match=r"'EasyToy' could be .* or .*say which"):
        named(folder, "EasyToy")


def picture(path: Path, name: str | None) -> Path:
    """A PNG file with an embedding of that name in its text; a plain one for None."""
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    if name is not None:
        stored = {"string_to_param": {"*": {"TORCHTENSOR": vectors().astype(float).tolist()}}, "name": name}
        info.add_text("sd-ti-embedding", base64.b64encode(json.dumps(stored).encode()).decode())
    Image.new("RGB", (16, 16), (200, 30, 90)).save(path, pnginfo=info)
    return path


def test_a_picture_with_an_embedding_is_called_by_its_name(folder: Path) -> None:
    picture(folder / "cat.png", "rick")
    picture(folder / "sub/cat.preview.png", "rick")
    assert named(folder, "a rick in a hat") == [("cat.png", "rick")]
    assert named(folder, "a Rick, and his cat") == [("cat.png", "rick")]
    assert named(folder, "a cat") == [("cat.png", "cat")]
    assert named(folder, "a dog, cat.preview") == [("cat.png", "cat")]
    picture(folder / "sub/other.png", "rick")
    with pytest.raises(UsageError, match=r"'rick' could be .*cat\.png or .*other\.png; say which"):
        named(folder, "rick")


def test_a_plain_picture_is_the_preview_of_another_file(folder: Path) -> None:
    picture(folder / "EasyToy.png", None)
    picture(folder / "apple.png", None)
    (folder / "badhand.png").write_bytes(picture(folder / "x.png", None).read_bytes()[:60])
    assert named(folder, "an easytoy") == [("EasyToy.safetensors", "EasyToy")]
    assert named(folder, "badhand, apple") == [("badhand.safetensors", "badhand")]
    (folder / "lonely.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    assert named(folder, "lonely") == [("lonely.png", "lonely")]  # it is opened, and refused
    picture(folder / "EasyToy.png", "EasyToy")
    with pytest.raises(UsageError, match=r"'EasyToy' could be .*EasyToy\.safetensors or .*EasyToy\.png"):
        named(folder, "an easytoy")


@pytest.fixture
def run(run_command: Run) -> Run:
    if "emoji" not in bundled_models():
        pytest.skip("the bundled model is not in this checkout")
    return run_command


def test_generate_uses_what_the_prompts_name(run: Run, folder: Path) -> None:
    from PIL import Image

    pytest.importorskip("onnxruntime")
    words = ["--backend", "onnxruntime", "--steps", "2", "-s", "1", "-q", "--embedding-dir", folder]
    texts, pixels = {}, {}
    for name, prompt, negative in (
        ("plain", "red apple", ""),
        ("toy", "red EasyToy apple", ""),
        ("negative", "red apple", "badhand"),
    ):
        result = run("generate", prompt, "-n", negative, *words, "-o", f"{name}.png")
        assert result.exit_code == 0, result.output
        with Image.open(f"{name}.png") as image:
            texts[name], pixels[name] = image.text["parameters"], np.asarray(image)  # type: ignore[attr-defined]
    assert "TI hashes" not in texts["plain"]
    assert texts["toy"].startswith("red EasyToy apple\n")
    assert 'TI hashes: "EasyToy: ' in texts["toy"]
    assert "Negative prompt: badhand\n" in texts["negative"]
    assert 'TI hashes: "badhand: ' in texts["negative"]
    assert not np.array_equal(pixels["plain"], pixels["toy"])
    assert not np.array_equal(pixels["plain"], pixels["negative"])


def test_what_does_not_fit_is_refused_where_it_is_asked_for(run: Run, folder: Path) -> None:
    refused = run("generate", "a wide apple", "--embedding-dir", folder, "-o", "x.png")
    assert refused.exit_code == 1
    assert "'wide' is for SD1: its vectors are 768 wide" in refused.stderr
    assert list(Path().iterdir()) == []
    refused = run("generate", "a broken apple", "--embedding-dir", folder, "-o", "x.png")
    assert (refused.exit_code, "broken.pt" in refused.stderr) == (1, True)
    refused = run("generate", "an apple", "--embedding", "none.pt")
    assert (refused.exit_code, "no embedding file 'none.pt'" in refused.stderr) == (2, True)


def test_a_picture_is_baked_without_torch(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    result = run("bake", "emoji", "-o", "with", "--embedding", picture(folder / "x.png", "rick"))
    assert result.exit_code == 0, result.output
    assert "token rick: 2 vectors\n" in result.stderr
    refused = run("bake", "emoji", "-o", "without", "--embedding", picture(folder / "y.png", None))
    assert (refused.exit_code, "is a picture without an embedding" in refused.stderr) == (1, True)
    assert "Traceback" not in refused.output


def test_bake_and_inspect(run: Run, folder: Path) -> None:
    lora = next(iter(bundled_models().values())).parent / "emoji-flat.safetensors"
    steps = [
        ("bake", "emoji", "-o", "styled", "--lora", f"{lora}:0.5"),
        ("bake", "styled", "-o", "both", "--embedding", f"{folder / 'EasyToy.safetensors'}:mytoy"),
        ("bake", "both", "-o", "more", "--embedding", folder / "learned_embeds.safetensors"),
    ]
    for words in steps:
        result = run(*words)
        assert result.exit_code == 0, result.output
    assert "token <birb>: 1 vector\n" in result.stderr
    said = json.loads(run("inspect", "more", "--json").stdout)
    assert [(row["token"], row["vectors"]) for row in said["embeddings"]] == [("mytoy", 2), ("<birb>", 1)]
    assert [row["name"] for row in said["adapters"]] == ["emoji-flat"]
    refused = run("bake", "more", "-o", "again", "--embedding", f"{folder / 'sub/badhand.safetensors'}:MyToy")
    assert (refused.exit_code, "'mytoy' is a token already" in refused.stderr) == (1, True)
    assert not Path("again").exists()


def test_a_reference_is_a_file_and_a_token(folder: Path) -> None:
    path = folder / "EasyToy.safetensors"
    assert EmbeddingRef.parse(str(path)) == EmbeddingRef(path)
    assert EmbeddingRef.parse(f"{path}:<toy>") == EmbeddingRef(path, "<toy>")
