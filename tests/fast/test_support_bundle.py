"""`support-bundle`: what helps and nothing personal, also on a broken node."""

import io
import json
import os
import random
import stat
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sparkinstall.cli import support_bundle
from sparkinstall.errors import NeedsRoot, Storage
from sparkinstall.support import bundle, identity
from sparkinstall.support.mask import Known, Mask
from sparkinstall.system import Result
from sparkinstall.system.local import LocalReader
from tests.support.mounts import read_only
from tests.support.nodes import NODE
from tests.support.rehearsals import envelope, in_this_process, output_of, sparkinstall, tree

GOOD, FAILED, USAGE = 0, 1, 2
RUN = "20261121-163137-7704"
SECRETS = {
    "host": "livingroom", "user": "marianne", "full name": "Marianne Musterfrau", "serial": "1324500099999",
    "machine id": "0123456789abcdef0123456789abcdef", "token": "very-secret-token-1", "short token": "s3cret",
    "hub token": "hf_abcdefghijklmnopqrstuv", "lan": "10.11.12.13", "wan": "203.0.113.77", "ipv6": "2a02:8071:1:2::3",
    "mac": "48:b0:2d:aa:bb:cc", "guid": "e89e:4903:0012:3456", "uuid": "12345678-1234-1234-1234-123456789abc",
    "mail": "marianne@example.com", "wifi": "Casa Verde", "wifi key": "correct horse",
    "ray": "ray-token-of-the-cluster",
    "shadow": "$6$saltsalt$hash", "private key": "MIIEvQIBADANBg", "prompt": "my private question",
    "answer": "it's my private answer",
    "answer's tokens": "31337, 4242", "wpa": "teacher-17",
}  # fmt: skip
LOG = (
    "Nov 21 16:35:46 {host} vllm[1]: \x1b[36m(EngineCore pid=1)\x1b[0m {user} at {lan}, {wan} and [{ipv6}]:80\n"
    "link/ether {mac} node_guid: {guid} GPU-{uuid} {mail} SSID: {wifi}\n"
    "Authorization: Bearer {token} api_key={short token} {hub token} /home/{user}/.cache SN: {serial}\n"
    "Received request x: prompt: '{prompt}', params: SamplingParams(n=1)\n"
    'Generated response x (streaming complete): output: "{answer}", output_token_ids: [{answer\'s tokens}], '
    "finish_reason: stop\n"
    "Generated response y: output: '{prompt} CUDA out of memory\n"
    "{host}:1:9 [0] bootstrap.cc:251 NCCL WARN Message truncated : received 176 bytes instead of 172\n"
)


def filled(text: str) -> str:
    for name, secret in SECRETS.items():
        text = text.replace("{" + name + "}", secret)
    return text


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A rehearsal with secrets, personal data and broken files."""
    root = tmp_path / "node"
    source = "/home/{user}/nccl.tar.gz"
    settings = {"nccl.source": source, "nccl.sha256": "0" * 64, "nccl.version": "2.28.9"}
    record = {
        "at": "2026-11-21T16:31:37Z", "n": 1, "run": RUN, "step": "network", "v": 1,
        "undo": {"kind": "path", "subject": "/etc/{user}.conf", "before": {"of": "{host}\n{user}"}, "after": {}},
    }  # fmt: skip
    files = {
        "etc/hostname": "{host}\n",
        "etc/passwd": "{user}:x:1000:1000:{full name},,,:/home/{user}:/bin/bash\n",
        "etc/shadow": "{user}:{shadow}:1::::::\n",
        "etc/machine-id": "{machine id}\n",
        "etc/dgx-release": (
            'DGX_PRETTY_NAME="NVIDIA DGX Spark"\nDGX_SERIAL_NUMBER="{serial}"\n'
            "DGX_SWBUILD_VERSION=7.2.3\nDGX_OTA_VERSION=7.6.0\n"
        ),
        "etc/netplan/40-cx7.yaml": "network: {ethernets: {enp1s0f0np0: {addresses: [192.168.100.10/24]}}}\n",
        "etc/netplan/90-{user}.yaml": (
            'network:\n  wifis:\n    wlP9s9:\n      access-points:\n        "{wifi}":\n          auth:\n'
            "            identity: {wpa}\n            password: {wifi key}\n"
        ),
        "etc/systemd/system/vllm.service": "[Service]\nUser={user}\nEnvironment=HF_TOKEN={token}\n",
        "etc/systemd/system/vllm.service.d/more.conf": "[Service]\nEnvironment=NGC_API_KEY={short token}\n",
        "opt/sparkinstall/env/single-node.env": 'HF_TOKEN="{token}"\nVLLM_HOST_IP={lan}\nNCCL_DEBUG=INFO\n',
        "opt/sparkinstall/env/server.key": "-----BEGIN PRIVATE KEY-----\n{private key}\n-----END PRIVATE KEY-----\n",
        "opt/sparkinstall/ray-token": "{ray}\n",
        "opt/sparkinstall/fp8.json": '{"fallback": true, "why": "sm_120a only"}',
        f"var/lib/sparkinstall/logs/{RUN}/environment.log": LOG,
        f"var/lib/sparkinstall/logs/{RUN}/of-{{user}}.log": "{user} was here\n",
        "var/lib/sparkinstall/journal.jsonl": json.dumps(record) + "\n{damaged {user}\n",
        "var/lib/sparkinstall/options.json": json.dumps({"settings": settings}),
    }  # fmt: skip
    for name, text in files.items():
        path = root / filled(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(filled(text))
    (root / "opt/sparkinstall/env/evil.env").symlink_to("../../../etc/shadow")
    os.mkfifo(root / f"var/lib/sparkinstall/logs/{RUN}/pipe.log")
    return root


def members_of(path: Path) -> dict[str, bytes]:
    """The members by name, after checks that every archive must pass."""
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with tarfile.open(path, "r:gz") as archive:
        members = archive.getmembers()
        for each in members:
            assert each.isreg() and each.mode == 0o644 and (each.uid, each.gid, each.uname) == (0, 0, "")
            assert each.name.startswith(f"{bundle.TOP}/") and ".." not in each.name.split("/")
        assert [each.name for each in members] == sorted(each.name for each in members)
        contents = {each.name.removeprefix(f"{bundle.TOP}/"): archive.extractfile(each) for each in members}
        return {name: file.read() for name, file in contents.items() if file}


def bundled(root: Path, *options: str | Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    path = root.parent / "out.tar.gz"
    run = in_this_process("support-bundle", "--root", root, "--level", "static", "--output", path, "--json", *options)
    assert run.returncode == GOOD, output_of(run)
    data = envelope(run)["data"]
    contents = members_of(path)
    assert data["path"] == str(path) and data["bytes"] == path.stat().st_size
    assert {each["name"]: each["bytes"] for each in data["members"]} == {k: len(v) for k, v in contents.items()}
    return contents, data


# --- the members


def test_bundle_contains_no_secret(node: Path) -> None:
    contents, data = bundled(node)
    for name, content in {**contents, "the answer": json.dumps(data["missing"]).encode()}.items():
        text = f"{name}\n{content.decode()}".lower()
        found = [kind for kind, secret in SECRETS.items() if secret.lower() in text]
        assert not found, f"{name}: {found}"


def test_bundle_contains_logs_facts_and_results(node: Path) -> None:
    contents, _ = bundled(node)
    assert set(contents) == {
        "README.txt", "decisions/fp8.json", "env/single-node.env", "facts.json", "journal.jsonl",
        f"logs/{RUN}/environment.log", f"logs/{RUN}/of-user-1.log", "netplan/40-cx7.yaml", "netplan/90-user-1.yaml",
        "preflight.json", "state.json", "settings.json", "units/vllm.service", "units/vllm.service.d/more.conf",
        "verify.json", "diagnose.json",
    }  # fmt: skip
    log = contents[f"logs/{RUN}/environment.log"].decode()
    assert "received 176 bytes instead of 172" in log and "\x1b" not in log
    assert "prompt: [hidden], params: SamplingParams(n=1)" in log
    # A cut answer that mentions a failure is no failure.
    diagnosed = contents["diagnose.json"].decode()
    assert "private" not in diagnosed and "cuda-out-of-memory" not in diagnosed
    assert "output: [hidden], output_token_ids: [hidden], finish_reason: stop" in log
    (known,) = [each for each in json.loads(contents["diagnose.json"])["found"] if each["fix"] == 1]
    (place,) = known["places"]
    assert (place["log"], place["line"]) == (f"logs/{RUN}/environment.log", 7)
    assert "received 176 bytes instead of 172" in place["text"] and known["hint"]
    assert "NCCL_DEBUG=INFO" in contents["env/single-node.env"].decode()
    assert "192.168.100.10/24" in contents["netplan/40-cx7.yaml"].decode()
    assert json.loads(contents["decisions/fp8.json"])["why"] == "sm_120a only"
    facts = json.loads(contents["facts.json"])
    assert facts["machine"]["release"] == "DGX OS 7.6.0 (factory image 7.2.3)"
    assert facts["machine"]["machine"] == "NVIDIA DGX Spark" and "DGX_SERIAL_NUMBER" not in facts["release"]
    assert {"checks", "probes", "fixes"} <= set(json.loads(contents["verify.json"]))
    assert json.loads(contents["settings.json"])["prefix"] == {"value": "/opt/sparkinstall", "source": "default"}


def test_bundle_masks_a_value_alike_in_all_members(node: Path) -> None:
    contents, _ = bundled(node)
    (own,) = {line.split("=")[1] for line in contents["env/single-node.env"].decode().splitlines() if "HOST_IP" in line}
    assert own.startswith("<ip-") and f"at {own}," in contents[f"logs/{RUN}/environment.log"].decode()


def test_bundle_of_a_damaged_journal_contains_the_damaged_line(node: Path) -> None:
    contents, _ = bundled(node)
    first, second = contents["journal.jsonl"].decode().splitlines()
    assert json.loads(first)["undo"]["before"]["of"].startswith("<host-")
    assert second.startswith("{damaged <user-")
    page = contents["README.txt"].decode().partition("What could not be read:")[2]
    assert "journal.jsonl line 2 cannot be read" in page


def test_bundle_readme_names_all_members(node: Path) -> None:
    contents, _ = bundled(node)
    page = contents["README.txt"].decode()
    assert all(f"  {name} " in page for name in contents)
    assert "Nothing was sent anywhere." in page and "Masked: " in page


def test_bundle_changes_nothing(node: Path) -> None:
    (node / f"var/lib/sparkinstall/logs/{RUN}/pipe.log").unlink()
    before = tree(node, bool)
    bundled(node)
    assert tree(node, bool) == before


# --- the file


def test_bundle_repeated_has_the_same_members(node: Path) -> None:
    first, _ = bundled(node)
    second, _ = bundled(node, "--yes")
    assert list(first) == list(second)


def test_bundle_replaces_a_file_only_with_yes(node: Path) -> None:
    path = node.parent / "out.tar.gz"
    path.write_text("another user's file")
    run = in_this_process("support-bundle", "--root", node, "--level", "static", "--output", path)
    assert run.returncode == USAGE and f"{path} already exists" in output_of(run) and "--yes" in output_of(run)
    assert path.read_text() == "another user's file"
    bundled(node, "--yes")


@pytest.mark.parametrize("name", ["no/such/folder.tar.gz", "."])
def test_bundle_with_an_impossible_path_is_refused(tmp_path: Path, name: str) -> None:
    run = in_this_process("support-bundle", "--root", tmp_path / "node", "--output", tmp_path / name)
    assert run.returncode == USAGE, output_of(run)


def test_bundle_in_a_read_only_folder_fails_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with read_only(tmp_path / "there"):
        run = in_this_process("support-bundle", "--root", tmp_path / "n", "--output", tmp_path / "there/x.tar.gz")
    assert run.returncode == FAILED and "`--output FILE.tar.gz`" in output_of(run)
    with pytest.raises(Storage, match=r"writing .*/x\.tar\.gz failed") as refused:
        support_bundle.write_bundle(tmp_path / "gone/x.tar.gz", b"x")
    assert "sparkinstall" not in refused.value.message, "the temporary name is not shown"


def test_bundle_without_output_is_written_to_the_current_folder(
    node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = in_this_process("support-bundle", "--root", node, "--level", "static")
    (path,) = tmp_path.glob("sparkinstall-support-*.tar.gz")
    contents = members_of(path)
    assert all(name in run.stdout for name in contents) and path.name in run.stdout
    assert "Nothing was sent anywhere." in run.stdout


# --- broken nodes


def test_bundle_without_an_installation_has_the_facts(tmp_path: Path) -> None:
    contents, data = bundled(tmp_path / "node")
    assert {"README.txt", "facts.json", "preflight.json", "settings.json", "verify.json"} <= set(contents)
    assert json.loads(contents["verify.json"])["error"]["code"] == "not-there"
    assert any("nothing is installed" in each for each in data["missing"])
    assert not (tmp_path / "node").exists()


def test_bundle_with_invalid_settings_names_them(node: Path) -> None:
    (node / "var/lib/sparkinstall/options.json").write_text('{"settings": {"stack": "0.99"}}')
    contents, data = bundled(node)
    assert "env/single-node.env" in contents
    assert any(each.startswith("settings: ") and "0.99" in each for each in data["missing"])


def test_bundle_with_a_crash_of_verify_contains_the_traceback(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise ZeroDivisionError(f"boom at {SECRETS['host']}")

    monkeypatch.setattr("sparkinstall.core.verify.verify", crash)
    contents, data = bundled(node)
    assert any("ZeroDivisionError" in line for line in json.loads(contents["verify.json"])["traceback"])
    assert any("ZeroDivisionError: boom at <host-" in each for each in data["missing"])


class Unreadable(LocalReader):
    """A node as an ordinary user without sudo can read it."""

    def names(self, path: str) -> tuple[str, ...]:
        if path.endswith("/logs"):
            raise PermissionError(13, "Permission denied", path)
        return super().names(path)

    def read(self, path: str) -> bytes | None:
        if path.startswith("/etc/netplan/"):
            raise NeedsRoot(f"only root can read {path}")
        return super().read(path)


def test_bundle_with_unreadable_files_names_them(node: Path) -> None:
    on = Unreadable(str(node))
    found = bundle.gather(NODE, on, Mask(identity.known(on)), {"verify.json": {"probes": []}}, ["settings: bad"])
    names = {member.name for member in found.members}
    assert {"env/single-node.env", "journal.jsonl", "facts.json"} <= names
    assert not [name for name in names if name.startswith(("logs/", "netplan/"))]
    assert "settings: bad" in found.missing
    assert [each for each in found.missing if "only root can read" in each and "40-cx7.yaml" in each]
    assert [each for each in found.missing if each.startswith("/var/lib/sparkinstall/logs: ")]


class WithoutSudo(LocalReader):
    """A node whose programs have these outputs, and where sudo asks for a password."""

    answers: Mapping[str, str] = {}

    @property
    def rehearsal(self) -> bool:
        return False

    def ask(
        self, *argv: str, timeout: float = 30, env: Mapping[str, str] | None = None, root: bool = False, stdin: str = ""
    ) -> Result:
        del timeout, env, stdin
        if root:
            return Result(argv, 1, "", "sudo: a password is required")
        known = next((answer for start, answer in self.answers.items() if " ".join(argv).startswith(start)), None)
        return Result(argv, 127 if known is None else 0, known or "", "")

    def real(self, path: str) -> str:
        return self.root + path


def test_bundle_contains_the_logs_of_the_services(node: Path) -> None:
    (node / "sys/class/net/enp1s0f0np0/device").mkdir(parents=True)
    (node / "sys/class/net/enp1s0f0np0/device/driver").symlink_to("../../../../bus/pci/drivers/mlx5_core")
    (node / "sys/class/net/lo").mkdir()
    on = WithoutSudo(str(node))
    on.answers = {
        "journalctl -u vllm.service": filled(LOG),
        "journalctl -u ray-head.service": "",
        "journalctl -k --boot=-1 -g NVRM": "2026-11-20 kernel: Unable to handle kernel paging request at 0\n",
        "journalctl -k -g NVRM": "2026-11-21 kernel: NVRM: Xid (PCI:000f:01:00): 79, GPU has fallen off the bus.\n",
        "ethtool -i enp1s0f0np0": "driver: mlx5_core\nfirmware-version: 28.45.4028\n",
        "ip -br link": filled("enp1s0f0np0 UP {mac} <BROADCAST>\n"),
    }
    found = bundle.gather(NODE, on, Mask(identity.known(on)), {})
    contents = {member.name: member.data.decode() for member in found.members}
    assert [name for name in contents if name.endswith(".log") and name.startswith("units/")] == [
        "units/kernel-of-previous-boot.log",
        "units/kernel.log",
        "units/vllm.service.log",
    ]
    assert "Message truncated" in contents["units/vllm.service.log"]
    assert not [secret for secret in SECRETS.values() if secret in contents["units/vllm.service.log"]]
    diagnosed = json.loads(contents["diagnose.json"])
    assert "units/vllm.service.log" in diagnosed["logs"]
    assert any(place["log"] == "units/kernel.log" for each in diagnosed["found"] for place in each["places"])
    programs = json.loads(contents["facts.json"])["programs"]
    assert set(programs) == {"ip -br link", "ethtool -i enp1s0f0np0"}
    assert "28.45.4028" in programs["ethtool -i enp1s0f0np0"] and "UP <mac-" in programs["ip -br link"]


def test_bundle_omits_netplan_files_with_bad_yaml(node: Path) -> None:
    (node / "etc/netplan/91-torn.yaml").write_text(f"network:\n wifis: [\n  access-points:\n   {SECRETS['wpa']}: x\n")
    contents, data = bundled(node)
    assert "netplan/91-torn.yaml" not in contents and "netplan/40-cx7.yaml" in contents
    assert any("left out" in each for each in data["missing"])


def test_bundle_truncates_long_logs_and_keeps_the_newest_runs(node: Path) -> None:
    noise, logs = random.Random(1), node / "var/lib/sparkinstall/logs"
    line = "".join(noise.choices("ghijkmnopqrst", k=199))
    for at in range(7):
        folder = logs / f"20261122-00000{at}-1"
        folder.mkdir()
        (folder / "nccl.log").write_text(f"{line}\n" * 15_000)
    started = time.process_time()
    contents, _ = bundled(node)
    assert time.process_time() - started < 60
    runs = sorted({name.split("/")[1] for name in contents if name.startswith("logs/")})
    assert runs == [f"20261122-00000{at}-1" for at in (4, 5, 6)]
    kept = contents["logs/20261122-000006-1/nccl.log"].decode().splitlines()
    assert kept[0] == "[truncated: only the end follows]" and set(kept[1:]) == {line}
    assert sum(map(len, contents.values())) < 8_000_000


def test_bundle_with_odd_member_names_keeps_them_in_its_folder(tmp_path: Path) -> None:
    odd = dict.fromkeys(("../../etc/x", "logs/a b\nc", "logs/a b\tc", "/abs"), "x")
    on = LocalReader(str(tmp_path))
    plain, found = (bundle.gather(NODE, on, Mask(Known()), results) for results in ({}, odd))
    with tarfile.open(fileobj=io.BytesIO(found.packed()), mode="r:gz") as archive:
        names = archive.getnames()
    assert len(names) == len(set(names)) == len(plain.members) + len(odd)
    assert not [name for name in names if ".." in name.split("/") or not name.isprintable() or "//" in name]


def test_bundle_of_this_machine_contains_program_output(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    run = sparkinstall("support-bundle", "--level", "static", "--output", path, "--json", XDG_CACHE_HOME=str(tmp_path))
    assert run.returncode == GOOD, output_of(run)
    facts = json.loads(members_of(path)["facts.json"])
    assert facts["programs"]["uname -a"].startswith("Linux <host-")
    assert facts["meminfo_kb"]["MemTotal"] > 0
