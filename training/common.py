"""What the training scripts share: captions, the noise schedule, and one step of the optimizer."""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import CLIPTokenizer

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# The text encoder is taught to draft the picture at the positions after the caption:
# position FIRST_PATCH + p describes patch p of a GRID x GRID division of the latents.
CONTEXT_LENGTH = 32
GRID = 4
FIRST_PATCH = CONTEXT_LENGTH - GRID * GRID


@dataclass(frozen=True)
class Emoji:
    """One training picture: its file stem, its name and the words people search it by."""

    hexcode: str
    label: str
    tags: tuple[str, ...]

    @property
    def name(self) -> str:
        """The caption that names this emoji and no other."""
        return self.label.replace(": ", ", ").lower()


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring as it is."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def load_emojis(work: Path) -> list[Emoji]:
    """The training set in the order of ``images.npy``."""
    rows = json.loads((work / "emojis.json").read_text())
    return [Emoji(hexcode, label, tuple(tags)) for hexcode, label, tags in rows]


def caption(emoji: Emoji, rng: random.Random) -> str:
    """One of the ways to ask for ``emoji``: its name, with an article, with tags, or by tags."""
    kind = rng.random()
    if kind < 0.6 or not emoji.tags:
        return emoji.name
    if kind < 0.75:
        return ("an " if emoji.name[0] in "aeiou" else "a ") + emoji.name
    count = min(len(emoji.tags), rng.randint(1, 4))
    words = rng.sample(emoji.tags, count)
    return ", ".join([emoji.name, *words] if kind < 0.9 else words)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids ``(batch, CONTEXT_LENGTH)`` int64, padded with the end token as SD1 does."""
    return tokenizer(
        captions,
        padding="max_length",
        truncation=True,
        max_length=CONTEXT_LENGTH,
        return_tensors="pt",
    ).input_ids


def alphas_cumprod() -> torch.Tensor:
    """The 1,000 values of SD1's noise schedule, float32."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=1000, **BETAS).alphas_cumprod


def learning_rate(peak: float, warm_up: int, step: int, progress: float) -> float:
    """Linear warm-up over ``warm_up`` steps, then a cosine over the budget of time to 0.01 of ``peak``."""
    return peak * min(1, (step + 1) / warm_up) * (0.5 * (1 + math.cos(math.pi * progress)) + 0.01)


def descend(
    optimizer: torch.optim.Optimizer, loss: torch.Tensor, parameters: Iterable[torch.Tensor], rate: float
) -> None:
    """One optimizer step at the learning rate ``rate``, with gradients clipped to a norm of 1."""
    import torch

    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def report_progress(losses: list[float], start: float) -> None:
    """Print the mean of the last 50 losses after each 50 steps; ``start`` is as ``time.time`` gave it."""
    step = len(losses)
    if step % 50 == 0:
        print(f"{step} {time.time() - start:.0f} s loss {sum(losses[-50:]) / 50:.4f}", flush=True)
