"""The store where ranks meet: it serves its own launch, whatever else uses the ports."""

import contextlib
import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ckpt_ema import rendezvous
from ckpt_ema.place import Place
from ckpt_ema.rendezvous import Store, meet
from tests.command import wait_for
from tests.conftest import free_port

Serve = Callable[[socket.socket], object]


@pytest.fixture(name="port")
def a_port() -> int:
    return free_port()


@pytest.fixture
def join() -> Iterator[Callable[..., Store]]:
    """What joins a launch, at first as rank 0 of two, and leaves it in the end."""
    with contextlib.ExitStack() as joined:

        def join(
            port: int, rank: int = 0, size: int = 2, launch: str = "7.2", **others: Any
        ) -> Store:
            address, seconds = others.get("address", "127.0.0.1"), others.get("seconds", 20.0)
            is_hosted = others.get("is_hosted", False)
            place = Place(rank, size, address, port, is_hosted, 0, launch)
            met = meet(place, seconds, others.get("silent", 20.0))
            joined.callback(met.close)
            return met

        yield join


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give other services, and connections to the host, little time to speak."""
    monkeypatch.setattr(rendezvous, "SECONDS_TO_GREET", 0.2)


@contextlib.contextmanager
def service(port: int, serve: Serve) -> Iterator[None]:
    """Something that listens at a port and serves each connection by a thread."""

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connections.append(connection)
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    connections: list[socket.socket] = []
    with socket.create_server(("", port)) as listener:
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for connection in connections:
                connection.close()


def connected(port: int) -> socket.socket:
    """A connection to a host that greets."""
    return socket.create_connection(("127.0.0.1", port), 10)


def joined_by_hand(port: int, rank: int) -> socket.socket:
    """The connection of a rank that says what it likes."""
    connection = connected(port)
    greeting = json.loads(read_line(connection))
    connection.sendall(json.dumps([*greeting, rank]).encode() + b"\n")
    return connection


def read_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += connection.recv(1)
    return line


def is_disconnected(connection: socket.socket) -> bool:
    """Whether the other side hangs up without another word."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


# --- The operations -------------------------------------------------------------------------------


def test_all_ranks_see_the_same_keys(join: Callable[..., Store], port: int) -> None:
    first, last = join(port), join(port, 1)
    assert last.get("a", "b") == [None, None]
    first.set("a", "x\n\udcff")
    last.set("a", "y")  # has one
    last.set("b", "z")
    assert first.get("b", "a", "c") == ["z", "x\n\udcff", None]
    assert first.get() == []
    assert [first.add("n", 2), last.add("n", -3), first.add("n", 0)] == [2, -1, -1]
    assert last.get("n") == [-1]


def test_no_addition_is_lost(join: Callable[..., Store], port: int) -> None:
    stores = [join(port, rank, size=6) for rank in range(6)]
    with ThreadPoolExecutor(12) as pool:  # two threads for each rank
        sums = list(pool.map(lambda n: stores[n % 6].add("n", 1), range(1200)))
    assert sorted(sums) == list(range(1, 1201))


def test_a_request_that_a_signal_interrupted_does_not_confuse_the_next(port: int) -> None:
    class AlarmError(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise AlarmError

    def serve(connection: socket.socket) -> None:
        connection.sendall(b'["ckpt-ema store 1", "7.2"]\n')
        read_line(connection)
        for reply in ("joined", "late", "in time"):
            number = json.loads(read_line(connection))[0]
            time.sleep(0.5 if reply == "late" else 0)
            connection.sendall(json.dumps([number, [reply]]).encode() + b"\n")

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with (
            service(port, serve),
            contextlib.closing(Store("127.0.0.1", port, "7.2", 1, 20.0)) as remote,
        ):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(AlarmError):
                remote.get("late")
            assert remote.get("in time") == ["in time"]
    finally:
        signal.signal(signal.SIGALRM, previous)


# --- Who meets whom -------------------------------------------------------------------------------


def test_two_launches_at_one_port_do_not_mix(join: Callable[..., Store], port: int) -> None:
    names = ["7.2", "7.3"]
    firsts = [join(port, launch=name) for name in names]
    for first, name in zip(firsts, names, strict=True):
        first.set("launch", name)
    assert [join(port, 1, launch=name).get("launch") for name in names[::-1]] == [["7.3"], ["7.2"]]


@pytest.mark.parametrize("other", [{"launch": "7.3"}, {"size": 3}, {"rank": 2}, {"rank": 5}])
def test_a_rank_of_another_launch_is_not_admitted(
    join: Callable[..., Store], port: int, other: dict[str, Any]
) -> None:
    first = join(port)
    with pytest.raises(ConnectionError):
        join(port, **{"rank": 1, "seconds": 0.3, **other})
    first.set("a", "x")
    assert join(port, 1).get("a") == ["x"]


def test_a_rank_joins_once(join: Callable[..., Store], port: int) -> None:
    """Of two launches with one name, each has its own ranks; none has two of the same."""
    _, last = join(port, size=3), join(port, 1, size=3)
    with pytest.raises(ConnectionError):
        join(port, 1, size=3, seconds=0.3)
    assert last.add("n", 1) == 1


def test_a_process_can_take_part_in_one_launch_after_the_other(
    join: Callable[..., Store], port: int
) -> None:
    """The second rank is early: it waits for the new store, the old one is out of bounds."""
    first, last = join(port), join(port, 1)
    first.set("a", "old")
    last.close()
    with ThreadPoolExecutor() as pool:
        again = pool.submit(join, port, 1)
        time.sleep(0.2)
        first.close()
        join(port).set("a", "new")
        assert again.result().get("a") in ([None], ["new"])


def test_nobody_joins_what_rank_0_has_left(join: Callable[..., Store], port: int) -> None:
    join(port, size=3).close()
    with pytest.raises(ConnectionError):
        join(port, 1, size=3, seconds=0.3)


@pytest.mark.parametrize("address", ["localhost", "127.0.0.2", "::1"])
def test_rank_0_listens_on_all_addresses(
    join: Callable[..., Store], port: int, address: str
) -> None:
    if address == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    join(port)
    assert join(port, 1, address=address).add("n", 1) == 1


def test_the_port_of_a_launcher_that_listens_itself_is_left_alone(
    join: Callable[..., Store], port: int
) -> None:
    """It would be torchrun's; none of our ranks listens or connects there."""
    join(port, is_hosted=True)
    connections: list[socket.socket] = []
    with service(port, connections.append):
        assert join(port, 1, is_hosted=True).add("n", 1) == 1
    assert connections == []


# --- Other services -------------------------------------------------------------------------------


def floods(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(b"a" * 65536)


FOREIGN: dict[str, Serve] = {
    "silent": lambda _: None,
    "hangs up": lambda connection: connection.close(),
    "speaks first": lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n"),
    "never ends its line": floods,
    "other version": lambda connection: connection.sendall(b'["ckpt-ema store 0", "7.2"]\n'),
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("serve", FOREIGN.values(), ids=FOREIGN)
def test_a_service_of_another_kind_is_passed_by(
    join: Callable[..., Store], port: int, serve: Serve
) -> None:
    with service(port, serve):
        join(port)
        begun = time.monotonic()
        assert join(port, 1).add("n", 1) == 1
        assert time.monotonic() - begun < 10


@pytest.mark.usefixtures("impatient")
def test_a_service_of_another_kind_is_sent_nothing(join: Callable[..., Store], port: int) -> None:
    received: list[bytes] = []
    with service(port, lambda connection: received.append(connection.recv(100))):
        join(port)
        join(port, 1)
        wait_for(lambda: received)
    assert set(received) == {b""}


@pytest.mark.usefixtures("impatient")
def test_a_web_server_is_passed_by(join: Callable[..., Store], port: int) -> None:
    with ThreadingHTTPServer(("", port), BaseHTTPRequestHandler) as server:
        threading.Thread(target=partial(server.serve_forever, 0.01)).start()
        try:
            join(port)
            assert join(port, 1).add("n", 1) == 1
        finally:
            server.shutdown()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("is_hosted", [False, True])
def test_if_no_port_is_free_rank_0_cannot_listen(
    join: Callable[..., Store], is_hosted: bool
) -> None:
    with contextlib.suppress(OSError), service(65535, FOREIGN["silent"]):
        with pytest.raises(OSError):
            join(65535, is_hosted=is_hosted)
        with pytest.raises(ConnectionError):
            join(65535, 1, is_hosted=is_hosted, seconds=0.1)


def test_an_impossible_host_name_is_no_traceback(join: Callable[..., Store], port: int) -> None:
    with pytest.raises(ConnectionError):
        join(port, 1, address="a" * 64, seconds=0.1)


# --- What is not a rank ---------------------------------------------------------------------------

GARBAGE = {
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "empty line": b"\n",
    "bytes": b"\x00\xff" * 100 + b"\n",
    "deep": b"[" * 100_000 + b"\n",
    "not JSON": b"x\n",
    "no operation": b"[1]\n",
    "object": b"{}\n",
    "wrong types": b'[1, "add", "n", []]\n',
    "key of no type": b'[1, "get", {}]\n',
    "too long": b"a" * (2 << 20),
}


@pytest.mark.parametrize("sent", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("has_joined", [False, True])
def test_garbage_disconnects_its_sender_alone(
    join: Callable[..., Store], port: int, sent: bytes, has_joined: bool
) -> None:
    first = join(port, size=3)
    with joined_by_hand(port, 2) if has_joined else connected(port) as connection:
        if not has_joined:
            read_line(connection)
        with contextlib.suppress(ConnectionError):  # it may hang up before the end
            connection.sendall(sent)
        assert is_disconnected(connection)
    assert first.add("n", 1) == 1
    assert join(port, 1, size=3).add("n", 1) == 2


def test_a_connection_that_says_nothing_keeps_nobody_out(
    join: Callable[..., Store], port: int
) -> None:
    first = join(port)
    with connected(port) as connection:
        read_line(connection)
        assert join(port, 1).add("n", 1) == first.get("n")[0]
        assert is_disconnected(connection)


def test_a_rank_that_vanishes_does_not_harm_the_others(
    join: Callable[..., Store], port: int
) -> None:
    first, last = join(port, size=3), join(port, 2, size=3)
    vanishing = joined_by_hand(port, 1)
    vanishing.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    vanishing.sendall(b'[1, "ad')
    vanishing.close()
    assert [first.add("n", 1), last.add("n", 1)] == [1, 2]


# --- A host that is lost --------------------------------------------------------------------------


def greets(connection: socket.socket, replies: bytes = b"", *, then_hangs_up: bool = True) -> None:
    """Play a host that admits a rank and replies once."""
    connection.sendall(b'["ckpt-ema store 1", "7.2"]\n')
    read_line(connection)
    read_line(connection)
    connection.sendall(b"[1, []]\n")
    read_line(connection)
    connection.sendall(replies)
    if then_hangs_up:
        connection.close()


@pytest.mark.parametrize(
    "serve",
    [
        greets,
        partial(greets, then_hangs_up=False),
        partial(greets, replies=b'[2, ["x'),
        partial(greets, replies=b"garbage\n"),
        partial(greets, replies=b"a" * (2 << 20)),
    ],
    ids=["hangs up", "silent", "cut reply", "garbage", "too long"],
)
def test_a_host_that_is_lost_stays_lost(port: int, serve: Serve) -> None:
    with service(port, serve), contextlib.closing(Store("127.0.0.1", port, "7.2", 1, 0.5)) as lost:
        for operation in (partial(lost.add, "n", 1), lost.get, partial(lost.set, "a", "x")):
            begun = time.monotonic()
            with pytest.raises(ConnectionError):
                operation()
            assert time.monotonic() - begun < 5


def test_only_a_launch_imports_sockets_and_none_imports_torch() -> None:
    code = (
        "import sys, ckpt_ema.ranks; assert 'socket' not in sys.modules;"
        " import ckpt_ema.rendezvous; assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
