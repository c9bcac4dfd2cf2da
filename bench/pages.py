"""Measures pages in Chromium: at 390 and 1280 px, by day and by night.

    python -m bench.pages runs/x/report.html [more.html ...] [--pictures=FOLDER]

For each page, width and colour scheme: how far it scrolls to the side, the smallest text as shown
(also in plots, whose text is scaled), the least contrast of text with what lies behind it, and
scripts. `Chromium` talks to the browser over a pipe, so nothing is installed and no port is open.

CSS pixels throughout. Contrast is that of WCAG 2.2, 1 to 21.
"""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

WIDTHS, SCHEMES = (390, 1280), ("light", "dark")
LEAST_SIZE, LEAST_CONTRAST = 9.0, 4.5
_TALLEST = 16_000  # of a picture, as Chromium draws no taller one
_PATIENCE = 120  # seconds without a word

# Text is measured where it stands: an SVG scales its own, and what lies behind it is either an
# earlier filled shape that its centre falls into or the background of an ancestor.
_MEASURE = """(() => {
  document.querySelectorAll('details').forEach(d => d.open = true);
  const rgb = text => {
    const n = (text.match(/[\\d.]+/g) || []).map(Number);
    return n.length < 3 ? [0, 0, 0, 0] : [n[0], n[1], n[2], n.length > 3 ? n[3] : 1];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const light = c => {
    const p = c.slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * p[0] + 0.7152 * p[1] + 0.0722 * p[2];
  };
  const contrast = (a, b) => {
    const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const ground = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement)
      layers.push(rgb(getComputedStyle(e).backgroundColor));
    let colour = rgb(getComputedStyle(document.body).backgroundColor).slice(0, 3);
    for (const layer of layers.reverse()) colour = over(layer, colour);
    return colour;
  };
  const behind = text => {
    const svg = text.ownerSVGElement, box = text.getBoundingClientRect();
    const x = box.left + box.width / 2, y = box.top + box.height / 2;
    let colour = ground(svg.parentElement);
    for (const shape of svg.querySelectorAll('path, rect, circle, polygon')) {
      if (!(shape.compareDocumentPosition(text) & Node.DOCUMENT_POSITION_FOLLOWING)) continue;
      if (shape.closest('defs, clipPath')) continue;
      const style = getComputedStyle(shape), b = shape.getBoundingClientRect();
      if (style.fill === 'none') continue;
      if (b.left > x || b.right < x || b.top > y || b.bottom < y) continue;
      const fill = rgb(style.fill);
      fill[3] *= Number(style.fillOpacity) * Number(style.opacity);
      colour = over(fill, colour);
    }
    return colour;
  };
  let size = [Infinity, ''], least = [Infinity, ''], wide = [];
  const look = (element, shown, back, words) => {
    const style = getComputedStyle(element), svg = element instanceof SVGElement;
    if (shown < size[0]) size = [shown, words];
    const ink = over(rgb(svg ? style.fill : style.color), back);
    const value = contrast(ink, back);
    if (value < least[0]) least = [value, words];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const words = node.textContent.trim().slice(0, 60), element = node.parentElement;
    if (!words || element.closest('style, defs')) continue;
    if (!element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    let shown = parseFloat(style.fontSize), back;
    if (element instanceof SVGElement) {
      const text = element.closest('text'), m = text.getScreenCTM();
      shown *= Math.hypot(m.a, m.b);
      back = behind(text);
    } else back = ground(element);
    look(element, shown, back, words);
  }
  const scrolls = e => { for (; e; e = e.parentElement)
    if (['auto', 'scroll'].includes(getComputedStyle(e).overflowX)) return true; return false; };
  const edge = WIDTH;
  for (const e of document.body.querySelectorAll('*')) {
    const b = e.getBoundingClientRect();
    if (b.width && b.right > edge + 0.5 && !(e instanceof SVGElement) && !scrolls(e))
      wide.push(e.tagName + '.' + e.className + ': ' + e.textContent.trim().slice(0, 40));
  }
  return {
    beyond: document.documentElement.scrollWidth - edge, wide: wide.slice(0, 5),
    size: size[0], smallest: size[1], contrast: least[0], faintest: least[1],
    num_scripts: document.scripts.length, height: document.documentElement.scrollHeight,
  };
})()"""


@dataclass(frozen=True)
class Measured:
    """A page at one width and by one colour scheme.

    beyond: how far the page scrolls to the side; `wide` names elements that reach beyond the edge.
    size: of the smallest text as shown, and that text.
    contrast: the least of any text with its ground, and that text.
    """

    width: int
    scheme: str
    beyond: int
    wide: tuple[str, ...]
    size: float
    smallest: str
    contrast: float
    faintest: str
    num_scripts: int

    def faults(self) -> list[str]:
        """Return what is wrong, in words."""
        at, faults = f"{self.width} px, {self.scheme}", []
        if self.beyond > 0 or self.wide:
            faults.append(f"{at}: scrolls {self.beyond} px to the side: {'; '.join(self.wide)}")
        if self.size < LEAST_SIZE:
            faults.append(f"{at}: text of {self.size:.2f} px: {self.smallest}")
        if self.contrast < LEAST_CONTRAST:
            faults.append(f"{at}: contrast of {self.contrast:.2f}: {self.faintest}")
        if self.num_scripts:
            faults.append(f"{at}: {self.num_scripts} scripts")
        return faults


def chromium() -> str | None:
    """Return the path of a Chromium or Chrome, None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def _pipe() -> tuple[int, int]:
    """Return the ends of a pipe, neither of them 3 or 4."""
    ends = os.pipe()
    far = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return far[0], far[1]


class Chromium:
    """A browser without a window, driven over a pipe by the DevTools protocol."""

    def __enter__(self) -> "Chromium":
        """Start it.

        Raises:
            FileNotFoundError: there is no Chromium.
        """
        if (path := chromium()) is None:
            raise FileNotFoundError("pages are measured in Chromium, and none is on the PATH")
        self._profile = tempfile.TemporaryDirectory(prefix="pages-", ignore_cleanup_errors=True)
        theirs_in, self._out = _pipe()
        self._in, theirs_out = _pipe()
        words = [path, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        words += ["--no-first-run", "--hide-scrollbars", "--remote-debugging-pipe"]
        words += [f"--user-data-dir={self._profile.name}", "about:blank"]
        # the protocol's own descriptors are 3 and 4
        actions: list[tuple] = [(os.POSIX_SPAWN_DUP2, theirs_in, 3)]
        actions += [(os.POSIX_SPAWN_DUP2, theirs_out, 4)]
        actions += [(os.POSIX_SPAWN_OPEN, end, os.devnull, os.O_RDWR, 0) for end in (0, 1, 2)]
        self._process = os.posix_spawn(path, words, os.environ, file_actions=actions, setsid=True)
        for end in (theirs_in, theirs_out):
            os.close(end)
        self._ids, self._buffer, self._session = itertools.count(1), b"", None
        targets = self._call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self._call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        self._call("Page.enable")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it."""
        for end in (self._in, self._out):
            os.close(end)
        os.killpg(self._process, signal.SIGKILL)  # of the session that it leads
        os.waitpid(self._process, 0)
        self._profile.cleanup()

    def open(self, path: Path, width: int, scheme: str) -> None:
        """Show a page at a width (a phone's below 600) and by a colour scheme."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=844 if width < 600 else 900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._call("Emulation.setEmulatedMedia", features=[feature])
        self._call("Page.navigate", url=path.resolve().as_uri())
        self._until("Page.loadEventFired")

    def measure(self, width: int, scheme: str) -> Measured:
        """Measure the page that is shown, with all that is folded opened."""
        script = _MEASURE.replace("WIDTH", str(width))
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        if "value" not in result["result"]:
            raise RuntimeError(f"the page could not be measured: {result}")
        values = result["result"]["value"]
        values.pop("height")
        return Measured(width, scheme, **{**values, "wide": tuple(values["wide"])})

    def picture(self, to: Path) -> None:
        """Write a PNG of the whole page that is shown."""
        size = self._call("Page.getLayoutMetrics")["cssContentSize"]
        height = min(int(size["height"]), _TALLEST)
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height, "scale": 1}
        shot = self._call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        to.write_bytes(base64.b64decode(shot["data"]))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        call: dict[str, Any] = {"id": next(self._ids), "method": method, "params": params}
        if self._session:
            call["sessionId"] = self._session
        os.write(self._out, json.dumps(call).encode() + b"\0")
        while (answer := self._read()).get("id") != call["id"]:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _until(self, event: str) -> None:
        while self._read().get("method") != event:
            pass

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], _PATIENCE)
            more = os.read(self._in, 1 << 16) if ready else b""
            if not more:
                raise RuntimeError("Chromium ended, or says nothing")
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)


def measured(pages: list[Path], pictures: Path | None = None) -> dict[Path, list[Measured]]:
    """Measure each page at all widths and by both schemes, and write pictures where asked to."""
    results: dict[Path, list[Measured]] = {}
    with Chromium() as browser:
        for page, width, scheme in itertools.product(pages, WIDTHS, SCHEMES):
            browser.open(page, width, scheme)
            if pictures:
                name = f"{page.resolve().parent.name}-{page.stem}-{width}-{scheme}.png"
                browser.picture(pictures / name)
            results.setdefault(page, []).append(browser.measure(width, scheme))
    return results


def main(argv: list[str]) -> int:
    """Print a line for each page, width and scheme; return 1 if any has a fault."""
    pages = [Path(word) for word in argv if not word.startswith("--")]
    folder = next((w.removeprefix("--pictures=") for w in argv if w.startswith("--pictures=")), "")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
    bad = False
    for page, results in measured(pages, Path(folder) if folder else None).items():
        print(page)
        for m in results:
            print(
                f"  {m.width:>5} px  {m.scheme:<5}  beyond {m.beyond:>3} px  text from "
                f"{m.size:.2f} px ({m.smallest})  contrast from {m.contrast:.2f} ({m.faintest})"
            )
            bad = bad or bool(m.faults())
            for fault in m.faults():
                print(f"    FAULT {fault}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
