"""optimum-onnx: its own ONNX export on ONNX Runtime, in the precision of its export (fp32 on a CPU)."""

from __future__ import annotations

import shutil
from importlib import metadata
from typing import Any

import onnxruntime
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTStableDiffusionPipeline

from .common import PipelineWorker, effective, read_job, serve

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_PARTS = ("text_encoder", "unet", "vae_decoder")


def main() -> None:
    """Serve the harness."""
    job = read_job()
    worker = PipelineWorker(job)
    requested = job["requested"]
    device = "cpu" if requested["device"] == "auto" else requested["device"].lower()

    def convert() -> None:
        shutil.rmtree(worker.converted, ignore_errors=True)
        main_export(
            job["model"],
            worker.converted,
            task="text-to-image",
            library_name="diffusers",
            local_files_only=True,
        )

    def load() -> dict[str, Any]:
        if requested["precision"] not in ("auto", "fp32"):
            raise ValueError(f"its export on a CPU is in fp32; {requested['precision']} was asked for")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = requested["threads"]
        pipe = ORTStableDiffusionPipeline.from_pretrained(
            str(worker.converted), provider=_PROVIDERS[device], session_options=options, safety_checker=None
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = worker.scheduler(pipe.scheduler.config)
        worker.pipe = pipe
        parts = {name: getattr(pipe, name) for name in _PARTS}
        for name, part in parts.items():
            worker.watch.wrap(part, "forward", name)
        return {name: _in_force(part.session, requested["threads"]) for name, part in parts.items()}

    serve(load, worker.draw, convert, onnxruntime=onnxruntime.__version__)


def _in_force(session: Any, threads: int) -> dict[str, Any]:
    types = {port.type for port in session.get_inputs() if "float" in port.type}
    precision = "fp16" if "tensor(float16)" in types else "fp32"
    return effective(
        "optimum-onnx",
        metadata.version("optimum-onnx"),
        precision,
        threads,
        provider=f"{session.get_providers()[0]} {onnxruntime.__version__}",
    )


if __name__ == "__main__":
    main()
