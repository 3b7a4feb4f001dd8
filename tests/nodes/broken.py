"""Parts of a node that are broken on purpose during a test, and the result of `verify`."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.lab.node import FreshNode
from tests.nodes.fresh import sparkinstall

ENV_FILE = "/opt/sparkinstall/env/single-node.env"
SITE = "/opt/sparkinstall/venv/lib/python3.13/site-packages"
TOOL = "/home/spark/.local/share/sparkinstall/tool"
UNIT = "/etc/systemd/system/vllm.service"
UP = "/run/vllm/up"
# Like the unit of the step `serving`, with a program instead of vLLM that needs no GPU.
SERVICE = """\
[Service]
Type=exec
User=spark
EnvironmentFile={env_file}
{more}
RuntimeDirectory=vllm
ExecStart=/opt/sparkinstall/venv/bin/python -c "import time; {program}; open('{up}', 'w').close(); time.sleep(9999)"
"""


@contextmanager
def changed(node: FreshNode, path: str, *edits: str) -> Iterator[None]:
    """Edit a file with sed, keep its time, and restore it at the end of the context."""
    kept = "/run/kept"
    node.run("cp", "-a", path, kept)
    words = [word for edit in edits for word in ("-e", edit)]
    node.run("sed", "-i", *words, path)
    node.run("touch", "-r", kept, path)
    assert node.run("cmp", "-s", kept, path, check=False).returncode == 1, "the edit changed nothing"
    try:
        yield
    finally:
        node.run("cp", "-a", kept, path)


def probe_result(node: FreshNode, probe: str) -> tuple[str, str]:
    """The verdict and the finding of a probe, on a node that serves a model."""
    model = ("--set", "serving.model=/srv/model")
    answer = json.loads(sparkinstall(node, "verify", "--only", probe, *model, "--json", check=False).stdout)
    (found,) = answer["data"]["probes"]
    assert answer["exit_code"] == (3 if found["verdict"] == "fail" else 0)
    return found["verdict"], found["found"]


def reinstall(node: FreshNode, package: str) -> None:
    """Reinstall the same version from the wheelhouse, as a user with a package manager."""
    uv, python = f"{TOOL}/bin/uv", f"{SITE.partition('/lib/')[0]}/bin/python"
    source = ("--no-cache", "--offline", "--no-index", "--find-links", "/home/spark/.cache/sparkinstall/wheels")
    same = node.run("sh", "-c", f"basename {SITE}/{package}-*.dist-info .dist-info").stdout.strip().replace("-", "==")
    node.run(uv, "pip", "install", *source, "--reinstall", "--no-deps", "--python", python, same, user="spark")


def serve(node: FreshNode, more: str = "", program: str = "pass", seconds: float = 600) -> None:
    """Restart `vllm.service` with `more` in its unit and the Python statements `program` in its process."""
    node.write(UNIT, SERVICE.format(env_file=ENV_FILE, more=more, program=program, up=UP))
    node.run("systemctl", "daemon-reload")
    node.run("systemctl", "restart", "vllm.service")
    until = time.monotonic() + seconds
    while node.run("test", "-e", UP, check=False).returncode:
        assert time.monotonic() < until, node.run("journalctl", "-u", "vllm.service", "--no-pager").stdout
        time.sleep(0.2)


def stop_serving(node: FreshNode) -> None:
    """Remove the service."""
    node.run("systemctl", "stop", "vllm.service")
    node.run("rm", UNIT)
    node.run("systemctl", "daemon-reload")
