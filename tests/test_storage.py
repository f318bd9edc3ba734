"""What Local, the storage on a file system, makes of each thing that can be at a path."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_ema.errors import Code, IncompleteError, RefusedError
from ckpt_ema.storage.local import Local
from ckpt_ema.storage.protocol import Kind
from tests.makers.faulty_os import faulty

LOCAL = Local()


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda _path: None, Kind.ABSENT),
        (lambda path: path.symlink_to("nowhere"), Kind.ABSENT),
        (lambda path: path.symlink_to(path.name), Kind.ABSENT),
        (lambda path: path.touch(), Kind.FILE),
        (lambda path: path.mkdir(), Kind.FOLDER),
        (lambda path: path.symlink_to("/"), Kind.FOLDER),
        (os.mkfifo, Kind.OTHER),
        (lambda path: path.symlink_to("/dev/null"), Kind.OTHER),
    ],
)
def test_links_are_followed_to_what_they_lead_to(
    make: Callable[[Path], object], kind: Kind, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    make(path)
    assert LOCAL.kind(path) is kind
    assert LOCAL.is_folder(path) == (kind is Kind.FOLDER)
    assert LOCAL.is_link(path) == path.is_symlink()
    assert LOCAL.exists(path) == os.path.lexists(path)


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "file/below"])
def test_nothing_can_be_at_an_impossible_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert LOCAL.kind(f"{tmp_path}/{name}") is Kind.ABSENT


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        *((LOCAL.kind, "stat"), (LOCAL.identity, "stat"), (LOCAL.file_id, "stat")),
        *((LOCAL.names, "listdir"), (LOCAL.exists, "lstat")),
        (lambda path: LOCAL.open(path).__enter__(), "open"),
    ],
)
def test_what_cannot_be_accessed_is_not_taken_to_be_absent(
    call: Callable[[Path], object], kind: str, tmp_path: Path
) -> None:
    with faulty(kind, 1, errno.EACCES), pytest.raises(RefusedError) as caught:
        call(tmp_path)
    assert (caught.value.code, caught.value.path) == (Code.INACCESSIBLE, str(tmp_path))
    assert str(caught.value) == f"cannot access {tmp_path}: Permission denied."


def test_only_regular_files_are_opened_and_none_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, code in ((tmp_path / "fifo", Code.NOT_A_FILE), (tmp_path, Code.NOT_A_FILE)):
        with pytest.raises(RefusedError) as caught, LOCAL.open(path):
            pass
        assert caught.value.code is code
    with pytest.raises(IncompleteError) as caught, LOCAL.open(tmp_path / "gone"):
        pass
    assert caught.value.code is Code.NOT_FOUND


def test_small_files_are_read_whole_or_at_their_start(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abcdef")
    assert LOCAL.read(path) == b"abcdef"
    assert LOCAL.read(path, 2) == b"ab"
    assert LOCAL.read(tmp_path) is None
    assert LOCAL.read(tmp_path / "gone") is None
    os.truncate(path, 1 << 40)
    assert LOCAL.read(path, 3) == b"abc"
    with pytest.raises(RefusedError) as caught:
        LOCAL.read(path)
    assert caught.value.code is Code.WRONG_FORMAT


def test_files_below_are_found_no_deeper_than_asked(tmp_path: Path) -> None:
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    for name in ("0", "a/1", "a/b/2", "a/b/c/3"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert set(LOCAL.files_below(tmp_path, 2)) - {"link"} == {"0", "a/1", "a/b/2"}


def test_links_in_paths_are_resolved(tmp_path: Path) -> None:
    real = tmp_path.resolve() / "real"
    real.mkdir()
    (real / "file").touch()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").symlink_to("real/file")
    given = [tmp_path / "link" / "file", tmp_path / "file", tmp_path / "link" / ".." / "real"]
    assert LOCAL.real_paths(given) == [str(real / "file"), str(real / "file"), str(real)]
    assert LOCAL.file_id(tmp_path / "file") == LOCAL.file_id(real / "file")


def test_a_hole_is_where_nothing_was_written(tmp_path: Path) -> None:
    for name, content in (("whole", bytes(1 << 20)), ("sparse", b"start")):
        (tmp_path / name).write_bytes(content)
    os.truncate(tmp_path / "sparse", 1 << 20)
    with LOCAL.open(tmp_path / "whole") as file:
        assert file.first_hole() is None
    with LOCAL.open(tmp_path / "sparse") as file:
        assert file.first_hole() in (None, 4096)  # some file systems have none
