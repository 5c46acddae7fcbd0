"""Chromium without a window, driven through a pipe by the DevTools protocol: nothing to install but the browser.

https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 60  # that an answer may take on a busy machine


def program() -> str | None:
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Tab:
    """One page in a browser of its own. `said`: what came to its console; `asked`: every address that it wanted."""

    def __init__(self, reading, writing):
        self._reading, self._writing, self._count, self._rest, self._session = reading, writing, 0, b"", None
        self.said, self.asked = [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._writing.write(json.dumps(message).encode() + b"\0")
        self._writing.flush()
        while (answer := self._next()).get("id") != self._count:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _next(self) -> dict:
        while b"\0" not in self._rest:
            read = os.read(self._reading.fileno(), 1 << 20)
            if not read:
                raise RuntimeError("the browser has ended")
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        name, parameters = message.get("method"), message.get("params", {})
        if name == "Runtime.consoleAPICalled":
            self.said.append(" ".join(str(a.get("value", a.get("description"))) for a in parameters["args"]))
        elif name == "Runtime.exceptionThrown":
            self.said.append(parameters["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif name == "Log.entryAdded":
            self.said.append(parameters["entry"]["text"])
        elif name == "Page.javascriptDialogOpening":
            self.said.append(f"dialog: {parameters['message']}")
        elif name == "Network.requestWillBeSent":
            self.asked.append(parameters["request"]["url"])
        return message

    def size(self, width: int, height: int, *, dark=False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, path: pathlib.Path) -> None:
        self.call("Page.navigate", url=path.as_uri())
        self.until("document.readyState === 'complete' && location.protocol === 'file:'")

    def run(self, code: str):
        """The value of an expression."""
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def until(self, code: str) -> None:
        end = time.monotonic() + SECONDS
        while not self.run(code):
            assert time.monotonic() < end, f"never: {code}"
            time.sleep(0.05)

    def mouse(self, kind: str, x: float, y: float, **more) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def key(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def touch(self, kind: str, *points: tuple[float, float]) -> None:
        places = [{"x": x, "y": y, "id": k} for k, (x, y) in enumerate(points)]
        self.call("Input.dispatchTouchEvent", type=kind, touchPoints=places)

    def picture(self, path: pathlib.Path, *, whole=False) -> None:
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def tab():
    """A `Tab` of the first browser of PROGRAMS that is installed."""
    (to_read, to_write), (from_read, from_write) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(prefix="ktda_jax_browser_", ignore_cleanup_errors=True) as home:
        # The browser reads from descriptor 3 and writes to 4.
        command = (
            f'exec "$0" --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe '
            f'--no-first-run --disable-background-networking --user-data-dir="$1" 3<&{to_read} 4>&{from_write}'
        )
        environment = os.environ | {"HOME": home}
        process = subprocess.Popen(
            ["bash", "-c", command, program(), home], pass_fds=(to_read, from_write), env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(from_write)
        with os.fdopen(from_read, "rb", buffering=0) as reading, os.fdopen(to_write, "wb") as writing:
            try:
                yield Tab(reading, writing)
            finally:
                process.terminate()
                process.wait(timeout=20)
