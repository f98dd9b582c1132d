"""The pages of plans in a real browser. All tests check behaviour: what a reader would see.

Debian's chromium without a display. Pages hold no script and forbid it, so what is measured is
measured by a wrapper of the tests around them.
"""

from __future__ import annotations

import html as html_entities
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image

from lowres.core.plan import Candidate
from lowres.core.units import GIB
from lowres.report.plan_page import render
from lowres.report.plan_plots import COLOURS
from tests.report.test_plan_page import a_fit, a_matrix, a_plan, too_big

CROWD = [
    Candidate({"method": "lora", "method.rank": i}, int((4 + i * 0.6) * GIB), i < 13,
              12 - 0.3 * i + i % 3 / 3, 900.0, 0.6 if i % 3 else None, front=True)
    for i in range(24)
]  # fmt: skip
PAGES = {
    "plan": a_plan(), "too big": too_big(), "fit": a_fit(), "matrix": a_matrix(),
    "crowded fit": a_fit(candidates=CROWD, chosen=11),
}  # fmt: skip
WIDE, HIGH, PHONE = 1200, 3000, 390
GOOD, BAD, WHITE, DARK = (0x1C, 0x7C, 0x4A), (0xB4, 0x23, 0x18), (255, 255, 255), (0x14, 0x18, 0x1D)
INSTALL = "apt-get install -y --no-install-recommends chromium"

WRAPPER = """<!DOCTYPE html><body><script>
const page = PAGE, widths = WIDTHS, found = {};
const common = (r, s) => [Math.min(r.right, s.right) - Math.max(r.left, s.left),
                          Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top)];
function measure(d) {
  const outside = [], overlaps = [];
  for (const svg of d.querySelectorAll("svg")) {
    const box = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")];
    const places = texts.map(t => t.getBoundingClientRect());
    places.forEach((r, i) => {
      const [width, height] = common(r, box);
      if (width < r.width - 1 || height < r.height - 1) outside.push(texts[i].textContent);
      for (let j = i + 1; j < places.length; j++)
        if (common(r, places[j]).every(x => x > 1))
          overlaps.push([texts[i].textContent, texts[j].textContent]);
    });
  }
  const root = d.documentElement, scroll = Math.max(root.scrollWidth, d.body.scrollWidth);
  return {client: root.clientWidth, scroll, outside, overlaps,
          texts: d.querySelectorAll("svg text").length};
}
let left = widths.length;
for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width: ${width}px; height: 800px; border: 0`;
  frame.srcdoc = page;
  frame.onload = () => {
    found[width] = measure(frame.contentDocument);
    if (!--left) document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
  };
  document.body.append(frame);
}
</script></body>"""


@dataclass(frozen=True)
class Seen:
    """One page as the browser drew it.

    Args:
        pixels: Height by width by red, green, blue; 0 to 255.
        log: Standard error, with the messages of the page's console.
    """

    pixels: Any
    pdf: bytes
    log: str


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium")
    if found is None and os.geteuid() == 0:
        pytest.fail(f"chromium is missing; get it by `{INSTALL}`")
    if found is None:
        pytest.skip(f"chromium is missing; get it by `sudo {INSTALL}`")
    return found


def browse(
    chromium: str, folder: Path, html: str, *options: str
) -> subprocess.CompletedProcess[str]:
    """Open a page in a browser that is at home in `folder`."""
    (folder / "page.html").write_text(html, encoding="utf-8")
    command = [
        chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
        *options, (folder / "page.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(folder)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def look(chromium: str, folder: Path, html: str, *options: str) -> Seen:
    picture, pdf = folder / "page.png", folder / "page.pdf"
    done = browse(
        chromium, folder, html, f"--screenshot={picture}", f"--print-to-pdf={pdf}",
        f"--window-size={WIDE},{HIGH}", *options,
    )  # fmt: skip
    pixels = (image.imread(picture)[..., :3] * 255).round().astype(np.uint8)
    return Seen(pixels, pdf.read_bytes(), done.stderr)


def measured(chromium: str, folder: Path, html: str) -> dict[str, dict[str, Any]]:
    """For each width of a window: the width of its content, and labels of figures in disorder."""
    page = json.dumps(html).replace("<", "\\u003c")
    widths = json.dumps([PHONE, WIDE])
    wrapper = WRAPPER.replace("WIDTHS", widths).replace("PAGE", page, 1)
    text = browse(chromium, folder, wrapper, "--dump-dom").stdout
    (found,) = re.findall("FOUND(.*)END", text)
    result: dict[str, dict[str, Any]] = json.loads(html_entities.unescape(found))
    return result


def share(seen: Seen, colour: tuple[int, int, int]) -> float:
    return float((seen.pixels == np.array(colour, np.uint8)).all(axis=-1).mean())


def console(log: str) -> list[str]:
    """Messages about a page, without what the browser says of itself, such as of a bus."""
    return [line for line in log.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module", params=PAGES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def seen(chromium: str, name: str, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return look(chromium, tmp_path_factory.mktemp("look"), render(PAGES[name]))


def test_a_page_is_drawn(seen: Seen, name: str) -> None:
    """Behaviour: text and figures on white, the verdict in its colour, categories in theirs."""
    assert seen.pixels.shape == (HIGH, WIDE, 3)
    colours = np.unique(seen.pixels.reshape(-1, 3) @ np.array([1, 1 << 8, 1 << 16], np.uint32))
    assert len(colours) > 100
    assert 0.3 < share(seen, WHITE) < 0.99
    assert share(seen, BAD if name == "too big" else GOOD) > 1e-5
    if name != "matrix":
        weights = tuple(bytes.fromhex(COLOURS["weights"][0][1:]))
        assert share(seen, weights) > 0.005


def test_the_console_of_a_page_is_silent(seen: Seen) -> None:
    """Behaviour: nothing is missing, refused or malformed."""
    assert "bytes written to file" in seen.log, "the log is read"
    assert console(seen.log) == []


def test_a_page_prints(seen: Seen, name: str) -> None:
    """Behaviour: as a document of one page or a few, not of one page a table."""
    assert seen.pdf.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", seen.pdf))
    assert 1 <= pages <= (2 if name == "matrix" else 8)


def test_a_page_fits_a_phone_and_no_label_is_hidden(
    chromium: str, name: str, tmp_path: Path
) -> None:
    """Behaviour: the body is no wider than its window; texts of figures are inside and apart."""
    found = measured(chromium, tmp_path, render(PAGES[name]))
    assert set(found) == {str(PHONE), str(WIDE)}
    for width, m in found.items():
        assert m["client"] == int(width)
        assert m["scroll"] <= m["client"], f"{m['scroll']} at {width}"
        assert m["texts"] > 20 or name == "matrix"
        assert m["outside"] == [] and m["overlaps"] == [], width


def test_what_is_wrong_would_be_found(chromium: str, tmp_path: Path) -> None:
    """Behaviour: the tests above can fail; a script, a wide box and a covered label are planted."""
    planted = (
        '<script>1</script><div style="width: 900px">wide</div><svg viewBox="0 0 99 30">'
        '<text x="5" y="20">one</text><text x="7" y="20">two</text><text x="90" y="9">out</text>'
        "</svg></main>"
    )
    html = render(a_matrix()).replace("</main>", planted)
    found = measured(chromium, tmp_path, html)[str(PHONE)]
    assert found["scroll"] > PHONE
    assert found["overlaps"] == [["one", "two"]] and found["outside"] == ["out"]
    (message, *_) = console(look(chromium, tmp_path, html).log)
    assert "Content Security Policy" in message


def test_a_page_follows_a_dark_system(chromium: str, tmp_path: Path) -> None:
    """Behaviour: the page and the figures take their dark colours."""
    seen = look(chromium, tmp_path, render(a_plan()), "--blink-settings=preferredColorScheme=0")
    assert share(seen, DARK) > 0.3 and share(seen, WHITE) < 0.001
    weights = tuple(bytes.fromhex(COLOURS["weights"][1][1:]))
    assert share(seen, weights) > 0.005
