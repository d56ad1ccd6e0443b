"""Make the training set: Fluent emoji in 3D on white, their captions and their latents.

Needs two packages of the npm registry unpacked beside each other, both MIT:

    npm pack @lobehub/fluent-emoji-3d@1.1.0   -> SOURCE/lobe
    npm pack emojibase-data@17.0.0            -> SOURCE/ebase

Run: python -m training.dataset SOURCE WORK --model DIFFUSERS_FOLDER
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from .common import argument_parser

IMAGE_SIZE = 64
# Emojibase groups that hold things one can name: faces, animals, food, places, activities, objects.
# People (group 1: hundreds of near-identical figures), symbols (8) and flags (9) are left out.
GROUPS = {0, 3, 4, 5, 6, 7}


def find_emojis(source: Path) -> list[tuple[Path, str, list[str]]]:
    """Every picture of the groups above that has a caption, in Emojibase's order, without skin tones."""
    plain = {p.stem.lower().replace("-fe0f", ""): p for p in (source / "lobe/assets").glob("*.webp")}
    found = []
    for entry in json.loads((source / "ebase/en/data.json").read_text()):
        path = plain.get(entry["hexcode"].lower().replace("-fe0f", ""))
        clock_face = entry["label"].endswith(("o’clock", "-thirty"))
        if path and entry.get("group") in GROUPS and not clock_face:
            found.append((path, entry["label"], entry.get("tags", [])))
    return found


def on_white(path: Path) -> np.ndarray:
    """The picture on white, uint8 ``(IMAGE_SIZE, IMAGE_SIZE, 3)``."""
    image = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    white.alpha_composite(image)
    return np.asarray(white.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS))


def encode(images: np.ndarray, model: Path) -> np.ndarray:
    """Latents of ``images``, float32 ``(count, 4, 16, 16)``, in the UNet's scale."""
    import torch
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny.from_pretrained(model / "vae").float().eval()
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    with torch.no_grad():
        latents = torch.cat([vae.encode(chunk).latents for chunk in pixels.split(64)])
    return (latents * vae.config.scaling_factor).numpy()


def main() -> None:
    """Write images.npy, latents.npy, emojis.json and the parts of WORK/model that are not trained."""
    parser = argument_parser(__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    found = find_emojis(args.source)
    images = np.stack([on_white(path) for path, _, _ in found])
    np.save(args.work / "images.npy", images)
    np.save(args.work / "latents.npy", encode(images, args.model))
    rows = [(path.stem, label, tags) for path, label, tags in found]
    (args.work / "emojis.json").write_text(json.dumps(rows))
    for part in ("vae", "scheduler", "model_index.json"):  # WORK/model becomes a whole diffusers folder
        source, target = args.model / part, args.work / "model" / part
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(source, target)
    print(f"{len(found)} emojis")


if __name__ == "__main__":
    main()
