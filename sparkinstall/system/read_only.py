"""The commands that a `Reader` may run, each complete from the program to its last word: a list of forbidden
commands would have to know every option and abbreviation that changes something."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import PurePosixPath

from sparkinstall import payloads

_PAYLOADS = (
    *("cutlass_fp8", "inspect_env", "loaded_nccl", "nccl_bandwidth", "nccl_version", "vllm_client", "vllm_kv_cache"),
)
_GPU_LOAD = "gpu_load"
"""The payload that runs the command it is given."""

# One command per line, words separated by blanks; `_` is one word that is not an option, `%` any word.
_COMMANDS = r"""
all_gather_perf( -[beg] \d+)*
all_reduce_perf( -[beg] \d+)*
apt-cache depends( --(recurse|installed|no-recommends|no-suggests))*( _)+
apt-get( -y| -o [\w:-]+=[\w-]+)* -s purge( _)+
apt-get( -y| -o [\w:-]+=[\w-]+| -o Dir::(Etc::source(list|parts)|State::lists)=/_)* -s --no-remove( -f)? install( _)*
df -h
dpkg-query -W -f(=| )%
ethtool (-i |--show-fec )?_
fwupdmgr get-updates --json --no-unreported-check --no-metadata-check
git -C _ rev-parse _
git ls-remote --exit-code https://% _
ib_write_bw --version
ib_write_bw( -[dixqD] _| -F| --report_gbits| --bind_source_ip _| -p \d+)*( _)?
ibv_devinfo
ip( -j)?( -[46])? address
ip -br (link|address)
ip -o -[46] route show table all
ip -[46] rule show
ip -j( -[46])? route show default
ip -j( -[46])? route show table main
ip -j route get _
ip -j neighbour show (to _ dev _|nud permanent)
ip6?tables(-legacy)? -S
iperf3 --version
iperf3 (-s -1|-c _ -t \d+ -O \d+ -P \d+ -J --connect-timeout \d+) -B _ -p \d+
journalctl( -[bkq]| -[ugon] %| --no-pager| --boot| --(since|output|output-fields|lines|boot)=%| [A-Z_]+=%| \+)*
make -j\d+ -C _ src.build( [A-Z_]+=%)* -n
netplan generate --root-dir _
nft( -nn| -j)? list (tables|ruleset)
nft( -nn)? list table _ _
nft -c %
ninja --version
nvcc --(version|list-gpu-arch)
nvidia-smi -q
nvidia-smi --query-gpu=% --format=%
ping( -[nq]| -[WciIMs] _)* _
rdma link
ss -Hltnp
ssh -o BatchMode=yes -o ConnectTimeout=\d+ _ cat\x20/[\w.+@/-]*
sshd -T
systemctl (-q )?(show|is-active)( --property=%| --value| -p %| _)*( --( %)*)?
systemctl --failed --no-pager --plain
systemd-analyze verify --man=no _
true
uname -a
unshare --map-root-user --net [\w/]*nft list tables
unshare --map-root-user --net [\w/]*nft -c %
uv python find --no-python-downloads _
"""
# nft loads the rules in a temporary network namespace and lists the result.
_TRY_RULES = re.compile(r'"([\w/]*nft)" "\$1" && "\1" -nn list table \w+ \w+')
_VARIABLE = re.compile(r"(DEBIAN_FRONTEND|NEEDRESTART_SUSPEND|NCCL_DEBUG|NCCL_DEBUG_SUBSYS)=[\w,]+")
# `exec`, so that the process starts with these variables: LD_PRELOAD acts at process start.
WITH_ENV_FILE = '. "$1" && shift && exec "$@"'


class MayChange(RuntimeError):
    """A `Reader` got a command that is not known to be read-only: a bug. Not a ValueError, which callers expect
    for an unreadable reply."""

    def __init__(self, argv: Sequence[str]) -> None:
        super().__init__(f"`{' '.join(argv)[:200]}` is not on the list of read-only commands")


def require(argv: Sequence[str]) -> None:
    """Reject a command that may change the node.

    Raises:
        MayChange: it is not on the list.
    """
    if not allows(argv):
        raise MayChange(argv)


def allows(argv: Sequence[str]) -> bool:
    """Return whether a command is known to change nothing on the node."""
    match [PurePosixPath(argv[0]).name, *argv[1:]] if argv else []:
        case ["sudo", "-n", "-v"]:
            # Renews sudo's cached password.
            return True
        case ["sudo", "-n", *rest]:
            return allows(rest)
        case ["env", *rest]:
            return allows([word for word in rest if not _VARIABLE.fullmatch(word)])
        case ["timeout", "-k", _, _, *rest]:
            return allows(rest)
        case ["bash", "-c", text, "bash", _, *rest]:
            return text == WITH_ENV_FILE and allows(rest)
        case ["unshare", "--net", "sh", "-c", text, "sh", _]:
            return bool(_TRY_RULES.fullmatch(text))
        case [name, *rest] if re.fullmatch(r"python[0-9.]*", name):
            return _is_payload(rest)
        case words:
            return bool(_commands().fullmatch("\0".join(words)))


def _is_payload(words: Sequence[str]) -> bool:
    """Return whether Python runs one of the read-only payloads, from text or from its file on the node."""
    match words:
        case ["-I" | "-P", *rest]:
            return _is_payload(rest)
        case ["-c", text, *rest] if text == _text(_GPU_LOAD):
            return allows(rest)
        case ["-c", text, *_]:
            return any(text == _text(each) for each in _PAYLOADS)
        case [path, *rest]:
            # The words after `--` are a command that would replace it.
            return path.endswith("/ray-nodes.py") and "--" not in rest
    return False


@cache
def _text(payload: str) -> str:
    return payloads.source(payload)


@cache
def _commands() -> re.Pattern[str]:
    lines = [line.replace(" ", "\0") for line in _COMMANDS.strip().splitlines()]
    words = [re.sub(r"(?<![\w\\\[-])_(?![\w\]-])", r"[^\0-][^\0]*", line).replace("%", r"[^\0]*") for line in lines]
    return re.compile("|".join(words), re.DOTALL)
