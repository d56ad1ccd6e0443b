"""A1111's infotext: the ``parameters`` text of a PNG, written and read.

    prompt
    Negative prompt: negative
    Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512, ...

Format: AUTOMATIC1111/stable-diffusion-webui, modules/processing.py and modules/infotext_utils.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .. import __version__

VERSION = f"kiln {__version__}"
RNG_TITLES = {"cpu": "CPU", "cuda": "NV"}  # A1111's names for the same two streams

# Keys are written in this order; others follow in the order given; Version is last.
KEY_ORDER = (
    "Steps", "Sampler", "Schedule type", "CFG scale", "Image CFG scale", "Seed", "Size", "Model hash",
    "Model", "VAE hash", "VAE", "Variation seed", "Variation seed strength", "Denoising strength",
    "Clip skip", "ENSD", "RNG", "Lora hashes", "TI hashes",
)  # fmt: skip
_NEGATIVE = "Negative prompt:"
_PAIR = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_JSON_KEY = re.compile(r"(?:,\s*)?\b(Hashes|SDCPP):\s*(?=\{)")
_FEWEST_PAIRS = 3


@dataclass(frozen=True)
class Infotext:
    """A parsed infotext; ``fields`` keeps every key as it was written, values as text."""

    prompt: str
    negative_prompt: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height in pixels, where ``Size`` is there and makes sense."""
        match = re.fullmatch(r"(\d+)\s*x\s*(\d+)", self.fields.get("Size", ""))
        return (int(match[1]), int(match[2])) if match else None

    @property
    def sampler_and_schedule(self) -> tuple[str, str]:
        """Titles of sampler and schedule; older files say both as ``Sampler: DPM++ 2M Karras``."""
        sampler, schedule = self.fields.get("Sampler", ""), self.fields.get("Schedule type", "")
        head, _, tail = sampler.rpartition(" ")
        if not schedule and head and tail.lower() in ("karras", "exponential"):
            return head, tail.title()
        return sampler, schedule


def build_infotext(prompt: str, negative_prompt: str, fields: Mapping[str, object]) -> str:
    """The text of an image.

    Args:
        prompt: as the user typed it, tags included.
        negative_prompt: left out when empty.
        fields: values by A1111's keys; None is left out, whole floats are written without ``.0``.
            ``Version`` is Kiln's unless given.

    Returns:
        Text for the PNG key ``parameters``.
    """
    values = {"Version": VERSION, **fields}
    order = [key for key in KEY_ORDER if key in values]
    order += [key for key in values if key not in KEY_ORDER and key != "Version"] + ["Version"]
    pairs = ", ".join(f"{key}: {_quoted(_text(values[key]))}" for key in order if values[key] is not None)
    negative = f"\n{_NEGATIVE} {negative_prompt}" if negative_prompt else ""
    return f"{prompt}{negative}\n{pairs}".strip()


def build_parameters(
    *,
    prompt: str,
    negative_prompt: str,
    steps: int,
    sampler: str,
    schedule: str,
    cfg_scale: float,
    seed: int,
    width: int,
    height: int,
    model_hash: str | None = None,
    model: str | None = None,
    rng: str | None = None,
    lora_hashes: Mapping[str, str] | None = None,
    ti_hashes: Mapping[str, str] | None = None,
    version: str = VERSION,
) -> str:
    """The text of an image Kiln made.

    Args:
        prompt: as the user typed it.
        negative_prompt: left out when empty.
        steps: number of steps.
        sampler: title, such as ``Euler a``.
        schedule: title, such as ``Karras``.
        cfg_scale: guidance scale.
        seed: of this very image.
        width: pixels.
        height: pixels.
        model_hash: ten hex digits.
        model: name.
        rng: title of the noise stream, see ``RNG_TITLES``.
        lora_hashes: hex digest by name; the first 12 digits are kept, and ``:`` and ``,`` go from names.
        ti_hashes: the same for the embeddings that the prompts name.
        version: program and its version.

    Returns:
        Text for the PNG key ``parameters``.
    """
    fields = {
        "Steps": steps,
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": cfg_scale,
        "Seed": seed,
        "Size": f"{width}x{height}",
        "Model hash": model_hash,
        "Model": model,
        "RNG": rng,
        "Lora hashes": _hashes(lora_hashes or {}),
        "TI hashes": _hashes(ti_hashes or {}),
        "Version": version,
    }
    return build_infotext(prompt, negative_prompt, fields)


def _hashes(digests: Mapping[str, str]) -> str | None:
    cleaned = {re.sub("[:,]", "", name): digest[:12] for name, digest in digests.items()}
    return ", ".join(f"{name}: {digest}" for name, digest in cleaned.items()) or None


def _text(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _quoted(value: str) -> str:
    """JSON where a bare value would be read differently: A1111's rule, and values that look quoted."""
    bare = not any(c in value for c in ",\n\r:") and not value.startswith('"') and value == value.strip()
    return value if bare else json.dumps(value, ensure_ascii=False)


def parse_infotext(text: str) -> Infotext:
    """Read an infotext of A1111, its relatives, stable-diffusion.cpp or Kiln.

    The parameters are the last line that has ``Steps`` and at least three pairs; lines after it are ignored.
    Text without such a line is a prompt and nothing else. Never raises.

    Args:
        text: the value of ``parameters``.

    Returns:
        Prompt, negative prompt and all pairs.
    """
    lines = text.strip().replace("\r\n", "\n").split("\n")
    for i in range(len(lines) - 1, -1, -1):
        fields = _pairs(lines[i])
        if "Steps" in fields and len(fields) >= _FEWEST_PAIRS:
            break
    else:
        i, fields = len(lines), {}
    prompt, negative = lines[:i], list[str]()
    for j, line in enumerate(prompt):
        if line.strip().startswith(_NEGATIVE):
            negative = [line.strip().removeprefix(_NEGATIVE), *prompt[j + 1 :]]
            prompt = prompt[:j]
            break
    return Infotext("\n".join(prompt).strip(), "\n".join(negative).strip(), fields)


def _pairs(line: str) -> dict[str, str]:
    """All ``key: value`` pairs of a line; values that are bare JSON objects are cut out first."""
    objects: dict[str, str] = {}
    while match := _JSON_KEY.search(line):
        try:
            _, end = json.JSONDecoder().raw_decode(line, match.end())
        except ValueError:
            break
        objects[match[1]] = line[match.end() : end]
        line = line[: match.start()] + line[end:]
    return {key.strip(): _unquoted(value.strip()) for key, value in _PAIR.findall(line)} | objects


def _unquoted(value: str) -> str:
    if len(value) < 2 or not (value.startswith('"') and value.endswith('"')):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value
