"""Where and how to run: what the caller asks of every component alike."""

from __future__ import annotations

from dataclasses import dataclass

from ..backends.isolation.policy import ISOLATE
from ..errors import UsageError

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Settings:
    """Backend (with a device: ``torch:cuda``), precision, threads, and what is kept between runs.

    ``tune`` is for the backend ``auto``: whether to measure which is fastest. None: when the run is long
    enough to repay it, once for each network and size; True: now; False: never, and disregard what was.
    ``isolate`` says whether the engine runs in a process of its own, which outlives its crash: ``auto`` does
    so for MIGraphX, and for torch on ROCm.
    """

    backend: str = "auto"
    precision: str = "auto"
    threads: int = 0
    cache: bool = True
    tune: bool | None = None
    isolate: str = "auto"

    def __post_init__(self) -> None:
        """Check what can be checked without an engine.

        Raises:
            UsageError: an unknown precision, a number of threads below 0, or an unknown ``isolate``.
        """
        if self.precision not in PRECISIONS:
            raise UsageError(f"unknown precision {self.precision!r}; expected one of {', '.join(PRECISIONS)}")
        if self.threads < 0:
            raise UsageError(
                f"threads {self.threads} is out of range; expected 0 (the engine chooses) or more"
            )
        if self.isolate not in ISOLATE:
            raise UsageError(f"unknown isolate {self.isolate!r}; expected one of {', '.join(ISOLATE)}")
