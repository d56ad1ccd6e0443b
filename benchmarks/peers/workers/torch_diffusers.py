"""diffusers on torch: bf16 and channels-last on a CPU that has bf16, fp16 on a GPU, unless told otherwise."""

from __future__ import annotations

import os
from typing import Any

import diffusers
import torch

from .common import PipelineWorker, effective, read_job, serve


class TorchWorker(PipelineWorker):
    """Gives the noise in the type of the UNet, which the pipeline does not convert."""

    dtype = torch.float32
    device = "cpu"

    def initial(self, prompt: int) -> torch.Tensor:
        """The initial noise of one prompt."""
        return torch.from_numpy(self._noise(prompt)).to(self.device, self.dtype)


def main() -> None:
    """Serve the harness."""
    job = read_job()
    requested = job["requested"]
    device = _device(requested["device"])
    if requested["threads"]:
        torch.set_num_threads(requested["threads"])
    dtype = _dtype(requested["precision"], device)
    if job.get("cache"):  # else torch.compile keeps what it makes among the system's temporary files
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(job["cache"])
    worker = TorchWorker(job, torch.cuda.synchronize if device == "cuda" else lambda: None)
    worker.dtype, worker.device = dtype, device

    def load() -> dict[str, Any]:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            job["model"], torch_dtype=dtype, safety_checker=None, local_files_only=True
        ).to(device)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = worker.scheduler(pipe.scheduler.config)
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
        worker.pipe = pipe
        if requested["options"].get("compile"):
            pipe.unet.forward = torch.compile(pipe.unet.forward)
            pipe(
                **{**worker.arguments(0), "num_inference_steps": 1}
            )  # compiles, for the shapes of the workload
        for owner, name, component in (
            (pipe.text_encoder, "forward", "text_encoder"),
            (pipe.unet, "forward", "unet"),
            (pipe.vae, "decode", "vae_decoder"),
        ):
            worker.watch.wrap(owner, name, component)
        modules = {"text_encoder": pipe.text_encoder, "unet": pipe.unet, "vae_decoder": pipe.vae}
        return {name: _in_force(module, requested["options"]) for name, module in modules.items()}

    serve(load, worker.draw, diffusers=diffusers.__version__, torch=torch.__version__)


def _device(asked: str) -> str:
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return {"gpu": "cuda", "rocm": "cuda"}.get(asked.lower(), asked.lower())


def _dtype(precision: str, device: str) -> torch.dtype:
    """The type of weights and activations.

    Raises:
        ValueError: a precision that torch's modules do not have.
    """
    if precision == "auto":
        own_bf16 = torch.backends.cpu.get_cpu_capability() in ("AVX512", "AMX")
        return torch.float16 if device == "cuda" else torch.bfloat16 if own_bf16 else torch.float32
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in types:
        raise ValueError(f"diffusers computes in {', '.join(types)}, not in {precision}")
    return types[precision]


def _in_force(module: Any, options: dict[str, Any]) -> dict[str, Any]:
    weight = next(module.parameters())
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return effective(
        "diffusers",
        diffusers.__version__,
        names[weight.dtype],
        torch.get_num_threads(),
        provider=f"torch {torch.__version__}",
        device=str(weight.device),
        compiled=bool(options.get("compile")),
        channels_last=True,
    )


if __name__ == "__main__":
    main()
