"""Which lowerings go together, what keys a cache, and how ONNX Runtime finds the weights of bytes."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from kiln.backends.base import GraphSource
from kiln.backends.lowerings import registry
from kiln.backends.lowerings.registry import external_data_folder_entry, lower, names, resolve, versions
from kiln.errors import GraphError, SessionError


def test_lowerings_are_named_in_their_order() -> None:
    assert names() == ("static", "opset17", "opset22", "ort_fused", "fp16", "bf16")
    assert resolve(()) == ()
    assert resolve(("ort_fused", "fp16")) == ("static", "ort_fused", "fp16")
    assert resolve(("static", "opset17")) == ("static", "opset17")


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (("fp8",), "no lowering 'fp8'; known are static, opset17"),
        (("fp16", "ort_fused"), "expected ['ort_fused', 'fp16']"),
        (("fp16", "fp16"), "out of order or repeated"),
        (("opset17", "ort_fused"), "do not go together"),
        (("opset17", "bf16"), "opset22"),
        (("ort_fused", "bf16"), "float32 and fp16"),
        (("fp16", "bf16"), "one 16-bit type"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_what_does_not_go_together_is_refused(wanted: tuple[str, ...], text: str) -> None:
    with pytest.raises(SessionError) as caught:
        resolve(wanted)
    assert text in str(caught.value)


def test_exclusions_hold_both_ways() -> None:
    for name, lowering in registry._LOWERINGS.items():
        for other in lowering.excludes:
            assert name in registry._LOWERINGS[other].excludes


def test_versions_name_everything_that_is_applied() -> None:
    assert versions(("fp16",)) == {"static": 1, "fp16": 1}
    assert versions(()) == {}
    with pytest.raises(SessionError):
        versions(("fp8",))


def test_no_lowering_gives_the_graph_of_the_bundle(source_of: Any) -> None:
    source = source_of("unet")
    assert (
        lower((), source, {}).SerializeToString()
        == onnx.load(source.graph_path, load_external_data=False).SerializeToString()
    )


def test_lowering_twice_gives_the_same_bytes(source_of: Any, shapes: Any) -> None:
    for wanted in (("ort_fused", "fp16"), ("opset17", "fp16")):
        made = [
            lower(wanted, source_of("vae_decoder"), shapes["vae_decoder"]).SerializeToString()
            for _ in range(2)
        ]
        assert made[0] == made[1]


LOWER = """
import hashlib, sys
from pathlib import Path
from kiln.backends.base import GraphSource
from kiln.backends.lowerings.registry import lower
folder = Path(sys.argv[1])
source = GraphSource("vae_decoder", folder / "model.onnx", folder / "weights.safetensors", {}, "")
shapes = {"latent_sample": (1, 4, 4, 5)}
model = lower(("ort_fused", "fp16"), source, shapes)
engines = {"torch", "onnxruntime"}.intersection(sys.modules)
print(hashlib.sha256(model.SerializeToString()).hexdigest(), *engines)
"""


def test_every_process_makes_the_same_bytes_without_an_engine(source_of: Any) -> None:
    """A set of strings has another order in each process; a cache must not see it."""
    folder = str(source_of("vae_decoder").graph_path.parent)
    digests = set()
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", LOWER, folder],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        digest, *engines = run.stdout.split()
        assert engines == []
        digests.add(digest)
    assert len(digests) == 1


def test_weights_are_not_read(source_of: Any, shapes: Any, tmp_path: Path) -> None:
    source = source_of("vae_decoder")
    graph = shutil.copy(source.graph_path, tmp_path / "model.onnx")
    without = GraphSource("vae_decoder", Path(graph), tmp_path / "weights.safetensors", {}, "")
    for wanted in (("opset17", "fp16"), ("ort_fused", "fp16")):
        made = lower(wanted, without, shapes["vae_decoder"]).SerializeToString()
        assert made == lower(wanted, source, shapes["vae_decoder"]).SerializeToString()


def test_lowering_stable_diffusion_takes_little_memory(shipped_source: Any, sd1_shapes: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for wanted in (("opset17", "fp16"), ("ort_fused", "fp16")):
        lower(wanted, shipped_source("unet"), sd1_shapes["unet"])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500_000  # kilobytes on Linux


def test_onnx_runtime_finds_the_weights_of_bytes_by_the_entry(
    source_of: Any,
    shapes: Any,
    feeds: Any,
    run_ort: Any,
    canonical_outputs: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    source = source_of("vae_decoder")
    key, folder = external_data_folder_entry(source)
    assert (Path(folder) / "weights.safetensors").is_file()
    made = lower(("static",), source, shapes["vae_decoder"])
    (actual,) = run_ort(made, source, feeds["vae_decoder"])
    np.testing.assert_allclose(actual, canonical_outputs("vae_decoder")[0], atol=1e-4)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception, match=r"weights\.safetensors"):
        onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    options.add_session_config_entry(key, str(tmp_path))
    with pytest.raises(Exception, match=r"weights\.safetensors"):
        onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_a_graph_that_cannot_be_read_is_an_error(tmp_path: Path, source_of: Any) -> None:
    missing = GraphSource("unet", tmp_path / "model.onnx", tmp_path / "weights.safetensors", {}, "")
    with pytest.raises(GraphError, match="cannot be read"):
        lower((), missing, {})
    missing.graph_path.write_bytes(b"no graph")
    with pytest.raises(GraphError, match="cannot be read"):
        lower((), missing, {})
    shutil.copy(source_of("unet").graph_path, missing.graph_path)
    other = GraphSource("unet", missing.graph_path, tmp_path / "other.safetensors", {}, "")
    with pytest.raises(GraphError, match=r"expected other\.safetensors"):
        lower((), other, {})
