"""What torch computes in: the choice of precision, fp32 that stays fp32, attention that does not overflow."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kiln.backends.base import GraphSource, PrepareOptions
from kiln.backends.torch_devices import TorchDevice
from kiln.backends.torch_numerics import choose_numerics, exact_fp32, overflows_fp16
from kiln.errors import SessionError

torch = pytest.importorskip("torch")

GPU_PRECISIONS = ("fp16", "bf16", "fp32")
DEVICES = {
    "cpu": TorchDevice("cpu", "cpu", 0, "a processor", "", ("fp32", "bf16")),
    "cuda": TorchDevice("cuda", "cuda", 0, "GeForce", "sm_86", GPU_PRECISIONS),
    "turing": TorchDevice("cuda", "cuda", 0, "GeForce", "sm_75", ("fp16", "fp32")),
    "radeon": TorchDevice("rocm", "rocm", 0, "Radeon", "gfx1100", GPU_PRECISIONS),
    "instinct": TorchDevice("rocm", "rocm", 0, "MI300X", "gfx942", GPU_PRECISIONS),
}
KL = {"_class_name": "AutoencoderKL"}
SDXL = {**KL, "scaling_factor": 0.13025, "force_upcast": True}


def source(component: str, config: dict[str, Any] | None = None) -> GraphSource:
    return GraphSource(component, Path("none"), Path("none"), config or {}, "")


@pytest.mark.parametrize(
    ("device", "asked", "component", "config", "found"),
    [
        ("cpu", "auto", "unet", {}, "fp32"),
        ("cpu", "bf16", "unet", {}, "bf16"),
        ("cuda", "auto", "unet", {}, "fp16"),
        ("cuda", "auto", "text_encoder", {}, "fp16"),
        ("cuda", "auto", "unet", {"upcast_attention": True}, "fp16"),
        ("cuda", "fp32", "unet", {}, "fp32"),
        ("radeon", "auto", "unet", {}, "fp16"),
        ("radeon", "bf16", "vae_decoder", SDXL, "bf16"),
        ("cuda", "auto", "vae_decoder", SDXL, "fp32"),
        ("cuda", "fp16", "vae_encoder", SDXL, "fp32"),
        ("cuda", "auto", "vae_decoder", {**SDXL, "force_upcast": False}, "fp16"),
        ("cuda", "auto", "vae_decoder", KL, "fp16"),
        ("cuda", "auto", "vae_decoder", {**KL, "scaling_factor": 0.18215, "force_upcast": True}, "fp16"),
        ("cuda", "auto", "vae_decoder", {**SDXL, "_class_name": "AutoencoderTiny"}, "fp16"),
    ],
)
def test_precision(device: str, asked: str, component: str, config: dict[str, Any], found: str) -> None:
    chosen = choose_numerics(source(component, config), DEVICES[device], PrepareOptions(precision=asked))
    assert chosen.precision == found
    assert bool(chosen.why_wider) == (overflows_fp16(source(component, config)) and found == "fp32")


def test_force() -> None:
    forced = PrepareOptions(precision="fp16", extra={"force_precision": True})
    assert choose_numerics(source("vae_decoder", SDXL), DEVICES["cuda"], forced).precision == "fp16"
    assert choose_numerics(source("unet"), DEVICES["cpu"], forced).precision == "fp16"


@pytest.mark.parametrize(
    ("device", "options", "told"),
    [
        ("cpu", {"precision": "fp16"}, "two hundred times as long.*auto or one of fp32, bf16"),
        ("turing", {"precision": "bf16"}, "does not compute in bf16; use auto or one of fp16, fp32"),
        ("cpu", {"precision": "int8"}, "got int8"),
        ("cpu", {"extra": {"compiel": True}}, "no option 'compiel'; it has compile, channels_last"),
        ("cpu", {"extra": {"channels_last": 1}}, "channels_last of the torch backend takes bool, got 1"),
        ("cpu", {"extra": {"compile": "faster"}}, "has the modes default, .*got 'faster'"),
    ],
)
def test_refused(device: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(SessionError, match=told):
        choose_numerics(source("unet"), DEVICES[device], PrepareOptions(**options))


@pytest.mark.parametrize(
    ("device", "precision", "component", "found"),
    [
        ("cpu", "fp32", "unet", False),  # the reference stays as it is
        ("cpu", "bf16", "unet", True),
        ("cpu", "bf16", "text_encoder", False),
        ("cuda", "fp16", "unet", True),
        ("cuda", "fp32", "vae_decoder", False),
        ("radeon", "fp16", "unet", False),  # pytorch#170947: slower there
        ("instinct", "fp16", "unet", True),
    ],
)
def test_layout(device: str, precision: str, component: str, found: bool) -> None:
    options = PrepareOptions(precision=precision)
    assert choose_numerics(source(component), DEVICES[device], options).channels_last == found
    other = PrepareOptions(precision=precision, extra={"channels_last": not found})
    assert choose_numerics(source(component), DEVICES[device], other).channels_last != found


@pytest.mark.parametrize(
    ("asked", "mode"), [(True, "default"), (False, ""), ("max-autotune", "max-autotune")]
)
def test_compile_mode(asked: bool | str, mode: str) -> None:
    options = PrepareOptions(extra={"compile": asked})
    assert choose_numerics(source("unet"), DEVICES["cpu"], options).compile_mode == mode


def switches() -> tuple[str, ...]:
    b = torch.backends
    return tuple(
        one.fp32_precision
        for one in (b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv)
    )


@pytest.fixture
def sloppy() -> Iterator[tuple[str, ...]]:
    """A process whose user allowed everything."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield switches()
    torch.set_float32_matmul_precision(before)


def test_fp32_is_exact_inside_and_as_before_outside(sloppy: tuple[str, ...]) -> None:
    assert "tf32" in sloppy
    assert "bf16" in sloppy
    with exact_fp32(torch, tf32=False):
        assert set(switches()) == {"ieee"}
        assert torch.backends.cudnn.allow_tf32 is False  # the old flags, which others read, agree
        assert torch.backends.cuda.matmul.allow_tf32 is False
        with exact_fp32(torch, tf32=False):
            pass
        assert set(switches()) == {"ieee"}
    assert switches() == sloppy
    with pytest.raises(ZeroDivisionError), exact_fp32(torch, tf32=False):
        raise ZeroDivisionError
    assert switches() == sloppy


def test_tf32_when_asked_for() -> None:
    with exact_fp32(torch, tf32=True):
        assert switches()[:3] == ("tf32", "tf32", "tf32")
        assert torch.backends.cudnn.allow_tf32 is True


def test_sessions_in_several_threads_share_the_switches(sloppy: tuple[str, ...]) -> None:
    inside, leave, seen = threading.Barrier(3), threading.Event(), []

    def work(last: bool) -> None:
        with exact_fp32(torch, tf32=False):
            inside.wait()
            if last:
                leave.wait()
                seen.append(set(switches()))

    threads = [threading.Thread(target=work, args=(last,)) for last in (False, True)]
    for thread in threads:
        thread.start()
    inside.wait()
    threads[0].join()
    leave.set()
    threads[1].join()
    assert seen == [{"ieee"}]
    assert switches() == sloppy


@pytest.mark.usefixtures("sloppy")
def test_a_product_is_exact_inside() -> None:
    """What the switches are for: outside, oneDNN rounds this product to bf16 where it can."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bf16 on this processor")
    torch.manual_seed(0)
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    exact = (a.double() @ b.double()).float()
    if torch.allclose(a @ b, exact, rtol=1e-4, atol=1e-3):
        pytest.skip("torch did not round here, so there is nothing to prevent")
    with exact_fp32(torch, tf32=False):
        assert torch.allclose(a @ b, exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kernel", ["FLASH_ATTENTION", "MATH"])
def test_attention_of_sd2_does_not_overflow_in_fp16(kernel: str) -> None:
    """Logits beyond 65504, as SD2.1 has them: torch's kernels sum them in fp32, a plain product does not."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 64, 64).half() for _ in range(3))
    query, key = query * 100, key * 100
    assert (query @ key.mT).isinf().any()  # the error that is looked for is there
    exact = torch.nn.functional.scaled_dot_product_attention(query.float(), key.float(), value.float())
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert found.isfinite().all()
    assert torch.allclose(found.float(), exact, atol=1e-2)
