"""Which layers of tests this machine can run: a pytest plugin for the markers `layer2`, `layer3` and so on.

In CI (CI=true) or with SPARKINSTALL_ALL_LAYERS=1 a layer that cannot run is a failure, and so is any other skipped
test. Elsewhere it is skipped, and the end of the run says so in red.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Generator
from functools import cache
from typing import Any

import pytest

from tests.lab import commands, overlay

Missing = Callable[[], str | None]

PACKAGES = {
    "arch-test": "arch-test",
    "ip": "iproute2",
    "mmdebstrap": "mmdebstrap",
    "netplan": "netplan.io",
    "nsenter": "util-linux",
    "ssh-keygen": "openssh-client",
    "systemd-nspawn": "systemd-container",
    "unshare": "util-linux",
}

_skipped: dict[int, str] = {}


@cache
def namespaces_missing() -> str | None:
    """Why network namespaces (layer 2) cannot be created here, or None."""
    return (
        _root_missing()
        or _tools_missing("ip", "nsenter", "netplan", "ssh-keygen")
        or _refused("unshare", "--net", "true")
    )


@cache
def nodes_missing() -> str | None:
    """Why nodes (layer 3) cannot boot here, or None."""
    return (
        _root_missing()
        or _tools_missing("mmdebstrap", "systemd-nspawn", "nsenter")
        or _refused("unshare", "--mount", "--pid", "--fork", "--uts", "--ipc", "--cgroup", "true")
        or _overlay_missing()
        or _groups_missing()
    )


@cache
def arm64_missing() -> str | None:
    """Why the arm64 tree (layer 6) is not available here, or None."""
    return _root_missing() or _tools_missing("mmdebstrap", "unshare") or _overlay_missing() or _emulation_missing()


@cache
def vllm_missing() -> str | None:
    """Why vLLM's build for the CPU (layer 5) cannot run here, or None; two nodes of it take 7 GB of memory."""
    if platform.machine() != "x86_64":
        return f"there is no such build of vLLM for {platform.machine()}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None if memory > 10e9 else f"only {memory / 1e9:.0f} GB of memory"


# Other layers add a row.
LAYERS: dict[int, Missing] = {2: namespaces_missing, 3: nodes_missing, 5: vllm_missing, 6: arm64_missing}


def require(layer: int) -> None:
    """Unless this machine can run the layer, skip the calling test, or fail it in CI."""
    reason = LAYERS[layer]()
    if reason is None:
        return
    message = f"layer {layer} cannot run here: {reason}"
    if all_layers_wanted():
        pytest.fail(message, pytrace=False)
    _skipped[layer] = reason
    pytest.skip(message)


def all_layers_wanted() -> bool:
    """Whether a layer that cannot run is a failure."""
    return os.environ.get("CI", "").lower() in {"1", "true"} or os.environ.get("SPARKINSTALL_ALL_LAYERS") == "1"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before fixtures are created: a test marked `layerN` needs layer N."""
    for marker in item.iter_markers():
        number = marker.name.removeprefix("layer")
        if number.isdecimal() and int(number) in LAYERS:
            require(int(number))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a skipped test has failed, whatever the reason."""
    del item, call
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and all_layers_wanted():
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        report.outcome, report.longrepr = "failed", f"{reason}; and CI must run this"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker process sends its skipped layers to the main process."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["skipped_layers"] = {str(layer): reason for layer, reason in _skipped.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """The main process adds the skipped layers of a worker process."""
    skipped = getattr(node, "workeroutput", {}).get("skipped_layers", {})
    _skipped.update({int(layer): reason for layer, reason in skipped.items()})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the layers that did not run."""
    if _skipped:
        terminalreporter.section("LAYERS THAT DID NOT RUN", sep="!", red=True, bold=True)
        for layer, reason in sorted(_skipped.items()):
            terminalreporter.write_line(f"layer {layer}: {reason}", red=True)


def _root_missing() -> str | None:
    if not sys.platform.startswith("linux"):
        return "this is no Linux"
    return None if os.geteuid() == 0 else "not root (run it with sudo)"


def _tools_missing(*tools: str) -> str | None:
    absent = [tool for tool in tools if shutil.which(tool) is None]
    if not absent:
        return None
    packages = sorted({PACKAGES.get(tool, tool) for tool in absent})
    return f"no {', '.join(absent)} (apt-get install {' '.join(packages)})"


def _refused(*argv: str) -> str | None:
    try:
        commands.run(*argv)
    except (OSError, commands.CommandFailedError) as error:
        return f"no namespaces: {str(error).splitlines()[-1]}"
    return None


def _overlay_missing() -> str | None:
    try:
        overlay.workspace()
    except OSError as error:
        return str(error)
    return None


def _groups_missing() -> str | None:
    mounts = overlay.cgroup_mounts()
    if not mounts:
        return "no cgroup2 hierarchy is mounted"
    for mount in mounts:
        probe = mount / f"{overlay.PREFIX}probe-{os.getpid()}"
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            return f"no control groups: {error}"
    return None


def _emulation_missing() -> str | None:
    # Not at the top: the other layers do not need uv.
    from tests.lab import arm64

    try:
        arm64.register()
    except (OSError, commands.CommandFailedError) as error:
        return f"no emulation (apt-get install qemu-user-static binfmt-support): {error}"
    return None
