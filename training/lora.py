"""Train a LoRA on the bundled model and save it in kohya's format.

Two ship with Kiln: a style (the flat Fluent emoji of the npm package @iconify-json/fluent-emoji-flat,
MIT, drawn from its SVG) and a subject (a little kiln with a face, drawn here in several colours and
moods). The arithmetic of the layers is peft's; only the file's key names are written here.

Run: python -m training.lora style WORK --model FOLDER --flat UNPACKED_NPM_PACKAGE -o emoji-flat.safetensors
     python -m training.lora subject WORK --model FOLDER -o emoji-kiln.safetensors
"""

from __future__ import annotations

import io
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from .common import (
    alphas_cumprod,
    argument_parser,
    descend,
    learning_rate,
    load_emojis,
    report_progress,
    tokenize,
)
from .dataset import IMAGE_SIZE, encode
from .unet import min_snr_weight, plain_attention

if TYPE_CHECKING:
    import torch

BATCH = 32
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
CONVOLUTIONS = ["conv1", "conv2"]


@dataclass(frozen=True)
class Pairs:
    """Training pictures, uint8 ``(n, 64, 64, 3)``, and what each is called."""

    images: np.ndarray
    captions: list[str]


def flat_style(work: Path, package: Path) -> Pairs:
    """The flat drawing of every training emoji that has one."""
    import cairosvg

    icons = json.loads((package / "icons.json").read_text())
    names = json.loads((package / "chars.json").read_text())
    images, captions = [], []
    for emoji in load_emojis(work):
        name = names.get(emoji.hexcode.lower()) or names.get(emoji.hexcode.lower().replace("-fe0f", ""))
        if name not in icons["icons"]:
            continue
        size = icons.get("width", 32)
        body = icons["icons"][name]["body"]
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        svg = f'<svg {spaces} viewBox="0 0 {size} {size}">{body}</svg>'
        png = cairosvg.svg2png(
            svg.encode(), output_width=4 * IMAGE_SIZE, output_height=4 * IMAGE_SIZE, background_color="white"
        )
        drawn = Image.open(io.BytesIO(png)).convert("RGB")
        images.append(np.asarray(drawn.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)))
        captions.append(emoji.name)
    return Pairs(np.stack(images), captions)


KILN_COLOURS = {
    "red": (214, 84, 64),
    "blue": (76, 122, 214),
    "green": (88, 170, 92),
    "orange": (238, 140, 56),
    "purple": (142, 92, 190),
    "brown": (150, 104, 74),
}


def draw_kiln(colour: tuple[int, int, int], mood: str, shift: int) -> Image.Image:
    """A domed kiln with a chimney, a fire and a face, at eight times the training size."""
    scale = 8
    image = Image.new("RGB", (IMAGE_SIZE * scale,) * 2, "white")
    pen = ImageDraw.Draw(image)

    def at(*values: float) -> list[float]:
        return [v * scale + (shift * scale if i % 2 == 0 else 0) for i, v in enumerate(values)]

    dark = tuple(int(c * 0.7) for c in colour)
    pen.rectangle(at(40, 6, 48, 22), fill=dark)
    pen.pieslice(at(8, 10, 56, 58), 180, 360, fill=colour)
    pen.rectangle(at(8, 34, 56, 54), fill=colour)
    pen.rectangle(at(5, 54, 59, 59), fill=dark)
    pen.pieslice(at(20, 36, 44, 66), 180, 360, fill=(60, 36, 30))
    pen.rectangle(at(20, 50, 44, 54), fill=(60, 36, 30))
    pen.ellipse(at(25, 43, 39, 56), fill=(255, 150, 30))
    pen.ellipse(at(29, 47, 35, 55), fill=(255, 226, 90))
    for x in (22, 36):
        if mood == "sleepy":
            pen.arc(at(x, 23, x + 6, 29), 0, 180, fill="black", width=scale)
        else:
            pen.ellipse(at(x, 22, x + 6, 29), fill="white")
            pen.ellipse(at(x + 1.5, 24, x + 4.5, 28), fill="black")
    arc = {"happy": (20, 160), "sad": (200, 340), "sleepy": (60, 120)}[mood]
    top = 34 if mood == "sad" else 27
    pen.arc(at(27, top, 37, top + 7), *arc, fill="black", width=scale)
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)


def kiln_subject() -> Pairs:
    """The subject in all its colours and moods."""
    images, captions = [], []
    for name, colour in KILN_COLOURS.items():
        for mood in ("happy", "sad", "sleepy"):
            for shift in (-2, 0, 2):
                images.append(np.asarray(draw_kiln(colour, mood, shift)))
                captions.append(f"{mood} {name} kiln")
    return Pairs(np.stack(images), captions)


def kohya_name(path: str) -> str:
    """``down_blocks.1.attentions.0.proj_in`` as kohya writes it."""
    return "lora_unet_" + path.replace(".", "_")


def save_kohya(unet: torch.nn.Module, path: Path, rank: int, metadata: dict[str, str]) -> None:
    """Write the adapter of a peft-wrapped UNet as fp16 ``lora_down``, ``lora_up`` and ``alpha``."""
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, module in unet.named_modules():
        if not hasattr(module, "lora_A") or "default" not in module.lora_A:
            continue
        key = kohya_name(name)
        tensors[f"{key}.lora_down.weight"] = module.lora_A["default"].weight.detach().half().contiguous()
        tensors[f"{key}.lora_up.weight"] = module.lora_B["default"].weight.detach().half().contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(rank)).half()
    facts = {
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
    }
    save_file(tensors, path, metadata=facts | metadata)


def train(
    pairs: Pairs, model: Path, rank: int, minutes: float, rate: float, dropout: float
) -> torch.nn.Module:
    """Fit a LoRA of the UNet's attentions and convolutions to the pairs."""
    import torch
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder").float().eval()
    unet = plain_attention(UNet2DConditionModel.from_pretrained(model / "unet").float())
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS + CONVOLUTIONS))
    plain_attention(unet)
    latents = torch.from_numpy(encode(pairs.images, model))
    with torch.no_grad():
        states = encoder(tokenize(tokenizer, pairs.captions)).last_hidden_state
        empty = encoder(tokenize(tokenizer, [""])).last_hidden_state[0]
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    losses: list[float] = []
    alphas, start = alphas_cumprod(), time.time()
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        which = torch.tensor([rng.randrange(len(latents)) for _ in range(BATCH)])
        told = states[which].clone()
        told[torch.rand(BATCH) < dropout] = empty
        x, noise = latents[which], torch.randn(BATCH, *latents.shape[1:])
        t = torch.randint(0, 1000, (BATCH,))
        a = alphas[t].view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(a.sqrt() * x + (1 - a).sqrt() * noise, t, told, return_dict=False)[0]
        loss = (min_snr_weight(a) * (predicted.float() - noise).square().mean((1, 2, 3), keepdim=True)).mean()
        descend(optimizer, loss, parameters, learning_rate(rate, 50, len(losses), progress))
        losses.append(loss.item())
        report_progress(losses, start)
    return unet


def main() -> None:
    """Train one of the two LoRAs."""
    parser = argument_parser(__doc__)
    parser.add_argument("kind", choices=("style", "subject"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--flat", type=Path, help="style: the unpacked npm package")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate at its highest")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    if args.kind == "style" and args.flat is None:
        parser.error("the style needs --flat")
    pairs = flat_style(args.work, args.flat) if args.kind == "style" else kiln_subject()
    print(f"{len(pairs.captions)} pictures")
    unet = train(pairs, args.model, args.rank, args.minutes, args.rate, dropout=0.1)
    save_kohya(unet, args.output, args.rank, {"ss_output_name": args.output.stem})


if __name__ == "__main__":
    main()
