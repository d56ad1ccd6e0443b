"""The process that runs networks for parity: ``child.py`` starts it and speaks as ``harness/wire.py``.

Requests, each answered by one line; arrays lie in files and never cross the pipe:

* ``record``: draw with the reference, keep every call and what was drawn in ``folder``.
* ``replay``: run the calls of ``folder`` on a backend and give the distances, row by row.
* ``draw``: draw with a backend, keep latents and images in ``folder``.
* ``probe``: run one call and write tensors from inside the component into the file ``out``.
* ``learned``: LPIPS and CLIP score of the images in ``file``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ...bundle import open_bundle
from ..harness.wire import Answers, Message
from ..records.record import AdapterFacts, ModelFacts, Requested, WorkloadFacts


def workload_of(facts: Message) -> WorkloadFacts:
    """A workload from its JSON form."""
    rest = {key: value for key, value in facts.items() if key not in ("model", "prompts", "adapters")}
    return WorkloadFacts(
        **rest,
        model=ModelFacts(**facts["model"]),
        prompts=tuple(facts["prompts"]),
        adapters=tuple(AdapterFacts(**row) for row in facts["adapters"]),
    )


def _record(
    bundle: str, reference: Message, workload: Message, sampling: Message, folder: str
) -> dict[str, Any]:
    from .recording import record
    from .sampling import Sampling

    return record(
        open_bundle(bundle),
        Requested(**reference),
        workload_of(workload),
        Sampling(**sampling),
        Path(folder),
    )


def _replay(bundle: str, requested: Message, folder: str, cache: bool) -> dict[str, Any]:
    from .replay import replay

    return replay(open_bundle(bundle), Requested(**requested), Path(folder), cache=cache)


def _draw(
    bundle: str, requested: Message, workload: Message, sampling: Message, folder: str, cache: bool
) -> dict[str, Any]:
    from .drawing import draw
    from .sampling import Sampling

    return draw(
        open_bundle(bundle),
        Requested(**requested),
        workload_of(workload),
        Sampling(**sampling),
        Path(folder),
        cache=cache,
    )


def _probe(
    bundle: str,
    requested: Message,
    folder: str,
    component: str,
    number: int,
    names: list[str],
    out: str,
) -> dict[str, Any]:
    from .probing import probe

    asked = Requested(**requested)
    return probe(open_bundle(bundle), asked, Path(folder), component, number, names, Path(out))


def _learned(file: str, prompts: list[str], options: Message) -> dict[str, Any]:
    from .learned import LearnedOptions, learned_rows

    return {"rows": learned_rows(Path(file), prompts, LearnedOptions(**options))}


def main() -> int:
    """Answer until told to exit."""
    answers = Answers()
    answers.ready()
    answers.serve({"record": _record, "replay": _replay, "draw": _draw, "probe": _probe, "learned": _learned})
    return 0


if __name__ == "__main__":
    sys.exit(main())
