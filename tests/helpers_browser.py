"""A headless Chromium, driven through its own pipe (DevTools protocol): no package is needed for it.

It is the one that TRL_DLLM_CHROMIUM names, or one on PATH. A picture of a page, of 1200 x 1050 pixels:

    python tests/helpers_browser.py trace.html#step=6 trace.png
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest


NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
PATIENCE = 60  # seconds, on a busy machine


def find_chromium() -> str:
    """The browser's path; skips the test, saying so, where there is none."""
    wanted = os.environ.get("TRL_DLLM_CHROMIUM")
    if wanted:
        assert Path(wanted).is_file(), f"TRL_DLLM_CHROMIUM={wanted!r} is not a file"
        return wanted
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no Chromium: TRL_DLLM_CHROMIUM is not set, and {', '.join(NAMES)} are not on PATH")
    return found


class Browser:
    """`with Browser(folder) as browser`; what pages log and ask the network for is in `events`."""

    def __init__(self, folder: Path, width: int = 1200, height: int = 1050):
        self.events: list[dict] = []
        self._number, self._buffer, self._session = 0, b"", None
        (reads, self._out), (self._in, writes) = os.pipe(), os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={folder}", f"--window-size={width},{height}"]
        # It reads its descriptor 3 and writes to 4, which may be somebody else's here.
        theirs = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (reads, writes)]
        script = f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]} {theirs[0]}<&- {theirs[1]}>&-'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", find_chromium(), *flags, "about:blank"],
            pass_fds=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for descriptor in (reads, writes, *theirs):
            os.close(descriptor)

    def __enter__(self) -> "Browser":
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *exception) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, **params) -> dict:
        """What a method of the protocol returns."""
        self._number += 1
        message: dict = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0, end - time.monotonic()))
            assert ready, f"the browser has said nothing for {PATIENCE} seconds"
            part = os.read(self._in, 1 << 16)
            assert part, "the browser has ended"
            self._buffer += part
        answer, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(answer)

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a page, and wait until it has drawn itself; a page that is there already goes to the fragment."""
        self._loaded()
        if "loaderId" not in self.call("Page.navigate", url=path.absolute().as_uri() + fragment):
            self.run("new Promise((done) => setTimeout(done))")  # until it was told
            return
        end = time.monotonic() + PATIENCE
        while not self._loaded():
            assert time.monotonic() < end, f"{path} did not load"
            self.call("Runtime.evaluate", expression="0")

    def _loaded(self) -> bool:
        """Whether a page was loaded since the last question."""
        others = [event for event in self.events if event["method"] != "Page.loadEventFired"]
        found, self.events = len(others) < len(self.events), others
        return found

    def run(self, expression: str):
        """The value of a JavaScript expression on the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        code = {"key": key, "code": key if len(key) > 1 else f"Key{key.upper()}"}
        text = {"text": key} if len(key) == 1 else {}
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, " ": 32}
        number = {"windowsVirtualKeyCode": codes[key]} if key in codes else {}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **code, **text, **number)
        self.call("Input.dispatchKeyEvent", type="keyUp", **code, **number)

    def point(self, selector: str) -> None:
        """Move the mouse onto the first element that a selector finds."""
        box = f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
        x, y = self.run(f"{box} return [b.x + b.width / 2, b.y + b.height / 2]; }})()")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def errors(self) -> list[str]:
        """What the page logged: errors, warnings and exceptions."""
        named = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in named]

    def requests(self) -> list[str]:
        """All that was asked for."""
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return asked + [e["params"]["url"] for e in self.events if e["method"] == "Network.webSocketCreated"]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


if __name__ == "__main__":
    page, picture = sys.argv[1:]
    page, _, fragment = page.partition("#")
    with tempfile.TemporaryDirectory() as profile, Browser(Path(profile)) as browser:
        browser.call("Emulation.setScrollbarsHidden", hidden=True)
        browser.open(Path(page), f"#{fragment}")
        browser.screenshot(Path(picture))
