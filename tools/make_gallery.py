"""Write docs/gallery.png and the tables of docs/gallery.md: what each bundled LoRA does to the bundled model.

python tools/make_gallery.py            draw everything anew
python tools/make_gallery.py --tables   the tables only, from the pictures that are there

Every picture is drawn with one seed in float32, so a column differs from the first by its adapters alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kiln.api import ImageReady, Pipeline, Request, Settings, locate_adapter, resolve_model

DOCS = Path(__file__).resolve().parent.parent / "docs"
PICTURE, PAGE = DOCS / "gallery.png", DOCS / "gallery.md"
MODEL, SEED, STEPS = "emoji", 11, 20
PROMPTS = ("red apple", "yellow star", "green heart", "cat face", "happy red kiln", "sleepy blue kiln")
# All input blocks with the text encoder, and all output blocks with the middle, of the 26 that there are.
INPUTS, OUTPUTS = ",".join("1" * 13 + "0" * 13), ",".join("0" * 13 + "1" * 13)
COLUMNS: dict[str, tuple[str, ...]] = {
    "no adapter": (),
    "flat 0.5": ("emoji-flat:0.5",),
    "flat 1": ("emoji-flat:1",),
    "flat -0.5": ("emoji-flat:-0.5",),
    "flat, inputs": (f"emoji-flat:1:lbw={INPUTS}",),
    "flat, outputs": (f"emoji-flat:1:lbw={OUTPUTS}",),
    "kiln 0.5": ("emoji-kiln:0.5",),
    "kiln 1": ("emoji-kiln:1",),
    "flat + kiln": ("emoji-flat:1", "emoji-kiln:1"),
}
SIZE, GAP, LEFT, TOP, INK = 64, 6, 104, 18, (40, 40, 40)
BEGIN, END = "<!-- begin {} -->", "<!-- end {} -->"


def draw(column: str, prompts: tuple[str, ...] = PROMPTS) -> np.ndarray:
    """The pictures of a column: uint8 ``(len(prompts), 64, 64, 3)``."""
    adapters = [locate_adapter(text) for text in COLUMNS[column]]
    bundle = resolve_model(MODEL, adapters).bundle
    found = []
    with Pipeline.open(bundle, Settings(precision="fp32")) as pipeline:
        for prompt in prompts:
            events = pipeline.generate(Request(prompt, steps=STEPS, seed=SEED))
            found += [event.image for event in events if isinstance(event, ImageReady)]
    return np.stack(found)


def change(image: np.ndarray, before: np.ndarray) -> float:
    """Root of the mean squared difference of two pictures, in percent of the way from black to white."""
    difference = image.astype(np.float64) - before.astype(np.float64)
    return float(np.sqrt((difference**2).mean()) / 2.55)


def place(row: int, column: int) -> tuple[int, int]:
    """The corner of a picture in the sheet."""
    return LEFT + column * (SIZE + GAP), TOP + row * (SIZE + GAP)


def sheet(pictures: dict[str, np.ndarray]) -> Image.Image:
    """All pictures, a row for each prompt, with their names."""
    width, height = place(len(PROMPTS), len(COLUMNS))
    made = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(made), ImageFont.load_default(10)
    for column, name in enumerate(COLUMNS):
        pen.text((place(0, column)[0], 3), name, INK, font)
        for row, image in enumerate(pictures[name]):
            made.paste(Image.fromarray(image), place(row, column))
    for row, prompt in enumerate(PROMPTS):
        pen.text((4, place(row, 0)[1] + SIZE // 2 - 6), prompt, INK, font)
    return made


def cut(made: Image.Image) -> dict[str, np.ndarray]:
    """The pictures of a sheet, which a PNG keeps to the bit."""
    return {
        name: np.stack(
            [
                np.asarray(made.crop((x, y, x + SIZE, y + SIZE)))
                for x, y in (place(row, column) for row in range(len(PROMPTS)))
            ]
        )
        for column, name in enumerate(COLUMNS)
    }


def tables(pictures: dict[str, np.ndarray]) -> dict[str, str]:
    """The generated parts of the page."""
    before = pictures["no adapter"]
    names = list(COLUMNS)[1:]
    rows = [f"| prompt | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for row, prompt in enumerate(PROMPTS):
        values = [f"{change(pictures[name][row], before[row]):.1f}" for name in names]
        rows.append(f"| {prompt} | {' | '.join(values)} |")
    commands = ["| column | adapters |", "|---|---|"]
    for name, adapters in COLUMNS.items():
        given = " ".join(f"`--lora {text}`" for text in adapters) or "none"
        commands.append(f"| {name} | {given} |")
    return {"changes": "\n".join(rows), "columns": "\n".join(commands)}


def render(page: str, pictures: dict[str, np.ndarray]) -> str:
    """The page with its tables made anew."""
    for name, text in tables(pictures).items():
        begin, end = BEGIN.format(name), END.format(name)
        head, _, rest = page.partition(begin)
        page = f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
    return page


def main(arguments: list[str]) -> int:
    """Draw, and write what is drawn."""
    if arguments not in ([], ["--tables"]):
        print(__doc__)
        return 2
    if not arguments:
        sheet({name: draw(name) for name in COLUMNS}).save(PICTURE, optimize=True)
    with Image.open(PICTURE) as made:
        page = render(PAGE.read_text(encoding="utf-8"), cut(made.convert("RGB")))
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
