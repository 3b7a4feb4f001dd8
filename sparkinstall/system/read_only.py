"""The programs that a `Reader` may run: those that read, by their words, and can change nothing on the node."""

import re
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

Words = Sequence[str]


class MayChange(ValueError):
    """A `Reader` was given a command that is not known to be read-only: it belongs in `System.run`."""

    def __init__(self, argv: Words) -> None:
        super().__init__(f"`{' '.join(argv)[:200]}` is not on the list of read-only commands")


_READ_ALWAYS = {
    "apt-cache", "df", "dpkg-query", "ibv_devinfo", "nvcc", "nvidia-smi", "ping", "ss", "true", "uname",
    # They measure: nothing is left when they end.
    "all_gather_perf", "all_reduce_perf", "ib_write_bw", "iperf3",
}  # fmt: skip
_SYSTEMCTL = {"show", "is-active", "is-enabled", "list-units", "list-timers", "status", "cat", "--failed"}
_IP_CHANGES = {"add", "append", "change", "del", "delete", "flush", "replace", "restore", "set"}
_JOURNAL_CHANGES = re.compile(r"--(vacuum|rotate|flush|sync|relinquish|setup|update)")
# A shell that starts a program with the variables of a file: the program decides.
_ENV_FILE = re.compile(r'\. "\$1" && shift && exec "\$@"')


def _with_env_file(words: Words) -> bool:
    return len(words) > 4 and words[0] == "-c" and bool(_ENV_FILE.fullmatch(words[1])) and allows(words[4:])


def _python(words: Words) -> bool:
    """A payload (docs/how-it-works.md), as text or as the file that is left on the node; never a module such as pip."""
    options = [word for word in words if word.startswith("-")]
    return bool(words) and "-m" not in options and (words[0].endswith(".py") or "-c" in options[:2])


def _env(words: Words) -> bool:
    while words and "=" in words[0]:
        words = words[1:]
    return bool(words) and allows(words)


def _timeout(words: Words) -> bool:
    return words[:1] == ("-k",) and len(words) > 3 and allows(words[3:])


def _first_verb(words: Words) -> str:
    return next((word for word in words if not word.startswith("-") or word == "--failed"), "")


_READ_IF: dict[str, Callable[[Words], bool]] = {
    "apt-get": lambda words: "-s" in words,
    "bash": _with_env_file,
    "env": _env,
    "ethtool": lambda words: len(words) == 1 or words[0] in ("-i", "-m", "-S") or words[0].startswith("--show-"),
    "git": lambda words: "ls-remote" in words[:1] or "rev-parse" in words[2:3],
    "ip": lambda words: not _IP_CHANGES & set(words),
    "iptables": lambda words: words == ("-S",),
    "iptables-legacy": lambda words: words == ("-S",),
    "ip6tables-legacy": lambda words: words == ("-S",),
    "journalctl": lambda words: not any(map(_JOURNAL_CHANGES.match, words)),
    "make": lambda words: "-n" in words,
    "netplan": lambda words: words[:2] == ("generate", "--root-dir"),
    "nft": lambda words: "list" in words[:3] or words[:1] == ("-c",),
    "python": _python,
    "rdma": lambda words: words == ("link",),
    "ssh": lambda words: words[-1].startswith("cat "),
    "sshd": lambda words: words == ("-T",),
    # It renews the password that sudo was given once.
    "sudo": lambda words: words == ("-n", "-v"),
    "systemctl": lambda words: _first_verb(words) in _SYSTEMCTL,
    "systemd-analyze": lambda words: words[:1] == ("verify",),
    # What happens in a network namespace of its own ends with it.
    "timeout": _timeout,
    "unshare": lambda words: "--net" in words[:2],
    "uv": lambda words: words[:2] == ("python", "find"),
}


def allows(argv: Words) -> bool:
    """Return whether a command is known to be read-only; a `sudo -n` before it does not matter."""
    if tuple(argv[:2]) == ("sudo", "-n") and len(argv) > 2 and argv[2] != "-v":
        argv = argv[2:]
    name, words = PurePosixPath(argv[0]).name, tuple(argv[1:])
    if re.fullmatch(r"python[0-9.]*", name):
        name = "python"
    return name in _READ_ALWAYS or (name in _READ_IF and _READ_IF[name](words))


def require(argv: Words) -> None:
    """Refuse a command that might change the node.

    Raises:
        MayChange: it is not on the list.
    """
    if not allows(argv):
        raise MayChange(argv)
