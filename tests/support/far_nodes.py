"""Fake nodes, each a folder: `ssh` is `sh -c`, and `sparkinstall` records its requests and replies from a file.

They test the order of phases and the messages; tests/nodes has real nodes and real ssh.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkinstall.cluster import bootstrap
from tests.support import forks

_SSH = """\
#!/bin/sh
new=shared
while [ "$1" != -- ]; do
    case $1 in ControlPath=none) new=new ;; -O) exit 0 ;; esac
    shift
done
echo "$2 $new" >>"$LAB/trips"
if [ -e "$LAB/$2/ssh-says" ]; then cat "$LAB/$2/ssh-says" >&2; exit 255; fi
HOME=$LAB/$2
export HOME
exec sh -c "$3"
"""
_TOOL = """\
#!{python}
import json, os, sys, time
preface = json.loads(sys.stdin.readline())
home, argv = os.environ["HOME"], preface["argv"]
verb = argv[1] if argv[0] == "node" else argv[0]
only = [argv[n + 1] for n, word in enumerate(argv) if word == "--only"]
call = {{"host": os.path.basename(home), "verb": verb, "argv": argv, "stdin": preface["stdin"], "only": only,
        "began": time.monotonic(), "process": sys.argv[1:]}}
print("00:00:00 working", file=sys.stderr, flush=True)
answers = json.load(open(home + "/answers.json"))
key = next((k for k in (verb + ":" + only[0] if only else "", verb) if k in answers), None)
time.sleep(answers.get("slow:" + verb, answers.get("slow", 0)))
first = answers.get("after:" + verb, argv)
while argv[:len(first)] != first and json.dumps(first)[:-1] not in open(os.environ["LAB"] + "/calls").read():
    time.sleep(0.02)
if verb in answers.get("says", ()):
    print(answers["says"][verb], file=sys.stderr, flush=True)
call["ended"] = time.monotonic()
with open(os.environ["LAB"] + "/calls", "a") as log:
    log.write(json.dumps(call) + chr(10))
code, data, errors = answers[key] if key else (0, {{"changed": True}}, [])
print(json.dumps({{"version": 1, "command": verb, "status": "", "exit_code": code, "data": data, "errors": errors}}))
sys.exit(code)
"""
# The real program, which believes to be another machine at an address of this one.
_REAL_TOOL = """\
#!/bin/sh
unset HF_HOME XDG_CACHE_HOME
export PYTHONPATH={checkout}
exec {through} {python} -c '
import os, signal
from pathlib import Path
from sparkinstall.cli import app
from sparkinstall.cluster import agent, protocol
from sparkinstall.core import models
agent.identify = lambda on: protocol.Identity("{address}", ("{address}",))
dies = Path.home() / "dies-after"
told = models._Downloading._tell
def tell(self, file, done):
    if dies.exists() and done > int(dies.read_text()):
        os.kill(os.getpid(), signal.SIGKILL)
    told(self, file, done)
models._Downloading._tell = tell
app.main()
' "$@"
"""
STEPS = ("packages", "environment", "nccl", "fp8", "network", "firewall", "env-files", "ray", "serving")
VERSIONS = {"python": "3.12.3", "vllm": "0.18.1", "torch": "2.10.0", "ray": "2.60.0", "nccl": "2.28.9 121"}


def step(name: str, outcome: str = "drift") -> dict[str, Any]:
    """A step in the reply of `look`."""
    state: dict[str, Any] = {"key": name, "changed": False, "state": "ok", "note": ""}
    if outcome == "drift":
        state = {"key": name, "changed": False, "state": "drift", "summary": f"make {name}", "before": "", "after": ""}
    return {"step": name, "outcome": outcome, "seconds": 0.0, "blocked_by": None, "resources": [state], "error": None}


def look(outcome: str = "drift", **more: Any) -> list[Any]:
    """A reply of `node look`."""
    data = {
        "preflight": [{"name": "disk", "verdict": "pass", "found": "enough", "hint": "", "title": "", "seconds": 0.0}],
        "steps": [step(name, outcome) for name in STEPS],
        "unproven": [],
        "versions": VERSIONS,
        "token": "abc",
        "armed": False,
        "user": "spark",
        "executor": "ray",
    }
    return [0, {**data, **more}, []]


def problem(what: str) -> dict[str, Any]:
    """One error of an envelope."""
    return {
        "code": "command",
        "message": what,
        "cause": "a cause",
        "hint": "fix it",
        "log": "/l",
        "output": ["the end"],
    }


def copied(to: Path) -> tuple[Path, str]:
    """A copy of this checkout in the folder `to`, and its digest."""
    for name, path in bootstrap.sources().items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to / name)
    ask = [sys.executable, "-c", "from sparkinstall.cluster import bootstrap; print(bootstrap.digest())"]
    env = {**os.environ, "PYTHONPATH": str(to)}
    run = subprocess.run(ask, env=env, cwd=to, capture_output=True, text=True, check=True)
    return to, run.stdout.strip()


PROVEN = [0, {"checks": [], "probes": [], "fixes": []}, []]


@dataclass(frozen=True)
class FarNodes:
    """The folder `lab` of all fake nodes. Replies are by verb, or by verb and first step: `multi-node:network`.
    Seconds that they take are `slow`, or `slow:VERB`; `after:VERB` has the first words of a call that they wait for.

    `checkout` is a copy of the sources, so that edits during a test change nothing.
    """

    lab: Path
    checkout: Path
    digest: str

    def add(self, host: str, **answers: Any) -> None:
        """Add a node that has sparkinstall of exactly this version."""
        self._add(host, _TOOL.format(python=sys.executable))
        self.answer(host, **answers)

    def add_real(self, host: str, address: str, through: str = "") -> Path:
        """Add a node with the real program, run `through` another one; its home.

        With a number in the file `dies-after` there, the program is killed when a file has that many bytes.
        """
        self._add(
            host, _REAL_TOOL.format(checkout=self.checkout, python=sys.executable, address=address, through=through)
        )
        return self.lab / host

    def _add(self, host: str, program: str) -> None:
        tool = self.lab / host / ".local/share/sparkinstall/tool"
        (tool / "bin").mkdir(parents=True)
        (tool / "made-from").write_text(f"{self.digest} /usr/bin/python3\n")
        (tool / "bin/sparkinstall").write_text(program)
        (tool / "bin/sparkinstall").chmod(0o755)

    def answer(self, host: str, **answers: Any) -> None:
        """Set the replies of a node."""
        standard = {"look": look(), "verify": PROVEN, "token": [0, {"token": "t0ken-of-the-head"}, []]}
        given = {name.replace("_", "-").replace("--", ":"): value for name, value in answers.items()}
        (self.lab / host / "answers.json").write_text(json.dumps({**standard, **given}))

    def cluster(self, *argv: str, **variables: str) -> tuple[int, Mapping[str, Any], str]:
        """Run `sparkinstall cluster --json`: exit code, JSON object, stderr."""
        env = {**self.environment(), **variables}
        done = forks.run("sparkinstall", ["cluster", *argv, "--json"], env, 180, self.lab)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout), done.stderr

    def environment(self) -> dict[str, str]:
        """Environment in which `ssh` reaches these nodes."""
        tools = self.lab / "bin"
        tools.mkdir(exist_ok=True)
        # It appears whole: another thread's run may be starting it.
        if not (tools / "ssh").exists():
            made = tools / f"ssh-{threading.get_ident()}"
            made.write_text(_SSH)
            made.chmod(0o755)
            made.replace(tools / "ssh")
        paths = {"PATH": f"{tools}:{os.environ['PATH']}", "LAB": str(self.lab), "HOME": str(self.lab)}
        # What pip installs here is imported once or twice, and most of it never.
        env = {**os.environ, **paths, "PYTHONPATH": str(self.checkout), "PIP_NO_COMPILE": "1"}
        env.pop("XDG_DATA_HOME", None)
        return env

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The requests to all nodes, in the order in which they ended."""
        path = self.lab / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def trips(self) -> Sequence[str]:
        """`host shared` or `host new` for each command over ssh: which connection it used."""
        return (self.lab / "trips").read_text().splitlines()
