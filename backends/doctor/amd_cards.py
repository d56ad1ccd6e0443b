"""AMD's GPUs by gfx name: what they are called in shops, and what today's packages do with them.

Sources. ``official`` is what AMD's page "Install ONNX Runtime for ROCm" (ai-ecosystem, ROCm 10.1.0) lists for
ONNX Runtime with MIGraphX. ``unofficial`` is what TheRock, AMD's open build of ROCm, builds for Linux
(SUPPORTED_GPUS.md of August 2026, which also says what was at least started once by a test); ``unsupported``
is what neither has. Overrides: reports in pytorch/pytorch#164346 and #132570 and AMD's own ROCm/ROCm
discussions. docs/amd.md shows this table, and a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

OFFICIAL, UNOFFICIAL, UNSUPPORTED = "official", "unofficial", "unsupported"
MIGRAPHX, TORCH = "onnxruntime-migraphx", "torch:rocm"


@dataclass(frozen=True)
class Card:
    """One instruction set of AMD's GPUs.

    ``override`` is the HSA_OVERRIDE_GFX_VERSION under which it runs kernels built for a relative, for
    packages that have none for it; empty where none is known to work. ``integrated``: it shares the
    processor's memory. ``tested``: AMD's own list says that more than a build was tried. ``display``: it
    drives a screen and is slower than the processor beside it, so nothing is asked of it.
    """

    gfx: str
    architecture: str
    names: str
    support: str
    override: str = ""
    integrated: bool = False
    tested: bool = True
    display: bool = False

    @property
    def backends(self) -> tuple[str, ...]:
        """Which of Kiln's backends to take, the first one first."""
        return {OFFICIAL: (TORCH, MIGRAPHX), UNOFFICIAL: (TORCH,), UNSUPPORTED: ()}[self.support]


CARDS: tuple[Card, ...] = (
    Card("gfx1201", "RDNA4", "RX 9070 XT, 9070, 9070 GRE; AI PRO R9700", OFFICIAL),
    Card("gfx1200", "RDNA4", "RX 9060 XT, 9060", OFFICIAL),
    Card("gfx1153", "RDNA3.5", "Ryzen AI 300, smallest chips", OFFICIAL, integrated=True, tested=False),
    Card("gfx1152", "RDNA3.5", "Ryzen AI 300: Radeon 860M, 840M", OFFICIAL, integrated=True),
    Card(
        "gfx1151",
        "RDNA3.5",
        "Ryzen AI Max: Radeon 8060S, 8050S",
        OFFICIAL,
        override="11.0.0",
        integrated=True,
    ),
    Card("gfx1150", "RDNA3.5", "Ryzen AI 9: Radeon 890M, 880M", OFFICIAL, integrated=True),
    Card(
        "gfx1103",
        "RDNA3",
        "Ryzen 7040 and 8040: Radeon 780M, 760M, 740M",
        UNOFFICIAL,
        override="11.0.0",
        integrated=True,
    ),
    Card("gfx1102", "RDNA3", "RX 7600 XT, 7600, 7700S", OFFICIAL, override="11.0.0"),
    Card("gfx1101", "RDNA3", "RX 7800 XT, 7700 XT; PRO W7700", OFFICIAL, override="11.0.0"),
    Card("gfx1100", "RDNA3", "RX 7900 XTX, 7900 XT, 7900 GRE; PRO W7900, W7800", OFFICIAL),
    Card(
        "gfx1036",
        "RDNA2",
        "Ryzen 7000 and 9000 desktop: Radeon Graphics (2 units)",
        UNOFFICIAL,
        override="10.3.0",
        integrated=True,
        display=True,
    ),
    Card(
        "gfx1035",
        "RDNA2",
        "Ryzen 6000 and 7035: Radeon 680M, 660M",
        UNOFFICIAL,
        override="10.3.0",
        integrated=True,
    ),
    Card("gfx1034", "RDNA2", "RX 6500 XT, 6400", UNOFFICIAL, override="10.3.0"),
    Card("gfx1033", "RDNA2", "Steam Deck", UNOFFICIAL, override="10.3.0", integrated=True),
    Card("gfx1032", "RDNA2", "RX 6650 XT, 6600 XT, 6600; PRO W6600", UNOFFICIAL, override="10.3.0"),
    Card("gfx1031", "RDNA2", "RX 6750 XT, 6700 XT, 6700", UNOFFICIAL, override="10.3.0"),
    Card("gfx1030", "RDNA2", "RX 6950 XT, 6900 XT, 6800 XT, 6800; PRO W6800", UNOFFICIAL),
    Card("gfx1012", "RDNA1", "RX 5500 XT, 5500, 5300; PRO W5500", UNOFFICIAL),
    Card("gfx1011", "RDNA1", "PRO V520, PRO 5600M", UNOFFICIAL),
    # No override: with 10.3.0 it often ends in a segmentation fault (pytorch#132570).
    Card("gfx1010", "RDNA1", "RX 5700 XT, 5700, 5600 XT; PRO W5700", UNOFFICIAL),
    Card("gfx950", "CDNA4", "Instinct MI355X, MI350X, MI350P", OFFICIAL, tested=False),
    Card("gfx942", "CDNA3", "Instinct MI325X, MI300X, MI300A", OFFICIAL),
    Card("gfx90a", "CDNA2", "Instinct MI250X, MI250, MI210", OFFICIAL, tested=False),
    Card("gfx908", "CDNA", "Instinct MI100", UNOFFICIAL, tested=False),
    Card("gfx906", "GCN5.1", "Radeon VII, PRO VII; Instinct MI60, MI50", UNOFFICIAL, tested=False),
    Card("gfx900", "GCN5", "RX Vega 64, Vega 56; Instinct MI25", UNOFFICIAL, tested=False),
    Card("gfx90c", "GCN5", "Ryzen 4000G, 5000G: Radeon Graphics", UNSUPPORTED, integrated=True),
    Card("gfx902", "GCN5", "Ryzen 2000G, 3000G: Radeon Vega 8, 11", UNSUPPORTED, integrated=True),
    Card("gfx803", "GCN4, GCN3", "RX 590, 580, 570, 480, 470; R9 Fury", UNSUPPORTED),
)

_BY_GFX = {card.gfx: card for card in CARDS}


def card_of(gfx: str) -> Card | None:
    """What is known of a gfx name, None for one that is not in the table."""
    return _BY_GFX.get(gfx)


def gfx_name(version: int) -> str:
    """``gfx_target_version`` of the kernel as the compiler's name, empty for 0, which is a processor.

    Decimal major, minor and stepping in two digits each; minor and stepping become one hexadecimal digit:
    110501 is gfx1151 and 90010 is gfx90a. Source: Linux drivers/gpu/drm/amd/amdkfd/kfd_device.c.
    """
    if version <= 0:
        return ""
    major, minor, stepping = version // 10000, version // 100 % 100, version % 100
    return f"gfx{major}{minor:x}{stepping:x}"


def gfx_of_override(text: str) -> str:
    """What an HSA_OVERRIDE_GFX_VERSION stands for: ``10.3.0`` is gfx1030; empty if it is no version."""
    parts = text.split(".")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        return ""
    major, minor, stepping = map(int, parts)
    return gfx_name(major * 10000 + minor * 100 + stepping)


def same_family(gfx: str, other: str) -> bool:
    """Whether one can run code built for the other at all, as far as reports go.

    gfx10.3 is one family, gfx11 (11.5 included) one, gfx10.1 one, and so are gfx900 and its integrated
    relatives; every other chip runs its own code only.
    """
    return _family(gfx) == _family(other)


def _family(gfx: str) -> str:
    for prefix in ("gfx103", "gfx101", "gfx11"):
        if gfx.startswith(prefix):
            return prefix
    return "gfx900" if gfx in ("gfx900", "gfx902", "gfx90c") else gfx
