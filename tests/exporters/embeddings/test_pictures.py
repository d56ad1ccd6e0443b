"""Embeddings in pictures, written here as stable-diffusion-webui describes it, one number at a time.

No package reads or writes them but the web UI, which is none; what is checked against something of others is
the sequence that hides them, by the numbers that its ``image_embedding.py`` checks itself with.
"""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from kiln.errors import AdapterError
from kiln.exporters.embeddings import pictures
from kiln.exporters.embeddings.base import Embedding, EmbeddingRef
from kiln.exporters.embeddings.reading import read_embeddings
from kiln.exporters.inspection import inspect_path

RNG = np.random.default_rng(0)
FIVE = RNG.normal(size=(5, 768)).astype(np.float32)
FEW = settings(max_examples=150, deadline=None, database=None, derandomize=True)


def stored(vectors: Any = FIVE, **others: Any) -> dict[str, Any]:
    """What the web UI stores of an embedding, as JSON has it."""
    lists = vectors.astype(float).tolist() if isinstance(vectors, np.ndarray) else vectors
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": {"TORCHTENSOR": lists}},
        "name": "rick",
        "step": 3000,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    } | others


def sequence(multiplier: int = 1664525) -> Iterator[int]:
    state = 0
    while True:
        state = (multiplier * state + 1013904223) % 2**32
        yield state % 255


def block(halves: list[int], height: int, multiplier: int = 1664525) -> np.ndarray:
    """Halves of bytes as the lower halves of colours, under a pattern in the upper ones."""
    per_column = height * 3
    size = len(halves) + (-len(halves)) % per_column
    numbers = sequence(multiplier)
    hidden = [half ^ (next(numbers) & 15) for half in np.resize(halves, size)]
    pattern = np.random.default_rng(1).integers(0, 16, size) << 4
    return (np.array(hidden) | pattern).astype(np.uint8).reshape(height, -1, 3)


def beside(picture: np.ndarray, raw: bytes, multiplier: int = 1664525) -> np.ndarray:
    """A picture between the two blocks that hold some bytes."""
    height = len(picture)
    black = np.zeros((height, 1, 3), np.uint8)
    low = block([byte & 15 for byte in raw], height, multiplier)
    high = block([byte >> 4 for byte in raw], height, multiplier)
    return np.concatenate([low, black, picture, black, high], axis=1)


def noise(height: int = 128, width: int = 96) -> np.ndarray:
    return np.random.default_rng(2).integers(1, 256, (height, width, 3)).astype(np.uint8)


def deflated(value: object) -> bytes:
    return zlib.compress(json.dumps(value).encode(), 9)


def encoded(value: object) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


def png(path: Path, colours: np.ndarray, text: str | None = None, mode: str = "RGB") -> Path:
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_text("sd-ti-embedding", text)
    Image.fromarray(colours).convert(mode).save(path, pnginfo=info)
    return path


def read(path: Path) -> Embedding:
    (found,) = read_embeddings(EmbeddingRef(path))
    return found


def same(found: Embedding, vectors: np.ndarray = FIVE) -> bool:
    own = found.vectors["text_encoder"]
    return own.shape == vectors.shape and own.dtype == np.float32 and np.array_equal(own, vectors)


def test_the_sequence_is_that_of_the_web_ui() -> None:
    """Its first numbers, and the sum of 100,000 after the first hundred, as published there."""
    numbers = sequence()
    first = [next(numbers) for _ in range(100)]
    assert first[:8] == [253, 242, 127, 44, 157, 27, 239, 133]
    assert first[-7:] == [73, 222, 44, 198, 118, 240, 97]
    assert sum(next(numbers) for _ in range(100_000)) == 12_731_374
    own = pictures._sequence(100)
    assert own.tolist() == [(number & 15) * 17 for number in first]


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("place", ["text", "pixels", "both"])
def test_a_picture_of_the_web_ui(tmp_path: Path, place: str, mode: str) -> None:
    colours = noise() if place == "text" else beside(noise(), deflated(stored()))
    path = png(tmp_path / "x.png", colours, None if place == "pixels" else encoded(stored()), mode)
    found = read(path)
    assert same(found)
    assert found.token == "rick"
    assert not same(found, FIVE * np.float32(1.01)), "a factor is not seen"
    assert not same(found, FIVE[::-1]), "swapped vectors are not seen"
    said = inspect_path(path)
    assert (said["kind"], said["embeddings"][0]["token"], said["embeddings"][0]["vectors"]) == (
        "embedding",
        "rick",
        5,
    )


@pytest.mark.parametrize("height", [32, 61, 512])
@pytest.mark.parametrize("frame", [0, 7])
def test_any_size_and_a_black_frame(tmp_path: Path, height: int, frame: int) -> None:
    colours = beside(noise(height), deflated(stored()))
    framed = np.pad(colours, ((frame, frame), (frame, frame), (0, 0)))
    assert same(read(png(tmp_path / "x.png", framed)))


def test_a_picture_that_is_black_itself(tmp_path: Path) -> None:
    assert same(read(png(tmp_path / "x.png", beside(np.zeros((128, 96, 3), np.uint8), deflated(stored())))))


def test_a_text_behind_the_pixels(tmp_path: Path) -> None:
    data = png(tmp_path / "x.png", noise(), encoded(stored())).read_bytes()
    start = data.index(b"tEXt") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    behind = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    (tmp_path / "x.png").write_bytes(behind)
    assert same(read(tmp_path / "x.png"))


@pytest.mark.parametrize("plant", ["another sequence", "blocks swapped", "one colour", "mirrored"])
def test_a_planted_error_is_seen(tmp_path: Path, plant: str) -> None:
    raw = deflated(stored())
    colours = beside(noise(), raw, 1664526 if plant == "another sequence" else 1664525)
    width = (colours.shape[1] - 98) // 2
    if plant == "blocks swapped":
        colours = np.concatenate([colours[:, -width:], colours[:, width:-width], colours[:, :width]], axis=1)
    elif plant == "one colour":
        colours[0, 9, 0] ^= 1
    elif plant == "mirrored":
        colours = np.ascontiguousarray(colours[:, ::-1])
    with pytest.raises(AdapterError, match=r"x\.png: (is a picture without|the embedding in its pixels)"):
        read(png(tmp_path / "x.png", colours))


def test_names_and_numbers(tmp_path: Path) -> None:
    nameless = {key: value for key, value in stored().items() if key != "name"}
    assert read(png(tmp_path / "my-toy.png", noise(), encoded(nameless))).token == "my-toy"
    assert read(png(tmp_path / "my-toy.png", noise(), encoded(stored(name=3)))).token == "my-toy"
    named = EmbeddingRef.parse(f"{png(tmp_path / 'x.png', noise(), encoded(stored()))}:<toy>")
    assert [e.token for e in read_embeddings(named)] == ["<toy>"]
    wrapped = "\n".join(encoded(stored())[i : i + 76] for i in range(0, len(encoded(stored())), 76))
    assert same(read(png(tmp_path / "x.png", noise(), wrapped)))
    whole = {"string_to_param": {"*": {"TORCHTENSOR": [[1, 0, -2]], "more": 1}}}
    assert same(read(png(tmp_path / "x.png", noise(), encoded(whole))), np.array([[1, 0, -2]], np.float32))
    concept = {"<toy>": {"TORCHTENSOR": FIVE[0].astype(float).tolist()}}
    assert read(png(tmp_path / "x.png", noise(), encoded(concept))).token == "<toy>"


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


BROKEN: dict[str, tuple[str, str]] = {
    "no base64": ("!", "is not base64"),
    "half of base64": (encoded(stored())[:1001], "is not base64"),
    "no JSON": (b64(b"{"), "no JSON"),
    "not text": (b64(b"\xff\xfe{"), "no JSON"),
    "nothing": ("", "no JSON"),
    "half of the JSON": (b64(json.dumps(stored()).encode()[:999]), "no JSON"),
    "deep": (b64(b"[" * 100_000), "no JSON"),
    "null": (b64(b"null"), "holds null"),
    "a number": (b64(b"3"), "holds a int"),
    "empty": (b64(b"{}"), "holds nothing"),
    "no tensor": (encoded(stored() | {"string_to_param": {"*": [[1.0]]}}), "holds 1 entries"),
    "no parameters": (encoded(stored() | {"string_to_param": {}}), "holds 0 entries"),
    "two parameters": (
        encoded(stored() | {"string_to_param": {key: {"TORCHTENSOR": [[1.0]]} for key in "ab"}}),
        "holds 2 entries",
    ),
    "NaN": (encoded(stored([[1.0, float("nan")]])), "NaN or infinity"),
    "infinity": (encoded(stored([[1.0, 1e39]])), "NaN or infinity"),
    "a huge number": (encoded(stored([[1.0, 10**400]])), "not made of numbers"),
    "a number of a million digits": (b64(b'{"a": ' + b"9" * 1_000_000 + b"}"), "no JSON"),
    "ragged": (encoded(stored([[1.0], [1.0, 2.0]])), "no JSON"),
    "words": (encoded(stored([["1.5", "2"]])), "not made of numbers"),
    "nulls": (encoded(stored([[None]])), "not made of numbers"),
    "an object": (encoded(stored({"a": 1})), "not made of numbers"),
    "no rows": (encoded(stored([])), r"shape \[0\]"),
    "three axes": (encoded(stored([[[1.0]]])), "states of a whole prompt"),
    "too many vectors": (encoded(stored([[1.0]] * 1025)), r"shape \[1025, 1\]"),
    "a name with a line break": (encoded(stored(name="a\nb")), "cannot be called"),
    "a long name": (encoded(stored(name="a" * 101)), "cannot be called"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_text_is_one_line(tmp_path: Path, case: str) -> None:
    text, says = BROKEN[case]
    with pytest.raises(AdapterError, match=says) as caught:
        read(png(tmp_path / "x.png", noise(8, 8), text))
    assert "x.png" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plain_picture(tmp_path: Path) -> None:
    bars = noise()
    bars[:, 30:40] = 0
    bars[:, 70:80] = 0
    even = noise(16, 9)
    even[:, 3:6] = 0
    plain = {"noise": noise(), "black": noise() * 0, "white": noise() * 0 + 255, "bars": bars, "even": even}
    plain |= {"a pixel": noise(1, 1), "a row": noise(1, 9), "two black columns": noise(4, 2) * 0}
    for name, colours in plain.items():
        with pytest.raises(AdapterError, match="is a picture without an embedding"):
            read(png(tmp_path / "x.png", colours))
        with pytest.raises(AdapterError, match="is a picture without an embedding"):
            inspect_path(png(tmp_path / f"{name}.png", colours))


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16"])
def test_a_plain_picture_of_another_kind(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (9, 9)).save(tmp_path / "x.png")
    with pytest.raises(AdapterError, match="is a picture without an embedding"):
        read(tmp_path / "x.png")


def test_pixels_that_hold_something_else(tmp_path: Path) -> None:
    whole = deflated(stored())
    cases = {
        "ends too early": beside(noise(), whole)[:-9],
        "is damaged": beside(noise(), whole[:-4] + bytes(4)),
        "no JSON of an embedding": beside(noise(), zlib.compress(b"no JSON")),
        "more than 16 MiB": beside(noise(), zlib.compress(b" " * (pictures.MAX_JSON + 1), 9)),
        "list of int": beside(noise(), deflated([1])),
        "shape": beside(noise(), deflated(stored([[[1.0]]]))),
    }
    for says, colours in cases.items():
        with pytest.raises(AdapterError, match=says) as caught:
            read(png(tmp_path / "x.png", colours))
        assert "\n" not in str(caught.value)


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def crafted(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG file with a header that says a size, and other chunks."""
    header = chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0]))
    return pictures.SIGNATURE + header + b"".join(chunks) + chunk(b"IEND", b"")


def test_bombs_are_not_unpacked(tmp_path: Path) -> None:
    """A size in the header is looked at first; one colour of 25 million pixels has 73 kB."""
    large = Image.new("RGB", (5000, 5000))
    buffer = io.BytesIO()
    large.save(buffer, "PNG")
    packed = zlib.compress(b"A" * 20_000_000, 9)
    cases = {
        "expected an embedding in at most": buffer.getvalue(),
        "decompression bomb": crafted(12_000, 12_000, chunk(b"IDAT", zlib.compress(b""))),
        "could be decompression bomb": crafted(2**31 - 1, 2**31 - 1, chunk(b"IDAT", b"")),
        "cannot be read": crafted(4, 4, chunk(b"zTXt", b"sd-ti-embedding\0\0" + packed)),
    }
    for says, data in cases.items():
        (tmp_path / "x.png").write_bytes(data)
        with pytest.raises(AdapterError, match=says) as caught:
            read(tmp_path / "x.png")
        assert "\n" not in str(caught.value)


WHOLE = {
    "text": lambda folder: png(folder / "x.png", noise(8, 8), encoded(stored(FIVE[:, :8]))).read_bytes(),
    "pixels": lambda folder: png(
        folder / "x.png", beside(noise(16, 8), deflated(stored(FIVE[:, :8])))
    ).read_bytes(),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("pictures")
    return folder, {place: make(folder) for place, make in WHOLE.items()}


@FEW
@given(
    place=st.sampled_from(("text", "pixels")),
    where=st.floats(0, 1, exclude_max=True),
    noise_=st.binary(min_size=1, max_size=4),
    cut=st.booleans(),
)
def test_a_damaged_file_gives_one_line_or_the_embedding(
    whole: tuple[Path, dict[str, bytes]], place: str, where: float, noise_: bytes, cut: bool
) -> None:
    """Checksums of PNG and zlib find what is changed, so no other vectors come out."""
    folder, files = whole
    data, start = files[place], int(where * len(files[place]))
    (folder / "x.png").write_bytes(
        data[:start] if cut else data[:start] + noise_ + data[start + len(noise_) :]
    )
    try:
        found = read(folder / "x.png")
    except AdapterError as refused:
        event(f"{place}: refused")
        said = str(refused)
        assert "\n" not in said
        return
    event(f"{place}: read")
    assert same(found, FIVE[:, :8])
