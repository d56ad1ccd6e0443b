"""Pixels, the checks on them, and PNG files that are whole or not there."""

import errno
import os
import resource

import numpy as np
import pytest
from PIL import Image

from kiln.errors import InvalidOutputError, StorageError, UsageError
from kiln.runtime import images
from kiln.runtime.images import check_finite, check_images, read_parameters, save_png, to_uint8

RANDOM = np.random.default_rng(0)
PICTURE = RANDOM.integers(0, 256, (24, 16, 3), np.uint8)


def test_pixels_are_diffusers():
    torch = pytest.importorskip("torch")
    processor = pytest.importorskip("diffusers.image_processor").VaeImageProcessor()
    sample = (1.5 * RANDOM.standard_normal((2, 3, 40, 24))).astype(np.float32)
    sample[0, 0, 0] = np.linspace(-1.001, 1.001, 24)
    sample[1, 1] = ((np.arange(40 * 24) % 511) / 255 - 1).reshape(40, 24)  # many exact halves
    expected = np.stack(
        [np.asarray(i) for i in processor.postprocess(torch.from_numpy(sample), output_type="pil")]
    )
    actual = to_uint8(sample)
    assert actual.shape == expected.shape == (2, 40, 24, 3)
    assert actual.dtype == expected.dtype == np.uint8
    np.testing.assert_array_equal(actual, expected)
    assert (to_uint8(sample * np.float32(1.01)) != expected).any()
    assert (to_uint8(sample[:, ::-1]) != expected).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_planted_nan(value):
    sample = np.zeros((2, 3, 8, 8), np.float32)
    check_finite(sample, "vae_decoder")
    sample[1, 2, 3, 4] = value
    with pytest.raises(InvalidOutputError, match=r"^text_encoder gave 1 values of 384"):
        check_finite(sample, "text_encoder")


def test_planted_flat_image():
    batch = np.stack([PICTURE, PICTURE])
    check_images(batch)
    batch[1] = (0, 128, 255)
    with pytest.raises(
        InvalidOutputError, match=r"^vae_decoder gave image 2 of 2 in one flat colour \(0, 128, 255\)"
    ):
        check_images(batch)
    batch[1, ::2] += np.uint8(1)  # one level of dither is still flat
    batch[1, :, :, 2] = 254
    with pytest.raises(InvalidOutputError, match="flat"):
        check_images(batch)
    batch[1, 0, 0, 2] = 250  # one pixel is a picture
    check_images(batch)


@pytest.mark.parametrize("text", ["a cat\nSteps: 1", "naïve café", "漢字 😀\nSteps: 2", None, ""])
def test_png_round_trip(tmp_path, text):
    path = tmp_path / "out.png"
    save_png(PICTURE, path, text)
    with Image.open(path) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), PICTURE)
        assert set(image.info) == ({"parameters"} if text else set())
    assert read_parameters(path) == (text or None)
    assert os.listdir(tmp_path) == ["out.png"]


def test_text_chunk_is_plain_where_it_can_be(tmp_path):
    for text, chunk in (("a café", b"tEXtparameters\0a caf\xe9"), ("漢", b"iTXtparameters\0")):
        save_png(PICTURE, tmp_path / "x.png", text)
        assert chunk in (tmp_path / "x.png").read_bytes()


def test_existing_file_is_replaced_and_rights_are_ordinary(tmp_path):
    path = tmp_path / "out.png"
    path.write_text("old")
    save_png(PICTURE, path, "new")
    assert read_parameters(path) == "new"
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_disk_full_half_way(tmp_path, monkeypatch):
    """A real failing write: the kernel refuses bytes beyond the limit; the old picture stays."""
    path = tmp_path / "out.png"
    save_png(PICTURE, path, "old")
    large = RANDOM.integers(0, 256, (128, 128, 3), np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*out\.png"):
            save_png(large, path, "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["out.png"]
    assert read_parameters(path) == "old"

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(images.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device; free some space"):
        save_png(large, path, "new")
    assert os.listdir(tmp_path) == ["out.png"]


def test_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(images.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_png(PICTURE, tmp_path / "out.png")
    assert os.listdir(tmp_path) == []


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(StorageError, match="create the folder first"):
        save_png(PICTURE, tmp_path / "no" / "out.png")
    (tmp_path / "dir.png").mkdir()
    with pytest.raises(StorageError, match="choose another"):
        save_png(PICTURE, tmp_path / "dir.png")
    assert os.listdir(tmp_path) == ["dir.png"]


@pytest.mark.parametrize("order", ["big", "little", "ascii", "bare"])
def test_jpeg_user_comment(tmp_path, order):
    text = "a cat 漢 é" if order != "ascii" else "a cat"
    data = {
        "big": b"UNICODE\0" + text.encode("utf-16-be"),
        "little": b"UNICODE\0" + text.encode("utf-16-le"),
        "ascii": b"ASCII\0\0\0" + text.encode(),
        "bare": text.encode(),
    }[order]
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = data
    Image.fromarray(PICTURE).save(tmp_path / "x.jpg", exif=exif)
    assert read_parameters(tmp_path / "x.jpg") == text


def test_what_is_no_image(tmp_path):
    (tmp_path / "x.png").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UsageError, match="not an image"):
        read_parameters(tmp_path / "x.png")
    save_png(PICTURE, tmp_path / "cut.png", "text")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"cut\.png"):
        read_parameters(tmp_path / "cut.png")
    with pytest.raises(UsageError, match="No such file"):
        read_parameters(tmp_path / "none.png")
