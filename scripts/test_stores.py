"""Read objects from independent servers: moto's S3 and, where npm is installed, Azurite.

    python scripts/test_stores.py

The first run installs both into `.venv-stores/`, the only folder that remains. Only pip and npm use
the network.
"""

# What is installed there is not installed where types are checked.
# mypy: disable-error-code="import-not-found"
# ruff: noqa: E402 - the environment has to be made before obstore can be imported

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import environment

FOLDER = environment.REPOSITORY / ".venv-stores"
# Without ckpt-ema and torch: what is tested needs obstore alone.
ENVIRONMENT = environment.Environment(
    FOLDER,
    (("moto[server]==5.*", "azure-storage-blob==12.*", "obstore>=0.11"),),
    ("pyproject.toml",),
)

if __name__ == "__main__":
    environment.enter(ENVIRONMENT)

import random
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(environment.REPOSITORY))

from ckpt_ema.errors import CkptEmaError, Code
from ckpt_ema.storage.objects import Objects

Put = Callable[[str, bytes], None]
NAMES = ("model", "a b", "50%", "a%20b", "ключ é", "a+b&c=d#e", "deep/er/x", "empty")
START_SECONDS = 30
AZURITE = "azurite@3"
# The account that is built into Azurite, as its documentation has it.
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


def check(place: str, put: Put) -> None:
    """Check listings and reads below a bucket's URI against what was put there."""
    rng = random.Random(0)
    contents = {name: rng.randbytes(300_000) if name != "empty" else b"" for name in NAMES}
    for name, content in contents.items():
        put(f"run/{name}", content)
    client, run = Objects(), f"{place}/run"
    files = {file.name: file for file in client.files(run)}
    assert {name: file.size_bytes for name, file in files.items()} == {
        name: len(content) for name, content in contents.items()
    }
    for name, file in files.items():
        for _ in range(20):
            start = rng.randint(0, file.size_bytes)
            count = rng.randint(0, file.size_bytes - start)
            assert client.read(run, file, start, count) == contents[name][start : start + count]
    [itself] = client.files(f"{run}/a b")
    assert itself == files["a b"]._replace(name="")
    assert client.files(f"{place}/nothing") == []
    put("run/model", contents["model"][::-1])
    assert code_of(lambda: client.read(run, files["model"], 0, 9)) is Code.CHANGED
    assert code_of(lambda: client.files(f"{place}-elsewhere/run")) is Code.NOT_FOUND


def code_of(call: Callable[[], object]) -> Code | None:
    """Return the code of the error that a call raises, if any."""
    try:
        call()
    except CkptEmaError as error:
        print(f"  {error}")
        return error.code
    return None


@contextmanager
def served(*command: str, port: int) -> Iterator[None]:
    """Run a server until the end."""
    with tempfile.TemporaryFile() as said:
        server = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    if server.poll() is not None or time.monotonic() > deadline:
                        said.seek(0)
                        sys.exit(f"test_stores: {command[0]}: {said.read().decode()[-2000:]}")
                    time.sleep(0.1)
            yield
        finally:
            server.terminate()
            server.wait()


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_moto() -> None:
    """S3 by moto."""
    import boto3

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    os.environ.update(AWS_ACCESS_KEY_ID="id", AWS_SECRET_ACCESS_KEY="secret", AWS_ENDPOINT_URL=url)
    os.environ.update(AWS_DEFAULT_REGION="us-east-1")
    with served(str(FOLDER / "bin/moto_server"), "-p", str(port), port=port):
        s3 = boto3.client("s3")
        s3.create_bucket(Bucket="bucket")
        check("s3://bucket", lambda key, body: s3.put_object(Bucket="bucket", Key=key, Body=body))


def test_azurite() -> None:
    """Azure by Azurite."""
    from azure.storage.blob import BlobServiceClient

    port = free_port()
    program = FOLDER / "node_modules/.bin/azurite-blob"
    if not program.exists():
        npm = ["npm", "install", "--silent", "--prefix", str(FOLDER), AZURITE]
        environment.run("installing Azurite", npm)
    url = f"http://127.0.0.1:{port}/{ACCOUNT}"
    os.environ.update(AZURE_STORAGE_ACCOUNT_NAME=ACCOUNT, AZURE_STORAGE_ACCOUNT_KEY=ACCOUNT_KEY)
    os.environ.update(AZURE_STORAGE_ENDPOINT=url)
    with tempfile.TemporaryDirectory() as name:
        options = ("--skipApiVersionCheck", "--silent", "--location", str(Path(name)))
        with served(str(program), "--blobPort", str(port), *options, port=port):
            service = BlobServiceClient(url, credential=ACCOUNT_KEY)
            container = service.create_container("container")
            check(
                "az://container",
                lambda key, body: container.upload_blob(key, body, overwrite=True) and None,
            )


def main() -> int:
    """Run both; return 0 if all is right."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_")):
            del os.environ[name]
    os.environ["NO_PROXY"] = "127.0.0.1"
    print("moto", flush=True)
    test_moto()
    if shutil.which("npm") is None:
        print("Azurite is left out: npm is not installed")
        return 0
    print("Azurite", flush=True)
    test_azurite()
    return 0


if __name__ == "__main__":
    sys.exit(main())
