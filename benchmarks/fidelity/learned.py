"""LPIPS and CLIP score of images, by networks that were trained to see as people do: the extra ``metrics``.

LPIPS (Zhang et al. 2018, 1801.03924) is the ``lpips`` package's, over AlexNet; CLIP score (Hessel et al.
2021, 2104.08718) is ``100 max(cos(image, text), 0)`` of transformers' CLIPModel. Neither network comes with
Kiln: both are read from a path, or fetched when ``hub`` is written instead of one, and never otherwise. The
linear layers that LPIPS puts over AlexNet come with the package ``lpips``.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UsageError
from ..harness.process import LIMITS, Limits
from .child import child

if TYPE_CHECKING:
    import torch

HUB = "hub"
ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
CLIP_NAME = "openai/clip-vit-base-patch16"
_INSTALL = "pip install 'kiln-diffusion[metrics]'"


@dataclass(frozen=True)
class LearnedOptions:
    """Which are told, and where their networks lie; None leaves one out.

    ``lpips`` is AlexNet's weights as torchvision publishes them, a ``.pth`` file; ``clip`` a folder with a
    CLIPModel and its processor. ``hub`` fetches either.
    """

    lpips: str | None = None
    clip: str | None = None


def check_learned(options: LearnedOptions) -> None:
    """Refuse what cannot work before anything is measured: a path that leads nowhere, a missing package.

    Raises:
        UsageError: the text says what to install or where to point.
    """
    for asked, check, packages in (
        (options.lpips, _check_file, ("lpips", "torchvision")),
        (options.clip, _check_folder, ("transformers", "torch")),
    ):
        if asked is None:
            continue
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            metric = "LPIPS" if check is _check_file else "the CLIP score"
            raise UsageError(f"{metric} needs the package {' and '.join(missing)}: {_INSTALL}")
        if asked != HUB:
            check(Path(asked))


def measure_learned(
    images: Sequence[np.ndarray] | np.ndarray,
    reference_images: Sequence[np.ndarray] | np.ndarray,
    prompts: Sequence[str],
    options: LearnedOptions,
    limits: Limits = LIMITS,
) -> list[dict[str, float]]:
    """Tell LPIPS and CLIP score of each image, in a process of its own.

    Args:
        images: uint8 ``(h, w, 3)`` of one size.
        reference_images: as many.
        prompts: of each.
        options: which metrics, and their networks.
        limits: when the process is given up.

    Returns:
        Per image ``lpips`` (0 for equal ones), ``clip_score`` (0 to 100), ``clip_drop`` (how much higher the
        reference's score is) and ``clip_image`` (cosine of both images' embeddings).

    Raises:
        FidelityError: a package or a network is missing; the text says what to install or where to point.
        UsageError: numbers differ.
    """
    if not len(images) == len(reference_images) == len(prompts):
        raise UsageError(
            f"got {len(images)} images, {len(reference_images)} references, {len(prompts)} prompts"
        )
    with (
        tempfile.TemporaryDirectory() as scratch,
        child(offline=HUB not in (options.lpips, options.clip), limits=limits) as worker,
    ):
        file = Path(scratch) / "images.npz"
        np.savez(file, images=np.stack(list(images)), reference=np.stack(list(reference_images)))
        found = worker.ask("learned", file=str(file), prompts=list(prompts), options=asdict(options))
    rows: list[dict[str, float]] = found["rows"]
    return rows


def learned_rows(file: Path, prompts: Sequence[str], options: LearnedOptions) -> list[dict[str, float]]:
    """What ``measure_learned`` gives; runs in the child.

    Raises:
        UsageError: a package or a network is missing.
    """
    with np.load(file) as arrays:
        images, reference = arrays["images"], arrays["reference"]
    rows: list[dict[str, float]] = [{} for _ in images]
    if options.lpips:
        network = open_lpips(options.lpips)
        for row, made, wanted in zip(rows, images, reference, strict=True):
            row["lpips"] = lpips_distance(network, made, wanted)
    if options.clip:
        model, processor = open_clip(options.clip)
        for row, made, wanted, prompt in zip(rows, images, reference, prompts, strict=True):
            row |= clip_figures(model, processor, made, wanted, prompt)
    return rows


def open_lpips(weights: str) -> Any:
    """LPIPS over AlexNet with the trunk's weights from a file, in evaluation mode.

    Args:
        weights: torchvision's ``alexnet-owt-7be5be79.pth``, or ``hub`` to fetch it.

    Raises:
        UsageError: a package is missing, or the file is no AlexNet of torchvision's.
    """
    try:
        import lpips
    except (ImportError, RuntimeError) as exc:  # a torchvision of another torch raises the latter
        raise UsageError(f"LPIPS needs the packages lpips and torchvision ({exc}): {_INSTALL}") from exc
    state = _fetch_state() if weights == HUB else _read_state(Path(weights))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The parameter 'pretrained'|Arguments other than a weight enum")
        # The package would fetch the trunk by itself; its own linear layers come with it.
        network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    trunk = {}
    for name in network.net.state_dict():  # slice2.3.weight is torchvision's features.3.weight
        source = "features." + name.partition(".")[2]
        if source not in state:
            raise UsageError(f"{weights} has no {source}; expected torchvision's {ALEXNET_FILE}")
        trunk[name] = state[source]
    try:
        network.net.load_state_dict(trunk)
    except RuntimeError as exc:
        raise UsageError(f"{weights} is not torchvision's {ALEXNET_FILE}: {exc}") from exc
    return network.eval()


def _fetch_state() -> Mapping[str, torch.Tensor]:
    from torchvision.models import AlexNet_Weights

    try:
        found: Mapping[str, torch.Tensor] = AlexNet_Weights.IMAGENET1K_V1.get_state_dict(
            progress=False, check_hash=True
        )
    except (OSError, RuntimeError) as exc:
        raise UsageError(
            f"AlexNet's weights cannot be fetched ({exc}); get {ALEXNET_FILE} where there is a network and "
            "give its path instead of hub"
        ) from exc
    return found


def _read_state(path: Path) -> Mapping[str, torch.Tensor]:
    import pickle

    import torch

    _check_file(path)
    try:
        found: Mapping[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as exc:
        raise UsageError(f"{path} cannot be read as torch weights: {exc}") from exc
    if not isinstance(found, Mapping):
        raise UsageError(
            f"{path} holds a {type(found).__name__}; expected tensors by name, torchvision's {ALEXNET_FILE}"
        )
    return found


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UsageError(
            f"LPIPS needs AlexNet's weights, and {path} is no file; get {ALEXNET_FILE} (torchvision's "
            "AlexNet_Weights.IMAGENET1K_V1) and give its path, or write hub to have it fetched"
        )


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise UsageError(f"the CLIP score needs a folder with a CLIPModel; {path} is none (or write hub)")


def lpips_distance(network: Any, made: np.ndarray, wanted: np.ndarray) -> float:
    """LPIPS of two images, uint8 ``(h, w, 3)``."""
    import torch

    def tensor(image: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(image.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]

    with torch.inference_mode():
        return float(network(tensor(made), tensor(wanted)).item())


def open_clip(place: str) -> tuple[Any, Any]:
    """A CLIPModel and its processor from a folder.

    Args:
        place: the folder, or ``hub`` for ``openai/clip-vit-base-patch16``.

    Raises:
        UsageError: transformers is missing, or there is no such model.
    """
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError as exc:
        raise UsageError(f"the CLIP score needs transformers and torch ({exc}): {_INSTALL}") from exc
    name, local = (CLIP_NAME, False) if place == HUB else (place, True)
    if local:
        _check_folder(Path(name))
    try:
        model = CLIPModel.from_pretrained(name, local_files_only=local)
        processor = CLIPProcessor.from_pretrained(name, local_files_only=local, use_fast=False)
    except (OSError, ValueError) as exc:
        raise UsageError(f"{name} does not open as a CLIPModel with its processor: {exc}") from exc
    return model.eval(), processor


def clip_figures(
    model: Any, processor: Any, made: np.ndarray, wanted: np.ndarray, prompt: str
) -> dict[str, float]:
    """CLIP score of an image, what it lost against the reference's, and the cosine of the two images."""
    import torch

    inputs = processor(
        text=[prompt], images=[made, wanted], return_tensors="pt", padding=True, truncation=True
    )
    with torch.inference_mode():
        found = model(**inputs)  # get_text_features gives another type from transformers 5 on
    text, images = (
        torch.nn.functional.normalize(one, dim=-1) for one in (found.text_embeds, found.image_embeds)
    )
    score, reference = (100 * max(float(one @ text[0]), 0.0) for one in images)
    return {
        "clip_score": score,
        "clip_drop": reference - score,
        "clip_image": float(images[0] @ images[1]),
    }
