"""Runs on the Hugging Face Hub: what is listed and read, and that failures are honest and quiet."""

import hashlib
import random
import re
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_ema.errors import CkptEmaError, Code, FailedError, RefusedError
from ckpt_ema.storage.client import MOST_ATTEMPTS, RemoteFile
from ckpt_ema.storage.hub import Hub
from ckpt_ema.storage.uri import suggestion
from ckpt_ema.storage.web import Web, WebError, redirected
from tests.makers.fake_hub import FakeHub, Fault, fake_hub

LARGE = bytes(range(256)) * 64  # 16 KiB, served by the CDN
SMALL = b'{"model_type": "tiny"}'
REPO = "hf://org/run"


def write(root: Path, files: dict[str, bytes]) -> Path:
    """Write files by their names below a folder."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub with one run: a main branch, two steps, a branch with a slash, a tag."""
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    run = tmp_path / "hub" / "org" / "run"
    write(
        run / "main",
        {
            "README.md": b"of main",
            "checkpoint-500/model.safetensors": LARGE,
            "checkpoint-500/config.json": SMALL,
            "checkpoint-5000/config.json": SMALL,
        },
    )
    for revision in ("step1", "step2", "other%2Fstep3", "v1"):
        write(run / revision, {"model.safetensors": LARGE, "sub/config.json": SMALL})
    with fake_hub(tmp_path / "hub") as hub:
        hub.tags.add("v1")
        yield hub


def client(fake: FakeHub, token: str = "", timeout_seconds: float = 5.0) -> Hub:
    """A client that does not wait long."""
    return Hub(
        endpoint=fake.endpoint, token=token, timeout_seconds=timeout_seconds, pause_seconds=0.001
    )


def names(fake: FakeHub, uri: str) -> list[str]:
    """The names that are listed."""
    return sorted(file.name for file in client(fake).files(uri))


def large_file(hub: Hub) -> RemoteFile:
    """The file that the CDN serves, of the folder `MODEL`."""
    return next(file for file in hub.files(MODEL) if file.name == "model.safetensors")


MODEL = f"{REPO}/checkpoint-500"


# --- URIs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        (
            "hf://org/run",
            [
                "README.md",
                "checkpoint-500/config.json",
                "checkpoint-500/model.safetensors",
                "checkpoint-5000/config.json",
            ],
        ),
        ("hf://models/org/run/checkpoint-500", ["config.json", "model.safetensors"]),
        ("hf://org/run@main/checkpoint-500", ["config.json", "model.safetensors"]),
        ("hf://org/run@step1", ["model.safetensors", "sub/config.json"]),
        ("hf://org/run@v1/sub", ["config.json"]),
        ("hf://org/run@other%2Fstep3/sub", ["config.json"]),
        ("hf://org/run/README.md", [""]),
        ("hf://org/run@step1/sub/config.json", [""]),
        ("hf://org/run/absent", []),
        ("hf://org/run/absent/deeper", []),
        ("hf://org/run@step*/sub", ["step1/config.json", "step2/config.json"]),
        ("hf://org/run@step[2-9]/sub", ["step2/config.json"]),
        ("hf://org/run@v?/sub", ["v1/config.json"]),
        ("hf://org/run@*step3", ["other--step3/model.safetensors", "other--step3/sub/config.json"]),
        ("hf://org/run@step*/absent", []),
    ],
)
def test_a_uri_lists_the_files_below_it(fake: FakeHub, uri: str, expected: list[str]) -> None:
    assert names(fake, uri) == expected


def test_a_commit_is_a_revision_of_which_nothing_is_asked(fake: FakeHub) -> None:
    commit = fake.revisions("org/run")["step1"]
    assert names(fake, f"{REPO}@{commit}/sub") == ["config.json"]
    assert fake.counts == {"tree": 1}


def test_pull_requests_and_conversions_have_slashes_in_their_names(fake: FakeHub) -> None:
    fake.push("org/run", "refs/pr/7", fake.root / "org/run/step1")
    assert names(fake, f"{REPO}@refs/pr/7/sub") == ["config.json"]


@pytest.mark.parametrize(
    "uri",
    [
        "hf://org",
        "hf://",
        "hf://org/run@",
        "hf://org/../secret",
        "hf://datasets/org/run",
        "hf://org/run@step1/../other",
        "hf://org/run@%2F/etc",
        "hf://org/run/a\0b",
        "hf://org/run/a\nb",
    ],
)
def test_a_uri_of_another_form_is_refused_without_a_request(fake: FakeHub, uri: str) -> None:
    with pytest.raises(RefusedError, match=r"^cannot access hf://"):
        client(fake).files(uri)
    assert fake.counts == {}


def test_a_glob_that_matches_nothing_is_refused_with_what_there_is(fake: FakeHub) -> None:
    with pytest.raises(RefusedError) as caught:
        client(fake).files(f"{REPO}@stage*")
    assert caught.value.code is Code.NOT_FOUND
    assert "no branch or tag matches stage*; it has main, other/step3, step1" in str(caught.value)


def test_revisions_that_would_share_a_name_are_refused(fake: FakeHub) -> None:
    fake.push("org/run", "other--step3", fake.root / "org/run/step1")
    with pytest.raises(RefusedError, match="would both be called other--step3"):
        client(fake).files(f"{REPO}@other*")


def test_identities_are_digests_and_pin_the_commit_of_small_files(fake: FakeHub) -> None:
    files = {file.name: file for file in client(fake).files(MODEL)}
    digest = hashlib.sha256(LARGE).hexdigest()
    assert files["model.safetensors"] == RemoteFile("model.safetensors", len(LARGE), 0, digest)
    blob = hashlib.sha1(b"blob %d\0" % len(SMALL) + SMALL).hexdigest()
    assert files["config.json"].tag == f"{blob}@{fake.revisions('org/run')['main']}"


def test_many_revisions_take_one_request_for_refs_and_one_for_each_tree(fake: FakeHub) -> None:
    for step in range(100, 180):
        fake.push("org/run", f"step{step}", fake.root / "org/run/step1")
    fake.latency_seconds = 0.02
    assert len(names(fake, f"{REPO}@step1??")) == 160
    assert fake.counts == {"refs": 1, "tree": 80}
    assert 8 <= fake.most_at_a_time <= 32


def test_pages_are_followed_at_the_endpoint_wherever_the_link_leads(fake: FakeHub) -> None:
    fake.page_names = 2
    assert len(names(fake, f"{REPO}@step*")) == 4
    assert len(names(fake, REPO)) == 4
    assert fake.counts["tree"] > 4


def test_a_revision_stays_what_it_was_when_it_was_listed(fake: FakeHub, tmp_path: Path) -> None:
    hub = client(fake)
    before = hub.files(f"{REPO}@step1")
    newer = write(tmp_path / "newer", {"model.safetensors": LARGE[::-1]})
    fake.push("org/run", "step1", newer)
    assert hub.files(f"{REPO}@step1") == before
    assert hub.read(f"{REPO}@step1", before[0], 0, 4) == LARGE[:4]
    assert client(fake).files(f"{REPO}@step1") != before


def test_a_renamed_repository_is_found_where_it_is_now(fake: FakeHub) -> None:
    new = {"Location": "/api/models/org/run/revision/step1"}
    fake.fail(Fault.STATUS, "revision", status=307, headers=new)
    assert names(fake, f"{REPO}@before") == ["model.safetensors", "sub/config.json"]


def test_odd_names_are_listed_and_read(fake: FakeHub, tmp_path: Path) -> None:
    odd = ["a b.bin", "50%.bin", "ü\N{SNOWMAN}.bin", "a#b?c&d=e+f.bin", "%2e%2e/x.bin", "p@q;r.bin"]
    fake.push("org/run", "odd", write(tmp_path / "odd", dict.fromkeys(odd, LARGE)))
    hub = client(fake)
    files = hub.files(f"{REPO}@odd")
    assert sorted(file.name for file in files) == sorted(odd)
    for file in files:
        assert hub.read(f"{REPO}@odd", file, 1000, 100) == LARGE[1000:1100]
        assert hub.files(f"{REPO}@odd/{file.name}") == [file._replace(name="")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", "hf://org/name"),
        ("EleutherAI/pythia-14m@step*", "hf://EleutherAI/pythia-14m@step*"),
        ("name", None),
        ("/org/name", None),
        ("./org", None),
        ("../org", None),
        ("~/runs", None),
        ("org/name/deeper", None),
        ("s3://bucket/run", None),
        ("org/a name", None),
    ],
)
def test_a_name_that_could_be_a_repository_is_suggested(text: str, expected: str | None) -> None:
    assert suggestion(text) == expected


# --- Reading --------------------------------------------------------------------------------------


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, len(LARGE)), st.integers(0, len(LARGE)))
def test_a_range_is_what_the_file_has_there(fake: FakeHub, first: int, second: int) -> None:
    start, end = sorted((first, second))
    hub = client(fake)
    assert hub.read(MODEL, large_file(hub), start, end - start) == LARGE[start:end]


def test_large_parts_arrive_whole(fake: FakeHub, tmp_path: Path) -> None:
    content = random.Random(0).randbytes(3_000_000)
    fake.push("org/run", "large", write(tmp_path / "large", {"a": content}))
    hub = client(fake)
    (file,) = hub.files(f"{REPO}@large")
    assert hub.read(f"{REPO}@large", file, 1, 2_999_998) == content[1:-1]
    assert hub.read(f"{REPO}@large", file, 0, 3_000_000) == content


@pytest.mark.parametrize("sends_small_files", [False, True])
def test_small_files_may_come_from_the_hub_itself(fake: FakeHub, sends_small_files: bool) -> None:
    fake.sends_small_files = sends_small_files
    hub = client(fake)
    file = next(file for file in hub.files(MODEL) if file.name == "config.json")
    assert hub.read(MODEL, file, 3, 5) + hub.read(MODEL, file, 0, 22) == SMALL[3:8] + SMALL
    assert fake.counts["resolve"] == 1 + sends_small_files
    assert hub.read(f"{MODEL}/config.json", file._replace(name=""), 2, 5) == SMALL[2:7]


def test_files_of_a_glob_are_read_by_their_revision(fake: FakeHub, tmp_path: Path) -> None:
    fake.push("org/run", "step2", write(tmp_path / "two", {"model.safetensors": LARGE[::-1]}))
    hub = client(fake)
    files = {file.name: file for file in hub.files(f"{REPO}@step*")}
    assert hub.read(f"{REPO}@step*", files["step1/model.safetensors"], 9, 9) == LARGE[9:18]
    assert hub.read(f"{REPO}@step*", files["step2/model.safetensors"], 9, 9) == LARGE[::-1][9:18]


def test_a_client_that_has_listed_nothing_reads_too(fake: FakeHub) -> None:
    file = large_file(client(fake))
    assert client(fake).read(MODEL, file, 5, 5) == LARGE[5:10]


def test_nothing_is_requested_for_no_bytes(fake: FakeHub) -> None:
    assert client(fake).read(MODEL, RemoteFile("model.safetensors", 0, 0, "x"), 0, 0) == b""
    assert fake.counts == {}


def test_threads_resolve_a_file_once_and_keep_their_connections(fake: FakeHub) -> None:
    fake.latency_seconds = 0.01
    hub = client(fake)
    file = large_file(hub)
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda start: hub.read(MODEL, file, start, 256), range(0, len(LARGE), 256))
        assert b"".join(parts) == LARGE
    assert fake.counts["resolve"] == 1
    assert fake.counts["cdn"] == 64
    assert fake.connections <= 1 + 8


def test_threads_renew_an_expired_address_once(fake: FakeHub) -> None:
    hub = client(fake)
    file = large_file(hub)
    hub.read(MODEL, file, 0, 1)
    fake.expire()
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda start: hub.read(MODEL, file, start, 256), range(0, len(LARGE), 256))
        assert b"".join(parts) == LARGE
    assert fake.counts["resolve"] == 2


def test_an_address_that_expires_at_once_is_renewed_once(fake: FakeHub) -> None:
    fake.lifetime_seconds = -1
    hub = client(fake)
    with pytest.raises(FailedError, match="status 403") as caught:
        hub.read(MODEL, large_file(hub), 0, 10)
    assert caught.value.code is Code.READ_FAILED
    assert fake.counts["resolve"] == fake.counts["cdn"] == 2


def test_a_connection_that_the_server_closed_meanwhile_is_no_failure(fake: FakeHub) -> None:
    hub = client(fake)
    file = large_file(hub)
    for start in range(3):
        fake.fail(Fault.STATUS, "cdn", status=403, headers={"Connection": "close"})
        assert hub.read(MODEL, file, start, 2) == LARGE[start : start + 2]


# --- Failures -------------------------------------------------------------------------------------

TEMPORARY = [
    *((Fault.STATUS, status) for status in (429, 500, 502, 503, 504)),
    *((Fault.RESET, 0), (Fault.CUT, 0)),
]


@pytest.mark.parametrize(("fault", "status"), TEMPORARY)
def test_what_may_succeed_later_is_repeated(fake: FakeHub, fault: Fault, status: int) -> None:
    hub = client(fake)
    for kind in ("revision", "tree", "cdn"):
        fake.fail(fault, kind, times=2, status=status)
    if fault is not Fault.CUT:  # the answer has no body
        fake.fail(fault, "resolve", times=2, status=status)
    file = large_file(hub)
    assert hub.read(MODEL, file, 100, 1000) == LARGE[100:1100]
    assert fake.counts["revision"] == fake.counts["tree"] == fake.counts["cdn"] == 3


@pytest.mark.parametrize(("fault", "status"), TEMPORARY)
def test_an_operation_ends_after_six_attempts(fake: FakeHub, fault: Fault, status: int) -> None:
    hub = client(fake)
    file = large_file(hub)
    fake.fail(fault, "cdn", times=1000, status=status)
    with pytest.raises(FailedError, match="after 6 attempts") as caught:
        hub.read(MODEL, file, 0, 10)
    assert caught.value.code is Code.READ_FAILED
    assert fake.counts["cdn"] == MOST_ATTEMPTS
    assert fake.counts["resolve"] == 1


def test_a_listing_ends_after_six_attempts(fake: FakeHub) -> None:
    fake.fail(Fault.STATUS, "tree", times=1000, status=503)
    with pytest.raises(RefusedError, match="status 503, after 6 attempts") as caught:
        client(fake).files(REPO)
    assert caught.value.code is Code.INACCESSIBLE
    assert fake.counts["tree"] == MOST_ATTEMPTS


def test_a_stall_ends_with_the_time_out_and_is_repeated(fake: FakeHub) -> None:
    hub = client(fake, timeout_seconds=0.1)
    fake.fail(Fault.STALL, "tree")
    fake.fail(Fault.STALL, "cdn")
    assert hub.read(MODEL, large_file(hub), 0, 1000) == LARGE[:1000]
    fake.fail(Fault.STALL, "cdn", times=100)
    with pytest.raises(FailedError, match="timed out"):
        hub.read(MODEL, large_file(hub), 0, 1000)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"RateLimit": '"resolvers";r=0;t=12'}, 12),
        ({"RateLimit": '"api";r=0;t=250'}, 60),
        ({"Retry-After": "9999"}, 60),
        ({"Retry-After": "soon", "RateLimit": "t"}, 0),
    ],
)
def test_a_server_says_how_long_to_wait(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], seconds: float
) -> None:
    waits: list[float] = []
    fake.fail(Fault.STATUS, "revision", status=429, headers=headers)
    hub = client(fake)
    monkeypatch.setattr("ckpt_ema.storage.web.time.sleep", waits.append)
    hub.files(REPO)
    assert [round(wait) for wait in waits if wait] == [seconds]


def test_pauses_double_and_end_at_five_seconds(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    fake.fail(Fault.RESET, times=100)
    hub = Hub(endpoint=fake.endpoint, token="")
    monkeypatch.setattr("ckpt_ema.storage.web.time.sleep", waits.append)
    with pytest.raises(RefusedError):
        hub.files(REPO)
    pauses = [wait for wait in waits if wait]
    for pause, least in zip(pauses, (0.2, 0.4, 0.8, 1.6, 3.2), strict=True):
        assert least <= pause <= min(5.0, 1.5 * least)


@pytest.mark.parametrize(
    ("fault", "kind", "status", "code"),
    [
        (Fault.IGNORED_RANGE, "cdn", 0, Code.READ_FAILED),
        (Fault.OTHER_RANGE, "cdn", 0, Code.READ_FAILED),
        (Fault.WRONG_LENGTH, "cdn", 0, Code.READ_FAILED),
        (Fault.HTML, "cdn", 0, Code.READ_FAILED),
        (Fault.HTML, "resolve", 0, Code.READ_FAILED),
        (Fault.LOOP, "cdn", 0, Code.READ_FAILED),
        (Fault.LOOP, "resolve", 0, Code.READ_FAILED),
        (Fault.TO_SCHEME, "cdn", 0, Code.READ_FAILED),
        (Fault.TO_SCHEME, "resolve", 0, Code.READ_FAILED),
        (Fault.STATUS, "resolve", 401, Code.READ_FAILED),
        (Fault.STATUS, "resolve", 403, Code.READ_FAILED),
        (Fault.STATUS, "cdn", 400, Code.READ_FAILED),
        (Fault.STATUS, "resolve", 404, Code.CHANGED),
        (Fault.STATUS, "cdn", 404, Code.CHANGED),
        (Fault.STATUS, "cdn", 412, Code.CHANGED),
        (Fault.STATUS, "cdn", 416, Code.CHANGED),
        (Fault.GROWN, "cdn", 0, Code.CHANGED),
        (Fault.OTHER_CONTENT, "resolve", 0, Code.CHANGED),
    ],
)
def test_what_cannot_succeed_fails_at_once(
    fake: FakeHub, fault: Fault, kind: str, status: int, code: Code
) -> None:
    hub = client(fake)
    file = large_file(hub)
    fake.fail(fault, kind, times=1000, status=status)
    with pytest.raises(FailedError) as caught:
        hub.read(MODEL, file, 10, 10)
    assert caught.value.code is code
    assert caught.value.path == f"{MODEL}/model.safetensors"
    assert fake.counts[kind] == (6 if fault is Fault.LOOP else 1)
    said = {Code.CHANGED: f"{MODEL}/model.safetensors changed", Code.READ_FAILED: "cannot read hf:"}
    assert str(caught.value).startswith(said[code])


@pytest.mark.parametrize("fault", [Fault.GROWN, Fault.HTML])
def test_a_whole_file_is_checked_like_a_part(fake: FakeHub, fault: Fault) -> None:
    hub = client(fake)
    file = large_file(hub)
    assert hub.read(MODEL, file, 0, len(LARGE)) == LARGE
    fake.fail(fault, "cdn")
    with pytest.raises(FailedError):
        hub.read(MODEL, file, 0, len(LARGE))


@pytest.mark.parametrize(
    ("kind", "status", "error_code", "code", "said"),
    [
        ("revision", 401, "RepoNotFound", Code.INACCESSIBLE, "private or gated. Set HF_TOKEN"),
        ("revision", 403, "GatedRepo", Code.INACCESSIBLE, "denies access. If it is gated, request"),
        ("revision", 404, "RepoNotFound", Code.NOT_FOUND, "no such repository or revision."),
        ("revision", 404, "RevisionNotFound", Code.NOT_FOUND, "no such repository or revision."),
        ("tree", 404, "RevisionNotFound", Code.NOT_FOUND, "no such repository or revision."),
        ("revision", 400, "", Code.INACCESSIBLE, "answered with status 400."),
    ],
)
def test_what_denies_access_says_what_to_do(
    fake: FakeHub, kind: str, status: int, error_code: str, code: Code, said: str
) -> None:
    fake.fail(Fault.STATUS, kind, times=9, status=status, headers={"X-Error-Code": error_code})
    with pytest.raises(RefusedError) as caught:
        client(fake).files(MODEL)
    assert caught.value.code is code
    assert str(caught.value).startswith(f"cannot access {MODEL}: ")
    assert said in str(caught.value)
    assert fake.counts[kind] == 1


@pytest.mark.parametrize("uri", ["hf://org/none", "hf://org/none@step*", "hf://org/run@none"])
def test_what_does_not_exist_is_not_found(fake: FakeHub, uri: str) -> None:
    with pytest.raises(RefusedError) as caught:
        client(fake).files(uri)
    assert caught.value.code is Code.NOT_FOUND


def test_nobody_listens(fake: FakeHub) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        hub = Hub(endpoint=f"http://127.0.0.1:{closed.getsockname()[1]}", token="", pause_seconds=0)
        with pytest.raises(RefusedError, match="Connection refused"):
            hub.files(REPO)


# --- What a server may not do ---------------------------------------------------------------------

COMMIT = "a" * 40
ROW = {"type": "file", "path": "a", "size": 1, "oid": COMMIT}


@pytest.mark.parametrize(
    "answer",
    [
        b"<html></html>",
        b"",
        b"[" * 100_000,
        b"\xff\xfe",
        {},
        {"error": "x"},
        ["a"],
        [[ROW]],
        [{**ROW, "type": 1}],
        [{**ROW, "size": "1"}],
        [{**ROW, "size": True}],
        [{**ROW, "size": -1}],
        [{**ROW, "size": 1 << 70}],
        [{**ROW, "oid": None}],
        [{**ROW, "oid": "../x"}],
        [{**ROW, "lfs": []}],
        [{**ROW, "lfs": {"oid": "sha", "size": 1}}],
        *(
            [{**ROW, "path": path}]
            for path in (
                "/etc/passwd",
                "../a",
                "a/../b",
                "a//b",
                "",
                ".",
                "a\0",
                "a\nb",
                "a\x7f",
                7,
            )
        ),
        [{**ROW, "path": "\ud800"}],
    ],
    ids=lambda answer: repr(answer)[:60],
)
def test_a_tree_of_another_form_is_refused(fake: FakeHub, answer: object) -> None:
    fake.bodies["tree"] = answer
    with pytest.raises(RefusedError) as caught:
        client(fake).files(REPO)
    assert caught.value.code is Code.INACCESSIBLE
    assert "\n" not in str(caught.value)
    assert fake.counts["tree"] == 1


def test_files_outside_of_the_folder_are_refused(fake: FakeHub) -> None:
    fake.bodies["tree"] = [{**ROW, "path": "checkpoint-5000/x"}]
    with pytest.raises(RefusedError, match="files of another folder"):
        client(fake).files(MODEL)


@pytest.mark.parametrize(
    "refs",
    [
        [],
        {"branches": []},
        {"branches": [{"name": "step1"}], "tags": []},
        {"branches": [{"name": "step1", "targetCommit": "../../x"}], "tags": []},
        {"branches": [{"name": "step/../1", "targetCommit": COMMIT}], "tags": []},
        {"branches": [{"name": ["step1"], "targetCommit": COMMIT}], "tags": []},
    ],
)
def test_refs_of_another_form_are_refused(fake: FakeHub, refs: object) -> None:
    fake.bodies["refs"] = refs
    with pytest.raises(RefusedError):
        client(fake).files(f"{REPO}@step*")


@pytest.mark.parametrize("answer", [{}, {"sha": "main"}, {"sha": COMMIT + "/.."}])
def test_a_revision_without_a_commit_is_refused(fake: FakeHub, answer: object) -> None:
    fake.bodies["revision"] = answer
    with pytest.raises(RefusedError):
        client(fake).files(REPO)


def test_a_listing_without_an_end_is_refused(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt_ema.storage.hub_listing.MOST_NAMES", 5)
    assert len(names(fake, f"{REPO}@step2")) == 2  # and a folder
    with pytest.raises(RefusedError, match="more than 5 files"):
        client(fake).files(f"{REPO}@step*")


def test_pages_without_an_end_are_refused(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_ema.storage.hub_listing.MOST_PAGES", 3)
    fake.page_names = 1
    with pytest.raises(RefusedError, match="more than 3 pages"):
        client(fake).files(REPO)


def test_html_instead_of_json_is_refused_at_once(fake: FakeHub) -> None:
    fake.fail(Fault.HTML, "revision", times=9)
    with pytest.raises(RefusedError, match="answer is not JSON"):
        client(fake).files(REPO)
    assert fake.counts == {"revision": 1}


# --- Secrets --------------------------------------------------------------------------------------

TOKEN = "hf_ThisIsASecret"


def test_the_token_reaches_the_hub_alone(fake: FakeHub) -> None:
    fake.token = TOKEN
    hub = client(fake, TOKEN)
    assert hub.read(MODEL, large_file(hub), 7, 7) == LARGE[7:14]
    assert fake.authorized == {"hub": 3, "cdn": 0}
    with pytest.raises(RefusedError, match="Set HF_TOKEN"):
        client(fake).files(REPO)


@pytest.mark.parametrize(
    "where", ["HF_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "XDG_CACHE_HOME", "HOME"]
)
def test_the_token_is_found_where_the_hubs_own_library_has_it(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", fake.endpoint + "/")
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    fake.token = TOKEN
    if where != "HF_HOME":
        monkeypatch.delenv("HF_HOME")
    value = {"HF_TOKEN": TOKEN, "HF_TOKEN_PATH": str(tmp_path / "token")}.get(where, str(tmp_path))
    monkeypatch.setenv(where, value)
    below = {"XDG_CACHE_HOME": "huggingface/", "HOME": ".cache/huggingface/"}.get(where, "")
    write(tmp_path, {f"{below}token": f"{TOKEN}\n".encode()})
    assert len(Hub().files(REPO)) == 4


def test_a_token_that_cannot_be_sent_is_refused_unseen(fake: FakeHub) -> None:
    token = TOKEN + "\r\nHost: x"
    with pytest.raises(RefusedError, match="characters that cannot be sent") as caught:
        client(fake, token)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "endpoint", ["huggingface.co", "file:///etc", "http://", "http://a:b", "x y"]
)
def test_an_endpoint_that_is_no_address_is_refused(endpoint: str) -> None:
    with pytest.raises(RefusedError, match="HF_ENDPOINT"):
        Hub(endpoint=endpoint, token="")


@pytest.mark.parametrize("fault", Fault)
def test_no_message_or_traceback_has_a_token_or_a_signature(fake: FakeHub, fault: Fault) -> None:
    for kind in ("revision", "tree", "resolve", "cdn"):
        hub = client(fake, TOKEN, timeout_seconds=0.03)
        fake.fail(fault, kind, times=99, status=503)
        try:
            hub.read(MODEL, large_file(hub), 0, 99)
        except CkptEmaError as error:
            text = "".join(traceback.format_exception(error)) + repr(vars(error)) + repr(hub)
            assert not re.search("SECRET|Expires|Signature|ThisIsASecret|Bearer", text)
            assert "\n" not in str(error)
        fake.recover()


def test_a_redirect_may_not_end_encryption() -> None:
    """Asked of the rule itself, for want of a certificate."""
    assert redirected("https://a/x?y", "/z") == "https://a/z"
    assert redirected("http://a/x", "https://b/z") == "https://b/z"
    for location in ("http://a/z", "ftp://a/z", "https://[", "https://a:port/"):
        with pytest.raises(WebError):
            redirected("https://a/x?Signature=SECRET", location)


@pytest.mark.parametrize(
    "location", ["https://a\x01b/", "http://localhost:1/a b", "http://localhost:1/\xff"]
)
def test_a_redirect_to_no_address_fails_at_once(fake: FakeHub, location: str) -> None:
    hub = client(fake)
    file = large_file(hub)
    fake.fail(Fault.STATUS, "resolve", times=9, status=302, headers={"Location": location})
    with pytest.raises(FailedError, match="redirects to"):
        hub.read(MODEL, file, 0, 9)
    assert fake.counts["resolve"] == 1


def test_a_server_without_tls_is_not_talked_to_in_plain_text(fake: FakeHub) -> None:
    endpoint = fake.endpoint.replace("http:", "https:")
    with pytest.raises(RefusedError, match="cannot access hf://org/run: the connection"):
        Hub(endpoint=endpoint, token=TOKEN, pause_seconds=0).files(REPO)
    assert fake.counts == {}


def test_https_goes_through_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def refuse() -> None:
            for _ in range(MOST_ATTEMPTS):
                connection, _ = proxy.accept()
                with connection:
                    seen.append(connection.recv(4096))
                    connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")

        thread = threading.Thread(target=refuse)
        thread.start()
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:pass@127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.setenv("https_proxy", f"http://user:pass@127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        with pytest.raises(RefusedError):
            Hub(endpoint="https://hub.invalid", token=TOKEN, pause_seconds=0).files(REPO)
        thread.join()
    assert all(one.startswith(b"CONNECT hub.invalid:443 ") for one in seen)
    assert all(b"Proxy-Authorization: Basic dXNlcjpwYXNz" in one for one in seen)
    assert not any(TOKEN.encode() in one for one in seen)


def test_a_body_longer_than_it_may_be_is_not_read(fake: FakeHub) -> None:
    web = Web(fake.endpoint, "", timeout_seconds=5, pause_seconds=0)
    fake.bodies["refs"] = b"x" * 1000
    with pytest.raises(WebError, match="more than the expected 999 bytes"):
        web.get(f"{fake.endpoint}/api/models/org/run/refs").read(999)


def test_154_revisions_are_listed_in_time(fake: FakeHub) -> None:
    for step in range(154):
        fake.push("org/run", f"stage-{step}", fake.root / "org/run/step1")
    fake.latency_seconds = 0.04
    start = time.monotonic()
    assert len(names(fake, f"{REPO}@stage-*")) == 308
    assert time.monotonic() - start < 2.5


def test_a_certificate_that_nobody_vouches_for_is_refused() -> None:
    """And accepted where the environment says who may be trusted, so that it is the reason."""
    pem = Path(__file__).parent / "data/tls/self-signed.pem"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with socket.create_server(("localhost", 0)) as listening:
        served = threading.Thread(target=_answer_once, args=(listening, context))
        served.start()
        endpoint = f"https://localhost:{listening.getsockname()[1]}"
        with pytest.raises(RefusedError, match="the certificate of localhost is not valid"):
            Hub(endpoint=endpoint, token="", timeout_seconds=5).files(REPO)
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("SSL_CERT_FILE", str(pem))
            with pytest.raises(RefusedError, match="no such repository or revision"):
                Hub(endpoint=endpoint, token="", timeout_seconds=5).files(REPO)
        served.join(5)
    assert not served.is_alive()


def _answer_once(listening: socket.socket, context: ssl.SSLContext) -> None:
    """Answer 404 to the first client that accepts the certificate."""
    while True:
        connection, _ = listening.accept()
        with suppress(OSError), context.wrap_socket(connection, server_side=True) as encrypted:
            encrypted.recv(1 << 16)
            encrypted.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
