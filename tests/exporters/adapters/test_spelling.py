"""How an adapter is written: ``--lora``'s fields and the tags of a prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from kiln.errors import UsageError
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.block_strengths import BlockStrengths
from kiln.exporters.prompt_tags import AdapterFolder, take_tags

INS = BlockStrengths.parse("INS")
LIST = "1,0,0,0,0,0,0,1,1,1,0,0"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0, None, None, None)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8, None, None, None)),
        ("a.safetensors:-1e-1:.5", ("a.safetensors", -0.1, 0.5, None, None)),
        ("a.safetensors:0.8:lbw=INS", ("a.safetensors", 0.8, None, None, INS)),
        ("a.safetensors:lbw=INS:0.8", ("a.safetensors", 0.8, None, None, INS)),
        ("a.safetensors:te=0:dyn=4", ("a.safetensors", 1.0, 0.0, 4, None)),
        ("a.safetensors:unet=0.3:te=0.2", ("a.safetensors", 0.3, 0.2, None, None)),
        ("a.safetensors:0.3:te=0.2", ("a.safetensors", 0.3, 0.2, None, None)),
        (f"a.safetensors:lbw={LIST}", ("a.safetensors", 1.0, None, None, BlockStrengths.parse(LIST))),
        ("C:/x:y/a.pt:1:2", ("C:/x:y/a.pt", 1.0, 2.0, None, None)),
        ("dir:lbw/a:0.5", ("dir:lbw/a", 0.5, None, None, None)),
    ],
)
def test_the_option(text: str, expected: tuple[object, ...]) -> None:
    path, *rest = expected
    ref = AdapterRef.parse(text)
    assert (ref.path, ref.unet_strength, ref.text_encoder_strength, ref.rank, ref.blocks) == (
        Path(str(path)),
        *rest,
    )


def test_a_path_that_exists_is_taken_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:lbw=INS").touch()
    assert AdapterRef.parse("a:lbw=INS") == AdapterRef(Path("a:lbw=INS"))
    assert AdapterRef.parse("a:lbw=INS:0.5:lbw=INS") == AdapterRef(Path("a:lbw=INS"), 0.5, blocks=INS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a.safetensors:1:2:3", "cannot read the adapter.*lbw=BLOCKS"),
        ("a.safetensors:strong", "cannot read the adapter"),
        ("a.safetensors:weight=1", "cannot read the adapter"),
        (":0.5", "cannot read the adapter"),
        ("a.safetensors:0.5:unet=0.4", "one strength twice"),
        ("a.safetensors:1:0.5:te=0.4", "one strength twice"),
        ("a.safetensors:lbw=INS:lbw=ALL", "lbw twice"),
        ("a.safetensors:lbw=1,2", "2 block strengths; expected 12"),
        ("a.safetensors:te=much", "'much', which is no number"),
        ("a.safetensors:unet=inf", "inf is not a finite number"),
        ("a.safetensors:dyn=2.5", "rank '2.5'; expected a whole number"),
        ("a.safetensors:dyn=0", "rank 0; expected 1 or more"),
        ("a.safetensors:start=3", "start=.*step to step"),
        ("a.safetensors:lbwe=ATTNALL", "lbwe=.*does not know"),
    ],
)
def test_an_option_that_cannot_be_read(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        AdapterRef.parse(text)


@pytest.fixture
def folder(tmp_path: Path) -> AdapterFolder:
    """``style``, ``old`` in a folder, ``dup`` twice, and ``v1-000004``, which calls itself ``face``."""
    for name in ("style.safetensors", "sub/old.pt", "sub/dup.safetensors", "dup.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "sub/peft-style").mkdir()
    (tmp_path / "sub/peft-style/adapter_model.safetensors").touch()
    (tmp_path / "notes.txt").touch()
    one = {"a": np.ones(1, np.float32)}
    save_file(one, tmp_path / "v1-000004.safetensors", {"ss_output_name": "face"})
    save_file(one, tmp_path / "sub/x.safetensors", {"ss_output_name": "style"})
    return AdapterFolder(tmp_path)


@pytest.mark.parametrize(
    ("tag", "path", "rest"),
    [
        ("<lora:style>", "style.safetensors", (1.0, 1.0, None, None)),
        ("<lora:style:0.5>", "style.safetensors", (0.5, 0.5, None, None)),
        ("<lora:style:0.5:0.7>", "style.safetensors", (0.7, 0.5, None, None)),
        ("<lora:style:0.5:0.7:4>", "style.safetensors", (0.7, 0.5, 4, None)),
        ("<lora:style:unet=0.5>", "style.safetensors", (0.5, 1.0, None, None)),
        ("<lora:style:te=0.5>", "style.safetensors", (0.5, 0.5, None, None)),
        ("<lora:style:1:te=0.5:unet=2:dyn=8:lbw=INS>", "style.safetensors", (2.0, 0.5, 8, INS)),
        ("<lora:style:1:INS>", "style.safetensors", (1.0, 1.0, None, INS)),
        (f"<lora:style:1:{LIST}>", "style.safetensors", (1.0, 1.0, None, BlockStrengths.parse(LIST))),
        ("<lyco:old:0.5>", "sub/old.pt", (0.5, 0.5, None, None)),
        ("<lora:face:0.5>", "v1-000004.safetensors", (0.5, 0.5, None, None)),
        ("<lora:sub/dup:0.5>", "sub/dup.safetensors", (0.5, 0.5, None, None)),
        ("<lora:dup.safetensors:0.5>", "dup.safetensors", (0.5, 0.5, None, None)),
        ("<lora:peft-style:0.5>", "sub/peft-style/adapter_model.safetensors", (0.5, 0.5, None, None)),
    ],
)
def test_a_tag(folder: AdapterFolder, tag: str, path: str, rest: tuple[object, ...]) -> None:
    text, (ref,) = take_tags(f"red {tag} apple", folder)
    assert text == "red  apple"
    assert folder.path is not None
    assert ref.path == folder.path / path
    assert (ref.unet_strength, ref.text_encoder_strength, ref.rank, ref.blocks) == rest


def test_tags_are_taken_in_order_and_twice(folder: AdapterFolder) -> None:
    text, refs = take_tags("<lora:style:1>a <lora:old:0.5> b <3 c<lora:style:0.2>", folder)
    assert text == "a  b <3 c"
    assert [(ref.path.name, ref.unet_strength) for ref in refs] == [
        ("style.safetensors", 1.0),
        ("old.pt", 0.5),
        ("style.safetensors", 0.2),
    ]


@pytest.mark.parametrize(
    ("tag", "says"),
    [
        ("<lora:none:1>", "no none.safetensors.*its adapters: .*style.*v1-000004"),
        ("<lora:dup:1>", "could be dup.safetensors and sub/dup.safetensors; name it by its path"),
        ("<lora:style:strong>", "'strong', which is no number.*<lora:name:0.8>"),
        ("<lora:style:>", "'', which is no number"),
        ("<lora:style:1:1:1:1>", "4 numbers; expected <lora:NAME"),
        ("<lora:style:1:1:1.5>", "rank '1.5'"),
        ("<lora:style:lbw=1,1>", "2 block strengths"),
        ("<lora:style:1:1,1>", "2 block strengths"),
        ("<lora:style:1:step=0-10>", "step=.*step to step"),
        ("<lora:style:nan>", "nan is not a finite number"),
        ("<hypernet:style:1>", "<hypernet:style:1>, which Kiln does not know"),
    ],
)
def test_a_tag_that_cannot_be_read(folder: AdapterFolder, tag: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        take_tags(tag, folder)


def test_without_a_folder_only_bundled_names_are_known(tmp_path: Path) -> None:
    folder = AdapterFolder(None, {"flat": tmp_path / "flat.safetensors"})
    assert take_tags("<lora:flat:1>", folder)[1][0].path == tmp_path / "flat.safetensors"
    with pytest.raises(UsageError, match="--lora-dir FOLDER"):
        take_tags("<lora:style:1>", folder)
    with pytest.raises(UsageError, match="is not a folder"):
        take_tags("<lora:style:1>", AdapterFolder(tmp_path / "none"))
