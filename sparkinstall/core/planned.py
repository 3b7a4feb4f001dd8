"""Ask the vLLM that is installed on this node for its plan of a model's KV cache; its weights are not needed."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct, field
from msgspec.structs import replace

from sparkinstall import payloads
from sparkinstall.facts import machine
from sparkinstall.facts.env_file import with_env_file
from sparkinstall.models.files import LARGEST_JSON, Files
from sparkinstall.models.planned import Answer, Asked, Plan, Planned, Question, Reply
from sparkinstall.node import Node
from sparkinstall.own_files import read_regular
from sparkinstall.system import Reader, Result

PLANS = "plans"
"""The folder of the answers in the user's cache."""
_PAYLOAD = "vllm_kv_cache"
# Seconds: on a node 10 to 20, nearly all for the import of vLLM; on two busy cores much more.
_LIMIT = 240.0
# Of a class with experts vLLM may open a CUDA context, which takes from the memory that all programs share. In kB.
_ROOM = 3 << 20
_LARGEST_ANSWER = 4 << 20
# Large, and not read without a tokenizer.
_NOT_READ = ("tokenizer.json", "vocab.json", "merges.json")
_REMOTE = "--trust-remote-code"
# No network, nobody is told anything, and vLLM's log has errors only.
_QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


class NotPlanned(Exception):
    """vLLM has not answered: why, in a few words."""


class Questions(Struct, frozen=True):
    """What is asked: sets of options, the first of which is the wanted one.

    `more`: further options of `vllm serve` that all have. `remote_code`: vLLM may run the code of the model.
    """

    sets: Sequence[Asked]
    more: tuple[str, ...] = ()
    remote_code: bool = False


Oracle = Callable[[Files, Questions], Planned]


class InstalledVllm(Struct, frozen=True):
    """The vLLM of this node. `say` is called with a sentence before it is asked, which takes a while."""

    node: Node
    on: Reader
    say: Callable[[str], None] = field(default=lambda _: None)

    def plan(self, files: Files, questions: Questions) -> Planned:
        """Return vLLM's plans.

        Raises:
            NotPlanned: vLLM is not installed here, or has no plan for the first of the sets.
            ModelError, NotDownloaded: a file of the model cannot be read.
        """
        self._require_installed()
        contents = _small_files(files, questions.remote_code)
        kept = self._cache_file(contents, questions)
        reply = _kept(kept) or self._asked(contents, questions)
        if reply.error or len(reply.answers) != len(questions.sets):
            raise NotPlanned(reply.error or "its answer is not whole")
        answers = dict(zip(questions.sets, reply.answers, strict=True))
        if not answers[questions.sets[0]].plan:
            raise NotPlanned(_why_no_plan(reply.vllm, answers[questions.sets[0]].error))
        _keep(kept, reply)
        return _planned(reply, answers)

    def _require_installed(self) -> None:
        node = self.node
        if node.partial or node.foreign:
            raise NotPlanned("the vLLM of this rehearsal cannot be run")
        if not self.on.entry(f"{node.venv}/bin/python") or not self.on.entry(node.env_file):
            raise NotPlanned("vLLM is not installed here")

    def _asked(self, contents: Mapping[str, bytes], questions: Questions) -> Reply:
        free = machine.parse_meminfo(self.on.read("/proc/meminfo") or b"").get("MemAvailable", 0)
        if free < _ROOM:
            return Reply(error=f"only {free >> 10} MiB of memory are available to run it")
        self.say(f"asking vLLM {self.node.stack.vllm} how it would plan the KV cache: 10 to 20 seconds")
        try:
            said = self._ask(contents, questions)
        except OSError as error:
            return Reply(error=f"its files of the model cannot be written: {error.strerror}")
        try:
            return msgspec.json.decode(said.out.splitlines()[-1], type=Reply)
        except (msgspec.DecodeError, IndexError):
            late = f"it has not answered within {_LIMIT:g} s" if said.code == 124 else ""
            return Reply(error=late or said.last_line[:300] or f"it ended with code {said.code}")

    def _ask(self, contents: Mapping[str, bytes], questions: Questions) -> Result:
        with tempfile.TemporaryDirectory(prefix="sparkinstall-fit-") as folder:
            for name, content in contents.items():
                (Path(folder) / name).write_bytes(content)
            asked = [_question(folder, questions, each) for each in questions.sets]
            command = ("python", "-P", "-c", payloads.source(_PAYLOAD), msgspec.json.encode(asked).decode())
            more = {**_QUIET, "VLLM_CACHE_ROOT": f"{folder}/.vllm", "TMPDIR": folder}
            said = with_env_file(self.node, self.on, *command, timeout=_LIMIT, **more)
            return replace(said, out=said.out.replace(folder, "the model's folder"))

    def _cache_file(self, contents: Mapping[str, bytes], questions: Questions) -> Path:
        """Return where the answer is kept: all that it depends on is in the name."""
        own = [payloads.source(_PAYLOAD).encode(), *map(self._content, (self.node.venv_lock, self.node.env_file))]
        parts = [
            *own,
            repr(questions).encode(),
            *(part for name in contents for part in (name.encode(), contents[name])),
        ]
        whole = hashlib.sha256()
        for part in parts:
            whole.update(b"%d\0" % len(part) + part)
        return self.node.cache / PLANS / f"{whole.hexdigest()[:32]}.json"

    def _content(self, path: str) -> bytes:
        return self.on.read(path) or b""


def _question(folder: str, questions: Questions, asked: Asked) -> Question:
    words = ["--max-num-batched-tokens", str(asked.batched_tokens), *questions.more]
    words += ["--kv-cache-dtype", asked.kv_dtype] if asked.kv_dtype != "auto" else []
    return Question(folder, [*words, *([_REMOTE] if questions.remote_code else [])], asked.tensor_parallel)


def _why_no_plan(release: str, error: str) -> str:
    if "custom code" in error or "trust_remote_code" in error or _REMOTE in error:
        return f"vLLM {release} needs the model's own code for it: {_REMOTE} lets it run that"
    return f"vLLM {release} has no plan for it: {error}"


def _planned(reply: Reply, answers: Mapping[Asked, Answer]) -> Planned:
    plans: dict[Asked, Plan] = {asked: answer.plan for asked, answer in answers.items() if answer.plan}
    errors = {asked: answer.error for asked, answer in answers.items() if not answer.plan}
    return Planned(reply.vllm, plans, errors)


def _small_files(files: Files, remote_code: bool) -> dict[str, bytes]:
    """Return what vLLM reads of a model to plan: its JSON files, and its code only if that may run."""
    wanted = [name for name in files.names() if name.endswith(".json") and not name.endswith(".index.json")]
    wanted = [name for name in wanted if name not in _NOT_READ]
    wanted += [name for name in files.names() if remote_code and name.endswith(".py")]
    found = {name: files.part(name, 0, LARGEST_JSON) for name in wanted}
    return {name: part.data for name, part in found.items() if part.size <= LARGEST_JSON}


def _kept(path: Path) -> Reply | None:
    """Return an answer that was kept, None if there is none that can be used."""
    try:
        return msgspec.json.decode(read_regular(path, _LARGEST_ANSWER), type=Reply)
    except (OSError, msgspec.DecodeError):
        return None


def _keep(path: Path, reply: Reply) -> None:
    """Keep an answer; where that is not possible, the next run asks again."""
    own = path.with_suffix(f".{os.getpid()}.new")
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            own.write_bytes(msgspec.json.encode(replace(reply, seconds=0)))
            own.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            own.unlink()
