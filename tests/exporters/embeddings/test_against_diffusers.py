"""Embeddings baked into a bundle against diffusers' ``load_textual_inversion`` on transformers' CLIP."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kiln.backends.base import PrepareOptions
from kiln.backends.registry import get_backend
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.bundle import Bundle, open_bundle
from kiln.exporters.embeddings.base import EmbeddingRef
from kiln.exporters.embeddings.plan import TABLE
from kiln.exporters.export import ExportSpec, add_tokens, export
from kiln.runtime.tokenizer import ClipTokenizer

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
STATES = THRESHOLDS["component_relative_l2"]
TOKENS = {"<birb>": 1, "EasyToy": 3, "<toy-two>": 9}
PROMPTS = [
    "<birb>",
    "EasyToy, lowres, bad hands",
    "a photo of <birb>, and EasyToy in <toy-two>!",
    "(<birb>) <birb><birb> <Birb",
    "EasyToy EasyToy",
    "",
    "an apple without any of them",
    " ".join(["word"] * 70) + " <toy-two> and what is cut",
    " ".join(["word"] * 74) + " EasyToy",
    "<toy-two> " * 12,
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One embedding of diffusers' form, one of A1111's and one of kohya's, for a text encoder 32 wide."""
    folder, rng = tmp_path_factory.mktemp("embeddings"), np.random.default_rng(0)
    arrays = {t: rng.normal(size=(n, 32), scale=0.5).astype(np.float32) for t, n in TOKENS.items()}
    torch.save({"<birb>": torch.from_numpy(arrays["<birb>"][0])}, folder / "learned_embeds.bin")
    params = {"*": torch.nn.Parameter(torch.from_numpy(arrays["EasyToy"]))}
    torch.save({"string_to_token": {"*": 265}, "string_to_param": params, "name": "x"}, folder / "EasyToy.pt")
    save_file({"emb_params": arrays["<toy-two>"]}, folder / "two.safetensors")
    return [folder / "learned_embeds.bin", folder / "EasyToy.pt", folder / "two.safetensors"]


@pytest.fixture(scope="module")
def refs(files: list[Path]) -> tuple[EmbeddingRef, ...]:
    return EmbeddingRef(files[0]), EmbeddingRef(files[1]), EmbeddingRef(files[2], "<toy-two>")


@pytest.fixture(scope="module")
def exported(
    tiny_sd1: Path,
    tiny_bundle: Path,
    refs: tuple[EmbeddingRef, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    output = tmp_path_factory.mktemp("bundle") / "with"
    report = export(ExportSpec(tiny_sd1, output, embeddings=refs))
    assert report.embeddings == TOKENS
    return open_bundle(output, verify="full")


@pytest.fixture(scope="module")
def oracle(tiny_sd1: Path, files: list[Path]) -> Any:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd1)
    for path, token in zip(files, TOKENS, strict=True):
        stored = {"EasyToy": None, "<birb>": None}.get(token, token)
        if path.suffix == ".pt":
            # diffusers calls it by the name inside; the web UI, and Kiln, by the file's.
            loaded = torch.load(path, weights_only=True)
            pipe.load_textual_inversion(loaded | {"name": "EasyToy"})
        else:
            pipe.load_textual_inversion(str(path), token=stored)
    return pipe


def oracle_ids(pipe: Any, prompts: list[str]) -> np.ndarray:
    converted = pipe.maybe_convert_prompt(list(prompts), pipe.tokenizer)
    return pipe.tokenizer(
        converted, padding="max_length", truncation=True, max_length=77, return_tensors="np"
    ).input_ids


def tokenizer(bundle: Bundle) -> ClipTokenizer:
    return ClipTokenizer.open(bundle.tokenizer_dir, {row.token: row.ids for row in bundle.embeddings})


def test_ids_are_those_of_diffusers(exported: Bundle, oracle: Any) -> None:
    ours = tokenizer(exported).encode(PROMPTS).input_ids
    theirs = oracle_ids(oracle, PROMPTS)
    np.testing.assert_array_equal(ours, theirs)
    assert (ours >= 49408).any(axis=1).tolist() == [bool(t) and "any of" not in t for t in PROMPTS]
    planted = ClipTokenizer.open(exported.tokenizer_dir, {"<birb>": (49409,)}).encode(PROMPTS).input_ids
    assert not np.array_equal(planted, theirs)


def test_rows_are_those_of_diffusers(exported: Bundle, oracle: Any) -> None:
    table = load_file(exported.source("text_encoder").weights_path)[TABLE]
    expected = oracle.text_encoder.get_input_embeddings().weight.detach().numpy()
    assert table.shape == expected.shape == (49408 + 13, 32)
    np.testing.assert_array_equal(table, expected)
    assert exported.config("text_encoder")["vocab_size"] == 49421


@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "openvino"])
def test_hidden_states_are_those_of_diffusers(exported: Bundle, oracle: Any, backend: str) -> None:
    engine = get_backend(backend)
    if not engine.probe().available:
        pytest.skip(f"{backend} is not here")
    ids = tokenizer(exported).encode(PROMPTS).input_ids
    options = PrepareOptions(shapes={"input_ids": ids.shape}, precision="fp32")
    session = engine.prepare(exported.source("text_encoder"), options)
    try:
        found = session.run({"input_ids": ids})["last_hidden_state"]
        planted = session.run({"input_ids": np.where(ids == 49408, 49409, ids)})["last_hidden_state"]
    finally:
        session.close()
    with torch.no_grad():
        expected = oracle.text_encoder(torch.from_numpy(oracle_ids(oracle, PROMPTS)))[0].numpy()
    assert found.shape == expected.shape == (len(PROMPTS), 77, 32)
    assert found.dtype == expected.dtype == np.float32
    assert np.isfinite(found).all()
    assert STATES.holds(relative_l2(found, expected))
    assert not STATES.holds(relative_l2(planted, expected))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_optimum_knows_the_tokens(exported: Bundle, oracle: Any) -> None:
    runtime = pytest.importorskip("optimum.onnxruntime")
    pipe = runtime.ORTDiffusionPipeline.from_pretrained(exported.path)
    for negative, prompt in itertools.pairwise(PROMPTS):
        said = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        with torch.no_grad():
            ours = pipe.encode_prompt(prompt, negative_prompt=negative, **said)
            theirs = oracle.encode_prompt(prompt, negative_prompt=negative, **said)
        for found, expected in zip(ours, theirs, strict=True):
            assert STATES.holds(relative_l2(np.asarray(found), expected.numpy())), (prompt, negative)


def test_adding_to_a_bundle_is_exporting_with_them(
    exported: Bundle, tiny_bundle: Path, refs: tuple[EmbeddingRef, ...], tmp_path: Path
) -> None:
    """To the byte, and in two steps as in one."""
    add_tokens(open_bundle(tiny_bundle), tmp_path / "a", refs, name="with")
    add_tokens(open_bundle(tiny_bundle), tmp_path / "b", refs[:1])
    report = add_tokens(open_bundle(tmp_path / "b"), tmp_path / "c", refs)
    assert list(report.embeddings) == ["EasyToy", "<toy-two>"]
    for folder in (tmp_path / "a", tmp_path / "c"):
        opened = open_bundle(folder, verify="full")
        assert opened.embeddings == exported.embeddings
        for name, facts in exported.manifest["files"].items():
            assert opened.manifest["files"][name] == facts, name
        assert opened.manifest["components"] == exported.manifest["components"]


def test_nothing_but_the_text_encoder_and_the_tokenizer_changes(exported: Bundle, tiny_bundle: Path) -> None:
    ours, theirs = exported.manifest["files"], json.loads((tiny_bundle / "kiln.json").read_text())["files"]
    changed = {name for name in ours if ours[name] != theirs.get(name)}
    assert changed == {
        "text_encoder/config.json",
        "text_encoder/model.onnx",
        "text_encoder/weights.safetensors",
        "tokenizer/added_tokens.json",
    }
    assert theirs.keys() <= ours.keys()


def test_a_diffusers_folder_that_learnt_tokens_is_read(
    oracle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What diffusers saves after ``load_textual_inversion``; no graph is traced for its longer table."""
    from kiln.exporters import tracing

    oracle.save_pretrained(tmp_path / "folder")
    monkeypatch.setattr(tracing, "trace", lambda *_: pytest.fail("a graph was traced"))
    export(ExportSpec(tmp_path / "folder", tmp_path / "bundle"))
    bundle = open_bundle(tmp_path / "bundle")
    assert {row.token: len(row.ids) for row in bundle.embeddings} == TOKENS
    np.testing.assert_array_equal(tokenizer(bundle).encode(PROMPTS).input_ids, oracle_ids(oracle, PROMPTS))


def test_a_lora_with_embeddings(
    tiny_sd1: Path, tiny_bundle: Path, write_lora: Callable[..., Path], tmp_path: Path
) -> None:
    """They come with the LoRA, at full strength, and only where it acts."""
    from kiln.exporters.adapters.base import AdapterRef
    from kiln.exporters.export import bake

    path = write_lora(tmp_path / "style.safetensors", tiny_sd1, 1)
    rng = np.random.default_rng(3)
    own = {
        "bundle_emb.my.toy.string_to_param.*": rng.normal(size=(2, 32)).astype(np.float32),
        "bundle_emb.other.clip_l": rng.normal(size=(1, 32)).astype(np.float32),
        "<s1>": rng.normal(size=32).astype(np.float32),
    }
    save_file(load_file(path) | own, path)
    base = open_bundle(tiny_bundle)
    report = bake(base, tmp_path / "baked", (AdapterRef(path, 0.25), AdapterRef(path, 0.5)))
    assert report.embeddings == {"<s1>": 1, "my.toy": 2, "other": 1}
    assert report.adapters[0].unmatched_keys == ()
    baked = open_bundle(tmp_path / "baked")
    table = load_file(baked.source("text_encoder").weights_path)[TABLE]
    by_token = {row.token: table[list(row.ids)] for row in baked.embeddings}
    for key, token in zip(own, ("my.toy", "other", "<s1>"), strict=True):
        np.testing.assert_array_equal(by_token[token], own[key].reshape(-1, 32))
    bake(base, tmp_path / "zero", (AdapterRef(path, 0.0),))
    for name in ("weights.safetensors", "model.onnx", "config.json"):
        assert (tmp_path / "zero/text_encoder" / name).read_bytes() == (
            tiny_bundle / "text_encoder" / name
        ).read_bytes()
    assert open_bundle(tmp_path / "zero").embeddings == ()


def test_other_adapters_keep_the_embeddings_and_new_embeddings_the_adapters(
    exported: Bundle,
    tiny_sd1: Path,
    write_lora: Callable[..., Path],
    refs: tuple[EmbeddingRef, ...],
    tmp_path: Path,
) -> None:
    from kiln.exporters.adapters.base import AdapterRef
    from kiln.exporters.export import bake

    lora = AdapterRef(write_lora(tmp_path / "style.safetensors", tiny_sd1, 1), 0.5)
    bake(exported, tmp_path / "a", (lora,), embeddings=refs[:2])
    export(ExportSpec(tiny_sd1, tmp_path / "b", (lora,), embeddings=refs))
    bake(exported, tmp_path / "plain", (lora,))
    a, b = open_bundle(tmp_path / "a"), open_bundle(tmp_path / "b")
    assert a.embeddings == b.embeddings == exported.embeddings
    assert a.content_digest == b.content_digest == open_bundle(tmp_path / "plain").content_digest
    assert a.content_digest != exported.content_digest
    more = tmp_path / "more.safetensors"
    save_file({"emb_params": np.ones((1, 32), np.float32)}, more)
    add_tokens(a, tmp_path / "c", (EmbeddingRef(more),))
    c = open_bundle(tmp_path / "c")
    assert c.adapters == a.adapters
    assert [row.token for row in c.embeddings] == [*TOKENS, "more"]
    assert c.digest("unet") == a.digest("unet")
    export(ExportSpec(tmp_path / "c", tmp_path / "d"))  # a bundle as a checkpoint, adapters and all
    d = open_bundle(tmp_path / "d")
    assert (d.embeddings, d.content_digest) == (c.embeddings, c.content_digest)
