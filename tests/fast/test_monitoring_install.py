"""`monitoring install`: Debian's Prometheus with our files, and nothing of a Prometheus of others touched."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from sparkinstall import layout
from sparkinstall.core import catalogue
from sparkinstall.errors import BadUsage, Blocked
from sparkinstall.layout import EXPORTER_UNIT, PROMETHEUS_CONFIG, PROMETHEUS_RULES, PROMETHEUS_UNIT, drop_in_path
from sparkinstall.node import Node
from sparkinstall.probes import Finding
from sparkinstall.probes.monitoring import probes
from sparkinstall.resources import Conflict, Drift, Ok, Unknown, state_of
from sparkinstall.resources.debian_service import DropIn, NoOther, OwnService, PackageUser, remove_user
from sparkinstall.resources.packages import STATUS
from sparkinstall.system import Undo
from tests.support.nodes import node_of, node_with, system_of
from tests.support.recording import RecordingSystem
from tests.support.rehearsals import in_this_process, output_of

ON: dict[str, Any] = {"monitoring__prometheus": True}
INSTALLED = {
    STATUS: b"Package: prometheus\nStatus: install ok installed\n\n"
    b"Package: prometheus-node-exporter\nStatus: install ok installed\n"
}
OURS = {drop_in_path(unit): b"# created by sparkinstall.\n" for unit in (PROMETHEUS_UNIT, EXPORTER_UNIT)}
JOURNAL = "/var/lib/sparkinstall/journal.jsonl"


def rehearsed(root: Path, role: str = "single", **settings: Any) -> dict[str, str]:
    """The files that a rehearsal writes, by their paths."""
    on = system_of(root)
    node = node_of(root, role, **ON, **settings)
    if node.api_key == layout.API_KEY:
        (root / "etc").mkdir()
        (root / "etc/sparkinstall-api-key").write_text("secret-of-a-test-0123456789")
    for each in catalogue.named("monitoring").resources(node):
        if isinstance(state_of(each, on), Drift):
            each.apply(on)
    paths = (*OURS, PROMETHEUS_CONFIG, PROMETHEUS_RULES)
    return {path: (root / path[1:]).read_text() for path in paths if (root / path[1:]).exists()}


def test_prometheus_listens_on_loopback_and_scrapes_this_node(tmp_path: Path) -> None:
    files = rehearsed(tmp_path, monitoring__port=9191, monitoring__days=3, monitoring__ttft_ms=700)
    unit = files[drop_in_path(PROMETHEUS_UNIT)]
    # An empty line first: else systemd would refuse a second command.
    assert "\nExecStart=\nExecStart=/usr/bin/prometheus " in unit
    assert "--web.listen-address=127.0.0.1:9191\n" in unit and "retention.time=3d " in unit
    assert "--web.listen-address=127.0.0.1:9100 " in files[drop_in_path(EXPORTER_UNIT)]
    jobs = msgspec.yaml.decode(files[PROMETHEUS_CONFIG])["scrape_configs"]
    assert [each["static_configs"][0]["targets"] for each in jobs] == [["127.0.0.1:8000"], ["127.0.0.1:9100"]]
    assert "authorization" not in files[PROMETHEUS_CONFIG]
    assert "p95 > 0.7" in files[PROMETHEUS_RULES] and "p95 > 0.25" in files[PROMETHEUS_RULES]


def test_alerts_without_limits_are_left_out(tmp_path: Path) -> None:
    files = rehearsed(tmp_path, monitoring__ttft_ms=0)
    assert "ttft-high" not in files[PROMETHEUS_RULES] and "itl-high" in files[PROMETHEUS_RULES]


def test_key_of_the_api_is_a_credential_and_in_no_file_of_ours(tmp_path: Path) -> None:
    files = rehearsed(tmp_path, serving__model="m", serving__allow="192.168.1.0/24")
    assert "\nLoadCredential=api-key:/etc/sparkinstall-api-key\n" in files[drop_in_path(PROMETHEUS_UNIT)]
    (vllm, node) = msgspec.yaml.decode(files[PROMETHEUS_CONFIG])["scrape_configs"]
    assert vllm["authorization"] == {"credentials_file": "/run/credentials/prometheus.service/api-key"}
    assert "authorization" not in node
    assert not any("secret-of-a-test" in text for text in files.values())


def test_generated_key_that_is_not_there_yet_waits_for_serving(tmp_path: Path) -> None:
    node = node_of(tmp_path, serving__model="m", serving__allow="192.168.1.0/24", **ON)
    states = [state_of(each, system_of(tmp_path)) for each in catalogue.named("monitoring").resources(node)]
    assert [each.waits_for for each in states if isinstance(each, Unknown)] == ["serving"]


def test_heads_prometheus_asks_workers_whose_exporter_listens_on_the_link(tmp_path: Path) -> None:
    head = rehearsed(tmp_path / "head", "head")
    targets = msgspec.yaml.decode(head[PROMETHEUS_CONFIG])["scrape_configs"][1]["static_configs"][0]["targets"]
    assert targets == ["127.0.0.1:9100", "192.168.100.11:9100"]
    worker = rehearsed(tmp_path / "worker", "worker")
    assert worker.keys() == {drop_in_path(EXPORTER_UNIT)}
    assert "--web.listen-address=192.168.100.11:9100 " in worker[drop_in_path(EXPORTER_UNIT)]


# --- what others have installed


@pytest.mark.parametrize(
    ("files", "listening", "message"),
    [
        (INSTALLED, "", "the package prometheus is installed already, and not by sparkinstall"),
        ({}, "LISTEN 0 4096 *:9090 *:*\n", "port 9090 is in use by another program"),
        ({}, "LISTEN 0 4096 127.0.0.1:19090 *:*\n", ""),
        ({**INSTALLED, **OURS}, "LISTEN 0 4096 127.0.0.1:9090 *:*\n", ""),
    ],
    ids=["installed", "port", "another port", "ours"],
)
def test_prometheus_of_others_is_a_conflict(files: dict[str, bytes], listening: str, message: str) -> None:
    state = NoOther("prometheus", 9090, "give it our files").check(RecordingSystem(files, {"ss": listening}))
    assert isinstance(state, Conflict if message else Ok)
    assert getattr(state, "message", "") == message and getattr(state, "hint", "give") != ""


def test_node_exporter_of_others_is_left_as_it_is() -> None:
    on, inputs = RecordingSystem(INSTALLED), lambda _: ()
    drop_in = DropIn(drop_in_path(EXPORTER_UNIT), "any", lambda _: {}, unit=EXPORTER_UNIT, optional=True)
    service = OwnService(EXPORTER_UNIT, inputs, "/noted")
    for each in (drop_in, service):
        assert isinstance(each.check(on), Ok)
        each.apply(on)
    assert on.changed == []


def test_user_of_the_package_is_removed_only_if_the_package_made_it() -> None:
    user, there = PackageUser("prometheus"), {"/etc/passwd": b"root:x:0:0::/root:/bin/sh\nprometheus:x:104:106::/:/x\n"}
    bare = RecordingSystem({"/etc/passwd": b"root:x:0:0::/root:/bin/sh\n"})
    assert isinstance(user.check(bare), Drift) and isinstance(user.check(RecordingSystem(there)), Ok)
    user.apply(bare)
    assert bare.changed == ["promise user user:prometheus"]
    bare.files[JOURNAL] = b'"subject": "user:prometheus"'
    assert isinstance(user.check(bare), Ok)
    records, on = [Undo("user", user.key, {"kind": "absent"}, {"name": "prometheus"})], RecordingSystem(there)
    assert remove_user(records, on).outcome == "removed" and on.changed == ["userdel prometheus"]
    assert remove_user(records, bare).outcome == "nothing"


# --- probes


def looked(node: Node, listening: str, files: dict[str, bytes]) -> list[Finding]:
    answers = {"systemctl show": "ActiveState=active\n", "ss": listening}
    return [each.look(RecordingSystem(files, answers)) for each in probes(node, "")]


def test_probes_tell_where_the_services_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    node = node_with(cluster__role="single", **ON)
    both = "LISTEN 0 4096 127.0.0.1:9090 *:*\nLISTEN 0 4096 127.0.0.1:9100 *:*\n"
    assert [each.verdict for each in looked(node, both, OURS)] == ["pass", "pass"]
    prometheus, exporter = looked(node, both.replace("127.0.0.1:9090", "*:9090"), OURS)
    assert (prometheus.verdict, prometheus.found, exporter.verdict) == ("fail", "it listens on *:9090", "pass")
    assert looked(node, "", {})[1].found.endswith("others have installed it")
    monkeypatch.setattr("sparkinstall.probes.monitoring._PATIENCE", 0)
    assert [each.verdict for each in looked(node, "", OURS)] == ["fail", "fail"]


# --- the verb


def test_monitoring_install_in_a_rehearsal_is_undone_without_a_trace(tmp_path: Path) -> None:
    root = tmp_path / "node"
    done = in_this_process("monitoring", "install", "--slo", "ttft=1s", "--root", root)
    assert done.returncode == 0, output_of(done)
    rules = (root / PROMETHEUS_RULES[1:]).read_text()
    assert "p95 > 1" in rules and "itl-high" not in rules
    assert in_this_process("monitoring", "uninstall", "--root", root).returncode == 0
    assert not root.exists()


def test_monitoring_uninstall_asks_only_if_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, asked = tmp_path / "node", list[str]()
    monkeypatch.setattr("sparkinstall.cli.monitoring.confirm", lambda question, **_: asked.append(question))
    nothing = in_this_process("monitoring", "uninstall", "--root", root)
    assert (nothing.returncode, asked) == (0, []), output_of(nothing)
    assert nothing.stdout.startswith("Nothing to undo: Prometheus with node_exporter is not installed.")
    assert in_this_process("monitoring", "install", "--root", root).returncode == 0
    assert in_this_process("monitoring", "uninstall", "--root", root).returncode == 0
    assert len(asked) == 1 and not root.exists()


def test_monitoring_uninstall_keeps_the_timer_of_health(tmp_path: Path) -> None:
    root = tmp_path / "node"
    assert in_this_process("health", "--install", "--root", root).returncode == 0
    assert in_this_process("monitoring", "install", "--root", root).returncode == 0
    assert in_this_process("monitoring", "uninstall", "--root", root).returncode == 0
    assert (root / "etc/systemd/system/sparkinstall-health.timer").is_file()
    assert in_this_process("health", "--uninstall", "--root", root).returncode == 0
    assert not root.exists()


def test_monitoring_install_where_prometheus_is_installed_already_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "node"
    (root / "var/lib/dpkg").mkdir(parents=True)
    (root / STATUS[1:]).write_bytes(INSTALLED[STATUS])
    done = in_this_process("monitoring", "install", "--root", root)
    assert done.returncode == Blocked.exit_code
    assert "is installed already" in done.stderr and "monitoring render scrape" in done.stderr
    assert [path.name for path in root.rglob("*") if path.is_file()] == ["status"]


@pytest.mark.parametrize("words", [("--port", "0"), ("--days", "0"), ("--slo", "soon")], ids=" ".join)
def test_monitoring_install_with_a_wrong_value_is_refused(words: tuple[str, ...], tmp_path: Path) -> None:
    run = in_this_process("monitoring", "install", *words, "--root", tmp_path / "node")
    assert run.returncode == BadUsage.exit_code, output_of(run)
    assert not (tmp_path / "node").exists()
