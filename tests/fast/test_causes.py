"""Why a program failed: a full disk, a missing right, a missing systemd and a network failure are told apart."""

import os
from pathlib import Path

import pytest

from sparkinstall import causes
from sparkinstall.causes import cause_of, program_of
from tests.support.mounts import fill, small_disk

APT = ("sudo", "-n", "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-y", "install", "git")


@pytest.mark.parametrize(
    ("command", "program"),
    [
        (APT, "apt-get"),
        (("env", "A=b", "C=d e", "/usr/bin/apt-get", "update"), "apt-get"),
        (("sudo", "-n", "/usr/sbin/netplan", "apply"), "netplan"),
        (("sudo", "-u", "spark", "git", "clone"), "git"),
        (("timeout", "-k", "2", "30", "iperf3", "-s"), "iperf3"),
        (("env", "-u", "HOME", "timeout", "5s", "make"), "make"),
        (("unshare", "--map-root-user", "--net", "/usr/sbin/nft", "-c", "x"), "nft"),
        (("sudo", "-n", "sh", "-c", "set -eu\n...", "rollback.sh", "arm"), "rollback.sh"),
        (("sh", "-ec", "/usr/sbin/netplan apply\nip link set x up"), "netplan"),
        (("make", "-j4"), "make"),
        (("env",), "env"),
    ],
)
def test_program_of_a_command_is_not_a_wrapper(command: tuple[str, ...], program: str) -> None:
    assert program_of(command) == program


@pytest.mark.parametrize(
    ("argv", "code", "said", "kind"),
    [
        # Full disks, in the words of dpkg, apt, uv, git, tar, sh and Python.
        (APT, 100, "dpkg: error: failed to write status database: No space left on device", "full"),
        (APT, 100, "E: You don't have enough free space in /var/cache/apt/archives/.", "full"),
        (("uv", "pip"), 2, "error: failed to write\n  Caused by: No space left on device (os error 28)", "full"),
        (("git", "clone"), 128, "fatal: write error: No space left on device", "full"),
        (("tar", "-x"), 2, "tar: x: Cannot write: No space left on device", "full"),
        (("cat",), 1, "cat: write error: Disk quota exceeded", "full"),
        (("netplan", "apply"), 1, "Traceback\nOSError: [Errno 28] No space left on device", "full"),
        # Not a disk: the kernel's watches of files.
        (("systemctl", "restart", "x"), 1, "Failed to add a watch: No space left on device", ""),
        # sudo refused, so the program did not run.
        (("sudo", "-n", "netplan", "apply"), 1, "sudo: a password is required", "sudo"),
        (("sudo", "-n", "netplan", "apply"), 1, "sudo: interactive authentication is required", "sudo"),
        (("sudo", "-n", "nft"), 1, "Sorry, user spark is not allowed to execute '/usr/sbin/nft' as root on n.", "sudo"),
        (("sudo", "-n", "nft"), 1, "spark is not in the sudoers file.", "sudo"),
        (("sudo", "-n", "nft"), 1, "sudo: I'm sorry spark. I'm afraid I can't do that", "sudo"),
        (("sudo", "-n", "nft"), 1, 'sudo: The "no new privileges" flag is set, which prevents sudo', "sudo"),
        # The same words without sudo are the program's own.
        (("nft",), 1, "sudo: a password is required", ""),
        # systemd.
        (("systemctl", "daemon-reload"), 1, "System has not been booted with systemd as init system", "systemd"),
        (("systemctl", "restart", "x"), 1, "Failed to connect to system scope bus via local transport", "systemd"),
        (("systemctl", "restart", "x"), 1, "Failed to connect to bus: Connection refused", "systemd"),
        (("sh", "-c", "x", "rollback.sh"), 1, "rollback.sh: 88: systemd-run: not found", "systemd"),
        (("systemctl", "x"), 127, "systemctl: not found", "systemd"),
        # Other programs that are missing.
        (("sudo", "-n", "netplan", "apply"), 1, "sudo: netplan: command not found", "missing"),
        (("netplan", "apply"), 127, "netplan: not found", "missing"),
        # The network, in the words of apt, git and uv; and what only looks like it.
        (APT, 100, "E: Failed to fetch http://d/x  Temporary failure resolving 'deb.debian.org'", "network"),
        (APT, 100, "E: Failed to fetch http://d/x  Could not connect to 127.0.0.1:9 (127.0.0.1).", "network"),
        (("git", "clone"), 128, "fatal: unable to access 'https://x/': Could not resolve host: x", "network"),
        (("uv", "pip"), 2, "error: error sending request for url: dns error", "network"),
        (("uv", "pip"), 2, "error sending request for url\ntunnel error: proxy authorization required", "network"),
        (("git", "clone"), 128, "unable to access 'https://x/': Received HTTP code 407 from proxy", "network"),
        # A server was reached, but what it sent is not trusted: the clock, or a proxy.
        (("uv", "pip"), 2, "error sending request for url\ninvalid peer certificate: UnknownIssuer", "certificate"),
        (("git", "clone"), 128, "unable to access 'https://x/': SSL certificate problem: expired", "certificate"),
        (APT, 100, "E: Release file for http://x/InRelease is not valid yet (invalid for another 3h).", "certificate"),
        (APT, 100, "Certificate verification failed: The certificate is NOT trusted.", "certificate"),
        (("make",), 2, "no certificate here", ""),
        # A server was reached, and refused.
        (("uv", "pip"), 2, "cause: HTTP status client error (404 File not found) for url (http://h/x.whl)", "server"),
        (("uv", "pip"), 2, "cause: HTTP status client error (403 Forbidden) for url (http://h/x.whl)", "server"),
        (("uv", "pip"), 2, "HTTP status server error (503 Service Unavailable) for url (http://h/)", "server"),
        (APT, 100, "E: Failed to fetch http://d/x.deb  404  Not Found [IP: 10.0.0.1 80]", "server"),
        (APT, 100, "Err:3 http://d x Release\n  403  Forbidden [IP: 10.0.0.1 80]", "server"),
        (("git", "clone"), 128, "unable to access 'https://h/': The requested URL returned error: 503", "server"),
        (("git", "clone"), 128, "fatal: repository 'http://h/x/' not found", "server"),
        (("git", "clone"), 128, "fatal: Authentication failed for 'https://h/x/'", "server"),
        (("python3", "-m", "pip", "download"), 1, "ERROR: HTTP error 404 while getting http://h/x.whl", "server"),
        (("pip", "x"), 1, "HTTP error 503 Server Error: Service Unavailable for url: http://h/x", "server"),
        (("curl", "-f"), 22, "curl: (22) The requested URL returned error: 404", "server"),
        (("make",), 2, "x.c:404 Client Error", ""),
        # What came is not what was asked for.
        (("uv", "pip"), 2, "error: Failed to download `x==1`\n  cause: Hash mismatch for `x==1`", "damaged"),
        (APT, 100, "E: Failed to fetch http://d/x.deb  Hash Sum mismatch", "damaged"),
        (APT, 100, "E: Failed to fetch http://d/x  File has unexpected size (3 != 5).", "damaged"),
        (("pip", "x"), 1, "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "damaged"),
        (("git", "clone"), 128, "fatal: early EOF\nfatal: fetch-pack: invalid index-pack output", "damaged"),
        (APT, 100, "W: GPG error: http://d x InRelease: the public key is not available: NO_PUBKEY 3B4F", "key"),
        (APT, 100, "E: The repository 'http://d x InRelease' is not signed.", "key"),
        # A file in the place of uv's cache.
        (("uv", "pip"), 2, "Failed to initialize cache at `/c`\n cause: `/c`: File exists (os error 17)", "cache"),
        (("uv", "pip"), 2, "Failed to initialize cache at `/c`\n Permission denied (os error 13)", "permission"),
        # Too little of what a process may use.
        (("make",), 2, "make: fork: Resource temporarily unavailable", "limit"),
        (("cc1plus",), 1, "virtual memory exhausted: Cannot allocate memory", "limit"),
        (("uv", "pip"), 2, "error: Too many open files (os error 24)", "limit"),
        (APT, 100, "sudo: unable to resolve host n: Name or service not known\nE: broken", ""),
        (("make",), 2, "collect2: error: Connection refused by the linker", ""),
        # Locks, read-only file systems, rights, signals, time.
        (APT, 100, "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 7 (apt)", "busy"),
        (("dpkg", "--configure", "-a"), 2, "dpkg: error: dpkg frontend lock was locked by another process", "busy"),
        (APT, 100, "E: Could not open lock file /x - open (30: Read-only file system)", "read-only"),
        (APT, 100, "E: Could not open lock file /x - open (13: Permission denied)\nE: are you root?", "permission"),
        (("make",), -9, "", "killed"),
        (("sh", "-c", "x", "sh"), 137, "Killed", "killed"),
        (("make",), 124, "", "late"),
        # Nothing was observed, so nothing is claimed.
        (("make",), 2, "x.cu(7): error: identifier is undefined", ""),
        (("make",), 1, "", ""),
    ],
)  # fmt: skip
def test_cause_of_a_failure_is_what_was_observed(argv: tuple[str, ...], code: int, said: str, kind: str) -> None:
    found = cause_of(argv, code, f"first line\n{said}\n")
    assert (found.kind if found else "") == kind
    if found:
        assert found.why and "run the same command again" in found.hint


@pytest.mark.parametrize(
    ("program", "said", "advice"),
    [
        ("uv", "HTTP status client error (403 Forbidden) for url (x)", "proxy or mirror"),
        ("uv", "HTTP status server error (503 Service Unavailable) for url (x)", "wait a few minutes"),
        ("uv", "HTTP status client error (404 Not Found) for url (x)", "check the address"),
        ("apt-get", "E: Failed to fetch http://d/x.deb  404  Not Found [IP: 10.0.0.1 80]", "`sudo apt-get update`"),
        ("apt-get", "E: Failed to fetch http://d/x.deb  Hash Sum mismatch", "`sudo apt-get clean`"),
        ("apt-get", "E: x: NO_PUBKEY 3B4F", "install the key"),
        ("uv", "Failed to initialize cache at `/my/cache`\n`/my/cache`: File exists", "`rm -r /my/cache`"),
    ],
)
def test_cause_at_a_server_or_cache_says_what_to_do(program: str, said: str, advice: str) -> None:
    found = cause_of((program,), 1, said)
    assert found is not None and advice in found.hint


def test_cause_of_a_refusal_names_the_program_and_how_to_allow_it() -> None:
    command = ("sudo", "-n", "netplan", "apply")
    denied = cause_of(command, 1, "Sorry, user a is not allowed to execute 'x' as root on n.")
    assert denied and "let this user run `netplan` with sudo" in denied.hint and "sudo -v" not in denied.hint
    asks = cause_of(command, 1, "sudo: a password is required")
    assert asks and "sudo -v" in asks.hint and "`netplan`" in asks.hint


@pytest.mark.parametrize("named", [True, False], ids=["the program names it", "it is where the program writes"])
def test_cause_on_a_full_file_system_names_the_place(tmp_path: Path, named: bool) -> None:
    """dash says only `I/O error` when its printf meets a full disk."""
    with small_disk(tmp_path / "disk", "16k") as disk:
        fill(disk / "filler")
        said = f"sh: cannot create {disk}/x/y: No space left on device" if named else "sh: 1: printf: I/O error"
        found = cause_of(("sh", "-c", "x", "arm.sh"), 1, said, () if named else (f"{disk}/not/there",))
        assert found is not None and found.kind == "full"
        assert str(disk) in found.why and "0 KiB left" in found.why


def test_cause_with_room_on_the_disk_is_not_a_full_disk(tmp_path: Path) -> None:
    assert cause_of(("sh", "-c", "x", "arm.sh"), 1, "sh: 1: printf: I/O error", (str(tmp_path), "/proc")) is None


@pytest.mark.parametrize("booted", [True, False])
def test_cause_in_systemd_says_whether_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, booted: bool) -> None:
    monkeypatch.setattr(causes, "BOOTED", str(tmp_path / "systemd"))
    if booted:
        os.mkdir(tmp_path / "systemd")
    found = cause_of(("systemctl", "start", "x"), 1, "Failed to connect to bus: No such file or directory")
    assert found is not None
    assert ("does not exist" in found.why, "PID 1" in found.hint) == (not booted, not booted)


@pytest.mark.parametrize("place", ["", ".", "/", "//", "/.", "no/such/folder", "/no/such/", "x" * 300, "/dev/null/x"])
def test_cause_with_a_strange_place_ends(place: str) -> None:
    found = cause_of(("sh",), 1, f"sh: cannot create {place}: No space left on device", (place,))
    assert found is not None and found.kind == "full"
    assert causes.no_inode_left(place) is False
