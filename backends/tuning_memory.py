"""Remember on this machine which backend was fastest: one small JSON file for each question asked.

The question is what decides the answer: processor and graphics cards, versions of the engines, architecture
and storage type of the network, shapes, precision, threads. Anything else gives another file name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..cache import keeps_nothing, private_folder
from ..cache_store import enforce_limit
from .cpu import describe_cpu
from .tuning import FAILED, WRONG, Measurement

_FORMAT = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Remembered:
    """An answer: the labels in the order to try them, the winner first, and how it reads.

    ``wrong`` says of those that computed something else why they are not to be used.
    """

    order: tuple[str, ...]
    summary: str
    wrong: Mapping[str, str] = field(default_factory=dict)


def recall(folder: Path, question: Mapping[str, Any]) -> Remembered | None:
    """What was measured for a question, None if nothing was; an answer that cannot be read is removed."""
    path = _path(folder, question)
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))
        if answer["format"] != _FORMAT or answer["question"] != _plain(question):
            raise ValueError("it answers another question")
        order, summary, wrong = answer["order"], answer["summary"], answer["wrong"]
        texts = [*order, *wrong, *wrong.values(), summary]
        if not order or not all(isinstance(text, str) for text in texts):
            raise ValueError("it names no backend")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        log.warning("the measurement in %s is thrown away: %s", path, error)
        _forget(path)
        return None
    _touch(path)
    return Remembered(tuple(order), summary, wrong)


def remember(folder: Path, question: Mapping[str, Any], found: Measurement, now: float) -> None:
    """Write the answer; a cache that cannot be written costs measuring again and nothing else.

    Args:
        folder: of the cache.
        question: everything that decides the answer.
        found: what was measured; it has a winner.
        now: seconds since 1970.
    """
    if keeps_nothing():
        return
    path = _path(folder, question)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    wrong = {result.label: result.fault for result in found.results if result.verdict == WRONG}
    answer = asdict(Remembered(found.order, summarise(found, now), wrong))
    facts = {"format": _FORMAT, "question": _plain(question), "results": [asdict(r) for r in found.results]}
    try:
        private_folder(folder)
        partial.write_text(json.dumps(facts | answer, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        log.warning("what was measured cannot be kept in %s: %s", folder, error.strerror)
        _forget(partial)
        return
    enforce_limit()


def summarise(found: Measurement, now: float) -> str:
    """``openvino (bf16): 0.28 s a step; onnxruntime (fp32) 1.9 s; measured 2026-11-20``."""
    others = []
    for result in found.results:
        if result.label == found.winner:
            precision = f" ({result.precision})" if result.precision else ""
            head = f"{result.label}{precision}: {result.median_s:.2g} s a step"
        elif result.verdict in (FAILED, WRONG):
            others.append(f"{result.label} {result.verdict}")
        else:
            others.append(str(result))
    return "; ".join([head, *others, f"measured {time.strftime('%Y-%m-%d', time.gmtime(now))}"])


def machine_facts(root: Path = Path("/")) -> dict[str, Any]:
    """What of this machine decides how fast an engine is, read without loading one.

    Args:
        root: where ``proc`` and ``sys`` lie; another folder for tests.
    """
    cpu = describe_cpu(root)
    return {
        "cpu": [cpu.name, list(cpu.flags), cpu.threads],
        "cards": sorted(_pci_cards(root) + _nvidia_cards(root)),
        "drivers": [_first_line(root / "proc/driver/nvidia/version"), _first_line(root / _AMD_DRIVER)],
    }


_AMD_DRIVER = "sys/module/amdgpu/version"


def _pci_cards(root: Path) -> list[str]:
    """``vendor:device`` of every card the kernel drives."""
    folders = sorted((root / "sys/class/drm").glob("card[0-9]*/device"))
    return [
        f"{_first_line(f / 'vendor')}:{_first_line(f / 'device')}" for f in folders if "-" not in f.parts[-2]
    ]


def _nvidia_cards(root: Path) -> list[str]:
    """The models, which NVIDIA's driver names even where a container hides the rest."""
    models = []
    for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError:
            continue
        models += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return models


def _first_line(path: Path) -> str:
    try:
        return path.read_text(errors="replace").split("\n", 1)[0].strip()
    except OSError:
        return ""


def _plain(question: Mapping[str, Any]) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(question, sort_keys=True, default=str))


def _path(folder: Path, question: Mapping[str, Any]) -> Path:
    text = json.dumps(question, sort_keys=True, default=str)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def _forget(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error.strerror)


def _touch(path: Path) -> None:
    """Note that it was used; the oldest entries of the cache are removed first."""
    try:
        os.utime(path)
    except OSError as error:
        log.debug("the use of %s cannot be noted: %s", path, error)
