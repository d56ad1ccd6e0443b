"""Train the UNet to denoise the training set given the states of the text encoder.

The text encoder is frozen (see text_encoder.py), so the states of a bank of captions are computed
once; what is left per step is the UNet alone. On CPUs plain attention is several times as fast in
the backward pass as the fused one at these sizes. Stops and resumes: the state is saved every five
minutes.

Run: python -m training.unet WORK --model DIFFUSERS_FOLDER --minutes 90
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .common import alphas_cumprod, argument_parser, caption, descend, learning_rate, load_emojis, tokenize

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel

BATCH = 64
LEARNING_RATE = 6e-4
CAPTIONS_PER_EMOJI = 12
UNCONDITIONAL = 0.1
SAVE_EVERY_S = 300


def caption_bank(work: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Text states of several captions of each emoji, bfloat16 ``(emojis, captions, tokens, width)``,
    with the plain name first, and the states of the empty caption ``(tokens, width)``.
    """
    import torch
    from transformers import CLIPTextModel, CLIPTokenizer

    rng = random.Random(1)
    tokenizer = CLIPTokenizer.from_pretrained(work / "model/tokenizer")
    encoder = CLIPTextModel.from_pretrained(work / "model/text_encoder").float().eval()
    rows = []
    with torch.no_grad():
        for emoji in load_emojis(work):
            texts = [emoji.name] + [caption(emoji, rng) for _ in range(CAPTIONS_PER_EMOJI - 1)]
            rows.append(encoder(tokenize(tokenizer, texts)).last_hidden_state.bfloat16())
        empty = encoder(tokenize(tokenizer, [""])).last_hidden_state[0].bfloat16()
    return torch.stack(rows), empty


def plain_attention(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Use matmul and softmax instead of the fused kernel: several times faster backward on CPUs."""
    from diffusers.models.attention_processor import AttnProcessor

    unet.set_attn_processor(AttnProcessor())
    return unet


def min_snr_weight(alpha: torch.Tensor, gamma: float = 5.0) -> torch.Tensor:
    """Loss weight of the noise prediction, min(SNR, gamma) / SNR (Hang et al., 2303.09556)."""
    snr = alpha / (1 - alpha)
    return snr.clamp(max=gamma) / snr


class Trainer:
    """The loop's state: weights, their moving average, optimizer, how much of the budget is used."""

    def __init__(self, work: Path, start: Path) -> None:
        """Resume from WORK/unet.pt if it is there, else begin with the UNet of ``start``."""
        import torch
        from diffusers import UNet2DConditionModel

        self.work = work
        self.unet = plain_attention(UNet2DConditionModel.from_pretrained(start / "unet").float().train())
        self.parameters = list(self.unet.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.average = [p.detach().clone() for p in self.parameters]
        self.step, self.used_s = 0, 0.0
        if (work / "unet.pt").exists():
            state = torch.load(work / "unet.pt", weights_only=True)
            self.unet.load_state_dict(state["unet"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step, self.used_s = state["average"], state["step"], state["used_s"]

    def update(self, loss: torch.Tensor, rate: float) -> None:
        """One optimizer step and one step of the moving average."""
        import torch

        descend(self.optimizer, loss, self.parameters, rate)
        self.step += 1
        decay = min(0.998, (self.step + 1) / (self.step + 20))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    def save(self) -> None:
        """Write the resumable state, and the averaged weights as a diffusers UNet."""
        import torch

        state = {"unet": self.unet.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"average": self.average, "step": self.step, "used_s": self.used_s}
        torch.save(state, self.work / "unet.pt.partial")
        (self.work / "unet.pt.partial").replace(self.work / "unet.pt")
        raw = [p.detach().clone() for p in self.parameters]
        for p, a in zip(self.parameters, self.average, strict=True):
            p.data.copy_(a)
        self.unet.save_pretrained(self.work / "model/unet")
        for p, r in zip(self.parameters, raw, strict=True):
            p.data.copy_(r)


def main() -> None:
    """Train until the minutes are used up, counting earlier runs."""
    parser = argument_parser(__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(time.time_ns() % 2**31)
    bank, empty = caption_bank(args.work)
    latents = torch.from_numpy(np.load(args.work / "latents.npy"))
    alphas = alphas_cumprod()
    trainer = Trainer(args.work, args.model)
    budget, last, saved, losses = 60 * args.minutes, time.time(), time.time(), []
    while (progress := trainer.used_s / budget) < 1:
        which = torch.randint(0, len(latents), (BATCH,))
        # Half of the time the plain name, which is what people type.
        variant = torch.randint(0, CAPTIONS_PER_EMOJI, (BATCH,)) * (torch.rand(BATCH) < 0.5)
        states = bank[which, variant]
        states[torch.rand(BATCH) < UNCONDITIONAL] = empty
        x, noise = latents[which], torch.randn(BATCH, *latents.shape[1:])
        t = torch.randint(0, 1000, (BATCH,))
        a = alphas[t].view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = trainer.unet(a.sqrt() * x + (1 - a).sqrt() * noise, t, states, return_dict=False)[0]
        error = (predicted.float() - noise).square().mean((1, 2, 3), keepdim=True)
        loss = (min_snr_weight(a) * error).mean()
        trainer.update(loss, learning_rate(LEARNING_RATE, 300, trainer.step, progress))
        losses.append(loss.item())
        now = time.time()
        trainer.used_s, last = trainer.used_s + now - last, now
        if trainer.step % 100 == 0:
            speed = BATCH * trainer.step / trainer.used_s
            print(
                f"{trainer.step} {trainer.used_s:.0f} s loss {np.mean(losses[-200:]):.4f} {speed:.0f} img/s",
                flush=True,
            )
        if now - saved > SAVE_EVERY_S:
            trainer.save()
            saved = last = time.time()
    trainer.save()


if __name__ == "__main__":
    main()
