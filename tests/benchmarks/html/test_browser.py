"""The report in headless Chromium, driven by the WebDriver protocol; skipped where there is none."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kiln.benchmarks.html.build import render_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="needs chromium and chromedriver: apt-get install chromium-driver",
)
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]


class Browser:
    """A session of chromedriver; JSON over HTTP on this machine, see w3.org/TR/webdriver2."""

    def __init__(self, port: int, profile: Path) -> None:
        self._base = f"http://127.0.0.1:{port}"
        self._http = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        made = self._send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{made['sessionId']}"

    def open(self, page: Path, *, width: int = 1400, scheme: str = "light") -> None:
        """Load a file at a width, in a colour scheme."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", metrics)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.devtools("Emulation.setEmulatedMedia", media)
        self._send("POST", f"{self._session}/url", {"url": page.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """What a function body returns in the page."""
        return self._send("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        """A command of the DevTools protocol."""
        body = {"cmd": command, "params": parameters}
        return self._send("POST", f"{self._session}/goog/cdp/execute", body)

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What was logged since the last call: ``browser`` the console, ``performance`` the network."""
        return self._send("POST", f"{self._session}/se/log", {"type": kind})

    def requests(self) -> list[str]:
        """Addresses that the page has asked for, without those that hold their own data."""
        messages = [json.loads(row["message"])["message"] for row in self.log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    def screenshot(self) -> np.ndarray:
        """What is in the window, uint8 ``(h, w, 3)``."""
        data = base64.b64decode(self.devtools("Page.captureScreenshot", {"format": "png"})["data"])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def close(self) -> None:
        """End it."""
        self._send("DELETE", self._session)

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self._base + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        with self._http.open(request, timeout=120) as answer:
            return json.load(answer)["value"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("chromium")
    process = subprocess.Popen(
        [str(DRIVER), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        port = next(
            int(found.group(1))
            for line in process.stdout
            if (found := re.search(r"successfully on port (\d+)", line))
        )
        session = Browser(port, folder / "profile")
        yield session
        session.close()
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def page(six, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_report(six.records, six.folder), encoding="utf-8")
    return path


OVERFLOW = """
const wide = innerWidth, found = [];
for (const e of document.querySelectorAll('body *')) {
  if (e.closest('.scroll') && !e.matches('.scroll')) continue;
  if (e.closest('svg') && !e.matches('svg') || e.closest('.hidden, .skip, dialog, .speed thead')) continue;
  const box = e.getBoundingClientRect();
  const name = e.tagName + '.' + e.getAttribute('class');
  if (box.width && box.right > wide + 1) found.push(name + ' ' + box.right);
}
return {page: document.documentElement.scrollWidth, wide: wide, found: found.slice(0, 5)};
"""
IMAGES = """
return [...document.querySelectorAll('main img')].map(i => [i.complete, i.naturalWidth, i.alt.length]);
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_it_asks_nobody_logs_nothing_and_fits(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.log("performance"), browser.log("browser")
    browser.open(page, width=width, scheme=scheme)
    assert browser.requests() == [page.resolve().as_uri()]
    assert browser.log("browser") == []
    found = browser.run(OVERFLOW)
    assert found["wide"] == width
    assert found["page"] <= width, found
    assert not found["found"], found
    images = browser.run(IMAGES)
    assert len(images) == 8 * 7 + 8 * 5  # with the reference; one configuration has nothing to compare with
    assert all(done and wide > 0 and alt > 0 for done, wide, alt in images)


def test_a_wide_child_is_found(browser: Browser, page: Path) -> None:
    browser.open(page, width=390)
    browser.run("const d = document.createElement('div'); d.style.width = '900px'; d.textContent = 'x';"
                "document.querySelector('main').append(d);")  # fmt: skip
    assert browser.run(OVERFLOW)["found"]


def test_a_request_would_be_seen_and_the_policy_forbids_it(
    browser: Browser, page: Path, tmp_path: Path
) -> None:
    browser.log("browser"), browser.log("performance")
    planted = tmp_path / "planted.html"
    html = page.read_text(encoding="utf-8")
    asks = '<img src="http://192.0.2.1/a.png" alt="">'
    planted.write_text(html.replace("<main", asks + "<main", 1), encoding="utf-8")
    browser.open(planted)
    assert any("Content Security Policy" in row["message"] for row in browser.log("browser"))
    bare = re.sub(
        r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", planted.read_text(encoding="utf-8")
    )
    planted.write_text(bare, encoding="utf-8")
    browser.log("performance")
    browser.open(planted)
    assert "http://192.0.2.1/a.png" in browser.requests()


def test_dark_is_dark_and_the_button_turns_it(browser: Browser, page: Path) -> None:
    browser.open(page, scheme="dark")
    assert browser.screenshot().mean() < 60
    browser.run("document.getElementById('theme').click()")
    assert browser.screenshot().mean() > 200
    browser.open(page, scheme="light")
    assert browser.screenshot().mean() > 200
    browser.run("document.getElementById('theme').click()")
    assert browser.screenshot().mean() < 60
    assert browser.run("return document.getElementById('theme').getAttribute('aria-pressed')") == "true"


def test_a_picture_opens_over_its_reference(browser: Browser, page: Path) -> None:
    browser.open(page)
    said = browser.run("""
        const cell = [...document.querySelectorAll('.cell.failed')][0];
        cell.querySelector('button').click();
        const d = document.getElementById('viewer'), of = n => d.querySelector('[data-' + n + ']');
        const own = cell.querySelector('img').src;
        const seen = [of('top').src === own, of('below').src !== own, of('tools').hidden];
        return [d.open, ...seen, of('caption').textContent];
    """)
    assert said[:4] == [True, True, True, False]
    assert "expected" in said[4]


def test_paper_is_white_whatever_the_screen_is(browser: Browser, page: Path) -> None:
    browser.open(page, scheme="dark")
    browser.run("document.documentElement.dataset.theme = 'dark'")
    browser.devtools("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert browser.run(CONTRAST) == []
        assert browser.screenshot().mean() > 200
    finally:
        browser.devtools("Emulation.setEmulatedMedia", {"media": ""})


CONTRAST = """
const parse = c => c.match(/[\\d.]+/g).map(Number);
const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = c => { const [r, g, b] = parse(c).map(v => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
  if (parse(c).length < 4 || parse(c)[3] === 1) return c; } return 'rgb(255,255,255)'; };
const found = [];
for (const e of document.querySelectorAll('body *')) {
  if (e.closest('svg, dialog, script, .skip')) continue;
  if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
  const a = light(getComputedStyle(e).color), b = light(behind(e));
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) found.push(e.tagName + '.' + e.className + ' ' + ratio.toFixed(2));
}
return [...new Set(found)];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(browser: Browser, page: Path, scheme: str) -> None:
    browser.open(page, scheme=scheme)
    assert browser.run(CONTRAST) == []  # WCAG 2.2, success criterion 1.4.3: 4.5 to 1
    browser.run("document.querySelector('.lead').style.color = '#777'")
    assert browser.run(CONTRAST)
