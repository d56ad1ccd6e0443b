"""What records are called where several stand side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .record import Record

_DIGITS = 8


def told_apart(records: Sequence[Record]) -> tuple[str, ...]:
    """A name for each record, in their order: its label, and where that means several models, which it is.

    A bundle of int8 and one of fp16 run as ``openvino bf16`` both. What is added is what they differ in: the
    model's name, the types that its UNet is stored in, and where that is not enough digits of its digest.
    """
    names = tuple(record.label for record in records)
    for further in (_model, _storage, _digest):
        names = _with(names, records, further)
    return names


def _with(
    names: Sequence[str], records: Sequence[Record], further: Callable[[Record], str]
) -> tuple[str, ...]:
    """The names, with something more where one name stands for several models that differ in it."""
    models: dict[str, set[str]] = {}
    told: dict[str, set[str]] = {}
    for name, record in zip(names, records, strict=True):
        models.setdefault(name, set()).add(record.workload.model.digest)
        told.setdefault(name, set()).add(further(record))
    return tuple(
        f"{name}, {further(record)}" if len(models[name]) > 1 and len(told[name]) > 1 else name
        for name, record in zip(names, records, strict=True)
    )


def _model(record: Record) -> str:
    return record.workload.model.name


def _storage(record: Record) -> str:
    return record.workload.model.storage.get("unet", "unknown storage")


def _digest(record: Record) -> str:
    return record.workload.model.digest[:_DIGITS]
