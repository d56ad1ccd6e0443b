"""Whether two checkpoints hold the same tensors, so that they can be added to each other."""

from __future__ import annotations

from ...errors import CheckpointError
from ..checkpoints import Checkpoint

_SHOWN = 3


def check_alike(one: Checkpoint, other: Checkpoint) -> None:
    """Check family, names and shapes of the networks that both have; a VAE may be missing in either.

    Raises:
        CheckpointError: they differ; the text names the tensors.
    """
    if one.family != other.family:
        raise CheckpointError(
            f"{one.path} is {one.match.title} and {other.path} is {other.match.title}; expected one family"
        )
    for network in one.networks:
        if network in other.networks:
            _check_network(one, other, network)


def _check_network(one: Checkpoint, other: Checkpoint, network: str) -> None:
    mine, others = one.tensors(network), other.tensors(network)
    for having, lacking, names in (
        (one, other, [name for name in mine if name not in others]),
        (other, one, [name for name in others if name not in mine]),
    ):
        if names:
            raise CheckpointError(
                f"{lacking.path}: its {network} lacks {len(names)} tensors that {having.path} has: "
                f"{_list(names)}; "
                "expected checkpoints of one architecture"
            )
    wrong = [name for name, info in mine.items() if info.shape != others[name].shape]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{len(wrong)} tensors of the {network} differ in shape, such as {name}: "
            f"{list(mine[name].shape)} in "
            f"{one.path}, {list(others[name].shape)} in {other.path}; expected checkpoints of one "
            f"architecture"
        )


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
