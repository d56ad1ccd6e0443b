"""Normal noise in numpy, from the same random bits as torch's CPU and CUDA generators.

One seed gives one image on every backend, and the image other programs give for that seed: ``cpu`` is
``torch.randn`` on the CPU (A1111 "CPU", ComfyUI, diffusers with a CPU generator), ``cuda`` is
``torch.randn`` on an NVIDIA GPU (A1111 "GPU" and "NV", stable-diffusion.cpp "cuda").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from ..errors import UsageError

_U32, _U64 = np.uint32, np.uint64
_BLOCK = 16  # torch fills contiguous tensors of at least this many elements in blocks of this size
_TWO_PI_F32 = np.float32(2 * math.pi)


class NoiseGenerator(Protocol):
    """A stream of standard normal values; each call continues where the last one ended."""

    def randn(self, shape: Sequence[int]) -> np.ndarray:
        """The next float32 array of ``shape``."""
        ...


def _seed_bits(seed: int) -> int:
    """``seed`` as the unsigned 64 bits torch makes of it (negative seeds in two's complement)."""
    if not -(2**63) <= seed < 2**64:
        raise UsageError(f"seed {seed} does not fit: give a whole number from -2**63 to 2**64 - 1")
    return seed & (2**64 - 1)


class TorchCPUGenerator:
    """``torch.Generator("cpu").manual_seed(seed)``: MT19937 seeded with the low 32 bits of the seed.

    Raw bits are torch's exactly; normal values agree to float32 rounding of log, sin and cos (torch uses
    vectorised polynomials). Scheme: PyTorch, aten/src/ATen/native/cpu/DistributionTemplates.h.
    """

    def __init__(self, seed: int) -> None:
        """Seed it: -2**63 to 2**64 - 1."""
        self._words = np.random.RandomState(_seed_bits(seed) & 0xFFFFFFFF)
        self._spare: float | None = None

    def raw(self, n: int) -> np.ndarray:
        """The next ``n`` 32-bit words of the Mersenne twister, uint32 ``(n,)``."""
        return self._words.randint(0, 2**32, size=n, dtype=_U32)

    def randn(self, shape: Sequence[int]) -> np.ndarray:
        """What ``torch.randn(shape, generator=...)`` would give next.

        Args:
            shape: of the result.

        Returns:
            float32 array of ``shape``, mean 0 and deviation 1.
        """
        n = math.prod(shape)
        values = self._scalars(n) if n < _BLOCK else self._blocks(n)
        return values.reshape(tuple(shape))

    def _blocks(self, n: int) -> np.ndarray:
        """Box-Muller over blocks of 16: eight radii, then eight angles.

        An incomplete last block is replaced by a fresh one that overlaps its predecessor.
        """
        words = self.raw(n)
        out = np.empty(n, np.float32)
        whole = n - n % _BLOCK
        out[:whole] = _box_muller_blocks(words[:whole])
        if whole != n:
            out[n - _BLOCK :] = _box_muller_blocks(self.raw(_BLOCK))
        return out

    def _scalars(self, n: int) -> np.ndarray:
        """Fewer than 16 values come one by one, in double precision.

        Each pair's second value is kept for the next scalar draw, however much later that is.
        """
        values = [] if self._spare is None or n == 0 else [self._spare]
        if values:
            self._spare = None
        pairs = (n - len(values) + 1) // 2
        high, low = self.raw(4 * pairs).reshape(pairs, 2, 2).astype(_U64).transpose(2, 0, 1)
        uniform = (((high << _U64(32)) | low) & _U64(2**53 - 1)).astype(np.float64) * 2.0**-53
        radius, angle = np.sqrt(-2 * np.log1p(-uniform[:, 1])), 2 * math.pi * uniform[:, 0]
        values += np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel().tolist()
        if len(values) > n:
            self._spare = values.pop()
        return np.array(values, np.float32)


def _box_muller_blocks(words: np.ndarray) -> np.ndarray:
    """Normal values of whole blocks of 16 words, float32.

    Rounded to float32 after each operation, as torch does; log, sine and cosine are taken in double so that
    they do not depend on numpy's build.
    """
    uniform = (words & _U32(0xFFFFFF)).astype(np.float32).reshape(-1, 2, _BLOCK // 2) * np.float32(2.0**-24)
    log = np.log(1 - uniform[:, 0].astype(np.float64)).astype(np.float32)
    radius = np.sqrt(np.float32(-2) * log)
    angle = (_TWO_PI_F32 * uniform[:, 1]).astype(np.float64)
    waves = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    return (radius[:, None] * waves).ravel()


def philox4x32_10(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds of Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        counter: uint32 ``(4, n)``.
        key: two 32-bit words.

    Returns:
        uint32 ``(4, n)``.
    """
    c0, c1, c2, c3 = (row.astype(_U64) for row in counter)
    k0, k1 = key
    low = _U64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = c0 * _U64(0xD2511F53), c2 * _U64(0xCD9E8D57)
        c0, c1 = (p1 >> _U64(32)) ^ c1 ^ _U64(k0), p1 & low
        c2, c3 = (p0 >> _U64(32)) ^ c3 ^ _U64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(_U32)


class TorchCUDAGenerator:
    """``torch.Generator("cuda").manual_seed(seed)``: Philox4x32-10 keyed with the seed.

    Element ``i`` of a draw is made by GPU thread ``i`` from counter ``(draws so far, 0, i, 0)``. A real GPU
    has a limited number of threads and lets them take several elements each when a draw is larger. The GPU's
    own values can differ in the last digits: cuRAND takes sine and cosine from the hardware's fast units.
    """

    def __init__(self, seed: int, sm_count: int | None = None, threads_per_sm: int = 2048) -> None:
        """Seed it.

        Args:
            seed: -2**63 to 2**64 - 1.
            sm_count: multiprocessors of the GPU to imitate; None gives every element its own thread, which is
                what A1111 ("NV") and stable-diffusion.cpp do, and equals the GPU for draws of at most
                ``sm_count * threads_per_sm`` elements (43,008 on a small desktop card; one 512x512 image
                draws 16,384).
            threads_per_sm: resident threads of one multiprocessor: 2048 on data-centre cards, 1536 on desktop
                ones since Ampere, 1024 on Turing.
        """
        bits = _seed_bits(seed)
        self._key = (bits & 0xFFFFFFFF, bits >> 32)
        self._offset = 0
        self._max_threads = None if sm_count is None else sm_count * (threads_per_sm // 256) * 256

    def raw(self, n: int) -> np.ndarray:
        """The next block of four 32-bit words of each of the first ``n`` threads, uint32 ``(n, 4)``."""
        blocks = self._blocks(np.arange(n, dtype=_U64), np.zeros(n, _U64))
        self._offset += 1
        return blocks.T

    def randn(self, shape: Sequence[int]) -> np.ndarray:
        """What ``torch.randn(shape, device="cuda", generator=...)`` would give next.

        The thread layout is that of PyTorch, aten/src/ATen/native/cuda/DistributionTemplates.h: thread
        ``i mod T`` makes four values per counter for elements ``T`` apart.

        Args:
            shape: of the result.

        Returns:
            float32 array of ``shape``, mean 0 and deviation 1.
        """
        n = math.prod(shape)
        if n == 0:
            return np.zeros(tuple(shape), np.float32)
        threads = -(-n // 256) * 256
        if self._max_threads is not None:
            threads = min(threads, self._max_threads)
        turn, thread = np.divmod(np.arange(n, dtype=_U64), _U64(threads))
        rounds, slot = np.divmod(turn, _U64(4))
        words = self._blocks(thread, rounds)
        self._offset += (n - 1) // (4 * threads) + 1
        return _box_muller_slots(words, slot).reshape(tuple(shape))

    def _blocks(self, thread: np.ndarray, rounds: np.ndarray) -> np.ndarray:
        counter = np.zeros((4, thread.size), _U32)
        draws = rounds + _U64(self._offset)
        counter[0], counter[1] = draws & _U64(0xFFFFFFFF), draws >> _U64(32)
        counter[2] = thread
        return philox4x32_10(counter, self._key)


def _box_muller_slots(words: np.ndarray, slot: np.ndarray) -> np.ndarray:
    """cuRAND's ``curand_normal4``: values 0, 1 are sine, cosine of words 0, 1; values 2, 3 of words 2, 3.

    Uniforms are rounded to float32 once, as the GPU's fused multiply-add does.
    """
    second = slot >= 2
    w_radius, w_angle = np.where(second, words[2], words[0]), np.where(second, words[3], words[1])
    step = np.float64(np.float32(2.0**-32) * _TWO_PI_F32)
    uniform = (w_radius.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32)
    angle = (w_angle.astype(np.float32).astype(np.float64) * step + step / 2).astype(np.float32)
    wide = angle.astype(np.float64)
    wave = np.where(slot % _U64(2) == 0, np.sin(wide), np.cos(wide))
    return (np.sqrt(-2 * np.log(uniform.astype(np.float64))) * wave).astype(np.float32)


RNGS: dict[str, Callable[[int], NoiseGenerator]] = {"cpu": TorchCPUGenerator, "cuda": TorchCUDAGenerator}


def make_generators(rng: str, seed: int, count: int) -> tuple[NoiseGenerator, ...]:
    """One generator per image, seeded ``seed + i``, so that image i of a batch can be made alone.

    Raises:
        UsageError: ``rng`` is not one of ``RNGS``, or a seed does not fit.
    """
    if rng not in RNGS:
        raise UsageError(f"rng {rng!r} is unknown: choose one of {', '.join(RNGS)}")
    return tuple(RNGS[rng](seed + i) for i in range(count))


def make_noise_sampler(
    generators: Sequence[NoiseGenerator], shape: Sequence[int]
) -> Callable[[], np.ndarray]:
    """A function whose every call draws ``(len(generators), *shape)`` float32, row i from generator i."""

    def draw() -> np.ndarray:
        return np.stack([generator.randn(shape) for generator in generators])

    return draw
