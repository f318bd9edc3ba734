"""Look at the pages that --report writes with a real browser: Debian's chromium, without a screen.

    python scripts/test_pages.py
    python scripts/test_pages.py --keep screens/

It installs chromium if it is missing (Debian or Ubuntu, as root or with sudo). Each page is looked
at as wide as a phone and as a desk, light and dark, and on paper. `--keep` leaves a picture of each
in a folder, for a person to look at.
"""

from __future__ import annotations

import environment

if __name__ == "__main__":
    environment.enter()

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))  # the makers are beside the tests

from browser import Page, browser, pixels

import ckpt_ema
from ckpt_ema.report.figure_style import COLOURS
from ckpt_ema.report.pages.inspection import inspection_page
from ckpt_ema.report.pages.selection import selection_page
from tests.makers.pages import made_up_inspection, made_up_selection
from tests.makers.safetensors_files import write_safetensors
from tests.makers.tensors import noise, series

_WIDTHS = (360, 1280)
_LEAST_CONTRAST = 4.5  # WCAG 2.2, 1.4.3
_LEAST_PIXELS = 16  # of a dot, antialiased ones not counted

# What is wrong in the page as it is shown; each name is followed by what it is about.
_PROBLEMS = """
(() => {
  const found = [];
  const wide = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > wide)
    found.push(`scrolls sideways: ${document.documentElement.scrollWidth} > ${wide}`);
  const luminance = text => {
    const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(one => {
      one /= 255;
      return one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = one => {
    for (; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (colour != "rgba(0, 0, 0, 0)") return colour;
    }
    return "rgb(255, 255, 255)";
  };
  for (const one of document.querySelectorAll("body *")) {
    if (one.closest("svg") || ![...one.childNodes].some(n => n.nodeType == 3)) continue;
    const shades = [luminance(getComputedStyle(one).color), luminance(background(one))];
    const contrast = (Math.max(...shades) + 0.05) / (Math.min(...shades) + 0.05);
    if (contrast < LEAST) found.push(`contrast ${contrast.toFixed(1)}: ${one.textContent}`);
  }
  for (const frame of document.querySelectorAll(".frame")) {
    const boxes = [...frame.querySelectorAll(".tick")].map(one => one.getBoundingClientRect());
    const plot = frame.querySelector("svg").getBoundingClientRect();
    boxes.forEach((a, n) => {
      if (a.left < 0 || a.right > wide) found.push(`label ${n} is cut off`);
      for (const b of [...boxes.slice(n + 1)])
        if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)
          found.push(`labels overlap in ${frame.parentElement.textContent}`);
      if (a.right > plot.left && a.top < plot.bottom - 1) found.push(`label ${n} on the chart`);
    });
  }
  return found;
})()
""".replace("LEAST", str(_LEAST_CONTRAST))
_PLOTS = """
[...document.querySelectorAll("svg.plot")].map(one => {
  const {left, top, width, height} = one.getBoundingClientRect();
  return {x: left + scrollX, y: top + scrollY, width, height};
})
"""
_HIDDEN_ROWS = """
[...document.querySelectorAll("tr")].filter(
  one => !one.checkVisibility({contentVisibilityAuto: true}) && !one.closest("thead")).length
"""
_HARM = """
<script>document.title = "harmed"</script>
<img src="https://example.invalid/image.png" onerror="document.title = 'harmed'">
<link rel="stylesheet" href="https://example.invalid/style.css">
<iframe src="https://example.invalid/"></iframe>
"""
_HARMS = 5  # what onerror does is one, too


def main() -> int:
    """Make the pages, look at each, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", type=Path, help="leave pictures in this folder")
    keep: Path | None = parser.parse_args().keep
    _install()
    failed = count = 0
    with tempfile.TemporaryDirectory() as name, browser() as page:
        folder = Path(name)
        for path in _pages(folder):
            problems = [*_looked_at(page, path, keep)]
            count += 1
            failed += bool(problems)
            print(f"{'FAILED' if problems else 'passed'}: {path.stem}")
            for problem in problems:
                print(f"  {problem}")
        problems = [*_harmed(page, folder)]
        print("\n".join(problems) or "passed: the policy lets nothing run or load")
    print(f"{count - failed} of {count} pages passed")
    return 1 if failed or problems else 0


def _install() -> None:
    """Install chromium, if it is missing."""
    if shutil.which("chromium") or shutil.which("chromium-browser"):
        return
    print("installing chromium", file=sys.stderr)
    as_root = [] if os.geteuid() == 0 else ["sudo"]
    environment.run("updating the list of packages", [*as_root, "apt-get", "update", "-qq"])
    install = [*as_root, "apt-get", "install", "-y", "-qq", "chromium"]
    environment.run("installing chromium", install, DEBIAN_FRONTEND="noninteractive")


# --- Pages ----------------------------------------------------------------------------------------


def _run(folder: Path, steps: range, pattern: str = "checkpoint-{}") -> Path:
    """Write a run of small checkpoints."""
    for step, state in zip(steps, series(len(steps), w=noise(len(steps), 4)), strict=True):
        checkpoint = folder / pattern.format(step)
        checkpoint.mkdir(parents=True)
        write_safetensors(checkpoint / "model.safetensors", state)
    return folder


def _pages(folder: Path) -> Iterator[Path]:
    """Write pages of every kind, from few checkpoints to many."""
    few, some = _run(folder / "few", range(1, 4)), _run(folder / "some", range(50, 1001, 50))
    odd = "<script>alert(1)<|script>&'-a-name-that-goes-on-and-on-{}"
    many = _run(folder / "many", range(100_000, 50_100_000, 100_000), odd)
    command = f"ckpt-ema average {many} --sigma-rel 0.1 --report many.html"
    averages: dict[str, tuple[Path, dict[str, Any]]] = {
        "one-of-3": (few, {"schedule": "uniform"}),
        "one-of-1": (few, {"last": 1}),
        "one-of-20": (some, {"half_life": 100}),
        "two-of-10": (some, {"half_life": "50,100", "last": 10}),
        "eighteen": (some, {"half_life": "20,50,100,200,400,1000", "last": "5,10,20"}),
        "one-of-500": (many, {"sigma_rel": 0.1, "command": command}),
        "nine-of-500": (many, {"sigma_rel": "0.02,0.05,0.1", "last": "100,300,500"}),
    }
    for name, (run, options) in averages.items():
        path = folder / f"{name}.html"
        ckpt_ema.average(run, output=folder / name, report=path, **options)
        yield path
    for count in (1, 3, 40, 500):
        path = folder / f"inspection-of-{count}.html"
        path.write_text(inspection_page(made_up_inspection(count), "ckpt-ema inspect runs/"))
        yield path
    for count in (1, 9, 40):
        path = folder / f"selection-of-{count}.html"
        path.write_text(selection_page(made_up_selection(count), "ckpt-ema select runs/"))
        yield path


# --- Looking at them ------------------------------------------------------------------------------


def _looked_at(page: Page, path: Path, keep: Path | None) -> Iterator[str]:
    """Yield what is wrong with a page, on screens and on paper."""
    page.open(path)
    for width in _WIDTHS:
        for scheme in ("light", "dark"):
            page.show(width, is_dark=scheme == "dark")
            problems = [*page.evaluate(_PROBLEMS)]
            if width == _WIDTHS[0]:
                problems += _blank_charts(page)
            yield from (f"{width} wide, {scheme}: {problem}" for problem in problems)
            if keep:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{path.stem}-{width}-{scheme}.png").write_bytes(page.picture())
    folded = page.evaluate(_HIDDEN_ROWS)
    page.show(700, is_dark=True, media="print")
    yield from (f"on paper: {problem}" for problem in page.evaluate(_PROBLEMS))
    if hidden := page.evaluate(_HIDDEN_ROWS):
        yield f"on paper: {hidden} rows are hidden"
    if not folded:
        yield "on screens: no row is folded away"
    printed = page.pdf()
    if keep:
        (keep / f"{path.stem}.pdf").write_bytes(printed)
    rows = page.evaluate("document.querySelectorAll('tr').length")
    sheets = len(re.findall(rb"/Type\s*/Page\b", printed))
    if not rows / 60 <= sheets <= 4 + rows / 15:
        yield f"on paper: {rows} rows on {sheets} sheets"
    yield from _reported(page, path)


def _blank_charts(page: Page) -> Iterator[str]:
    """Yield charts without colours of lines, dots or bars."""
    colours = {bytes.fromhex(colour[1:]) for colour in COLOURS}
    for number, area in enumerate(page.evaluate(_PLOTS), start=1):
        rows = pixels(page.picture(area))
        seen = sum(row[n : n + 3] in colours for row in rows for n in range(0, len(row), 3))
        if seen < _LEAST_PIXELS:
            yield f"chart {number} has {seen} coloured pixels"


def _reported(page: Page, path: Path) -> Iterator[str]:
    """Yield requests but for the page itself, and complaints of the browser."""
    for event in page.events:
        if event["method"] == "Network.requestWillBeSent":
            url = event["params"]["request"]["url"]
            if url != path.resolve().as_uri():
                yield f"requests {url[:80]}"
        elif event["method"] == "Log.entryAdded":
            yield f"complains: {event['params']['entry']['text']}"


def _harmed(page: Page, folder: Path) -> Iterator[str]:
    """Yield what a page runs and loads that somebody has put scripts and links into."""
    path = folder / "harmed.html"
    whole = selection_page(made_up_selection(3))
    path.write_text(whole.replace("</body>", f"{_HARM}</body>"))
    page.open(path)
    if page.evaluate("document.title") == "harmed":
        yield "FAILED: a script ran"
    complaints = [text for text in _reported(page, path) if "Content Security Policy" in text]
    if len(complaints) != _HARMS:
        yield f"FAILED: the browser complains of {len(complaints)} things, not of {_HARMS}"
    for event in page.events:
        url = event["params"].get("response", {}).get("url", "")
        if event["method"] == "Network.responseReceived" and url.startswith("http"):
            yield f"FAILED: {url} was loaded"


if __name__ == "__main__":
    sys.exit(main())
