"""optimum-intel: its own export at static shapes, compiled once, as its documentation advises."""

from __future__ import annotations

import shutil
from importlib import metadata
from typing import Any

import openvino
from optimum.exporters.openvino import main_export
from optimum.intel import OVConfig, OVStableDiffusionPipeline

from .common import PipelineWorker, effective, read_job, serve

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_NAMES = {
    "f32": "fp32",
    "bf16": "bf16",
    "f16": "fp16",
    "float": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
}
_PARTS = ("text_encoder", "unet", "vae_decoder")


def export(job: dict[str, Any], target: Any, *, tokenizer: bool = False) -> None:
    """What ``optimum-cli export openvino --weight-format fp16`` does; fp32 where that is asked for.

    In fp16 it also stores the frequencies of the timestep's embedding, which alone moves a picture.
    """
    storage = "fp32" if job["requested"]["precision"] == "fp32" else "fp16"
    shutil.rmtree(target, ignore_errors=True)
    main_export(
        job["model"],
        target,
        task="text-to-image",
        library_name="diffusers",
        ov_config=OVConfig(dtype=storage),
        convert_tokenizer=tokenizer,
        local_files_only=True,
    )


def properties(job: dict[str, Any]) -> dict[str, Any]:
    """OpenVINO's options for a request.

    Raises:
        ValueError: a precision that it does not have.
    """
    requested = job["requested"]
    found: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
    if requested["precision"] != "auto":
        if requested["precision"] not in _HINTS:
            raise ValueError(f"OpenVINO computes in {', '.join(_HINTS)}, not in {requested['precision']}")
        found["INFERENCE_PRECISION_HINT"] = _HINTS[requested["precision"]]
    if requested["threads"]:
        found["INFERENCE_NUM_THREADS"] = str(requested["threads"])
    if job.get("cache"):
        found["CACHE_DIR"] = str(job["cache"])
    return found


def in_force(backend: str, compiled: Any) -> dict[str, Any]:
    """What a compiled model says of itself."""
    hint = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    return effective(
        backend,
        metadata.version(backend),
        _NAMES.get(hint, hint),
        int(compiled.get_property("INFERENCE_NUM_THREADS")),
        provider=f"OpenVINO {openvino.__version__}",
        device=", ".join(compiled.get_property("EXECUTION_DEVICES")),
        from_cache_reported=bool(compiled.get_property("LOADED_FROM_CACHE")),
    )


def main() -> None:
    """Serve the harness."""
    job = read_job()
    worker = PipelineWorker(job)
    requested, work = job["requested"], job["workload"]
    device = "CPU" if requested["device"] == "auto" else requested["device"].upper()

    def load() -> dict[str, Any]:
        pipe = OVStableDiffusionPipeline.from_pretrained(
            str(worker.converted),
            device=device,
            compile=False,
            ov_config=properties(job),
            safety_checker=None,
        )
        pipe.reshape(
            batch_size=work["batch"], height=work["height"], width=work["width"], num_images_per_prompt=1
        )
        pipe.compile()
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = worker.scheduler(pipe.scheduler.config)
        worker.pipe = pipe
        parts = {name: getattr(pipe, name) for name in _PARTS}
        for name, part in parts.items():
            worker.watch.wrap(part, "forward", name)
        return {name: in_force("optimum-intel", part.request) for name, part in parts.items()}

    serve(load, worker.draw, lambda: export(job, worker.converted), openvino=openvino.__version__)


if __name__ == "__main__":
    main()
