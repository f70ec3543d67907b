"""A page as a browser shows it: Chromium's engine, by Qt's WebEngine.

    python tests/browser.py PAGE WIDTH light|dark SHOT

writes a picture of the top of the page to SHOT and prints, as JSON, what the
engine made of all of it. The engine runs in a process of its own: what goes
wrong in it stays there.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
from PIL import Image
import pytest

HEIGHT = 1400
SECONDS = 60
# Of a report, in each scheme (mpqfl_jax/report/style.html).
BACKGROUNDS = {"light": "#f6f7f9", "dark": "#14161a"}

# Colours are compared as WCAG 2.1 does: relative luminance (1.4.3), and 3 in
# place of 4.5 for text of 24 px, or 18.66 px in bold. Boxes that scroll by
# themselves may be wider than the page, and so may what lies in them.
AUDIT = """
(() => {
  const rgba = text => {
    const [r, g, b, a] = text.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a === undefined ? 1 : a];
  };
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => v / 255).map(
      v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = rgba(getComputedStyle(e).backgroundColor);
      if (color[3] === 1) return color;
    }
    return [255, 255, 255, 1];
  };
  const contrast = (one, other) => {
    const [a, b] = [luminance(one), luminance(other)];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  const name = e => `${e.tagName.toLowerCase()}.${e.className}: ` +
    e.textContent.trim().slice(0, 40);
  const seen = [...document.body.querySelectorAll('*')].filter(
    e => e.checkVisibility({visibilityProperty: true}));
  const texts = seen.filter(e => [...e.childNodes].some(
    n => n.nodeType === 3 && n.textContent.trim()));
  const faint = texts.filter(e => {
    const style = getComputedStyle(e), size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    return contrast(rgba(style.color), behind(e)) < (large ? 3 : 4.5);
  });
  const inside = e => {
    for (let p = e.parentElement; p; p = p.parentElement)
      if (['auto', 'scroll'].includes(getComputedStyle(p).overflowX))
        return true;
    return false;
  };
  // Without the scroll bar.
  const width = document.documentElement.clientWidth;
  const wide = seen.filter(e =>
    e.getBoundingClientRect().right > width + 0.5 && !inside(e));
  const images = [...document.images];
  return JSON.stringify({
    engine: navigator.userAgent.match(/Chrome\\/\\d+/)[0],
    dark: matchMedia('(prefers-color-scheme: dark)').matches,
    page: getComputedStyle(document.body).backgroundColor,
    width, wide: wide.map(name),
    texts: texts.length,
    smallest: Math.min(
      ...texts.map(e => parseFloat(getComputedStyle(e).fontSize))),
    faint: faint.map(name),
    images: images.length,
    broken: images.filter(i => !i.naturalWidth).length,
    undescribed: images.filter(i => !i.alt.trim()).length,
  });
})()
"""


def look(
  page: pathlib.Path, *, width: int, scheme: str, shot: pathlib.Path
) -> dict[str, Any]:
  """Opens a page in a fresh process.

  Args:
    page: an HTML file.
    width: of the window, in CSS pixels.
    scheme: `light` or `dark`, what the reader prefers.
    shot: where a picture of the window, `width` by `HEIGHT`, is written.

  Returns:
    What `AUDIT` finds, with `requests` (addresses of anything but the file
    itself and what it embeds) and `console` (what the page complained of).

  Raises:
    RuntimeError: the page was not shown; with what the engine wrote.
  """
  if importlib.util.find_spec("PySide6") is None:
    pytest.skip("PySide6 is not installed: no page is shown")
  command = [sys.executable, __file__, page, str(width), scheme, shot]
  done = subprocess.run(
    command, capture_output=True, text=True, timeout=2 * SECONDS
  )
  if done.returncode:
    raise RuntimeError(f"exit {done.returncode}:\n{done.stdout}{done.stderr}")
  return json.loads(done.stdout.splitlines()[-1])


def check(page: pathlib.Path, folder: pathlib.Path) -> None:
  """Asserts that a report can be read on a desk and a phone, in both schemes.

  Args:
    page: a report.
    folder: for the pictures.
  """
  for scheme, background in BACKGROUNDS.items():
    for width in (1280, 400):
      shot = folder / f"{scheme}_{width}.png"
      found = look(page, width=width, scheme=scheme, shot=shot)
      assert found["dark"] == (scheme == "dark")
      assert width - 20 <= found["width"] <= width
      assert found["texts"] > 20 and found["images"] > 0
      assert found["smallest"] >= 12
      for trouble in (
        *("faint", "wide", "broken", "undescribed"),
        *("requests", "console"),
      ):
        assert not found[trouble], (scheme, width, trouble, found[trouble])
      pixels = np.asarray(Image.open(shot).convert("RGB"))
      assert pixels.shape == (HEIGHT, width, 3)
      # Painted: its own background at the corner, letters of many shades.
      assert "#" + bytes(pixels[2, 2]).hex() == background
      assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def _show(page: str, width: int, scheme: str, shot: str) -> dict[str, Any]:
  # Before Qt is loaded. As root Chromium refuses to run with its sandbox, and
  # without a desktop Qt cannot tell it which scheme the reader prefers.
  preferred = {"dark": 0, "light": 1}[scheme]
  os.environ |= {
    "QT_QPA_PLATFORM": "offscreen",
    "QTWEBENGINE_DISABLE_SANDBOX": "1",
    "QTWEBENGINE_CHROMIUM_FLAGS": "--disable-gpu"
    f" --blink-settings=preferredColorScheme={preferred}",
  }
  from PySide6 import QtCore, QtWebEngineCore, QtWebEngineWidgets, QtWidgets

  requests: list[str] = []
  console: list[str] = []
  found: dict[str, Any] = {}

  class Requests(QtWebEngineCore.QWebEngineUrlRequestInterceptor):
    def interceptRequest(self, info):
      address = info.requestUrl()
      if address.scheme() != "data" and address != source:
        requests.append(address.toString())

  class Page(QtWebEngineCore.QWebEnginePage):
    def javaScriptConsoleMessage(self, _, message, line, __):
      console.append(f"{line}: {message}")

  def loaded(fine):
    if not fine:
      application.exit(2)
    # Painted some frames after it is loaded.
    QtCore.QTimer.singleShot(500, audit)

  def audit():
    view.page().runJavaScript(AUDIT, painted)

  def painted(text):
    found.update(json.loads(text))
    application.exit(0 if view.grab().save(shot) else 3)

  application = QtWidgets.QApplication(sys.argv[:1])
  source = QtCore.QUrl.fromLocalFile(os.path.abspath(page))
  profile = QtWebEngineCore.QWebEngineProfile()  # leaves nothing on the disk
  interceptor = Requests()
  profile.setUrlRequestInterceptor(interceptor)
  view = QtWebEngineWidgets.QWebEngineView()
  view.setPage(Page(profile, view))
  # Else it would not even ask for what lies elsewhere.
  view.settings().setAttribute(
    QtWebEngineCore.QWebEngineSettings.WebAttribute.LocalContentCanAccessRemoteUrls,
    True,
  )
  view.resize(width, HEIGHT)
  view.loadFinished.connect(loaded)
  view.load(source)
  view.show()
  QtCore.QTimer.singleShot(1000 * SECONDS, lambda: application.exit(4))
  status = application.exec()
  if status:
    raise SystemExit(status)
  return found | {"requests": requests, "console": console}


if __name__ == "__main__":
  result = _show(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
  print(json.dumps(result), flush=True)
  # Qt takes its objects down in an order that Chromium complains of.
  os._exit(0)
