"""Write docs/cli.md from the ``--help`` of every command.

python tools/make_docs.py            write it
python tools/make_docs.py --check    exit with 1 if it is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from kiln.cli import main as kiln

PAGE = Path(__file__).resolve().parent.parent / "docs/cli.md"
# Fixed, or the page would depend on the terminal that made it.
WIDTH = 100

INTRO = """\
# The kiln command

Made from `--help` by `tools/make_docs.py`; a test fails when it is out of date.

**MODEL** is a bundle, a `.safetensors` or `.ckpt` file, a diffusers folder, or the name of a model that comes
with Kiln (`emoji`). `generate` exports a checkpoint once into the cache and opens it from there afterwards.

**Adapters** are given as `FILE`, `FILE:STRENGTH` or `FILE:UNET_STRENGTH:TEXT_ENCODER_STRENGTH`; or in the
prompt as `<lora:name>`, `<lora:name:STRENGTH>` or, as in A1111,
`<lora:name:TEXT_ENCODER_STRENGTH:UNET_STRENGTH>`, looked up as `name.safetensors` in the folder of
`--lora-dir` or among the adapters that come with Kiln.

**Output.** Results go to stdout, one path per line, or with `--json` one JSON object per line for `generate`
and one document for the others. Progress, warnings and errors go to stderr. An error is one line; after it
nothing is left behind.

**Exit codes:** 0 done, 1 failed, 2 the command line or the request is wrong, 130 stopped by Ctrl-C.
For `doctor`: 0 all in order, 1 something to mend, 2 no backend works.

**Cache.** Exported models, compiled models, traced graphs and the stamps of verified files lie in the user's
cache folder; the environment variable `KILN_CACHE` moves it, `KILN_CACHE_LIMIT` (such as `10GB`) bounds it,
and it may be deleted at any time.
"""


def commands() -> dict[str, click.Context]:
    """A context for each command by the words that call it, the group itself first."""
    root = click.Context(
        kiln, info_name="kiln", terminal_width=WIDTH, max_content_width=WIDTH, **kiln.context_settings
    )
    found = {"kiln": root}
    _add(kiln, root, found)
    return found


def _add(group: click.Group, parent: click.Context, found: dict[str, click.Context]) -> None:
    for name, command in sorted(group.commands.items()):
        context = click.Context(
            command, info_name=name, parent=parent, terminal_width=WIDTH, max_content_width=WIDTH
        )
        found[context.command_path] = context
        if isinstance(command, click.Group):
            _add(command, context, found)


def render() -> str:
    """The page."""
    sections = [
        f"## {words}\n\n```text\n{context.get_help().rstrip()}\n```\n"
        for words, context in commands().items()
    ]
    return "\n".join([INTRO, *sections])


def main(arguments: list[str]) -> int:
    """Write the page, or compare it."""
    if arguments not in ([], ["--check"]):
        print(__doc__)
        return 2
    text = render()
    if not arguments:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE} is out of date: run python tools/make_docs.py")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
