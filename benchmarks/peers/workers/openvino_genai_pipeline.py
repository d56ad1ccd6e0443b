"""OpenVINO GenAI's Text2ImagePipeline: C++ over optimum-intel's export, at static shapes."""

from __future__ import annotations

import json
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from ...harness.wire import Message
from .common import UNKNOWN, effective, read_job, serve
from .optimum_intel import export, properties


class FixedNoise(openvino_genai.Generator):
    """Gives the harness's noise instead of random numbers: whole, or number by number."""

    def __init__(self, noise: np.ndarray) -> None:
        super().__init__()
        self._noise = np.ascontiguousarray(noise, np.float32)
        self._numbers = iter(self._noise.ravel())

    def next(self) -> float:
        """The next number of the initial noise.

        Raises:
            RuntimeError: all were given.
        """
        number = next(self._numbers, None)
        if number is None:
            raise RuntimeError("more noise was asked for than the initial one")
        return float(number)

    def next_tensor(self, shape: Any) -> openvino.Tensor:
        """The initial noise.

        Raises:
            RuntimeError: another shape was asked for.
        """
        if list(shape) != list(self._noise.shape):
            raise RuntimeError(f"noise of shape {list(shape)} was asked for; there is {self._noise.shape}")
        return openvino.Tensor(self._noise)


class Worker:
    """Serves the harness."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.work = job, job["workload"]
        self.noise = np.load(job["noise"])
        self.converted = Path(job["scratch"]) / "converted"
        self.pipe: Any = None

    def convert(self) -> None:
        """Export by optimum-intel, with the tokenizer that GenAI reads."""
        export(self.job, self.converted, tokenizer=True)

    def load(self) -> dict[str, Any]:
        """Reshape and compile.

        Raises:
            ValueError: a sampler that it may not step like Kiln's.
        """
        work, requested = self.work, self.job["requested"]
        if (work["sampler"], work["schedule"]) != ("euler", "normal"):
            raise ValueError(
                f"peers are compared with euler normal, not {work['sampler']} {work['schedule']}"
            )
        pipe = openvino_genai.Text2ImagePipeline(str(self.converted))
        kind = openvino_genai.Scheduler.Type.EULER_DISCRETE
        pipe.set_scheduler(openvino_genai.Scheduler.from_config(str(self._scheduler_config()), kind))
        pipe.reshape(work["batch"], work["height"], work["width"], work["cfg_scale"])
        device = "CPU" if requested["device"] == "auto" else requested["device"].upper()
        pipe.compile(device, **properties(self.job))
        self.pipe = pipe
        facts = effective(
            "openvino-genai",
            metadata.version("openvino-genai"),
            UNKNOWN,
            requested["threads"],
            provider=f"OpenVINO {openvino.__version__}",
            device=device,
            asked=properties(self.job),
        )
        return {"text_encoder": facts, "unet": facts, "vae_decoder": facts}

    def _scheduler_config(self) -> Path:
        """The model's own noise levels, at the timesteps of Kiln's ``normal`` schedule."""
        config = json.loads((self.converted / "scheduler/scheduler_config.json").read_text())
        config |= {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "linspace"}
        path = Path(self.job["scratch"]) / "euler.json"
        path.write_text(json.dumps(config))
        return path

    def draw(self, prompt: int, seed: int, save: str | None = None, latents: str | None = None) -> Message:
        """Draw one batch; the pipeline tells the time of its parts itself.

        Raises:
            ValueError: latents were asked for, whose scale is that of its own scheduler.
        """
        if latents:
            raise ValueError("the latents of openvino-genai are not in Kiln's scale")
        work = self.work
        arguments: dict[str, Any] = {
            "negative_prompt": work["negative_prompt"],
            "width": work["width"],
            "height": work["height"],
            "num_inference_steps": work["steps"],
            "num_images_per_prompt": work["batch"],
            "guidance_scale": work["cfg_scale"],
            "generator": FixedNoise(self.noise[prompt]),
        }
        started, start = time.monotonic_ns(), time.perf_counter()
        pictures = np.array(self.pipe.generate(work["prompts"][prompt], **arguments).data)
        seconds = time.perf_counter() - start
        if save:
            np.save(save, pictures)
        return {"started_ns": started, "seconds": seconds, **self._parts()}

    def _parts(self) -> dict[str, Any]:
        metrics = self.pipe.get_performance_metrics()
        encoders = metrics.get_text_encoder_infer_duration()
        return {
            "components": {
                "text_encoder": sum(encoders.values()) / 1e3,
                "unet": sum(metrics.raw_metrics.unet_inference_durations) / 1e6,
                "vae_decoder": metrics.get_vae_decoder_infer_duration() / 1e3,
            },
            "unet_steps": [value / 1e6 for value in metrics.raw_metrics.unet_inference_durations],
        }


def main() -> None:
    """Serve the harness."""
    worker = Worker(read_job())
    serve(worker.load, worker.draw, worker.convert, openvino=openvino.__version__)


if __name__ == "__main__":
    main()
