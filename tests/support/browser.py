"""A real browser without a screen, for one page at a time: Chromium of Debian, told what to do through a pipe."""

import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium-headless-shell", "chromium")
# It reads from the first descriptor, and writes to the second.
_READS, _WRITES = 3, 4
# Seconds: it answers within one, or it hangs.
_LIMIT = 300
# No profile of a person, no service of its maker, no graphics card. And no sandbox, for which a container may lack the
# right: the pages are ours.
_OPTIONS = (
    *("--no-sandbox", "--disable-dev-shm-usage"),
    *("--headless", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-default-apps", "--disable-sync", "--hide-scrollbars", "--no-pings"),
)


class Page:
    """A page that is shown.

    `asked`: the addresses that it has asked for, its own first; `said`: errors, and words for its console.
    """

    def __init__(self, reads: int, writes: int) -> None:
        self._reads, self._writes, self._left = reads, writes, b""
        self._count, self._session = 0, ""
        self._loaded: set[str] = set()
        self.asked: list[str] = []
        self.said: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def show(self, file: Path, width: int, *, dark: bool = False) -> None:
        """Load a file, in a window as high as the whole of it."""
        self.asked.clear()
        self.said.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._window(width, 800)
        # That it is loaded may be told before the answer.
        loader = self.call("Page.navigate", url=file.as_uri())["loaderId"]
        while loader not in self._loaded:
            self._next()
        self._window(width, int(self.value("document.documentElement.scrollHeight")))

    def value(self, script: str) -> Any:
        """Evaluate JavaScript in the page; what it returns as JSON."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def call(self, method: str, **params: Any) -> Mapping[str, Any]:
        """Call a method of the DevTools protocol."""
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._count, "method": method, "params": params, **session}
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            pass
        assert "error" not in answer, (method, answer["error"])
        found: Mapping[str, Any] = answer["result"]
        return found

    def _window(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            assert select.select([self._reads], [], [], _LIMIT)[0], f"the browser has said nothing for {_LIMIT} s"
            more = os.read(self._reads, 1 << 16)
            assert more, "the browser has ended"
            self._left += more
        message, _, self._left = self._left.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        self._note(found.get("method"), found.get("params", {}))
        return found

    def _note(self, method: str | None, params: Mapping[str, Any]) -> None:
        if method == "Page.lifecycleEvent" and params["name"] == "load":
            self._loaded.add(params["loaderId"])
        elif method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.said.append(json.dumps(params))


@contextmanager
def browser() -> Iterator[Page]:
    """Start it. Where there is none the test is skipped, which in CI is a failure."""
    program = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if not program:
        pytest.skip(f"no browser (apt-get install {_NAMES[0]})")
    to_it, ours = os.pipe()
    mine, from_it = os.pipe()
    with tempfile.TemporaryDirectory() as profile:
        argv = (program, *_OPTIONS, f"--user-data-dir={profile}")
        script = f'exec "$@" {_READS}<&{to_it} {_WRITES}>&{from_it}'
        env = {**os.environ, "HOME": profile}
        # In a group of its own, as it starts others.
        with subprocess.Popen(
            ("bash", "-c", script, "bash", *argv),
            env=env, pass_fds=(to_it, from_it), stderr=subprocess.DEVNULL, start_new_session=True,
        ) as process:  # fmt: skip
            os.close(to_it)
            os.close(from_it)
            try:
                yield Page(mine, ours)
            finally:
                # With the pipe it ends.
                os.close(ours)
                try:
                    process.wait(_LIMIT)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                os.close(mine)
