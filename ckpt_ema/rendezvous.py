"""A key-value store for the ranks of one launch, which rank 0 hosts and all connect to.

It uses plain sockets: the client caches of a network file system may hide new files for a minute,
and importing torch, which has such a store, takes longer than a small average. Messages are lines
of JSON, never pickles. Rank 0 greets whoever connects with the name of the launch; a rank that gets
another greeting, or none, tries the next port, and has sent nothing to a service of another kind.
There is no password: like torch's store, it belongs in a private network.
"""

import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ckpt_ema.place import Place

_PROTOCOL = "ckpt-ema store 1"
_LONGEST_LINE = 1 << 20
SECONDS_TO_GREET = 2.0  # a service of another kind may wait for us to speak first


class Store:
    """The keys of a launch; its methods raise `ConnectionError` once rank 0 cannot be reached."""

    def __init__(self, address: str, port: int, launch: str, rank: int, silent: float) -> None:
        """Join as a rank; rank 0 counts as lost if it takes more than `silent` seconds to reply."""
        self._lock, self._requests = threading.Lock(), 0
        self._socket = socket.create_connection((address, port), SECONDS_TO_GREET)
        self._lines = self._socket.makefile("rb")
        greeting = _line(_PROTOCOL, launch)
        with self._connected():
            if self._lines.readline(len(greeting)) != greeting:
                raise ConnectionError("This is not the store of the launch.")
            self._socket.settimeout(silent)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.sendall(_line(_PROTOCOL, launch, rank))
        self.get()  # fails unless the rank is admitted

    def set(self, key: str, value: str) -> None:
        """Give a key a value, unless it has one."""
        self._ask("set", key, value)

    def add(self, key: str, amount: int) -> int:
        """Add to the number at a key, which begins at 0, and return the sum."""
        return int(self._ask("add", key, amount))

    def get(self, *keys: str) -> list[Any]:
        """Return the values of keys, in one round trip; None for a key that has none."""
        return list(self._ask("get", *keys))

    @staticmethod
    def pause(since: float) -> float:
        """Return how many seconds to sleep before asking again for what was awaited since then.

        A tenth of the time waited: short runs lose little, long ones do not keep rank 0 busy.
        """
        return min(max((time.monotonic() - since) / 10, 0.01), 0.5)

    def close(self) -> None:
        """Disconnect."""
        self._lines.close()
        self._socket.close()

    def _ask(self, *request: str | int) -> Any:
        with self._lock, self._connected():
            self._requests += 1
            self._socket.sendall(_line(self._requests, *request))
            while True:
                number, reply = json.loads(self._lines.readline(_LONGEST_LINE))
                if number == self._requests:  # and not one that a signal kept us from reading
                    return reply

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """Disconnect if something goes wrong."""
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: there are no more lines
            self.close()
            raise ConnectionError("Rank 0 cannot be reached.") from error


class _Host:
    """The values themselves; one thread admits ranks, and one for each of them replies."""

    def __init__(self, listener: socket.socket, launch: str, size: int) -> None:
        self._values: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._greeting, self._first = _line(_PROTOCOL, launch), _line(_PROTOCOL, launch, 0)
        # Each joins once: a rank that comes again belongs to the next launch of the same name.
        self._awaited = {_line(_PROTOCOL, launch, rank) for rank in range(size)}
        threading.Thread(target=self._admit, args=(listener,), daemon=True).start()

    def _admit(self, listener: socket.socket) -> None:
        listener.settimeout(0.5)
        with listener:
            while self._awaited:
                try:
                    connection, _ = listener.accept()
                    threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
                except (OSError, RuntimeError):  # nobody came, or files or threads have run out
                    time.sleep(0.05)

    def _serve(self, connection: socket.socket) -> None:
        # Whoever sends what no rank sends is disconnected.
        foreign = contextlib.suppress(OSError, ValueError, TypeError, LookupError, RecursionError)
        with foreign, connection, connection.makefile("rb") as lines:
            connection.settimeout(SECONDS_TO_GREET)
            connection.sendall(self._greeting)
            answer = lines.readline(_LONGEST_LINE)
            with self._lock:
                self._awaited.remove(answer)
            connection.settimeout(None)
            try:
                while line := lines.readline(_LONGEST_LINE):
                    number, *request = json.loads(line)
                    connection.sendall(_line(number, self._reply(*request)))
            finally:
                if answer == self._first:  # nobody can join a launch that rank 0 has left
                    self._awaited.clear()

    def _reply(self, operation: str, *arguments: Any) -> Any:
        with self._lock:
            if operation == "get":
                return [self._values.get(key) for key in arguments]
            key, value = arguments
            if operation == "add":
                value += self._values.pop(key, 0)
            return self._values.setdefault(key, value)


def meet(place: Place, seconds: float, silent: float) -> Store:
    """Host the store of a launch if this is rank 0, and join it; others try one port after another.

    `silent` is as in `Store`. Raises `OSError` if rank 0 finds no free port, or another rank does
    not find rank 0 within some seconds.
    """
    launch = f"{place.launch}, {place.size} ranks, port {place.port}"
    address, ports = place.address, list(place.ports)
    if place.rank == 0:
        listener = _listener(ports)
        address, ports = "127.0.0.1", [listener.getsockname()[1]]
        _Host(listener, launch, place.size)
    since = time.monotonic()
    failure: Exception = OSError("There is no such port.")
    for port in itertools.cycle(ports):
        try:
            return Store(address, port, launch, place.rank, silent)
        except (OSError, UnicodeError) as error:  # UnicodeError: an impossible host name
            failure = error
        if time.monotonic() - since > seconds:
            break
        if port == ports[-1]:
            time.sleep(Store.pause(since))
    raise ConnectionError(f"There is no store of {launch}.") from failure


def _listener(ports: Sequence[int]) -> socket.socket:
    """Listen at the first port that is free."""
    is_dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual else socket.AF_INET
    failure = OSError("There is no such port.")
    for port in ports:
        try:
            return socket.create_server(
                ("", port), family=family, backlog=1024, dualstack_ipv6=is_dual
            )
        except OSError as error:
            failure = error
    raise failure


def _line(*values: object) -> bytes:
    return json.dumps(values).encode() + b"\n"
