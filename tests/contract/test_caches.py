"""A second LoRA never gets the first one's image: two bundles that only weights tell apart, cache on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from kiln.backends import registry
from kiln.backends.base import Backend, GraphSource, PrepareOptions
from kiln.backends.compiled_cache import CompiledCache, cache_key
from kiln.benchmarks.parity import THRESHOLDS, relative_l2
from kiln.bundle import Bundle, file_sha256, open_bundle
from kiln.exporters.resolve import bundled_models

LIMIT = THRESHOLDS["component_relative_l2"]
FP32 = PrepareOptions(precision="fp32", threads=1)
SHAPES = {"sample": (1, 4, 8, 8), "timestep": (), "encoder_hidden_states": (1, 4, 256)}
WITHOUT_VALUES = {"null"}
TENSOR = "conv_out.bias"  # what it adds to the output needs no second engine to know
ADDED = 1.0


@pytest.fixture(params=[name for name in registry.names() if name not in WITHOUT_VALUES])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each registered backend that computes; one that is not there is skipped with its own reason."""
    found = registry.get_backend(request.param)
    reason = registry.why_unusable(found)
    if reason:
        pytest.skip(reason)
    return found


@pytest.fixture
def any_backend() -> Backend:
    """One that reads graphs and is there: which does not matter."""
    for name in ("onnxruntime", "openvino"):
        found = registry.get_backend(name)
        if not registry.why_unusable(found):
            return found
    pytest.skip("no engine: install the cpu extra")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """The bundled model, and again with one weight changed: same names, sizes and times."""
    if "emoji" not in bundled_models():
        pytest.skip("the bundled model is not in this checkout")
    folders = [tmp_path_factory.mktemp(name) / "model" for name in ("first", "second")]
    for folder in folders:
        shutil.copytree(bundled_models()["emoji"], folder)
    change_weight(folders[1])
    for first in [path for path in folders[0].rglob("*") if path.is_file()]:
        second = folders[1] / first.relative_to(folders[0])
        os.utime(second, ns=(first.stat().st_atime_ns, first.stat().st_mtime_ns))
        assert second.stat().st_size == first.stat().st_size
    return open_bundle(folders[0], verify="full"), open_bundle(folders[1], verify="full")


def change_weight(folder: Path) -> None:
    """Add ``ADDED`` to the first value of the tensor, in the file's bytes, and note the new digest."""
    path, manifest = folder / "unet/weights.safetensors", folder / "kiln.json"
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start = 8 + length + json.loads(raw[8 : 8 + length])[TENSOR]["data_offsets"][0]
    value = np.frombuffer(raw, np.float16, 1, start) + np.float16(ADDED)
    raw[start : start + 2] = value.tobytes()
    before = file_sha256(path)
    path.write_bytes(raw)
    manifest.write_text(manifest.read_text().replace(before, file_sha256(path)))


def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}


def run(backend: Backend, source: GraphSource, cache: Path | None) -> np.ndarray:
    session = backend.prepare(source, replace(FP32, shapes=SHAPES, cache_dir=cache))
    try:
        return session.run(feeds())["out_sample"]
    finally:
        session.close()


def check_two_models(backend: Backend, first: GraphSource, second: GraphSource, cache: Path) -> None:
    """Run both, twice, with one cache: each time the outputs differ by what the weight adds."""
    outputs = [run(backend, source, cache) for source in (first, second, first, second)]
    expected = outputs[0].copy()
    expected[:, 0] += np.float32(ADDED)
    assert LIMIT.holds(relative_l2(outputs[1], expected)), "the second model gave another image than its own"
    # Not to the bit: a graphics card may add in another order the next time.
    assert LIMIT.holds(relative_l2(outputs[2], outputs[0]))
    assert LIMIT.holds(relative_l2(outputs[3], outputs[1]))


def test_a_second_model_never_gets_the_first_ones_image(
    backend: Backend, pair: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    first, second = (bundle.source("unet") for bundle in pair)
    assert first.graph_path.read_bytes() == second.graph_path.read_bytes()
    before, after = (load_file(source.weights_path)[TENSOR] for source in (first, second))
    assert np.count_nonzero(before != after) == 1
    check_two_models(backend, first, second, tmp_path)


def test_a_cached_answer_is_the_uncached_one(
    backend: Backend, pair: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    source = pair[0].source("unet")
    without = run(backend, source, None)
    for _ in range(2):
        assert LIMIT.holds(relative_l2(run(backend, source, tmp_path), without))


class _FileEngine:
    """Keeps what it "compiled" in files named like the model, as TensorRT's and MIGraphX's providers do."""

    def __init__(self, inner: Backend, *, blind: bool) -> None:
        self.name, self._inner, self._blind = "file-engine", inner, blind
        self.compiled = 0

    def prepare(self, source: GraphSource, options: PrepareOptions) -> _FileSession:
        assert options.cache_dir is not None
        key = cache_key({"digest": "" if self._blind else source.digest, "shapes": dict(options.shapes)})
        with CompiledCache(options.cache_dir / self.name).engine_folder(key) as folder:
            file = folder.path / f"{source.graph_path.stem}.npy"
            if not folder.ready:
                self.compiled += 1
                np.save(file, run(self._inner, source, None))
            return _FileSession(np.load(file))


class _FileSession:
    def __init__(self, output: np.ndarray) -> None:
        self._output = output

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"out_sample": self._output}

    def close(self) -> None:
        pass


def test_an_engine_with_files_of_its_own(
    any_backend: Backend, pair: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    engine = _FileEngine(any_backend, blind=False)
    check_two_models(engine, *(bundle.source("unet") for bundle in pair), tmp_path)  # type: ignore[arg-type]
    assert engine.compiled == 2


def test_a_key_that_does_not_see_the_weights_is_found(
    any_backend: Backend, pair: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    """What the engines' own caches do; planted in an engine whose files hold weights."""
    engine = _FileEngine(any_backend, blind=True)
    with pytest.raises(AssertionError, match="gave another image than its own"):
        check_two_models(engine, *(bundle.source("unet") for bundle in pair), tmp_path)  # type: ignore[arg-type]
    assert engine.compiled == 1


@contextmanager
def _keeping_weights() -> Iterator[None]:
    """Let OpenVINO write the weights into what it compiles, as all engines but a recent OpenVINO do."""
    from kiln.backends import openvino_compile

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_compile, "WEIGHTLESS_SINCE", (9999,))
        yield


def test_a_blind_key_of_a_real_engine_is_found(pair: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    backend = registry.get_backend("openvino")
    reason = registry.why_unusable(backend)
    if reason:
        pytest.skip(reason)
    first, second = (bundle.source("unet") for bundle in pair)
    with _keeping_weights(), pytest.raises(AssertionError, match="gave another image than its own"):
        check_two_models(backend, first, replace(second, digest=first.digest), tmp_path)
