"""Ask the model for 200 of its emojis by name, and see whether it draws them.

For each picture made, the training pictures are ranked by distance of latents (L2, as the VAE sees
them); the figure is how often the emoji asked for is among the five nearest. Also writes a contact
sheet: wanted above, made below.

Run: python -m training.evaluate WORK --model DIFFUSERS_FOLDER --sheet sheet.png
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .common import BETAS, argument_parser, load_emojis, tokenize

CAPTIONS = 200
STEPS = 20


def draw(model: Path, captions: list[str], cfg_scale: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents ``(n, 4, 16, 16)`` and images uint8 ``(n, 64, 64, 3)`` by diffusers' own Euler sampler."""
    import torch
    from diffusers import AutoencoderTiny, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder").float().eval()
    unet = UNet2DConditionModel.from_pretrained(model / "unet").float().eval()
    vae = AutoencoderTiny.from_pretrained(model / "vae").float().eval()
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace")
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(seed)
    latents = []
    with torch.no_grad():
        for start in range(0, len(captions), 50):
            chunk = captions[start : start + 50]
            states = encoder(tokenize(tokenizer, [""] * len(chunk) + chunk)).last_hidden_state
            x = torch.randn(len(chunk), 4, 16, 16, generator=generator) * scheduler.init_noise_sigma
            scheduler.set_timesteps(STEPS)
            for t in scheduler.timesteps:
                sample = scheduler.scale_model_input(torch.cat([x, x]), t)
                with torch.autocast("cpu", torch.bfloat16):
                    noise = unet(sample, t, states, return_dict=False)[0]
                without, prompted = noise.float().chunk(2)
                x = scheduler.step(without + cfg_scale * (prompted - without), t, x).prev_sample
            latents.append(x)
        z = torch.cat(latents)
        pixels = vae.decode(z / vae.config.scaling_factor).sample.clamp(-1, 1)
    return z.numpy(), ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def draw_with_kiln(
    bundle: str, captions: list[str], cfg_scale: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same by ``kiln generate``'s own pipeline, as the bundle ships; one seed for each caption."""
    from kiln.api import ImageReady, Pipeline, Request, StepFinished, resolve_model

    latents, images = [], []
    with Pipeline.open(resolve_model(bundle).bundle) as pipeline:
        for index, caption in enumerate(captions):
            request = Request(caption, steps=STEPS, cfg_scale=cfg_scale, seed=seed + index)
            events = list(pipeline.generate(request))
            latents.append([e.latents[0] for e in events if isinstance(e, StepFinished)][-1])
            images += [e.image for e in events if isinstance(e, ImageReady)]
    return np.stack(latents), np.stack(images)


def ranks(made: np.ndarray, wanted: np.ndarray, known: np.ndarray) -> np.ndarray:
    """How many training latents are nearer to each of ``made`` than the one ``wanted`` (an index)."""
    flat, bank = made.reshape(len(made), -1), known.reshape(len(known), -1)
    squared = (flat**2).sum(1)[:, None] + (bank**2).sum(1)[None] - 2 * flat @ bank.T
    return (squared < squared[np.arange(len(made)), wanted][:, None]).sum(1)


def contact_sheet(wanted: np.ndarray, made: np.ndarray, columns: int = 16, pairs: int = 96) -> Image.Image:
    """Rows of wanted pictures, each with the pictures made below it."""
    rows = []
    for start in range(0, min(pairs, len(made)), columns):
        for images in (wanted[start : start + columns], made[start : start + columns]):
            row = np.concatenate(list(images), axis=1)
            rows.append(np.pad(row, ((0, 0), (0, columns * 64 - row.shape[1]), (0, 0)), constant_values=255))
    return Image.fromarray(np.concatenate(rows))


def main() -> None:
    """Print the figures and save the sheet."""
    parser = argument_parser(__doc__)
    parser.add_argument("work", type=Path)
    drawn_by = parser.add_mutually_exclusive_group(required=True)
    drawn_by.add_argument("--model", type=Path, help="a diffusers folder, drawn by diffusers")
    drawn_by.add_argument("--bundle", help="a bundle, or emoji for the one that ships, drawn by Kiln")
    parser.add_argument("--cfg-scale", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()
    emojis = load_emojis(args.work)
    wanted = np.random.default_rng(args.seed).permutation(len(emojis))[:CAPTIONS]
    names = [emojis[i].name for i in wanted]
    if args.bundle:
        latents, images = draw_with_kiln(args.bundle, names, args.cfg_scale, args.seed)
    else:
        latents, images = draw(args.model, names, args.cfg_scale, args.seed)
    found = ranks(latents, wanted, np.load(args.work / "latents.npy"))
    shares = ", ".join(f"top {k} {(found < k).mean():.1%}" for k in (1, 5, 20))
    median = np.median(found) + 1
    print(
        f"{CAPTIONS} captions, {STEPS} steps, guidance {args.cfg_scale:g}: {shares}, median rank {median:.0f}"
    )
    if args.sheet:
        contact_sheet(np.load(args.work / "images.npy")[wanted], images).save(args.sheet)


if __name__ == "__main__":
    main()
