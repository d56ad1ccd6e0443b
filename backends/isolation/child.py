"""The child's side: hold one backend and its sessions, and do what the parent asks.

Run as ``python -m kiln.backends.isolation.child SOCKET HEARTBEAT LEVEL PYTHONPATH`` by ``process.py`` only.
Requests are ``open`` (load the adapter), ``devices``, ``prepare``, ``run``, ``close`` and ``exit``; answers
are ``done`` or ``error``; in between come ``alive`` and ``log``.
"""

from __future__ import annotations

import fcntl
import logging
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict
from typing import NoReturn

from ..base import Backend, Session
from ..compiled_cache import wait_for_writers
from .blocks import Block, plan
from .messages import Channel, ChannelClosedError, Message, pack_error, pack_in_force, unpack_task
from .target import load_backend

_LIFELINE = 0  # standard input: the parent holds the other end and writes nothing


class Server:
    """Answers requests, one after the other."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._backend: Backend | None = None
        self._sessions: dict[int, _Held] = {}

    def serve(self, heart: Heart) -> NoReturn:
        """Until the parent says ``exit`` or is gone."""
        while True:
            received = self._channel.receive()
            assert received  # without a time limit something always comes
            message, fds = received
            if message["kind"] == "exit":
                sys.stdout.flush()
                wait_for_writers()
                os._exit(0)  # past the engine's destructors, which may crash and have nothing left to do
            with heart:
                try:
                    answer, back = self._do(message, fds)
                except Exception as error:
                    answer, back = pack_error(error), []
            self._channel.send(answer, back)

    def _do(self, message: Message, fds: list[int]) -> tuple[Message, list[int]]:
        kind = message["kind"]
        for number in message.get("dropped", ()):
            self._close(number)
        if kind == "open":
            self._backend = load_backend(message["name"], message["target"])
            return {"kind": "done"}, []
        if kind == "devices":
            return {"kind": "done", "devices": [asdict(one) for one in self._opened().devices()]}, []
        if kind == "prepare":
            source, options = unpack_task(message["task"])
            session = self._opened().prepare(source, options)
            self._sessions[message["session"]] = _Held(session)
            return {"kind": "done", "in_force": pack_in_force(session.in_force)}, []
        if kind == "run":
            return self._sessions[message["session"]].run(message, fds)
        self._close(message["session"])
        return {"kind": "done"}, []

    def _opened(self) -> Backend:
        assert self._backend, "the parent opens a backend first"
        return self._backend

    def _close(self, number: int) -> None:
        held = self._sessions.pop(number, None)
        if held:
            held.close()


class _Held:
    """A session with its two blocks of shared memory, used again for every run."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._inputs: Block | None = None
        self._outputs: Block | None = None

    def run(self, message: Message, fds: list[int]) -> tuple[Message, list[int]]:
        """Run on the inputs in shared memory; the answer says where the outputs lie."""
        if fds:
            if self._inputs:
                self._inputs.close()
            self._inputs = Block(fds[0], message["size"])
        assert self._inputs  # comes with the first run
        outputs = self._session.run(self._inputs.read(message["arrays"]))
        layout, size = plan(outputs)
        new = self._outputs is None or self._outputs.size < size
        if new:
            if self._outputs:
                self._outputs.close()
            self._outputs = Block.create(size)
        assert self._outputs
        self._outputs.write(outputs, layout)
        answer = {"kind": "done", "arrays": layout, "size": self._outputs.size}
        return answer, [self._outputs.descriptor] if new else []

    def close(self) -> None:
        """Free the engine's memory and the shared memory."""
        self._session.close()
        for block in (self._inputs, self._outputs):
            if block:
                block.close()


class Heart:
    """Tells the parent from a thread of its own that a request is being worked on."""

    def __init__(self, channel: Channel, seconds: float) -> None:
        self._channel, self._seconds = channel, seconds
        self._busy = threading.Event()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def __enter__(self) -> None:
        self._busy.set()

    def __exit__(self, *_: object) -> None:
        self._busy.clear()

    def _beat(self) -> None:
        while True:
            self._busy.wait()
            time.sleep(self._seconds)
            if self._busy.is_set():
                _send_or_end(self._channel, {"kind": "alive", "cpu_seconds": time.process_time()})


class Forward(logging.Handler):
    """Gives log records to the parent, which has the handlers of the user."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record, formatted."""
        text = self.format(record)
        _send_or_end(
            self._channel, {"kind": "log", "name": record.name, "level": record.levelno, "text": text}
        )


def end_with_the_parent() -> None:
    """Have the system end this process when the parent is gone, even in the middle of native code.

    SIGIO comes when the other end of the lifeline closes, and its default is to end the process: unlike a
    thread this needs no interpreter lock, and unlike PR_SET_PDEATHSIG it does not mistake the end of the
    thread that started us for the end of the parent. See fcntl(2), F_SETOWN and O_ASYNC.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(_LIFELINE, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(_LIFELINE, fcntl.F_SETFL, fcntl.fcntl(_LIFELINE, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(_LIFELINE, select.POLLHUP)
    if poll.poll(0):  # it was gone before that
        os._exit(0)


def _send_or_end(channel: Channel, message: Message) -> None:
    try:
        channel.send(message)
    except ChannelClosedError:
        os._exit(0)


def main(arguments: list[str]) -> NoReturn:
    """Serve the parent until it is gone."""
    end_with_the_parent()
    # The memory of a process that maps a GPU is tens of gigabytes; nobody wants that as a file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    descriptor, heartbeat, level = int(arguments[0]), float(arguments[1]), int(arguments[2])
    os.environ["PYTHONPATH"] = arguments[
        3
    ]  # as it was: other Pythons that the engine starts must not use ours
    os.set_inheritable(descriptor, False)  # compilers that the engine starts must not hold it open
    channel = Channel(socket.socket(fileno=descriptor))
    logging.getLogger().setLevel(level)
    logging.getLogger().addHandler(Forward(channel))
    logging.captureWarnings(True)
    try:
        Server(channel).serve(Heart(channel, heartbeat))
    except ChannelClosedError:
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
