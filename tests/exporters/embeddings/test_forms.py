"""Every form in which embeddings are stored, and what is refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from kiln.errors import AdapterError, UsageError
from kiln.exporters.embeddings.base import Embedding, EmbeddingRef
from kiln.exporters.embeddings.reading import read_embeddings

torch = pytest.importorskip("torch")
RNG = np.random.default_rng(0)
ONE, FIVE = RNG.normal(size=768).astype(np.float32), RNG.normal(size=(5, 768)).astype(np.float32)
WIDE = RNG.normal(size=(5, 1280)).astype(np.float32)


def tensor(array: np.ndarray) -> Any:
    return torch.from_numpy(array.copy())


def webui(params: Any) -> dict[str, Any]:
    return {
        "string_to_token": {"*": 265},
        "string_to_param": params,
        "name": "inside",
        "step": 400,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }


def of_torch_1_11(array: np.ndarray) -> Any:
    """A ParameterDict with the attributes that torch 1.11 gave it, which later ones do not iterate over."""
    made = torch.nn.ParameterDict()
    made.__dict__.clear()
    made.__dict__.update(
        training=True,
        _parameters=OrderedDict({"*": torch.nn.Parameter(tensor(array))}),
        _buffers=OrderedDict(),
        _non_persistent_buffers_set=set(),
        _backward_hooks=OrderedDict(),
        _is_full_backward_hook=None,
        _forward_hooks=OrderedDict(),
        _forward_pre_hooks=OrderedDict(),
        _state_dict_hooks=OrderedDict(),
        _load_state_dict_pre_hooks=OrderedDict(),
        _modules=OrderedDict(),
        _initialized=True,
    )
    return made


FORMS: dict[str, tuple[Callable[[], Any], list[tuple[str, dict[str, np.ndarray]]]]] = {
    "string_to_param": (
        lambda: webui({"*": torch.nn.Parameter(tensor(FIVE))}),
        [("my-toy", {"text_encoder": FIVE})],
    ),
    "ParameterDict": (
        lambda: webui(torch.nn.ParameterDict({"*": torch.nn.Parameter(tensor(FIVE))})),
        [("my-toy", {"text_encoder": FIVE})],
    ),
    "a bare ParameterDict": (
        lambda: torch.nn.ParameterDict({"*": torch.nn.Parameter(tensor(FIVE))}),
        [("my-toy", {"text_encoder": FIVE})],
    ),
    "a ParameterDict of torch 1.11": (
        lambda: webui(of_torch_1_11(FIVE)),
        [("my-toy", {"text_encoder": FIVE})],
    ),
    "a bare ParameterDict of tokens": (
        lambda: torch.nn.ParameterDict(
            {"toy": torch.nn.Parameter(tensor(FIVE)), "dog": torch.nn.Parameter(tensor(ONE))}
        ),
        [("dog", {"text_encoder": ONE[None]}), ("toy", {"text_encoder": FIVE})],  # as torch sorts them
    ),
    "a star": (lambda: {"*": tensor(FIVE)}, [("my-toy", {"text_encoder": FIVE})]),
    "emb_params": (lambda: {"emb_params": tensor(FIVE)}, [("my-toy", {"text_encoder": FIVE})]),
    "emp_params": (lambda: {"emp_params": tensor(FIVE)}, [("my-toy", {"text_encoder": FIVE})]),
    "SDXL": (
        lambda: {"clip_l": tensor(FIVE), "clip_g": tensor(WIDE)},
        [("my-toy", {"text_encoder": FIVE, "text_encoder_2": WIDE})],
    ),
    "clip_l alone": (lambda: {"clip_l": tensor(FIVE)}, [("my-toy", {"text_encoder": FIVE})]),
    "diffusers": (lambda: {"<toy>": tensor(ONE)}, [("<toy>", {"text_encoder": ONE[None]})]),
    "diffusers, several vectors": (lambda: {"<toy>": tensor(FIVE)}, [("<toy>", {"text_encoder": FIVE})]),
    "several tokens": (
        lambda: {"<s1>": tensor(ONE), "<s2>": tensor(FIVE)},
        [("<s1>", {"text_encoder": ONE[None]}), ("<s2>", {"text_encoder": FIVE})],
    ),
    "emb and emb2": (
        lambda: {"name": "puppet", "emb": tensor(FIVE), "emb2": tensor(WIDE)},
        [("puppet", {"text_encoder": FIVE, "text_encoder_2": WIDE})],
    ),
    "a pack": (
        lambda: [{"name": "a", "emb_params": tensor(FIVE)}, {"<b>": tensor(ONE)}],
        [("a", {"text_encoder": FIVE}), ("<b>", {"text_encoder": ONE[None]})],
    ),
    "a bare tensor": (lambda: tensor(FIVE), [("my-toy", {"text_encoder": FIVE})]),
    "state_dict": (lambda: {"state_dict": {"<toy>": tensor(ONE)}}, [("<toy>", {"text_encoder": ONE[None]})]),
    "second encoder alone": (lambda: {"emb_params": tensor(WIDE)}, [("my-toy", {"text_encoder_2": WIDE})]),
    "fp16": (lambda: {"emb_params": tensor(FIVE).half()}, [("my-toy", {"text_encoder": FIVE.astype("f2")})]),
    "bf16": (
        lambda: {"emb_params": tensor(FIVE).bfloat16()},
        [("my-toy", {"text_encoder": tensor(FIVE).bfloat16().float().numpy()})],
    ),
}


def same(found: tuple[Embedding, ...], expected: list[tuple[str, dict[str, np.ndarray]]]) -> bool:
    return [e.token for e in found] == [token for token, _ in expected] and all(
        e.vectors.keys() == vectors.keys()
        and all(
            e.vectors[n].dtype == np.float32 and np.array_equal(e.vectors[n], vectors[n]) for n in vectors
        )
        for e, (_, vectors) in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "bare pickle"])
@pytest.mark.parametrize("form", FORMS)
def test_a_torch_file(tmp_path: Path, form: str, legacy: bool) -> None:
    make, expected = FORMS[form]
    torch.save(make(), tmp_path / "my-toy.pt", _use_new_zipfile_serialization=not legacy)
    found = read_embeddings(EmbeddingRef(tmp_path / "my-toy.pt"))
    assert same(found, expected)
    planted = [
        (token, {n: v[::-1] * np.float32(1.01) for n, v in vectors.items()}) for token, vectors in expected
    ]
    assert not same(found, planted)


@pytest.mark.parametrize("form", ["emb_params", "SDXL", "diffusers", "several tokens", "fp16", "bf16"])
def test_a_safetensors_file(tmp_path: Path, form: str) -> None:
    import safetensors.torch

    make, expected = FORMS[form]
    safetensors.torch.save_file(make(), tmp_path / "my-toy.safetensors")
    found = {e.token: e for e in read_embeddings(EmbeddingRef(tmp_path / "my-toy.safetensors"))}
    assert same(tuple(found[token] for token, _ in expected), expected)


def test_a_name_given_goes_first(tmp_path: Path) -> None:
    torch.save({"<toy>": tensor(ONE)}, tmp_path / "x.pt")
    (found,) = read_embeddings(EmbeddingRef.parse(f"{tmp_path / 'x.pt'}:better"))
    assert found.token == "better"
    torch.save({"<a>": tensor(ONE), "<b>": tensor(ONE)}, tmp_path / "x.pt")
    with pytest.raises(UsageError, match=r"holds 2 embeddings.*cannot all be 'better'"):
        read_embeddings(EmbeddingRef(tmp_path / "x.pt", "better"))
    with pytest.raises(UsageError, match="empty token"):
        EmbeddingRef.parse(f"{tmp_path / 'x.pt'}: ")
    with pytest.raises(UsageError, match="no embedding file"):
        EmbeddingRef.parse(f"{tmp_path / 'y.pt'}:toy")


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "NaN": (lambda: {"emb_params": tensor(FIVE) * float("nan")}, "holds NaN or infinity"),
    "infinity": (lambda: {"<toy>": tensor(ONE) / 0}, "holds NaN or infinity"),
    "a prompt's states": (lambda: torch.zeros(1, 77, 768), "states of a whole prompt"),
    "a number": (lambda: {"emb_params": torch.tensor(1.0)}, r"shape \[\]"),
    "nothing": (dict, "holds nothing"),
    "no rows": (lambda: {"emb_params": torch.zeros(0, 768)}, r"shape \[0, 768\]"),
    "no width": (lambda: {"emb_params": torch.zeros(3, 0)}, r"shape \[3, 0\]"),
    "whole numbers": (
        lambda: {"emb_params": torch.zeros(3, 768, dtype=torch.int64)},
        "int64; expected floating",
    ),
    "too many": (lambda: {"emb_params": torch.zeros(1025, 768)}, r"\[1025, 768\]"),
    "two parameters": (lambda: webui({"*": tensor(ONE), "a": tensor(ONE)}), "holds 2 entries"),
    "no parameter": (lambda: webui({}), "holds 0 entries"),
    "parameters of text": (lambda: webui({"*": "text"}), "holds 1 entries"),
    "string_to_param is text": (lambda: webui("text"), "holds no entries"),
    "an output embedding": (
        lambda: {"clip_l": tensor(FIVE), "clip_l_out": tensor(FIVE)},
        "clip_l_out.*OneTrainer",
    ),
    "uneven": (lambda: {"clip_l": tensor(FIVE), "clip_g": tensor(WIDE[:2])}, "5 for the .* and 2 for"),
    "two kinds": (lambda: {"emb_params": tensor(FIVE), "clip_l": tensor(FIVE)}, "vectors of one token"),
    "a LoRA": (lambda: {"lora_unet_x.lora_up.weight": torch.zeros(4, 4)}, "no textual inversion embedding"),
    "a ParameterDict without parameters": (torch.nn.ParameterDict, "holds nothing"),
    "two in a ParameterDict": (
        lambda: webui(torch.nn.ParameterDict({t: torch.nn.Parameter(tensor(ONE)) for t in "ab"})),
        "holds 2 entries",
    ),
    "a ParameterDict of NaN": (
        lambda: torch.nn.ParameterDict({"*": torch.nn.Parameter(tensor(ONE) * float("nan"))}),
        "holds NaN or infinity",
    ),
    "a layer": (lambda: webui(torch.nn.Linear(2, 2)), "refuses to read it safely"),
    "a number beside": (lambda: {"<toy>": tensor(ONE), "step": 3}, "no textual inversion embedding"),
    "a list of tensors": (lambda: [tensor(ONE)], "list of Tensor"),
    "a pack without names": (lambda: [{"emb_params": tensor(ONE)}], "no name"),
    "text": (lambda: "text", "holds a str"),
    "an empty token": (lambda: {" ": tensor(ONE)}, "cannot be called"),
    "a token of CLIP": (lambda: {"<|endoftext|>": tensor(ONE)}, "cannot be called"),
    "a line break": (lambda: {"a\nb": tensor(ONE)}, "cannot be called"),
    "a long token": (lambda: {"a" * 101: tensor(ONE)}, "1 to 100 printable"),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "bare pickle"])
@pytest.mark.parametrize("form", REFUSED)
def test_what_is_refused(tmp_path: Path, form: str, legacy: bool) -> None:
    make, says = REFUSED[form]
    torch.save(make(), tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(AdapterError, match=says) as caught:
        read_embeddings(EmbeddingRef(tmp_path / "x.pt"))
    assert "x.pt" in str(caught.value)


class Evil:
    """Would leave a file behind if it were unpickled freely."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "bare pickle"])
def test_a_hostile_pickle_runs_nothing(tmp_path: Path, legacy: bool) -> None:
    how = {"_use_new_zipfile_serialization": not legacy}
    torch.save({"emb_params": Evil(tmp_path / "evil")}, tmp_path / "x.pt", **how)
    with pytest.raises(AdapterError, match="refuses to read it safely"):
        read_embeddings(EmbeddingRef(tmp_path / "x.pt"))
    inside = torch.nn.ParameterDict({"*": torch.nn.Parameter(tensor(ONE))})
    inside._parameters["*"] = Evil(tmp_path / "evil")
    torch.save(webui(inside), tmp_path / "x.pt", **how)
    with pytest.raises(AdapterError, match="refuses to read it safely"):
        read_embeddings(EmbeddingRef(tmp_path / "x.pt"))
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "x.pt"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
        (b"PK\x03\x04 and no more", "refuses to read it safely"),
        (b"\x89PNG\r\n\x1a\n and no more", "cannot be read as a picture"),
        (b"\xff\xff\xff\xff\0\0\0\0{}", "x.pt"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(AdapterError, match=says):
        read_embeddings(EmbeddingRef(tmp_path / "x.pt"))


def test_a_checkpoint_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(AdapterError, match=r"68 MB.*is it a checkpoint"):
        read_embeddings(EmbeddingRef(tmp_path / "x.safetensors"))


def test_the_width_says_the_family(tmp_path: Path) -> None:
    for width, family in (
        (768, "SD1"),
        (1024, "SD2"),
        (1280, "SDXL's second"),
        (77, "no family that Kiln knows"),
    ):
        save_file({"emb_params": np.ones((1, width), np.float32)}, tmp_path / "x.safetensors")
        (found,) = read_embeddings(EmbeddingRef(tmp_path / "x.safetensors"))
        assert family in found.family
