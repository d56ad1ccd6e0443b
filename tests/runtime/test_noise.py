"""Noise against torch's CPU generator, and Philox against its published known answers."""

import time

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS
from kiln.errors import UsageError
from kiln.runtime.noise import (
    TorchCPUGenerator,
    TorchCUDAGenerator,
    make_generators,
    make_noise_sampler,
    philox4x32_10,
)

torch = pytest.importorskip("torch")

NEAR = THRESHOLDS["noise_absolute"]
SEEDS = [0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**32 + 42, 2**40 + 5, 2**63, 2**64 - 1, -1, -7, -(2**63)]
SHAPES = [(4, 64, 64), (1, 4, 8, 12), (16,), (17,), (31,), (33, 5), (2, 4, 8, 8), (1,), (3,), (15,), (2, 7)]


def worst(actual, expected):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == np.float32
    assert np.isfinite(actual).all()
    return float(np.abs(actual - expected).max())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_values_are_torchs(seed, shape):
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()
    assert NEAR.holds(worst(TorchCPUGenerator(seed).randn(shape), expected))


@pytest.mark.parametrize("seed", [0, 42, -1, 2**40 + 5])
def test_cpu_stream_goes_on_across_draws_of_all_kinds(seed):
    """Block draws, tails and the kept second value of scalar draws, one after the other."""
    oracle, ours = torch.Generator().manual_seed(seed), TorchCPUGenerator(seed)
    for shape in [(3,), (4, 8, 8), (2,), (1,), (17,), (1,), (5,), (0,), (100,), (15,), (16,), (7,)]:
        expected = torch.randn(shape, generator=oracle).numpy()
        actual = ours.randn(shape)
        assert actual.shape == expected.shape
        assert actual.size == 0 or NEAR.holds(worst(actual, expected)), shape


@pytest.mark.parametrize("seed", SEEDS)
def test_cpu_raw_bits_are_torchs(seed):
    """torch's 64-bit integers show whole words: modulo 2**32 the second of each pair."""
    n = 700  # more than one refill of the twister's 624 words
    oracle, ours = torch.Generator().manual_seed(seed), TorchCPUGenerator(seed)
    words = ours.raw(2 * n)
    assert words.dtype == np.uint32
    second = torch.randint(0, 2**32, (n,), generator=oracle).numpy()
    np.testing.assert_array_equal(words[1::2], second)
    oracle.manual_seed(seed)
    torch.rand(1, generator=oracle)  # one word further: the pairs now end on the other half
    other = torch.randint(0, 2**32, (n - 1,), generator=oracle).numpy()
    np.testing.assert_array_equal(words[2:-1:2], other)


def test_cpu_planted_errors_are_seen():
    expected = torch.randn((4, 64, 64), generator=torch.Generator().manual_seed(42)).numpy()
    right = TorchCPUGenerator(42).randn((4, 64, 64))
    late = TorchCPUGenerator(42)
    late.raw(1)
    swapped = right.reshape(-1, 2, 8)[:, ::-1].reshape(right.shape)
    for wrong in (
        TorchCPUGenerator(43).randn(right.shape),
        late.randn(right.shape),
        swapped,
        right * np.float32(1.01),
    ):
        assert not NEAR.holds(worst(wrong, expected))


def test_cpu_known_values():
    first = TorchCPUGenerator(0).randn((1, 4, 64, 64)).ravel()[:4]
    assert NEAR.holds(worst(first, np.float32([-1.1258398, -1.1523602, -0.25057858, -0.4338788])))
    few = TorchCPUGenerator(42).randn((4,))
    assert NEAR.holds(worst(few, np.float32([0.33669037, 0.1288094, 0.23446237, 0.23033303])))


PHILOX_KNOWN = [  # Random123, tests/kat_vectors: counter, key, result
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX_KNOWN)
def test_philox_known_answers(counter, key, expected):
    words = [[int(word, 16) for word in text.split()] for text in (counter, key, expected)]
    actual = philox4x32_10(np.array(words[0], np.uint32)[:, None], tuple(words[1]))
    assert actual.dtype == np.uint32
    np.testing.assert_array_equal(actual[:, 0], np.array(words[2], np.uint32))
    off_by_one = philox4x32_10(np.array(words[0], np.uint32)[:, None] ^ np.uint32(1), tuple(words[1]))
    assert (off_by_one != actual).any()


CUDA_KNOWN = [  # first row is what A1111 documents from a real GPU, modules/rng_philox.py
    (0, 0, (3, 4), [-0.92466259, -0.42534415, -2.6438457, 0.14518388]),
    (42, 0, (4,), [0.19401887, 2.1613739, -0.17205095, 0.84906]),
    (42, 1, (4,), [0.13913749, -0.10821616, -0.7174222, 0.75664866]),
]


@pytest.mark.parametrize(("seed", "earlier", "shape", "expected"), CUDA_KNOWN)
def test_cuda_known_values(seed, earlier, shape, expected):
    generator = TorchCUDAGenerator(seed)
    for _ in range(earlier):
        generator.randn(shape)
    actual = generator.randn(shape).ravel()[:4]
    assert NEAR.holds(worst(actual, np.float32(expected)))
    assert not NEAR.holds(worst(TorchCUDAGenerator(seed + 1).randn(shape).ravel()[:4], np.float32(expected)))


@pytest.mark.parametrize("seed", [0, 42, 2**32 + 42, -1])
def test_cuda_values_are_box_muller_of_the_raw_bits(seed):
    """In double precision from the whole words, as A1111 has it; float32 words cost up to 1e-5 near zero."""
    words = TorchCUDAGenerator(seed).raw(4096).astype(np.float64)
    u, v = (words[:, 0] + 0.5) * 2.0**-32, (words[:, 1] + 0.5) * (2 * np.pi * 2.0**-32)
    expected = np.sqrt(-2 * np.log(u)) * np.sin(v)
    actual = TorchCUDAGenerator(seed).randn((4096,))
    sure = u < 0.99  # where rounding the word to float32 does not move the radius
    assert np.abs(actual - expected)[sure].max() < 3e-6
    assert np.abs(actual - expected).max() < 1e-4


def test_cuda_seed_has_64_bits_and_cpu_seed_32():
    assert (TorchCUDAGenerator(2**32).raw(4) != TorchCUDAGenerator(0).raw(4)).any()
    assert (TorchCPUGenerator(2**32).raw(4) == TorchCPUGenerator(0).raw(4)).all()


def test_cuda_grid_of_a_small_gpu():
    """Beyond the GPU's threads elements take the other slots of a thread's block, then its next block."""
    threads = 2 * 1024  # two multiprocessors
    small, wide = TorchCUDAGenerator(7, sm_count=2, threads_per_sm=1024), TorchCUDAGenerator(7)
    np.testing.assert_array_equal(small.randn((threads,)), wide.randn((threads,)))
    n = 9 * threads + 5
    large = TorchCUDAGenerator(7, 2, 1024).randn((n,))
    first = TorchCUDAGenerator(7)
    blocks = [first.raw(threads).astype(np.float64) for _ in range(3)]
    for i in (0, threads, 2 * threads + 3, 3 * threads + 9, 4 * threads + 1, 7 * threads, n - 1):
        turn, thread = divmod(i, threads)
        x, y = blocks[turn // 4][thread, 2 * (turn % 4 // 2) :][:2]
        wave = np.cos if turn % 2 else np.sin
        value = np.sqrt(-2 * np.log((x + 0.5) * 2.0**-32)) * wave((y + 0.5) * 2 * np.pi * 2.0**-32)
        assert large[i] == pytest.approx(value, abs=1e-5), i
    small = TorchCUDAGenerator(7, 2, 1024)
    small.randn((n,))  # took three blocks of each thread
    fresh = TorchCUDAGenerator(7)
    for _ in range(3):
        fresh.raw(1)
    np.testing.assert_array_equal(small.raw(8), fresh.raw(8))


@pytest.mark.parametrize("rng", ["cpu", "cuda"])
def test_one_generator_per_image(rng):
    """Image i of a batch is the image of seed + i alone, in every draw."""
    batch = make_noise_sampler(make_generators(rng, 5, 3), (4, 8, 8))
    alone = [make_noise_sampler(make_generators(rng, 5 + i, 1), (4, 8, 8)) for i in range(3)]
    for _ in range(2):
        np.testing.assert_array_equal(batch(), np.concatenate([draw() for draw in alone]))


@pytest.mark.parametrize("kind", [TorchCPUGenerator, TorchCUDAGenerator])
def test_seed_that_does_not_fit(kind):
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(UsageError, match="does not fit"):
            kind(seed)


def test_unknown_rng():
    with pytest.raises(UsageError, match="cpu, cuda"):
        make_generators("gpu", 0, 1)


@pytest.mark.parametrize("kind", [TorchCPUGenerator, TorchCUDAGenerator])
def test_fast_enough_to_not_matter(kind):
    generator, times = kind(0), []
    for _ in range(7):
        start = time.perf_counter()
        generator.randn((4, 64, 64))
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05  # a tenth of that when the machine is idle
