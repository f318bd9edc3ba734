"""`average --report`: the page says what was made, is written last, and changes nothing else."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_ema
from ckpt_ema.errors import Code, FailedError, OptionError, RefusedError
from ckpt_ema.output.manifest import describe
from ckpt_ema.report.pages.average import average_page
from ckpt_ema.schedules.weights import learning_rate
from tests.command import Command
from tests.command import ckpt_ema as command
from tests.conftest import MakeRun, free_port, noise, series
from tests.makers import dcp_folders, deepspeed_folders
from tests.makers.folds import by_torch
from tests.makers.imports import imported_by
from tests.makers.pages import HOSTILE
from tests.makers.parsed_page import ParsedPage, check_harmless
from tests.makers.torch_files import save

STEPS = (1000, 2000, 3000, 4000)


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    """Four checkpoints, 1000 steps apart."""
    return make_run(series(4, w=noise(4, 50)), steps=STEPS)


def page_of(run: Path, **options: Any) -> ParsedPage:
    """Average a run, and return its page, which is harmless."""
    path = run.parent / "report.html"
    ckpt_ema.average(run, report=path, **options)
    return check_harmless(path.read_text(encoding="utf-8"))


# --- What it says ---------------------------------------------------------------------------------


def test_the_page_of_three_checkpoints_by_hand(make_run: MakeRun) -> None:
    """Half-lives of a gap: weights of 1/4, 1/4 and 1/2, so 3/4 is kept of what is before 200."""
    run = make_run(series(3, w=noise(3, 50)), steps=[100, 200, 300])
    parsed = page_of(run, half_life=100, command="ckpt-ema average run --half-life 100")
    assert f"Weighted average of 3 checkpoints of {run} : half-life 100 steps;" in parsed.text
    assert "effective number 2.7, mean age 75 steps." in parsed.text
    assert parsed.tables[:2] == [
        [
            ["checkpoint", "step", "gap", "decay", "weight"],
            ["checkpoint-100", "100", "-", "-", "25.00%"],
            ["checkpoint-200", "200", "100", "0.5000", "25.00%"],
            ["checkpoint-300", "300", "100", "0.5000", "50.00%"],
        ],
        [
            ["checkpoint", "learning rate"],
            ["checkpoint-100", "100.00%"],
            ["checkpoint-200", "75.00%"],
            ["checkpoint-300", "50.00%"],
        ],
    ]
    assert "ckpt-ema average run --half-life 100" in parsed.text
    assert f"{run}-ema" in parsed.text
    assert len(parsed.attributes("rect")) == 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"half_life": "500,1000,2000", "last": "2,4"},
        {"last": 1},
        {"decay": [n / 50 for n in range(20)]},
        {"schedule": "uniform", "output": "one.safetensors"},
    ],
    ids=str,
)
def test_the_page_has_the_figures_of_the_manifest(
    run: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    parsed = page_of(run, **options)
    result = ckpt_ema.average(run, device="cpu", **options)
    assert result.is_up_to_date
    columns: list[dict[str, str]] = [{} for _ in result.outputs]
    rates: list[dict[str, str]] = [{} for _ in result.outputs]
    found, is_one = columns, len(columns) == 1
    for headings, *rows in (table for table in parsed.tables if table[0][0] == "checkpoint"):
        if headings[1] in ("(1)", "learning rate"):
            found = rates  # the tables below the second chart
        for place, heading in enumerate(headings):
            if heading in ("weight", "learning rate") or heading.startswith("("):
                number = 0 if is_one else int(heading[1:-1]) - 1
                found[number] |= {row[0]: row[place] for row in rows if row[place] != "-"}
    described = [describe(result.plan, one) for one in result.plan.averages]
    for one, shown, rate in zip(described, columns, rates, strict=True):
        names = [checkpoint["name"] for checkpoint in one["checkpoints"]]
        weights = [checkpoint["weight"] for checkpoint in one["checkpoints"]]
        assert shown == {n: f"{w:.2%}" for n, w in zip(names, weights, strict=True)}
        kept = learning_rate(weights)
        assert rate == {n: f"{k:.2%}" for n, k in zip(names, kept, strict=True)}
        assert one["fingerprint"] in parsed.text
        assert os.path.abspath(one["output"]) in parsed.text
        assert len(described) == 1 or one["name"] in parsed.text


def test_the_page_says_how_it_was_made(run: Path) -> None:
    parsed = page_of(run)
    record = json.loads(Path(f"{run}-ema/ckpt_ema.json").read_text())
    for text in ("Device cpu", f"Made by ckpt-ema {ckpt_ema.__version__}", "Output written 20"):
        assert text in parsed.text
    assert f"Time {record['seconds']:.2f} s" in parsed.text
    assert f"Peak memory {record['peak_memory_bytes'] / 2**20:.0f} MiB" in parsed.text


def test_the_page_has_warnings_notes_and_what_was_left_out(make_run: MakeRun) -> None:
    states = series(4, w=noise(4, 50))
    states[3]["w"] *= 10  # much more than an average that weighs the oldest most
    run = make_run(states, steps=STEPS)
    (run / "last").mkdir()
    options: dict[str, Any] = {"exclude": ["*-1000"], "half_life": 100_000}
    parsed = page_of(run, **options)
    result = ckpt_ema.average(run, **options)
    assert result.warnings and result.plan.warnings and result.plan.notes
    for notice in (*result.warnings, *result.plan.warnings, *result.plan.notes):
        assert str(notice) in parsed.text
    assert ["checkpoint-1000", "left out by --exclude"] in parsed.tables[-1]


def test_without_warnings_there_is_no_box(run: Path) -> None:
    parsed = page_of(run)
    assert not [one for one in parsed.attributes("div") if one.get("class") == "alert"]


def test_no_name_of_a_file_is_markup(make_run: MakeRun) -> None:
    name = HOSTILE.replace("/", "|")  # which no name can hold
    states = series(3, w=noise(3, 50))
    run = make_run(states, steps=STEPS[:3], name=f"run {name}", pattern=f"{name}-{{}}")
    torch.save({}, run / f"{name}.bin")
    parsed = page_of(run, command=f"ckpt-ema average '{name}'")
    shown = name.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")
    assert f"ckpt-ema average '{shown}'" in parsed.text
    assert [row[0] for row in parsed.tables[0][1:]] == [f"{shown}-{step}" for step in STEPS[:3]]
    assert parsed.text.count("<script>") > 5


def test_a_name_that_is_no_text_is_shown_escaped(make_run: MakeRun) -> None:
    run = make_run(series(2, w=noise(2, 50)), name=os.fsdecode(b"run-\xff"))
    assert "run-\\udcff" in page_of(run).text


def test_from_python_the_page_has_the_options_instead_of_a_command(run: Path) -> None:
    assert "Options half_life=[500.0, 1000.0]" in page_of(run, half_life="500,1000").text


def test_an_average_without_options_or_command_has_no_such_part(run: Path) -> None:
    text = page_of(run).text
    assert "Options" not in text and "Repeat it" not in text


def torch_file(folder: Path, step: int) -> None:
    folder.mkdir(exist_ok=True)
    save(folder / f"step={step}.ckpt", {"state_dict": {"w": torch.arange(40.0) * step}})


def dcp(folder: Path, step: int) -> None:
    dcp_folders.save(folder / f"step-{step}", {"model": {"w": torch.full((4, 5), float(step))}})


def deepspeed(folder: Path, step: int) -> None:
    state = {"w": torch.arange(40.0) * step}
    deepspeed_folders.save(folder / f"global_step{step}", state, stage=2, ranks=2, step=step)


@pytest.mark.parametrize("write", [torch_file, dcp, deepspeed])
def test_every_format_has_a_page(tmp_path: Path, write: Callable[[Path, int], None]) -> None:
    for step in STEPS[:2]:
        write(tmp_path / "run", step)
    parsed = page_of(tmp_path / "run")
    assert len(parsed.tables[0]) == 3
    assert "model.safetensors" in parsed.text


def test_an_average_that_is_written_back_says_that_it_can_be_resumed(tmp_path: Path) -> None:
    for step in STEPS[:2]:
        torch_file(tmp_path / "run", step)
    assert "the trainer can resume from it" in page_of(tmp_path / "run", save_as="checkpoint").text


def test_torch_folds_to_the_same_page(run: Path) -> None:
    """But for a note that says that it did, and what making it took."""
    compiled = page_of(run, output=run.parent / "a")
    with by_torch():
        torch_made = page_of(run, output=run.parent / "b")
    assert compiled.tables[:2] == torch_made.tables[:2]
    assert "torch folds on the CPU" in torch_made.text


# --- When and where it is written -----------------------------------------------------------------


def test_the_command_writes_it_and_prints_what_it_always_prints(run: Path) -> None:
    words = ("average", run, "-q", "--device", "cpu", "--report", "page.html")
    done = command(*words, cwd=run.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{run}-ema\n", "")
    text = check_harmless((run.parent / "page.html").read_text()).text
    assert f"average {run} -q --device cpu --report page.html" in text
    assert {path.name for path in run.parent.iterdir()} == {"run", "run-ema", "page.html"}


def test_the_variable_asks_for_it_too(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = command("average", run, "-q", env={"CKPT_EMA_REPORT": page})
    assert done.returncode == 0
    assert f"CKPT_EMA_REPORT={page} " in check_harmless(page.read_text()).text


def test_the_page_of_an_output_that_is_there_already_is_the_same(run: Path) -> None:
    made = ckpt_ema.average(run, device="cpu", command="the first", report=run.parent / "a.html")
    again = ckpt_ema.average(run, device="cpu", command="the second", report=run.parent / "b.HTML")
    assert (made.is_up_to_date, again.is_up_to_date) == (False, True)
    assert (run.parent / "a.html").read_bytes() == (run.parent / "b.HTML").read_bytes()


def test_a_single_file_that_is_there_already_names_the_command_of_now(run: Path) -> None:
    options: dict[str, Any] = {"output": run.parent / "one.safetensors", "device": "cpu"}
    ckpt_ema.average(run, **options, command="the first")
    path = run.parent / "page.html"
    assert ckpt_ema.average(run, **options, command="the second", report=path).is_up_to_date
    text = ParsedPage(path.read_text()).text
    assert "the second" in text and "the first" not in text
    assert "Peak memory -" in text


def test_a_manifest_that_somebody_changed_is_not_trusted(run: Path) -> None:
    output = ckpt_ema.average(run, device="cpu").output
    record = json.loads((output / "ckpt_ema.json").read_text())
    odd = {"device": 5, "ckpt_ema": HOSTILE, "command": {"rm": "-rf"}}
    for number in ("soon", [1], None, -1, float("nan"), float("inf"), 10**400):
        changed = {**record, **odd, "seconds": number, "peak_memory_bytes": number}
        (output / "ckpt_ema.json").write_text(json.dumps(changed))
        text = page_of(run).text
        assert "Device - Time - Peak memory -" in text and "rm" not in text


def test_a_page_replaces_another_whole(run: Path, tmp_path: Path) -> None:
    real, link = tmp_path / "real.html", tmp_path / "link.html"
    real.write_text("x" * 100_000)
    link.symlink_to(real)
    ckpt_ema.average(run, device="cpu", report=link)
    assert link.is_symlink()
    assert check_harmless(real.read_text()).text.startswith("run-ema")


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("run-ema", "must end in .html."),
        ("run/checkpoint-1000/page.html", "is inside"),
        ("nowhere/page.html", "is in a folder that does not exist."),
        ("page.htm", "must end in .html."),
        ("page", "must end in .html."),
    ],
)
def test_a_page_that_may_not_be_is_refused_before_anything_is_written(
    run: Path, place: str, why: str
) -> None:
    path = run.parent / place
    with pytest.raises(OptionError, match=why) as caught:
        ckpt_ema.average(run, device="cpu", report=path)
    assert (caught.value.code, caught.value.path) == (Code.INVALID_OPTION, str(path))
    done = command("average", run, "--report", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {caught.value}\n"
    assert {one.name for one in run.parent.iterdir()} == {"run"}


def test_a_page_is_never_written_into_the_output(run: Path) -> None:
    output = ckpt_ema.average(run, device="cpu").output
    with pytest.raises(OptionError, match=r"is inside .*run-ema\. Write it elsewhere\."):
        ckpt_ema.average(run, device="cpu", report=output / "page.html")
    with pytest.raises(OptionError, match="is inside"):  # it is the output itself
        ckpt_ema.average(
            run, device="cpu", output=run.parent / "a.html", report=run.parent / "a.html"
        )


def test_nothing_is_written_where_the_output_is_taken(run: Path, tmp_path: Path) -> None:
    ckpt_ema.average(run, device="cpu")
    with pytest.raises(RefusedError):
        ckpt_ema.average(run, device="cpu", decay=0.2, report=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_says_that_the_output_is_complete(run: Path) -> None:
    path = run.parent / "page.html"
    path.mkdir()
    with pytest.raises(FailedError) as caught:
        ckpt_ema.average(run, device="cpu", report=path)
    assert (caught.value.code, caught.value.path) == (Code.WRITE_FAILED, str(path))
    done = command("average", run, "-q", "--report", path)
    assert (done.returncode, done.stdout) == (1, "")
    sentence = f"The report {path} cannot be written: Is a directory; {run}-ema is complete."
    assert done.stderr == f"error: {sentence}\n" == f"error: {caught.value}\n"
    assert ckpt_ema.average(run, device="cpu").is_up_to_date
    assert {one.name for one in run.parent.iterdir()} == {"run", "run-ema", "page.html"}


def fail_to_write_pages() -> None:
    """Have the disk be full when a page is synced."""
    real = os.fsync

    def synced(fd: int) -> None:
        if "page.html" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(28, "No space left on device")
        real(fd)

    pytest.MonkeyPatch().setattr(os, "fsync", synced)


def test_a_disk_that_is_full_leaves_the_page_of_before(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("before")
    done = command("average", run, "-q", "--report", page, before=fail_to_write_pages)
    assert done.returncode == 1
    assert "No space left on device; " in done.stderr
    assert page.read_text() == "before"
    assert {one.name for one in tmp_path.iterdir()} == {"run", "run-ema", "page.html"}
    done = command("average", run, "--no-sync", "--report", page, before=fail_to_write_pages)
    assert done.returncode == 0  # it syncs nothing
    check_harmless(page.read_text())


def end_while_writing() -> None:
    """Have a signal arrive when the page is about to get its name."""
    real = os.replace

    def replaced(source: Any, target: Any) -> None:
        if str(target).endswith("page.html"):
            os.kill(os.getpid(), signal.SIGTERM)
        real(source, target)

    pytest.MonkeyPatch().setattr(os, "replace", replaced)


def test_a_signal_after_publication_does_not_lose_the_page(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    words = ("average", run, "-q", "--report", page)
    done = command(*words, before=end_while_writing)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{run}-ema\n", "")
    check_harmless(page.read_text())
    assert {one.name for one in tmp_path.iterdir()} == {"run", "run-ema", "page.html"}


@pytest.mark.parametrize("is_command", [True, False])
def test_a_part_has_no_page(run: Path, tmp_path: Path, is_command: bool) -> None:
    page = tmp_path / "page.html"
    if is_command:
        done = command("average", run, "--part", "1/2", "--report", page)
        assert (done.returncode, done.stderr[:45]) == (
            2,
            "error: --report cannot be used with --part, w",
        )
    with pytest.raises(OptionError) as caught:
        ckpt_ema.average_part(run, "1/2", report=page)
    assert caught.value.code is Code.CONFLICTING_OPTIONS
    assert {one.name for one in tmp_path.iterdir()} == {"run"}


def test_the_first_rank_alone_writes_the_page(run: Path, tmp_path: Path) -> None:
    port, page = free_port(), tmp_path / "page.html"
    place = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = ("average", run, "-q", "--device", "cpu")
    first, last = (
        # That of the other rank would be refused, if it were looked at.
        Command(*words, "--report", report, env={**place, "RANK": rank})
        for rank, report in enumerate([page, "nowhere/page.html"])
    )
    assert [one.wait(90).returncode for one in (first, last)] == [0, 0]
    check_harmless(page.read_text())


def test_a_page_changes_neither_the_output_nor_its_fingerprint(run: Path, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    plain = ckpt_ema.average(run, device="cpu", output=tmp_path / "a" / "out").output
    path = tmp_path / "page.html"
    reported = ckpt_ema.average(run, device="cpu", output=tmp_path / "b" / "out", report=path)
    names = sorted(one.name for one in plain.iterdir())
    assert names == sorted(one.name for one in reported.output.iterdir())
    for name in set(names) - {"ckpt_ema.json"}:
        assert (plain / name).read_bytes() == (reported.output / name).read_bytes()
    records = [json.loads((one / "ckpt_ema.json").read_text()) for one in (plain, reported.output)]
    assert records[0]["fingerprint"] == records[1]["fingerprint"]
    assert records[0].keys() == records[1].keys()


def test_a_page_imports_nothing_beside_the_standard_library(run: Path, tmp_path: Path) -> None:
    pages = "ckpt_ema.report.pages.average"
    plain = imported_by("average", run, "-q", "-o", tmp_path / "a")
    reported = imported_by(
        "average", run, "-q", "-o", tmp_path / "b", "--report", tmp_path / "p.html"
    )
    new = {name.partition(".")[0] for name in reported - plain}
    assert new - sys.stdlib_module_names <= {"ckpt_ema"}
    assert pages in reported and pages not in plain


def test_a_page_can_be_made_of_any_result(run: Path) -> None:
    result = ckpt_ema.average(run, device="cpu")
    check_harmless(average_page(result))
