"""What pipelines hold on to: plans and manifests as JSON follow the schemas in docs/schema."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from tests.command import ckpt_ema
from tests.conftest import MakeRun, noise, series, write_safetensors
from tests.corpus.case import good_run
from tests.makers.fake_hub import fake_hub

FOLDER = Path(__file__).parent.parent / "docs" / "schema"
SCHEMAS = {
    name: json.loads((FOLDER / f"{name}.schema.json").read_text())
    for name in ("plan", "manifest", "inspection", "comparison", "selection", "verification")
}

# Fields whose own fields are names that users choose.
OPEN = {"options", "metrics", "weights"}


def closed(schema: Any, name: str = "") -> Any:
    """The schema with no room for fields that it does not describe."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value, key) for key, value in schema.items()}
    is_object = "properties" in schema and "object" in schema.get("type", ())
    return {**found, "additionalProperties": False} if is_object and name not in OPEN else found


REGISTRY: Registry[Any] = Registry().with_resources(
    (f"{name}.schema.json", Resource.from_contents(closed(schema)))
    for name, schema in SCHEMAS.items()
)


def check(name: str, document: Any) -> None:
    """Check that a document follows a schema and has no field that the schema lacks."""
    assert document["version"] == 1
    validator = Draft202012Validator(closed(SCHEMAS[name]), registry=REGISTRY)
    problems = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]
    assert problems == []


@pytest.fixture
def plain(make_run: MakeRun) -> Path:
    """A run with things to note: integers, folders that are no checkpoints, an alias."""
    run = make_run(series(4, w=noise(4, 8), n=torch.arange(3)), steps=[100, 200, 300, 900])
    (run / "logs").mkdir()
    return run


@pytest.fixture
def distributed(tmp_path: Path) -> Path:
    """A run of DCP checkpoints."""
    good_run(tmp_path / "run", "dcp")
    return tmp_path / "run"


CASES = {
    "one average": "",
    "several averages": "--half-life 50,2000 --last 2,4",
    "explicit weights": "--weights RUN/../weights.txt --normalize",
    "other schedules": "--power 0.7 --sigma-rel 0.1 --decay-per-step 0.9",
    "a constant decay": "--schedule constant --zero-debias --dtype float16",
    "one file": "-o RUN.safetensors",
}


@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_plans_and_manifests_follow_their_schemas(plain: Path, words: str) -> None:
    (plain.parent / "weights.txt").write_text("checkpoint-100 1\ncheckpoint-900 3\n")
    options = words.replace("RUN", str(plain)).split()
    planned = json.loads(ckpt_ema("plan", plain, "--json", *options).stdout)
    check("plan", planned)
    made = ckpt_ema("average", plain, "--json", "--device", "cpu", *options)
    printed = json.loads(made.stdout)
    manifests = printed if isinstance(printed, list) else [printed]
    assert isinstance(printed, list) == (len(planned["averages"]) > 1)
    for manifest, average in zip(manifests, planned["averages"], strict=True):
        check("manifest", manifest)
        assert manifest["fingerprint"] == average["fingerprint"]
        kept = Path(manifest["output"], "ckpt_ema.json")
        assert not kept.exists() or json.loads(kept.read_text()) == manifest


def test_distributed_checkpoints_follow_the_schemas(distributed: Path) -> None:
    check("plan", json.loads(ckpt_ema("plan", distributed, "--json").stdout))
    done = ckpt_ema("average", distributed, "--json", "--device", "cpu")
    check("manifest", json.loads(done.stdout))
    check("inspection", json.loads(ckpt_ema("inspect", distributed, "--json").stdout))


def test_what_finish_publishes_follows_the_schema(plain: Path) -> None:
    for part in ("1/2", "2/2"):
        assert ckpt_ema("average", plain, "--part", part, "--device", "cpu").returncode == 0
    for _ in range(2):  # the second time it is there already
        done = ckpt_ema("finish", f"{plain}-ema", "--json")
        assert done.returncode == 0, done.stderr
        check("manifest", json.loads(done.stdout))


def test_inspections_and_comparisons_follow_their_schemas(plain: Path) -> None:
    (plain.parent / "nan").mkdir()
    broken = {"w": torch.full((8,), torch.nan), "n": torch.arange(4), "other": torch.ones(1)}
    write_safetensors(plain.parent / "nan/model.safetensors", broken)
    check("inspection", json.loads(ckpt_ema("inspect", plain, "--json").stdout))
    words = (
        "inspect",
        plain / "checkpoint-100",
        plain.parent / "nan",
        "--drop",
        "other",
        "--drop",
        "n",
    )
    check("inspection", json.loads(ckpt_ema(*words, "--json").stdout))
    for one, other in ((f"{plain}@100", f"{plain}@200"), (plain.parent / "nan", f"{plain}@100")):
        check("comparison", json.loads(ckpt_ema("compare", one, other, "--json").stdout))


def test_selections_and_their_manifests_follow_the_schemas(plain: Path) -> None:
    options = ("--last", "2,3", "--greedy", "--metric", "size", "--minimize", "--json")
    command = "case $CKPT_EMA_CANDIDATE in *2) exit 1;; *) echo size=1;; esac # {}"
    done = ckpt_ema("select", plain, "--eval", command, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    check("selection", found)
    assert found["warnings"]
    assert found["greedy"]
    check("manifest", json.loads(Path(found["output"], "ckpt_ema.json").read_text()))


def test_warnings_and_notes_have_codes(plain: Path) -> None:
    planned = json.loads(ckpt_ema("plan", plain, "--json", "--half-life", "9000").stdout)
    for notice in (*planned["warnings"], *planned["notes"]):
        assert notice.keys() == {"code", "message"}
    assert planned["warnings"]
    assert planned["notes"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_valid_and_describes_every_field(name: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])

    def described(schema: Any) -> bool:
        parts = [*schema.get("properties", {}).values(), *schema.get("$defs", {}).values()]
        parts += [schema["items"]] if "items" in schema else []
        return ("description" in schema or "$ref" in schema) and all(map(described, parts))

    assert described(SCHEMAS[name])


def test_what_is_read_over_a_network_follows_the_schemas(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "hub/org/run").mkdir(parents=True)
    run = make_run(series(3, w=noise(3, 8)), steps=[100, 200, 300])
    run.rename(tmp_path / "hub/org/run/main")
    output = tmp_path / "out"
    with fake_hub(tmp_path / "hub") as hub:
        options = ("hf://org/run", "-o", output, "--save-as", "checkpoint", "--json")
        environment = {"HF_ENDPOINT": hub.endpoint}
        plan = json.loads(ckpt_ema("plan", *options, env=environment).stdout)
        made = json.loads(ckpt_ema("average", *options, env=environment).stdout)
    check("plan", plan)
    assert plan["requests"] >= 3
    check("manifest", json.loads((output / "ckpt_ema.json").read_text()))
    assert made


def test_verifications_follow_their_schema(plain: Path) -> None:
    output = plain.parent / "out"
    ckpt_ema("average", plain, "-o", output)
    check("verification", json.loads(ckpt_ema("verify", output, "--json").stdout))
    (output / "model.safetensors").write_bytes(b"")
    found = json.loads(ckpt_ema("verify", output, "--json").stdout)
    check("verification", found)
    assert found["differs"]["file"] == "model.safetensors"
