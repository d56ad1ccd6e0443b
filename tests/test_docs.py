"""The pages are true: their Python runs, their commands parse, their links lead somewhere."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import safetensors.numpy

from kiln.bundle import open_bundle
from kiln.cli import main as kiln
from kiln.exporters.resolve import bundled_models

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def commands_of(words: str, command: click.Command) -> dict[str, click.Command]:
    """A command, and if it is a group what is in it, by the words that call it."""
    found = {words: command}
    for name, inner in getattr(command, "commands", {}).items():
        found |= commands_of(f"{words} {name}", inner)
    return found


COMMANDS = commands_of("kiln", kiln)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Line number and text of every fenced block of a language."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


class Page:
    """Runs the Python of a page in one namespace and compares what is printed with the comments."""

    def __init__(self, page: Path) -> None:
        self.page, self.compared = page, 0
        self.lines = page.read_text(encoding="utf-8").splitlines()
        self.names: dict[str, Any] = {"__name__": "__main__", "print": self._print}

    def run(self) -> None:
        for line, text in blocks(self.page, "python"):
            # Blank lines before it give tracebacks the line of the page.
            exec(compile("\n" * line + text, str(self.page), "exec"), self.names)

    def _print(self, *values: object) -> None:
        number = sys._getframe(1).f_lineno
        _, mark, wanted = self.lines[number - 1].partition(")  # ")
        if mark:
            self.compared += 1
            printed = " ".join(map(str, values))
            pattern = wanted.strip().replace("[", "[[]").replace("...", "*")
            assert fnmatch.fnmatchcase(printed, pattern), f"{self.page.name}:{number} printed {printed!r}"


def write_checkpoint(folder: Path) -> None:
    """The bundled model as a diffusers folder."""
    bundle = open_bundle(bundled_models()["emoji"])
    networks = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
    for network, stem in networks.items():
        (folder / network).mkdir(parents=True)
        components = [network] if network != "vae" else ["vae_decoder", "vae_encoder"]
        tensors: dict[str, np.ndarray] = {}
        for component in components:
            tensors |= safetensors.numpy.load_file(bundle.source(component).weights_path)
        safetensors.numpy.save_file(tensors, folder / network / f"{stem}.safetensors")
        (folder / network / "config.json").write_text(json.dumps(bundle.config(components[0])))
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(bundle.path / name, folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))


def write_adapter(path: Path, seed: int) -> None:
    """A LoRA of rank 4 in kohya's names, for the queries of the bundled model."""
    config = open_bundle(bundled_models()["emoji"]).source("unet")
    weights = safetensors.numpy.load_file(config.weights_path)
    rng, tensors = np.random.default_rng(seed), {}
    for name, weight in weights.items():
        if name.endswith("attn2.to_q.weight"):
            stem = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            down, up = rng.normal(size=(4, weight.shape[1])), rng.normal(size=(weight.shape[0], 4))
            tensors[f"{stem}.lora_down.weight"] = (down / 100).astype(np.float32)
            tensors[f"{stem}.lora_up.weight"] = (up / 100).astype(np.float32)
            tensors[f"{stem}.alpha"] = np.array(4, np.float32)
    safetensors.numpy.save_file(tensors, path)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the files that the pages speak of, as the working directory."""
    if "emoji" not in bundled_models():
        pytest.skip("the bundled model is not in this checkout")
    monkeypatch.setenv("KILN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_checkpoint(folder / "stable-diffusion")
    write_adapter(folder / "style.safetensors", 1)
    write_adapter(folder / "face.safetensors", 2)
    return folder


def test_the_python_page_runs_and_prints_what_it_says(workplace: Path) -> None:
    page = Page(ROOT / "docs/api.md")
    page.run()
    assert page.compared >= 12
    assert {path.name for path in workplace.glob("*.png")} == {"apple.png", "star-7.png", "star-8.png"}


def test_a_wrong_comment_is_found(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("```python\nx = 2\n```\n\n```python\nprint(x, [1])  # 2 [1]\nprint(x)  # ...3\n```\n")
    with pytest.raises(AssertionError, match=r"page.md:7 printed '2'"):
        Page(path).run()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def shell_lines(text: str) -> list[list[str]]:
    """The ``kiln`` commands in shell text, as words after ``kiln``."""
    found = []
    for line in text.splitlines():
        for part in shlex.join(shlex.split(line, comments=True)).split("'&&'"):
            words = shlex.split(part)
            if words and words[0].rsplit("/", 1)[-1] == "kiln":
                found.append(words[1:])
    return found


def parse(words: list[str]) -> click.Context:
    """Parse a command line without running it; click raises on an unknown command, option or value."""
    name, *rest = words
    root = click.Context(kiln, info_name="kiln", **kiln.context_settings)
    command = kiln.get_command(root, name)
    if command is None:
        raise click.UsageError(f"no command {name}")
    return command.make_context(name, rest, parent=root)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_the_pages_parse(page: Path) -> None:
    for _, text in blocks(page, "sh"):
        for words in shell_lines(text):
            parse(words)


def test_a_wrong_option_on_a_page_is_found() -> None:
    (good, bad) = shell_lines("cd x && .venv/bin/kiln devices  # here\nkiln devices --fast\n")
    parse(good)
    with pytest.raises(click.UsageError, match="fast"):
        parse(bad)


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_has_help_and_examples_that_parse(words: str) -> None:
    command = COMMANDS[words]
    description, mark, example = (command.help or "").partition("Example:")
    assert description.strip()
    assert mark
    lines = shell_lines(example.replace("\b", ""))
    assert lines
    for line in lines:
        parse(line)


@pytest.mark.parametrize("words", COMMANDS)
def test_every_option_has_help(words: str) -> None:
    options = [p for p in COMMANDS[words].params if isinstance(p, click.Option)]
    assert [option.name for option in options if not option.help] == []


def make_docs(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A new process: click keeps the help option it made first, which depends on who asked.
    command = [sys.executable, str(ROOT / "tools/make_docs.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_reference_is_up_to_date() -> None:
    done = make_docs("--check")
    assert done.returncode == 0, done.stdout + done.stderr
    text = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == sorted(COMMANDS)


def test_a_changed_help_text_is_found(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "docs").mkdir()
    tool = shutil.copy(ROOT / "tools/make_docs.py", tmp_path / "tools")
    page = tmp_path / "docs/cli.md"
    page.write_text((ROOT / "docs/cli.md").read_text(encoding="utf-8").replace("Denoising steps", "Steps"))
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "out of date" in done.stdout
