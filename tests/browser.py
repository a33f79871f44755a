"""A headless Chromium that shows one page: what it shows, a click, and which addresses it asks."""

import base64
import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from typing import Any

CHROMIUM = shutil.which("chromium")
READ, WRITE = 3, 4  # the descriptors of --remote-debugging-pipe in the browser


class Browser:
    """Speaks the DevTools protocol through pipes: JSON, each message ended by a zero byte."""

    def __init__(self, to, back):
        self.to, self.back, self.count, self.left = to, back, 0, b""
        self.asked: list[str] = []
        self.session: str | None = None

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; notes the addresses asked for meanwhile."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            found = self.read()
            if found.get("method") == "Network.requestWillBeSent":
                self.asked.append(found["params"]["request"]["url"])
            if found.get("id") == self.count:
                assert "error" not in found, found
                return found["result"]

    def read(self) -> dict[str, Any]:
        while b"\0" not in self.left:
            part = os.read(self.back, 65536)
            assert part, "the browser ended"
            self.left += part
        text, _, self.left = self.left.partition(b"\0")
        return json.loads(text)

    def open(self, address: str) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        self.call("Network.enable")
        self.call("Page.enable")
        self.call("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get(
            "value"
        )

    def wait(self, script: str, seconds: float = 60.0) -> None:
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.1)

    def as_phone(self, width: int = 390, height: int = 800) -> None:
        """From here on, a screen as narrow as a phone's, and touched."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=True)

    def tap(self, selector: str) -> None:
        """Touch the middle of the first element that a selector finds, scrolled into view."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{found}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y = self.run(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])({found}.getBoundingClientRect())"
        )
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key: str, code: int) -> None:
        """Press and release a key. code: its Windows virtual key code."""
        for what in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=what, key=key, windowsVirtualKeyCode=code)

    def shot(self, path) -> None:
        """Write a PNG of what is seen."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def browser(profile, width: int = 1280, height: int = 900):
    """Start a browser with a profile of its own, and end it."""
    ours, theirs = os.pipe(), os.pipe()

    def place():
        ends = os.dup(ours[0]), os.dup(theirs[1])
        for end, number in zip(ends, (READ, WRITE), strict=True):
            os.dup2(end, number)

    options = ["--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--hide-scrollbars"]
    options += [f"--user-data-dir={profile}", f"--window-size={width},{height}"]
    process = subprocess.Popen(
        [CHROMIUM, *options],
        preexec_fn=place,
        close_fds=False,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield Browser(ours[1], theirs[0])
    finally:
        process.kill()
        process.wait()
        for end in (*ours, *theirs):
            os.close(end)
