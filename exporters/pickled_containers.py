"""Takes source code out of torch's old file form, so that its restricted reader accepts a container in it.

``torch.save`` of before 1.6, and today's with ``_use_new_zipfile_serialization=False``, writes the class of a
container such as ``ParameterDict`` as a persistent id ``("module", class, file, source code)``, to warn when
the code has changed since (``persistent_id`` in torch/serialization.py). ``weights_only`` lets persistent ids
of storages through and no others. Here the id becomes the class alone, as the zip form has it; opcodes are
looked at (``pickletools``) and nothing of them is run, and what comes out is still read by ``weights_only``.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Iterator

CONTAINER = "torch.nn.modules.container ParameterDict"
_BEFORE = 3  # pickles before the object: magic number, protocol, sizes of C's types
_MOST_OPCODES = 100_000  # an embedding has some hundreds
_MEMO = ("BINPUT", "LONG_BINPUT")  # they remember what is on the stack, and are left where the class is
_TEXT = ("BINUNICODE", "NONE")  # the source code is None where torch did not find it
_Opcode = tuple[str, object, int]


def without_sources(data: bytes) -> bytes:
    """A file of the old form with each ``ParameterDict`` named by its class alone.

    A file without one, and one that is damaged or of another form, comes back as it is.
    """
    if CONTAINER.replace(" ", "\n").encode() not in data:
        return data
    try:
        places = list(_places(data))
    except (ValueError, IndexError, OverflowError):  # whatever pickletools meets in a damaged file
        return data
    made, done = bytearray(), 0
    for start, class_start, class_end, end in places:
        made += data[done:start] + data[class_start:class_end]
        done = end
    return bytes(made + data[done:])


def _places(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Where a persistent id begins, its class begins and ends (with what remembers it), and the id ends."""
    stream = io.BytesIO(data)
    for _ in range(_BEFORE):
        for _ in pickletools.genops(stream):
            pass
    recent: list[_Opcode] = []
    class_end = 0
    for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
        if count == _MOST_OPCODES or position is None:
            raise ValueError("too many opcodes")
        if opcode.name in _MEMO:
            continue
        if recent and recent[-1][0] == "GLOBAL":
            class_end = position
        recent = [*recent[-6:], (opcode.name, argument, position)]
        if _is_container(recent):
            yield recent[0][2], recent[2][2], class_end, position + 1


def _is_container(opcodes: list[_Opcode]) -> bool:
    """Whether the last opcodes, without those for the memo, are an id as at the top of this file."""
    names = [name for name, _, _ in opcodes]
    return (
        len(names) == 7
        and names[:3] == ["MARK", "BINUNICODE", "GLOBAL"]
        and (opcodes[1][1], opcodes[2][1]) == ("module", CONTAINER)
        and names[3] in _TEXT
        and names[4] in _TEXT
        and names[5:] == ["TUPLE", "BINPERSID"]
    )
