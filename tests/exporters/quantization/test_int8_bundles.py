"""int8 bundles from end to end, on the tiny model: what is in them, and that engines agree on them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from kiln.backends.base import PrepareOptions
from kiln.backends.registry import get_backend
from kiln.benchmarks.parity import THRESHOLDS
from kiln.bundle import Bundle, open_bundle
from kiln.components import COMPONENTS
from kiln.errors import BundleError, CheckpointError, ParityError, SessionError, UsageError
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.export import ExportReport, ExportSpec, bake, export
from kiln.exporters.quantization import gate, plan, produce
from kiln.exporters.quantization.engines import open_graph
from kiln.exporters.quantization.hurting import hurting_weights
from kiln.exporters.quantization.produce import Int8Options
from kiln.exporters.quantization.quantize import quantize_weight
from kiln.int8 import dequantized_weights
from kiln.metrics import relative_l2

pytest.importorskip("torch")
pytest.importorskip("openvino", reason="no engine to calibrate with: install the cpu extra")

pytestmark = pytest.mark.usefixtures("small_int8")

QUICK = Int8Options(prompts=("red apple",), steps=2, min_parity=0.0)
NAMES = [f"{c}/{name}" for c in COMPONENTS for name in ("model.onnx", "weights.safetensors")]


@pytest.fixture(scope="module")
def made(
    small_int8: None, tiny_sd1: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Bundle, ExportReport]]:
    """The tiny model in both precisions, with what the exports reported; the one of int8 is not judged."""
    found = {}
    for precision in plan.INT8_PRECISIONS:
        folder = tmp_path_factory.mktemp(precision) / "b"
        options = dataclasses.replace(QUICK, gate=precision == "int8-full")
        report = export(ExportSpec(tiny_sd1, folder, storage=precision, int8=options))
        found[precision] = (open_bundle(folder, verify="full"), report)
    return found


def test_every_weight_is_the_float_one_quantized_or_as_it_was(
    made: dict[str, tuple[Bundle, ExportReport]], tiny_bundle: Path
) -> None:
    bundle, report = made["int8"]
    for component in COMPONENTS:
        before = load_file(tiny_bundle / component / "weights.safetensors")
        after = load_file(bundle.path / component / "weights.safetensors")
        int8 = {name for name, value in after.items() if value.dtype == np.int8}
        assert set(after) == set(before) | {f"{name}.scale" for name in int8}
        assert len(int8) == bundle.manifest["components"][component]["int8"]["weights"] > 0
        for name in int8:
            expected = quantize_weight(before[name])
            np.testing.assert_array_equal(after[name], expected.values)
            np.testing.assert_array_equal(after[f"{name}.scale"], expected.scale)
            # Of a step that is 1/127 of the largest value of a row, at most a half.
            assert relative_l2(dequantized_weights(after)[name], before[name]) < 0.02
        for name in set(before) - int8:
            np.testing.assert_array_equal(after[name], before[name])
        onnx.checker.check_model(str(bundle.path / component / "model.onnx"), full_check=True)
        if component == "unet":
            graph = onnx.load(tiny_bundle / "unet/model.onnx", load_external_data=False)
            names = [site.weight for site in plan.weight_sites("unet", graph)]
            kept = bundle.manifest["components"]["unet"]["int8"]["weights_kept"]
            assert kept == list(hurting_weights(names))
            assert int8 == set(names) - set(kept) < set(names)
    assert report.int8 == {}
    assert "parity" not in bundle.manifest
    assert bundle.manifest["storage"] == "int8"
    float_bytes = (tiny_bundle / "unet/weights.safetensors").stat().st_size
    assert (bundle.path / "unet/weights.safetensors").stat().st_size < 0.5 * float_bytes


def test_the_manifest_says_what_was_measured(
    made: dict[str, tuple[Bundle, ExportReport]], tiny_bundle: Path
) -> None:
    bundle, report = made["int8-full"]
    facts = bundle.manifest["components"]["unet"]["int8"]
    graph = onnx.load(bundle.path / "unet/model.onnx", load_external_data=False)
    kinds = [node.op_type for node in graph.graph.node]
    before = onnx.load(tiny_bundle / "unet/model.onnx", load_external_data=False)
    able = plan.unet_activations(before, plan.weight_sites("unet", before))
    assert 0 < facts["activations"] <= facts["weights"] + len(facts["weights_kept"])
    assert facts["activations"] == len(able) - len(facts["kept"])
    assert set(facts["kept"]) <= {operand.layer for operand in able}
    hurting = hurting_weights(site.weight for site in plan.weight_sites("unet", before))
    assert facts["weights_kept"] == [name for name in hurting if name in facts["kept"]]
    assert kinds.count("QuantizeLinear") <= facts["activations"]
    assert kinds.count("DequantizeLinear") == kinds.count("QuantizeLinear") + facts["weights"]
    calibration = json.loads((bundle.path / "calibration.json").read_text())
    assert calibration["facts"]["prompts"] == list(QUICK.prompts)
    assert calibration["kept"] == facts["kept"]
    assert report.int8["parity"] == bundle.manifest["parity"]
    assert set(bundle.manifest["parity"]) == {f.name for f in dataclasses.fields(gate.Parity)}


def unet_output(bundle: Bundle, engine: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    feeds = {
        "sample": rng.standard_normal((2, 4, 16, 16)).astype(np.float32),
        "timestep": np.array(500, np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 77, 32)).astype(np.float32),
    }
    shapes = {name: value.shape for name, value in feeds.items()}
    path = bundle.source("unet").graph_path
    copy = path.with_name("opened.onnx")
    try:
        return open_graph(onnx.load(path, load_external_data=False), copy, shapes, engine=engine)(feeds)[
            "out_sample"
        ]
    finally:
        copy.unlink()


@pytest.mark.parametrize("precision", plan.INT8_PRECISIONS)
def test_engines_agree_on_int8(
    made: dict[str, tuple[Bundle, ExportReport]], tiny_bundle: Path, precision: str
) -> None:
    pytest.importorskip("onnxruntime")
    bundle, _ = made[precision]
    openvino, onnxruntime = (unet_output(bundle, name) for name in ("openvino", "onnxruntime"))
    exact = unet_output(open_bundle(tiny_bundle), "onnxruntime")
    off = relative_l2(onnxruntime, exact)
    assert 1e-4 < off < 0.1
    if precision == "int8":
        assert relative_l2(openvino, onnxruntime) < 1e-4
    else:
        # A value on the edge of a step falls to one side or the other, and the next layers see that: two
        # engines are nearly as far from each other as from fp32, but no further.
        assert relative_l2(openvino, exact) < 1.25 * off
        assert relative_l2(openvino, onnxruntime) < 1.25 * off


def test_backends_agree_on_int8_weights(
    made: dict[str, tuple[Bundle, ExportReport]], tiny_bundle: Path
) -> None:
    """As users run them: ONNX Runtime and OpenVINO would round activations too if they were not told."""
    limit = THRESHOLDS["component_relative_l2"]
    rng = np.random.default_rng(3)
    feeds = {
        "sample": rng.standard_normal((2, 4, 16, 16), np.float32),
        "timestep": np.array(500, np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 77, 32), np.float32),
    }
    options = PrepareOptions({name: value.shape for name, value in feeds.items()}, precision="fp32")

    def run(bundle: Bundle, name: str, device: str) -> np.ndarray:
        backend = get_backend(name)
        session = backend.prepare(bundle.source("unet"), dataclasses.replace(options, device=device))
        return session.run(feeds)["out_sample"]

    bundle, _ = made["int8"]
    reference = run(bundle, "torch", "cpu")
    for name, device in (("openvino", "CPU"), ("onnxruntime", "cpu")):
        assert limit.holds(relative_l2(run(bundle, name, device), reference))
    assert not limit.holds(relative_l2(run(open_bundle(tiny_bundle), "torch", "cpu"), reference))
    with pytest.raises(SessionError, match="int8-full"):
        run(made["int8-full"][0], "torch", "cpu")


def test_openvino_computes_in_int8(made: dict[str, tuple[Bundle, ExportReport]]) -> None:
    import openvino

    core = openvino.Core()
    model = core.read_model(made["int8-full"][0].path / "unet/model.onnx")
    model.reshape({"sample": [2, 4, 16, 16], "timestep": [], "encoder_hidden_states": [2, 77, 32]})
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    types = [
        str(op.get_rt_info()["primitiveType"].astype(str))
        for op in compiled.get_runtime_model().get_ops()
        if op.get_rt_info()["layerType"].astype(str) in ("Convolution", "FullyConnected")
    ]
    int8 = [kind for kind in types if kind.lower().endswith("i8")]
    assert len(int8) >= 0.7 * made["int8-full"][0].manifest["components"]["unet"]["int8"]["activations"]


def test_a_lora_is_baked_before_quantizing(
    made: dict[str, tuple[Bundle, ExportReport]],
    tiny_sd1: Path,
    write_lora: Callable[..., Path],
    tmp_path: Path,
) -> None:
    lora = write_lora(tmp_path / "l.safetensors", tiny_sd1, 5)
    refs = (AdapterRef(lora, 0.5),)
    for precision, (bundle, _) in made.items():
        bake(bundle, tmp_path / f"baked-{precision}", refs)
        quiet = dataclasses.replace(QUICK, gate=False)
        export(ExportSpec(tiny_sd1, tmp_path / f"exported-{precision}", refs, precision, int8=quiet))
        for name in NAMES:
            one, other = (tmp_path / f"{kind}-{precision}" / name for kind in ("baked", "exported"))
            assert one.read_bytes() == other.read_bytes(), name
    bake(open_bundle(tmp_path / "baked-int8-full"), tmp_path / "again", ())
    for name in NAMES:
        assert (tmp_path / "again" / name).read_bytes() == (made["int8-full"][0].path / name).read_bytes()
    export(ExportSpec(tiny_sd1, tmp_path / "float", refs))
    baked = load_file(tmp_path / "float/unet/weights.safetensors")
    found = load_file(tmp_path / "baked-int8/unet/weights.safetensors")
    changed = [name for name in baked if name.endswith("attn1.to_q.weight")]
    (quantized,) = {found[name].dtype for name in changed if name.startswith("mid_block")}
    assert quantized == np.int8
    for name in changed:
        in_int8 = found[name].dtype == np.int8
        expected = quantize_weight(baked[name]).values if in_int8 else baked[name]
        np.testing.assert_array_equal(found[name], expected)


def test_a_bake_is_checked_against_the_calibration(
    made: dict[str, tuple[Bundle, ExportReport]],
    tiny_sd1: Path,
    write_lora: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle, _ = made["int8-full"]
    good = gate.Parity(0.0, 0.0, 99.0, 1.0, 1, 2)
    monkeypatch.setattr(produce, "measure_parity", lambda *_: good)
    lora = write_lora(tmp_path / "l.safetensors", tiny_sd1, 5)
    strict = dataclasses.replace(QUICK, min_parity=None)
    with pytest.raises(ParityError, match=r"does not fit: .*; use --recalibrate"):
        bake(bundle, tmp_path / "wild", (AdapterRef(lora, 60.0),), int8=strict)
    assert not (tmp_path / "wild").exists()
    report = bake(bundle, tmp_path / "mild", (AdapterRef(lora, 0.01),), int8=QUICK)
    assert report.int8["fit"]["range_ratio"] < 2
    assert open_bundle(tmp_path / "mild").manifest["fit"] == report.int8["fit"]


def test_int8_is_not_quantized_twice(
    made: dict[str, tuple[Bundle, ExportReport]], tiny_sd1: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle, _ = made["int8"]
    with pytest.raises(CheckpointError, match="is an int8 bundle"):
        export(ExportSpec(bundle.path, tmp_path / "b"))
    moved = tmp_path / "sd1"
    shutil.copytree(tiny_sd1, moved)
    quiet = dataclasses.replace(QUICK, gate=False)
    export(ExportSpec(moved, tmp_path / "orphan", storage="int8", int8=quiet))
    shutil.rmtree(moved)
    with pytest.raises(BundleError, match="has int8 weights inside and cannot be unbaked"):
        bake(open_bundle(tmp_path / "orphan"), tmp_path / "c", ())


def test_another_share_is_kept_without_measuring(
    made: dict[str, tuple[Bundle, ExportReport]],
    tiny_sd1: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(produce, "watch")
    bundle, _ = made["int8-full"]
    given = bundle.path / "calibration.json"
    nothing = dataclasses.replace(QUICK, gate=False, most_kept=0.0)
    bake(bundle, tmp_path / "baked", (), int8=nothing)
    options = dataclasses.replace(nothing, calibration=given)
    export(ExportSpec(tiny_sd1, tmp_path / "exported", storage="int8-full", int8=options))
    usual = dataclasses.replace(options, calibration=tmp_path / "baked/calibration.json", most_kept=0.1)
    export(ExportSpec(tiny_sd1, tmp_path / "back", storage="int8-full", int8=usual))
    kept = {
        name: open_bundle(tmp_path / name).manifest["components"]["unet"]["int8"]["kept"]
        for name in ("baked", "exported")
    }
    assert kept == {"baked": [], "exported": []}
    assert (tmp_path / "back/calibration.json").read_bytes() == given.read_bytes()
    for name in NAMES:
        assert (tmp_path / "back" / name).read_bytes() == (bundle.path / name).read_bytes()
    old = json.loads(given.read_text())
    del old["multiplications"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    before = dataclasses.replace(options, calibration=tmp_path / "old.json", most_kept=0.5)
    with pytest.raises(UsageError, match=r"old\.json is of an earlier Kiln .* with --recalibrate, or leave"):
        export(ExportSpec(tiny_sd1, tmp_path / "c", storage="int8-full", int8=before))
    same = dataclasses.replace(before, most_kept=None)
    export(ExportSpec(tiny_sd1, tmp_path / "old", storage="int8-full", int8=same))


def test_a_calibration_can_be_passed_along(
    made: dict[str, tuple[Bundle, ExportReport]], tiny_sd1: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle, _ = made["int8-full"]
    given = tmp_path / "c.json"
    shutil.copyfile(bundle.path / "calibration.json", given)
    options = dataclasses.replace(QUICK, gate=False, calibration=given)
    export(ExportSpec(tiny_sd1, tmp_path / "b", storage="int8-full", int8=options))
    assert (tmp_path / "b/unet/model.onnx").read_bytes() == (bundle.path / "unet/model.onnx").read_bytes()
    changed = json.loads(given.read_text()) | {"fingerprint": "0" * 64}
    given.write_text(json.dumps(changed))
    with pytest.raises(UsageError, match="was measured on another checkpoint"):
        export(ExportSpec(tiny_sd1, tmp_path / "c", storage="int8-full", int8=options))
