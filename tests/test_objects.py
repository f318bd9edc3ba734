"""Objects: what a store lists and gives, exactly; a fault is one line that shows no secret."""

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_ema.errors import CkptEmaError, Code, FailedError, RefusedError
from ckpt_ema.storage import objects as module
from ckpt_ema.storage.client import RemoteFile
from ckpt_ema.storage.objects import Objects
from tests.makers.fake_s3 import FakeS3, Fault, etag, fake_s3

KEY_ID, SECRET, TOKEN = "AKIDEXAMPLEID", "wJalrSECRETvalue", "session-TOKEN-value"
NAMES = (
    "model.safetensors",
    "a b",
    "50%",
    "a%20b",
    "ключ é",
    "a+b&c=d#e",
    "sub dir/deep/x",
    "q?a=b",
)
CONTENT = bytes(range(256)) * 400
RUN = "s3://bucket/run"
MOST_ATTEMPTS = 6


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials of nobody, and none of this machine's settings."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    """A bucket with a run of one file, and the environment that leads to it."""
    (tmp_path / "bucket/run").mkdir(parents=True)
    (tmp_path / "bucket/run/model").write_bytes(CONTENT)
    with fake_s3(tmp_path) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.url)
        yield found


def objects(most_keys: int = 200_000) -> Objects:
    """A client that waits for little."""
    return Objects(
        stall_seconds=0.3,
        first_wait_seconds=0.001,
        longest_wait_seconds=0.01,
        most_keys=most_keys,
    )


def model(client: Objects) -> RemoteFile:
    """The file of the run as it is listed."""
    [file] = client.files(RUN)
    return file


def error_of(caught: pytest.ExceptionInfo[CkptEmaError]) -> CkptEmaError:
    """The error, in which there is one line and no secret, however it is shown."""
    error = caught.value
    shown = [str(error), repr(error), str(error.path), "".join(traceback.format_exception(error))]
    for text in shown:
        assert not any(word in text for word in (KEY_ID, SECRET, TOKEN, "Signature=", "X-Amz"))
        assert "Debug source" not in text
    assert "\n" not in str(error)
    return error


# --- What is there --------------------------------------------------------------------------------


def test_files_are_listed_with_what_tells_them_from_later_ones(store: FakeS3) -> None:
    path = store.root / "bucket/run/model"
    mtime_ns = int(path.stat().st_mtime) * 10**9
    assert model(objects()) == RemoteFile("model", len(CONTENT), mtime_ns, etag(path))
    assert store.requests == {"connection": 1, "LIST": 1, "200": 1}


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_listed_and_read_as_it_is(name: str, store: FakeS3) -> None:
    path = store.root / "bucket/run" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(name.encode())
    client = objects()
    [file] = [one for one in client.files(RUN) if one.name == name]
    assert client.read(RUN, file, 0, file.size_bytes) == name.encode()


def test_a_path_may_have_such_a_name_too_and_be_one_file(store: FakeS3) -> None:
    (store.root / "bucket/a b").mkdir()
    (store.root / "bucket/a b/50% é").write_bytes(b"0123456789")
    client = objects()
    [below], [itself] = client.files("s3://bucket/a b"), client.files("s3://bucket/a b/50% é")
    assert (below.name, itself.name) == ("50% é", "")
    assert itself == below._replace(name="")
    assert client.read("s3://bucket/a b/50% é", itself, 2, 3) == b"234"


def test_a_whole_bucket_is_listed(store: FakeS3) -> None:
    assert [file.name for file in objects().files("s3://bucket")] == ["run/model"]


def test_nothing_is_at_a_path_where_nothing_is_below(store: FakeS3) -> None:
    (store.root / "bucket/run-2").write_bytes(b"x")
    assert objects().files("s3://bucket/ru") == []


def test_a_slash_at_the_end_of_a_path_says_nothing(store: FakeS3) -> None:
    assert objects().files(f"{RUN}/") == objects().files(RUN)


def test_a_listing_has_many_pages(store: FakeS3) -> None:
    store.keys = [f"run/{n:05}" for n in range(2500)]
    assert [file.name for file in objects().files(RUN)] == [f"{n:05}" for n in range(2500)]
    assert store.requests["LIST"] == 3


def test_a_listing_is_bounded(store: FakeS3) -> None:
    store.keys = [f"run/{n:05}" for n in range(9000)]
    with pytest.raises(RefusedError, match=r"more than 2000 objects. Name a narrower") as caught:
        objects(most_keys=2000).files(RUN)
    assert error_of(caught).path == RUN
    assert store.requests["LIST"] <= 5


def test_marks_of_folders_are_no_files(store: FakeS3) -> None:
    store.keys = ["run/", "run/a/", "run/a/b/", "run/a/b/model", "run/empty"]
    assert [file.name for file in objects().files(RUN)] == ["a/b/model", "empty"]
    store.keys = ["run/"]
    assert objects().files(RUN) == []


@pytest.mark.parametrize(
    "name", ["..", "../x", "a/../x", "./x", "/etc/x", "a//x", "a\tb", "a\x85b"]
)
def test_names_that_lead_elsewhere_are_refused_by_name(name: str, store: FakeS3) -> None:
    store.keys = ["run/good", f"run/{name}"]
    with pytest.raises(RefusedError) as caught:
        objects().files(RUN)
    assert error_of(caught).code is Code.UNSAFE
    assert repr(name.split("/")[-1])[1:-1] in str(caught.value)


@pytest.mark.parametrize(
    "path", [f"{RUN}/../x", f"{RUN}//x", "s3://bucket//run", f"{RUN}/a\nb", f"{RUN}/a\0b"]
)
def test_so_are_paths(path: str, store: FakeS3) -> None:
    with pytest.raises(RefusedError) as caught:
        objects().files(path)
    assert error_of(caught).code is Code.UNSAFE


@pytest.mark.parametrize("path", ["s3://", "s3:///run", f"s3://{KEY_ID}:{SECRET}@bucket/run"])
def test_a_bucket_has_to_be_named(path: str) -> None:
    with pytest.raises(RefusedError, match="followed by the name of a bucket") as caught:
        objects().files(path)
    error_of(caught)


@given(st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_reads_give_the_bytes_of_the_file(store: FakeS3, data: st.DataObject) -> None:
    client = objects()
    start = data.draw(st.integers(0, len(CONTENT)))
    count = data.draw(st.integers(0, len(CONTENT) - start))
    store.faults = [Fault("cut", "run/model", data.draw(st.integers(0, 2)))]
    assert client.read(RUN, model(client), start, count) == CONTENT[start : start + count]


def test_reads_beyond_the_end_give_nothing(store: FakeS3) -> None:
    client = objects()
    file = model(client)
    with pytest.raises(
        FailedError, match="100 bytes from 102390 were requested, 10 received"
    ) as caught:
        client.read(RUN, file, len(CONTENT) - 10, 100)
    assert error_of(caught).code is Code.READ_FAILED


# --- What changes ---------------------------------------------------------------------------------


def test_a_file_that_changes_is_noticed(store: FakeS3) -> None:
    client = objects()
    file = model(client)
    (store.root / "bucket/run/model").write_bytes(CONTENT[::-1])
    with pytest.raises(FailedError, match=r"changed or vanished.*Nothing was pub") as caught:
        client.read(RUN, file, 0, 10)
    assert (error_of(caught).code, caught.value.path) == (Code.CHANGED, f"{RUN}/model")
    assert store.requests["412"] == 1


def test_so_is_one_that_changes_before_a_body_is_resumed(store: FakeS3) -> None:
    client = objects()
    file = model(client)
    store.faults = [Fault("cut", "model", 1), Fault("412", "model", 1)]
    with pytest.raises(FailedError) as caught:
        client.read(RUN, file, 0, len(CONTENT))
    assert error_of(caught).code in (Code.CHANGED, Code.READ_FAILED)
    assert store.requests["GET"] == 2


@pytest.mark.parametrize("kind", ["other", "longer", "412", "416", "404"])
def test_and_one_whose_tag_or_size_is_another(kind: str, store: FakeS3) -> None:
    client = objects()
    file = model(client)
    store.faults = [Fault(kind, "model")]
    with pytest.raises(FailedError) as caught:
        client.read(RUN, file, 0, 10)
    assert error_of(caught).code is Code.CHANGED
    assert store.requests["GET"] == 1


# --- What fails -----------------------------------------------------------------------------------

BODIES = ("cut", "stall")  # what goes wrong after the header
PASSING = ("429", "500", "502", "503", "504", "cut", "stall", "reset")


@pytest.mark.parametrize("kind", PASSING)
def test_what_may_pass_is_tried_again(kind: str, store: FakeS3) -> None:
    client = objects()
    file = model(client)
    store.faults = [Fault(kind, "run/model", 2)]
    assert client.read(RUN, file, 1, 50_000) == CONTENT[1:50_001]
    assert store.requests["GET"] == 3


@pytest.mark.parametrize("kind", [one for one in PASSING if one not in BODIES])
def test_so_is_a_listing_unless_its_body_breaks_off(kind: str, store: FakeS3) -> None:
    client = objects()
    store.faults = [Fault(kind, times=2)]
    assert model(client).name == "model"
    assert store.requests["LIST"] == 3


@pytest.mark.parametrize("kind", ["cut", "stall"])
def test_a_listing_that_breaks_off_is_an_error(kind: str, store: FakeS3) -> None:
    """obstore does not ask for it again, and nothing here adds a second layer of retries."""
    store.faults = [Fault(kind, times=1)]
    with pytest.raises(FailedError, match=r"s3://bucket/run cannot be read: ") as caught:
        objects().files(RUN)
    assert (error_of(caught).code, store.requests["LIST"]) == (Code.READ_FAILED, 1)


@pytest.mark.parametrize("kind", PASSING)
def test_but_in_one_layer_and_not_for_ever(kind: str, store: FakeS3) -> None:
    client = objects()
    file = model(client)
    store.faults = [Fault(kind)]
    with pytest.raises(FailedError, match="s3://bucket/run/model cannot be read: ") as caught:
        client.read(RUN, file, 0, 50_000)
    assert error_of(caught).code is Code.READ_FAILED
    # A busy machine may give up on a request before the server has seen it.
    assert store.requests["GET"] == MOST_ATTEMPTS or kind == "stall"
    assert store.requests["GET"] <= MOST_ATTEMPTS


@pytest.mark.parametrize("kind", [one for one in PASSING if one not in BODIES])
def test_nor_is_a_listing(kind: str, store: FakeS3) -> None:
    store.faults = [Fault(kind)]
    with pytest.raises(FailedError, match=r"s3://bucket/run cannot be read: ") as caught:
        objects().files(RUN)
    assert (error_of(caught).code, store.requests["LIST"]) == (Code.READ_FAILED, MOST_ATTEMPTS)


def test_faults_of_several_kinds_share_the_attempts(store: FakeS3) -> None:
    client = objects()
    file = model(client)
    store.faults = [
        Fault("cut", times=1),
        Fault("503", times=2),
        Fault("cut", times=1),
        Fault("500"),
    ]
    with pytest.raises(FailedError, match=r"answered 500 \(InternalError\)"):
        client.read(RUN, file, 0, 50_000)
    assert store.requests["GET"] == MOST_ATTEMPTS


@pytest.mark.parametrize("kind", ["whole", "short", "more", "html", "loop", "301", "400"])
def test_answers_that_make_no_sense_fail_at_once(kind: str, store: FakeS3) -> None:
    client = objects()
    file = model(client)
    store.faults = [Fault(kind, "model")]
    with pytest.raises((FailedError, RefusedError)) as caught:
        client.read(RUN, file, 0, 50_000)
    assert error_of(caught).path == f"{RUN}/model"
    assert store.requests["GET"] == (11 if kind == "loop" else 1)


def test_a_slow_link_that_gives_bytes_is_waited_for(store: FakeS3) -> None:
    client = objects()
    file = model(client)
    store.connection_rate = 100_000  # three times as long as what is a stall
    assert client.read(RUN, file, 0, len(CONTENT)) == CONTENT
    assert store.requests["GET"] == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_denied_request_says_what_to_set(status: int, store: FakeS3) -> None:
    client = objects()
    file = model(client)
    store.faults = [Fault(str(status))]
    for call in (lambda: client.files(RUN), lambda: client.read(RUN, file, 0, 10)):
        before = store.requests[str(status)]
        with pytest.raises(
            RefusedError, match=f"answered {status} .*Set AWS_ACCESS_KEY_ID"
        ) as caught:
            call()
        assert error_of(caught).code is Code.INACCESSIBLE
        assert store.requests[str(status)] == before + 1


def test_an_answer_of_a_store_is_not_shown(store: FakeS3) -> None:
    """It tells the id of the key and what was signed."""
    store.answer = f"<AWSAccessKeyId>{KEY_ID}</AWSAccessKeyId><Message>Signature={SECRET}</Message>"
    for kind in ("403", "400", "500"):
        store.faults = [Fault(kind)]
        with pytest.raises(CkptEmaError) as caught:
            objects().files(RUN)
        error_of(caught)


def test_a_bucket_that_does_not_exist_is_named(store: FakeS3) -> None:
    with pytest.raises(RefusedError, match="the bucket elsewhere does not exist") as caught:
        objects().files("s3://elsewhere/run")
    assert error_of(caught).code is Code.NOT_FOUND


def test_a_page_instead_of_a_listing_is_not_an_empty_run(store: FakeS3) -> None:
    store.faults = [Fault("html")]
    with pytest.raises(FailedError) as caught:
        objects().files(RUN)
    error_of(caught)


def test_a_server_that_is_away_is_one_line(store: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        FailedError, match=r"cannot be read: HTTP error: error sending request\.$"
    ) as caught:
        objects().files(RUN)
    error_of(caught)


# --- What is set ----------------------------------------------------------------------------------


def test_the_endpoint_of_s3_goes_before_the_general_one(
    store: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", store.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert model(objects()).name == "model"
    assert all(KEY_ID in one for one in store.authorizations)


@pytest.mark.parametrize(
    "url", ["x", "ftp://a", "https://", f"http://{KEY_ID}:{SECRET}@127.0.0.1:9"]
)
def test_an_endpoint_is_an_address_without_a_password(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    with pytest.raises(RefusedError, match="AWS_ENDPOINT_URL is not of the form") as caught:
        objects().files(RUN)
    error_of(caught)


def test_requests_are_not_encrypted_only_if_the_endpoint_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = list[dict[str, Any]]()

    def make(_bucket: str, **given: Any) -> _Empty:
        made.append(given)
        return _Empty()

    monkeypatch.setattr(obstore.store, "S3Store", make)
    for url in ("http://127.0.0.1:9", "https://127.0.0.1:9", ""):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        objects().files("s3://bucket")
    assert [one["client_options"]["allow_http"] for one in made] == [True, False, False]
    assert [one.get("virtual_hosted_style_request") for one in made] == [False, False, None]
    assert not any("allow_invalid_certificates" in one["client_options"] for one in made)


class _Empty:
    """A store with nothing in it."""

    def list(self, _prefix: object, **_: object) -> list[list[object]]:
        """Give no page."""
        return []


@pytest.mark.parametrize(
    ("uri", "variables", "named"),
    [
        ("gs://bucket/run", {"GOOGLE_APPLICATION_CREDENTIALS": "/no/such.json"}, "GOOGLE_APPLI"),
        (
            "gs://bucket/run",
            {"GOOGLE_SERVICE_ACCOUNT_KEY": SECRET},
            "GOOGLE_APPLICATION_CREDENTIALS",
        ),
        ("az://container/run", {}, "AZURE_STORAGE_ACCOUNT_NAME"),
        (
            "az://container/run",
            {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_ACCOUNT_KEY": f"{SECRET}!"},
            "AZURE_STORAGE_ACCOUNT_KEY",
        ),
        (RUN, {"AWS_SKIP_SIGNATURE": SECRET}, "Set AWS_"),
    ],
)
def test_wrong_credentials_are_one_line(
    uri: str, variables: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RefusedError, match=named) as caught:
        objects().files(uri)
    assert error_of(caught).code is Code.INACCESSIBLE


def test_credentials_that_are_missing_are_named(
    store: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake stands for the service that gives them to machines in a cloud."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", store.url)
    store.faults = [Fault("404")]
    with pytest.raises(
        RefusedError, match=r"no valid credentials were found. Set AWS_ACCESS"
    ) as caught:
        objects().files(RUN)
    error_of(caught)


BOTO3 = """
class Credentials:
    access_key, secret_key, token = "profile-key", "profile-secret", None
    def get_frozen_credentials(self):
        return self
class Session:
    region_name = "eu-west-3"
    def get_credentials(self):
        import os
        return Credentials() if os.environ["AWS_PROFILE"] == "work" else None
"""


@pytest.fixture
def boto3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A boto3 that knows one profile."""
    files = {"boto3/__init__.py": "from boto3.session import Session", "boto3/session.py": BOTO3}
    files |= {"botocore/__init__.py": "", "botocore/session.py": ""}
    files |= {
        "botocore/credentials.py": "",
        "botocore/exceptions.py": "class BotoCoreError(Exception): pass",
    }
    for name, text in files.items():
        path = tmp_path / "packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    yield
    for name in [one for one in sys.modules if one.startswith(("boto", "obstore.auth"))]:
        del sys.modules[name]


@pytest.mark.usefixtures("boto3")
def test_a_profile_signs_by_boto3(store: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert model(objects()).name == "model"
    [authorization] = store.authorizations
    assert "Credential=profile-key/" in authorization
    assert "/eu-west-3/s3/" in authorization


@pytest.mark.usefixtures("boto3")
def test_a_profile_without_credentials_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "other")
    with pytest.raises(RefusedError, match="AWS_PROFILE with boto3") as caught:
        objects().files(RUN)
    assert error_of(caught).code is Code.INACCESSIBLE


def test_what_has_to_be_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _name: None)
    wanted = r"^gs:// needs obstore. Install it with: pip install 'ckpt-ema\[remote\]'$"
    with pytest.raises(RefusedError, match=wanted) as caught:
        objects().files("gs://bucket/run")
    assert error_of(caught).code is Code.MISSING_DEPENDENCY
    monkeypatch.setattr(module, "find_spec", lambda name: name == "obstore" or None)
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(RefusedError, match=r"AWS_PROFILE needs boto3. Install it with") as caught:
        objects().files(RUN)
    assert error_of(caught).code is Code.MISSING_DEPENDENCY


def test_obstore_is_imported_for_a_uri_alone() -> None:
    code = "import sys; from ckpt_ema.storage.objects import Objects; Objects()"
    code += "; sys.exit(any(one.startswith('obstore') for one in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_many_threads_share_a_client(store: FakeS3) -> None:
    client = objects()
    file = model(client)
    store.latency_seconds = 0.02
    begin = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        starts = range(0, len(CONTENT), 1024)
        parts = list(pool.map(lambda start: client.read(RUN, file, start, 1024), starts))
    assert b"".join(parts) == CONTENT
    assert time.monotonic() - begin < 0.02 * len(starts) / 2
