"""Teach the text encoder to draft the picture, before the UNet sees a caption.

A UNet that learns from scratch together with its text encoder spends most of its time finding
out what the words mean. Here a linear head, thrown away afterwards, must predict the latents
patch by patch from the text states after the caption; that takes minutes, and leaves the UNet
states that already say what goes where.

Run: python -m training.text_encoder WORK --model DIFFUSERS_FOLDER --minutes 10
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .common import (
    CONTEXT_LENGTH,
    FIRST_PATCH,
    GRID,
    argument_parser,
    caption,
    descend,
    learning_rate,
    load_emojis,
    report_progress,
    tokenize,
)

if TYPE_CHECKING:
    import torch
    from transformers import CLIPTextModel

BATCH = 128
LEARNING_RATE = 1e-3


def patches(latents: torch.Tensor) -> torch.Tensor:
    """Latents ``(n, 4, 16, 16)`` as ``(n, GRID * GRID, 64)``, one row a patch."""
    n, channels, height, width = latents.shape
    cells = latents.reshape(n, channels, GRID, height // GRID, GRID, width // GRID)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(n, GRID * GRID, -1)


def shortened(model: Path) -> CLIPTextModel:
    """The text encoder of ``model`` with CONTEXT_LENGTH positions, in fp32."""
    import torch
    from transformers import CLIPTextModel

    loaded = CLIPTextModel.from_pretrained(model / "text_encoder", attn_implementation="eager").float()
    embeddings = loaded.text_model.embeddings
    weight = embeddings.position_embedding.weight[:CONTEXT_LENGTH].detach().clone()
    embeddings.position_embedding = torch.nn.Embedding.from_pretrained(weight, freeze=False)
    embeddings.register_buffer("position_ids", torch.arange(CONTEXT_LENGTH)[None], persistent=False)
    loaded.config.max_position_embeddings = CONTEXT_LENGTH
    return loaded


def main() -> None:
    """Train for the minutes given and save the text encoder into WORK/model."""
    parser = argument_parser(__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    args = parser.parse_args()

    import torch
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    rng = random.Random(0)
    emojis = load_emojis(args.work)
    target = patches(torch.from_numpy(np.load(args.work / "latents.npy")))
    mean = target.mean(0)
    tokenizer = CLIPTokenizer.from_pretrained(args.model / "tokenizer", model_max_length=CONTEXT_LENGTH)
    encoder = shortened(args.model).train()
    head = torch.nn.Linear(encoder.config.hidden_size, target.shape[-1])
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    losses: list[float] = []
    start = time.time()
    while (progress := (time.time() - start) / (60 * args.minutes)) < 1:
        chosen = [rng.randrange(len(emojis)) for _ in range(BATCH)]
        # Some captions are empty: guidance needs a state that means "anything", the mean picture.
        empty = [rng.random() < 0.05 for _ in chosen]
        captions = ["" if e else caption(emojis[i], rng) for e, i in zip(empty, chosen, strict=True)]
        wanted = torch.where(torch.tensor(empty)[:, None, None], mean, target[chosen])
        with torch.autocast("cpu", torch.bfloat16):
            states = encoder(tokenize(tokenizer, captions)).last_hidden_state
        loss = torch.nn.functional.mse_loss(head(states[:, FIRST_PATCH:].float()), wanted)
        descend(optimizer, loss, parameters, learning_rate(LEARNING_RATE, 200, len(losses), progress))
        losses.append(loss.item())
        report_progress(losses, start)
    encoder.save_pretrained(args.work / "model/text_encoder")
    tokenizer.save_pretrained(args.work / "model/tokenizer")
    torch.save(head.state_dict(), args.work / "draft_head.pt")


if __name__ == "__main__":
    main()
