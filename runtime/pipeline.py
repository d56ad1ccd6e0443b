"""The pipeline: a bundle on a backend, turned into images request by request, without torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from .. import __version__
from ..backends.base import Session
from ..bundle import Bundle, open_bundle
from ..components import CONTRACTS
from ..errors import UsageError
from .choosing import unet_shapes, unet_work, vae_factor
from .denoiser import GuidedDenoiser
from .events import Event, ImageReady, PhaseFinished, PhaseStarted, Record, StepFinished, Warned
from .images import check_finite, check_images, to_uint8
from .infotext import build_parameters
from .noise import make_generators, make_noise_sampler
from .request import Request
from .samplers import resolve_sampler
from .schedules import NoiseSchedule, resolve_schedule
from .sessions import Sessions
from .settings import Settings
from .tokenizer import ClipTokenizer

# Guidance for a model that does not name its own: what A1111 and its kin use.
CFG_SCALE = 7.0


@dataclass(frozen=True)
class _Batch:
    """Images ``first`` to ``first + count - 1`` of a request, denoised together."""

    index: int
    batches: int
    first: int
    count: int

    def __str__(self) -> str:
        return f"batch {self.index + 1} of {self.batches}"


def _batches(count: int, size: int) -> list[_Batch]:
    total = -(-count // size)
    return [_Batch(i, total, i * size, min(size, count - i * size)) for i in range(total)]


class Pipeline:
    """A bundle opened on a backend. Sessions are prepared when first needed and kept per shape."""

    def __init__(
        self, bundle: Bundle, sessions: Sessions, check: Callable[[np.ndarray, str], None] = check_images
    ) -> None:
        """Use ``open`` instead, which finds the backend.

        Args:
            bundle: the bundle.
            sessions: of that bundle.
            check: refuses pixels, uint8 ``(n, h, w, 3)``, of the component named; another only for weights
                that are known to show nothing.
        """
        self.bundle, self.sessions, self._check = bundle, sessions, check

    @classmethod
    def open(cls, bundle: Bundle | str | Path, settings: Settings | None = None) -> Pipeline:
        """Open a bundle on a backend; nothing is loaded yet.

        Raises:
            BundleError: the folder is no bundle or is damaged.
            BackendUnavailable: the backend asked for is not here, or with ``auto`` none is.
            UsageError: an unknown backend or precision.
        """
        opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        return cls(opened, Sessions(opened, settings or Settings()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all sessions."""
        self.sessions.close()

    @property
    def choice(self) -> str:
        """Which backend ``auto`` took and why; empty for one that was named."""
        return self.sessions.choice

    @cached_property
    def tokenizer(self) -> ClipTokenizer:
        """The bundle's CLIP tokenizer."""
        return ClipTokenizer.open(
            self.bundle.tokenizer_dir, {row.token: row.ids for row in self.bundle.embeddings}
        )

    @cached_property
    def noise_schedule(self) -> NoiseSchedule:
        """The noise levels the model was trained with."""
        return NoiseSchedule.from_config(self.bundle.scheduler_config)

    @cached_property
    def vae_factor(self) -> int:
        """Pixels per latent cell and side: 8 for SD1, 4 for the bundled model."""
        return vae_factor(self.bundle)

    @property
    def native_size(self) -> int:
        """The side, in pixels, of the images the model was trained on."""
        return int(self.bundle.config("unet")["sample_size"]) * self.vae_factor

    def generate(self, request: Request, *, last: bool = False) -> Iterator[Event]:
        """Carry out a request, event by event; every image arrives as soon as it is decoded.

        Args:
            request: what to draw.
            last: no other request follows: each component but the decoder gives its memory back after its
                last run, so that the UNet is gone when the VAE decodes.

        Raises:
            UsageError: a size that the model cannot draw.
            BackendError: the engine refused or failed.
            InvalidOutputError: a network gave NaN, or an image is flat; names the component.
        """
        request = self._completed(request)
        width, height = self._size(request)
        cells = (height // self.vae_factor, width // self.vae_factor)
        tokens, guided = self.tokenizer.max_length, _guidance(request) > 1
        yield from self.sessions.choose(unet_work(self.bundle, request, cells, tokens, guided=guided))
        states = yield from self._encode(request)
        if last:
            self.sessions.release("text_encoder")
        for work in _batches(request.count, request.batch_size):
            latents = yield from self._denoise(request, states, work, cells)
            if last and work.index == work.batches - 1:
                self.sessions.release("unet")
            images = yield from self._decode(latents)
            for index, image in enumerate(images, start=work.first):
                yield ImageReady(index, image, self._record(request, index, width, height))

    def prepare(self, request: Request) -> Iterator[Event]:
        """Load every component that ``generate`` needs for a request, and draw nothing.

        Raises:
            UsageError: a size that the model cannot draw.
            BackendError: the engine refused.
        """
        request = self._completed(request)
        width, height = self._size(request)
        cells = (height // self.vae_factor, width // self.vae_factor)
        tokens, guided = self.tokenizer.max_length, _guidance(request) > 1
        work = unet_work(self.bundle, request, cells, tokens, guided=guided)
        yield from self.sessions.choose(work)
        yield from self.sessions.get("text_encoder", {"input_ids": (2 if guided else 1, tokens)})
        yield from self.sessions.get("unet", work.shapes, guided=guided)
        yield from self.sessions.get("vae_decoder", {"latent_sample": (1, 4, *cells)})

    def _completed(self, request: Request) -> Request:
        """The request with a seed, and with the model's own guidance where it names none."""
        own = float(self.bundle.manifest.get("defaults", {}).get("cfg_scale", CFG_SCALE))
        return replace(request.with_seed(), cfg_scale=own if request.cfg_scale is None else request.cfg_scale)

    def _size(self, request: Request) -> tuple[int, int]:
        width, height = request.width or self.native_size, request.height or self.native_size
        # Every level of the UNet but the last halves the latents; two cells must be left to convolve.
        least = self.vae_factor * 2 ** len(self.bundle.config("unet")["block_out_channels"])
        if min(width, height) < least:
            raise UsageError(
                f"{width}x{height} is too small for {self.bundle.name}; "
                f"each side needs at least {least} pixels"
            )
        return width, height

    def _encode(self, request: Request) -> Generator[Event, None, np.ndarray]:
        """Hidden states of negative and positive prompt, float32 ``(2, tokens, width)``."""
        guided = _guidance(request) > 1
        ids, cut = self.tokenizer.encode([request.negative_prompt, request.prompt])
        for text in cut:
            if text:
                yield Warned(
                    f"the prompt is longer than {self.tokenizer.max_length - 2} tokens; left out: {text!r}"
                )
        if not guided:
            ids = ids[1:]
        session = yield from self.sessions.get("text_encoder", {"input_ids": ids.shape})
        yield PhaseStarted("encode")
        start = time.perf_counter()
        states = session.run({"input_ids": ids})["last_hidden_state"]
        check_finite(states, "text_encoder")
        yield PhaseFinished("encode", time.perf_counter() - start)
        return states

    def _denoise(
        self, request: Request, states: np.ndarray, work: _Batch, cells: tuple[int, int]
    ) -> Generator[Event, None, np.ndarray]:
        """Latents of a batch, float32 ``(count, 4, *cells)``."""
        guided = len(states) == 2
        count = work.count
        rows = count * (2 if guided else 1)
        shape = (4, *cells)
        shapes = unet_shapes(rows, cells, states.shape[1:])
        session = yield from self.sessions.get("unet", shapes, guided=guided)
        generators = make_generators(request.rng, int(request.seed or 0) + work.first, count)
        sigmas = resolve_schedule(request.schedule).function(self.noise_schedule, request.steps)
        x = np.stack([g.randn(shape) for g in generators]) * np.float32(sigmas[0])
        denoiser = GuidedDenoiser(
            unet=partial(_run_unet, session),
            cond=np.repeat(states[-1:], count, axis=0),
            uncond=np.repeat(states[:1], count, axis=0) if guided else None,
            cfg_scale=_guidance(request),
            sigma_to_timestep=self.noise_schedule.sigma_to_timestep,
            prediction_type=str(self.bundle.manifest.get("prediction_type", "epsilon")),
        )
        yield PhaseStarted("denoise", str(work))
        start = last = time.perf_counter()
        steps = resolve_sampler(request.sampler).function(
            denoiser, x, sigmas, make_noise_sampler(generators, shape)
        )
        for step in steps:
            x, now = step.x, time.perf_counter()
            yield StepFinished(step.index, step.total, now - last, work.index, work.batches, x)
            last = time.perf_counter()
        yield PhaseFinished("denoise", time.perf_counter() - start, str(work))
        return x

    def _decode(self, latents: np.ndarray) -> Generator[Event, None, np.ndarray]:
        """Images, uint8 ``(count, h, w, 3)``, decoded one by one to bound the memory."""
        config = self.bundle.config("vae_decoder")
        scaled = latents / np.float32(config.get("scaling_factor") or 1.0) + np.float32(
            config.get("shift_factor") or 0.0
        )
        session = yield from self.sessions.get("vae_decoder", {"latent_sample": (1, *latents.shape[1:])})
        yield PhaseStarted("decode")
        start = time.perf_counter()
        images = []
        for latent in scaled:
            sample = session.run({"latent_sample": latent[None].astype(np.float32)})["sample"]
            check_finite(sample, "vae_decoder")
            images.append(to_uint8(sample)[0])
        pixels = np.stack(images)
        self._check(pixels, "vae_decoder")
        yield PhaseFinished("decode", time.perf_counter() - start)
        return pixels

    def _record(self, request: Request, index: int, width: int, height: int) -> Record:
        seed = int(request.seed or 0) + index
        text = build_parameters(
            prompt=request.prompt if request.typed_prompt is None else request.typed_prompt,
            negative_prompt=request.negative_prompt,
            steps=request.steps,
            sampler=resolve_sampler(request.sampler).title,
            schedule=resolve_schedule(request.schedule).title,
            cfg_scale=_guidance(request),
            seed=seed,
            width=width,
            height=height,
            model_hash=self.bundle.content_digest[:10],
            model=self.bundle.name,
            rng={"cpu": "CPU", "cuda": "NV"}[request.rng],
            lora_hashes={a.name: a.sha256[:12] for a in self.bundle.adapters},
            ti_hashes=self._embedding_hashes(request),
            version=f"kiln {__version__}",
        )
        return Record(seed, width, height, text, self.sessions.in_force, self.choice)

    def _embedding_hashes(self, request: Request) -> dict[str, str]:
        """Digests of the embeddings that the prompts name; one that came with the model has none."""
        used = self.tokenizer.embeddings_in(f"{request.prompt}\n{request.negative_prompt}")
        return {e.token: e.sha256 for e in self.bundle.embeddings if e.token in used and e.sha256}


def _run_unet(session: Session, sample: np.ndarray, timestep: np.ndarray, states: np.ndarray) -> np.ndarray:
    port = CONTRACTS["unet"].outputs[0].name
    feeds = {"sample": sample, "timestep": timestep, "encoder_hidden_states": states}
    return session.run(feeds)[port]


def _guidance(request: Request) -> float:
    return CFG_SCALE if request.cfg_scale is None else request.cfg_scale
