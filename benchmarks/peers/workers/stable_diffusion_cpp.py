"""stable-diffusion.cpp through its Python binding: ggml on the weights of the folder, as they are stored."""

from __future__ import annotations

import os
import time
from importlib import metadata
from typing import Any

import numpy as np
import stable_diffusion_cpp

from ...harness.wire import Message
from .common import UNKNOWN, effective, read_job, serve

_TYPES = {"auto": "default", "fp32": "f32", "fp16": "f16", "bf16": "bf16"}


class Worker:
    """Serves the harness."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.work = job, job["workload"]
        self.model: Any = None

    def load(self) -> dict[str, Any]:
        """Read the diffusers folder; weights are converted when a precision is asked for.

        Raises:
            ValueError: a precision or a sampler that cannot be compared.
        """
        work, requested = self.work, self.job["requested"]
        if (work["sampler"], work["schedule"]) != ("euler", "normal"):
            raise ValueError(
                f"peers are compared with euler normal, not {work['sampler']} {work['schedule']}"
            )
        if requested["precision"] not in _TYPES:
            raise ValueError(f"it stores {', '.join(_TYPES)}, not {requested['precision']}")
        # Left to itself it counts physical cores, and on a virtual machine often finds one.
        threads = requested["threads"] or os.cpu_count() or 1
        self.model = stable_diffusion_cpp.StableDiffusion(
            model_path=self.job["model"],
            n_threads=threads,
            wtype=_TYPES[requested["precision"]],
            rng_type="cpu",  # torch's generator on a CPU: the noise of Kiln for one seed
            sampler_rng_type="cpu",
            verbose=False,
        )
        facts = effective(
            "stable-diffusion.cpp",
            metadata.version("stable-diffusion-cpp-python"),
            UNKNOWN,
            threads,
            provider="ggml",
            asked_weight_type=_TYPES[requested["precision"]],
        )
        return {"text_encoder": facts, "unet": facts, "vae_decoder": facts}

    def draw(self, prompt: int, seed: int, save: str | None = None, latents: str | None = None) -> Message:
        """Draw one batch; each step's time is what the library reports.

        Raises:
            ValueError: latents were asked for, which it does not give.
        """
        if latents:
            raise ValueError("stable-diffusion.cpp does not give latents")
        work = self.work
        steps: list[float] = []
        started, start = time.monotonic_ns(), time.perf_counter()
        pictures = self.model.generate_image(
            work["prompts"][prompt],
            work["negative_prompt"],
            width=work["width"],
            height=work["height"],
            cfg_scale=work["cfg_scale"],
            sample_method="euler",
            scheduler="discrete",
            sample_steps=work["steps"],
            seed=seed,
            batch_count=work["batch"],
            progress_callback=lambda step, total, seconds: steps.append(seconds),
        )
        seconds = time.perf_counter() - start
        if save:
            np.save(save, np.stack([np.asarray(picture.convert("RGB"), np.uint8) for picture in pictures]))
        taken = steps[-work["steps"] :]  # it also reports the progress of loading
        return {
            "started_ns": started,
            "seconds": seconds,
            "components": {"unet": sum(taken)},
            "unet_steps": taken,
        }


def main() -> None:
    """Serve the harness."""
    worker = Worker(read_job())
    serve(worker.load, worker.draw, binding=metadata.version("stable-diffusion-cpp-python"))


if __name__ == "__main__":
    main()
