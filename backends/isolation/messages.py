"""What parent and child say to each other: JSON objects, one per line, over a Unix socket.

Nothing is pickled. Descriptors of shared memory travel beside a message; its key ``fds`` says how many.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ... import errors
from ...errors import KilnError, SessionError
from ..base import GraphSource, InForce, PrepareOptions

Message = dict[str, Any]

_CHUNK = 65536
_MOST_FDS = 8
_TRACE_CHARS = 20_000
_CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, KilnError)
}


class ChannelClosedError(Exception):
    """The other side is gone."""


class ChildTraceback(Exception):
    """The traceback of an error in the child, as text: the cause of the error raised here."""

    def __str__(self) -> str:
        """The text as the child's interpreter would have printed it."""
        return f"in the child process:\n{self.args[0]}"


class Channel:
    """One end of the conversation. Any thread may send; one at a time receives."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._sending = threading.Lock()
        self._bytes = b""
        self._fds: deque[int] = deque()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message and descriptors.

        Raises:
            ChannelClosedError: the other side is gone.
        """
        data = json.dumps({**message, "fds": len(fds)}).encode() + b"\n"
        try:
            with self._sending:
                sent = socket.send_fds(self._socket, [data], list(fds)) if fds else 0
                self._socket.sendall(data[sent:])
        except OSError as error:
            raise ChannelClosedError from error

    def receive(self, seconds: float | None = None) -> tuple[Message, list[int]] | None:
        """The next message and the descriptors that came with it, or None when none came in time.

        Raises:
            ChannelClosedError: the other side is gone.
        """
        while b"\n" not in self._bytes:
            try:
                self._socket.settimeout(seconds)
                data, fds, _, _ = socket.recv_fds(self._socket, _CHUNK, _MOST_FDS)
            except TimeoutError:
                return None
            except OSError as error:
                raise ChannelClosedError from error
            finally:
                self._socket.settimeout(None)
            for descriptor in fds:
                os.set_inheritable(descriptor, False)  # recv_fds does not pass MSG_CMSG_CLOEXEC on
            self._fds.extend(fds)
            if not data:
                raise ChannelClosedError
            self._bytes += data
        line, _, self._bytes = self._bytes.partition(b"\n")
        message = json.loads(line)
        return message, [self._fds.popleft() for _ in range(message["fds"])]

    def close(self) -> None:
        """Close this end."""
        self._socket.close()
        while self._fds:
            os.close(self._fds.popleft())


def pack_task(source: GraphSource, options: PrepareOptions) -> Message:
    """What ``prepare`` takes, as JSON; paths are made absolute.

    Raises:
        SessionError: a value of ``options.extra`` or of the config cannot be written as JSON.
    """
    task = {"source": asdict(source), "options": asdict(options)}
    task["source"] |= {
        "graph_path": str(source.graph_path.absolute()),
        "weights_path": str(source.weights_path.absolute()),
        "config": dict(source.config),
    }
    folder = options.cache_dir
    task["options"] |= {"cache_dir": str(folder.absolute()) if folder else None}
    try:
        return json.loads(json.dumps(task))
    except (TypeError, ValueError) as error:
        raise SessionError(
            f"options of a backend in its own process have to be numbers, texts and lists: {error}"
        ) from error


def unpack_task(task: Mapping[str, Any]) -> tuple[GraphSource, PrepareOptions]:
    """The arguments of ``prepare`` from ``pack_task``."""
    source, options = dict(task["source"]), dict(task["options"])
    source |= {key: Path(source[key]) for key in ("graph_path", "weights_path")}
    options["shapes"] = {name: tuple(shape) for name, shape in options["shapes"].items()}
    options["cache_dir"] = Path(options["cache_dir"]) if options["cache_dir"] else None
    return GraphSource(**source), PrepareOptions(**options)


def pack_in_force(in_force: InForce) -> Message:
    """What is in force, as JSON; a setting that JSON does not know is given as text."""
    return json.loads(json.dumps(asdict(in_force), default=str))


def pack_error(error: BaseException) -> Message:
    """An error as a message: the names of its classes, its text and its traceback."""
    trace = "".join(traceback.format_exception(error))
    return {
        "kind": "error",
        "classes": [kind.__name__ for kind in type(error).__mro__],
        "text": str(error),
        "trace": trace[-_TRACE_CHARS:],
    }


def unpack_error(message: Message, what: str) -> KilnError:
    """The error to raise: of the same class if that is one of Kiln's, else a SessionError naming it.

    Args:
        message: from ``pack_error``.
        what: who failed at what, for errors that are not Kiln's.
    """
    cause = ChildTraceback(message["trace"])
    kind = next((_CLASSES[name] for name in message["classes"] if name in _CLASSES), None)
    if kind is None:
        text = " ".join(str(message["text"]).split())
        error: KilnError = SessionError(f"{what}: {message['classes'][0]}: {text}")
    else:
        error = kind(message["text"])
    error.__cause__ = cause
    return error
