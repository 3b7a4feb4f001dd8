"""`cluster --serve` and `multi-node --serve`: what is asked of each node, and what a failure on one does to all."""

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from sparkinstall.cli.install import on_workers
from sparkinstall.cluster import bootstrap, model_copies, ssh
from sparkinstall.cluster.protocol import Fetched, Offered, Reply
from sparkinstall.cluster.remote import Member, RemoteNode
from sparkinstall.cluster.serving import ModelHandover
from sparkinstall.core import serve as use
from sparkinstall.core import serve_settings, serve_together
from sparkinstall.core.readiness import NotReady
from sparkinstall.core.serve_checks import probes
from sparkinstall.core.serve_settings import Named, Order, Wanted, found, wanted
from sparkinstall.core.session import Target, open_session
from sparkinstall.errors import BadUsage
from sparkinstall.events import silent
from sparkinstall.journal.state_dir import Served
from sparkinstall.layout import RAY_UNITS, VLLM_UNIT
from sparkinstall.recipes.catalogue import shipped
from tests.support.far_nodes import FarNodes, look, problem
from tests.support.model_files import LLAMA, write_model
from tests.support.model_hub import COMMIT
from tests.support.nodes import node_with
from tests.support.rehearsals import CHECKOUT, in_this_process
from tests.support.stored_models import FOLDER, MODEL, store

ORDER = {
    "served": {"name": "mine", "settings": {"serving.model": MODEL, "serving.revision": COMMIT}},
    "model": MODEL,
    "recipe": None,
    "options": {},
}
BEFORE = {"options": {"settings": {"serving.port": 9000}}, "invocation": "a", "active": False}
WAITED = {
    "changed": False,
    "serving": {
        "url": "http://127.0.0.1:8000/v1", "model": "m", "served": MODEL, "recipe": "mine", "revision": COMMIT,
        "invocation": "b", "started": "now", "seconds": 61.5, "phases": [], "first_token": 0.5, "server": None,
        "engine": None, "versions": {"vllm": "0.29.0"}, "kernel": "6.11", "driver": "", "clocks": {},
        "memory": {"total": 1, "available": 1, "free_blocks": {"4096": 2}},
    },
}  # fmt: skip
RUNS = {"unit": VLLM_UNIT, "active": "active", "sub": "running", "invocation": "b", "restarts": "0", "how": "active"}
HEAD = {
    "prepare": [0, {"memory": 0.7, "before": BEFORE, "order": ORDER, "changes": []}, []],
    "serve": [0, WAITED, []],
    "unit": [0, RUNS, []],
    "log": [0, {"text": "vLLM has started\n"}, []],
    "restore": [0, {"words": "vLLM is stopped, and no model is served, as before"}, []],
}
WORKER = {**HEAD, "prepare": [0, {"memory": 0.61, "before": BEFORE}, []]}
# The beginning of a driver's message about a model that is too large.
TOO_LARGE = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 1 GiB\n"
)


@pytest.fixture
def far(tmp_path: Path, checkout: tuple[Path, str]) -> FarNodes:
    nodes = FarNodes(tmp_path, *checkout)
    nodes.add("spark-1", **HEAD)
    nodes.add("spark-2", **WORKER)
    return nodes


def _calls(far: FarNodes, *verbs: str) -> list[tuple[str, str]]:
    return [(call["host"], call["verb"]) for call in far.calls if call["verb"] in verbs]


def _served_by(call: dict[str, Any]) -> dict[str, Any]:
    argv = call["argv"]
    return dict(json.loads(argv[argv.index("--order") + 1])["served"])


def test_model_is_served_by_all_nodes_with_the_settings_that_the_head_has_found(far: FarNodes) -> None:
    code, reply, log = far.cluster("spark-1", "spark-2", "--serve", "gpt-oss-20b", "--yes")
    assert code == 0, (reply["errors"], log)
    asked = {call["host"]: call["stdin"] for call in far.calls if call["verb"] == "prepare"}
    assert json.loads(asked["spark-1"])["recipe"]["id"] == "gpt-oss-20b"
    assert asked["spark-2"] == "", "the head alone looks for the model"
    ordered = [_served_by(call) for call in far.calls if call["verb"] in ("look", "multi-node")]
    # The worker has the least memory, and all start with the same.
    assert ordered and all(each["settings"]["serving.memory"] == "0.61" for each in ordered)
    (wait,) = [call for call in far.calls if call["verb"] == "serve"]
    assert (wait["host"], wait["argv"][:4]) == ("spark-1", ["serve", "wait", "--limit", "3600"])
    assert ("spark-2", "unit") in _calls(far, "unit")
    assert set(_calls(far, "verify")) == {("spark-1", "verify"), ("spark-2", "verify")}
    last_start = max(call["ended"] for call in far.calls if call["verb"] == "multi-node")
    assert wait["began"] > last_start
    assert min(call["began"] for call in far.calls if call["verb"] == "verify") > wait["ended"]
    serving = reply["data"]["serving"]
    assert (serving["changed"], serving["serving"]["model"]) == (True, "m")
    assert [each["what"] for each in serving["changes"]] == ["serving.memory 0.80"]
    assert "restore" not in {call["verb"] for call in far.calls}


def test_nodes_that_are_up_to_date_remember_what_is_served(far: FarNodes) -> None:
    for host, answers in (("spark-1", HEAD), ("spark-2", WORKER)):
        far.answer(host, **answers, look=look("unchanged"), multi_node=[0, {"changed": False}, []])
    code, reply, _ = far.cluster("spark-1", "spark-2", "--serve", "gpt-oss-20b")
    assert code == 0, reply["errors"]
    assert _calls(far, "multi-node") == [("spark-1", "multi-node"), ("spark-2", "multi-node")]
    assert not reply["data"]["serving"]["changed"]


def test_model_and_its_draft_go_from_the_head_to_a_worker_without_them(far: FarNodes) -> None:
    steps, drafts = look(), {"method": "x", "model": "org/draft", "revision": "d" * 40}
    order: dict[str, Any] = json.loads(json.dumps(ORDER))
    order["served"]["settings"] |= {
        "serving.recipe": "mine",
        "serving.arguments": ["--speculative-config", json.dumps(drafts)],
    }
    prepare = [0, {"memory": 0.7, "before": BEFORE, "order": order, "changes": []}, []]
    steps[1]["steps"].append({**steps[1]["steps"][0], "step": "model"})
    said = {"offer-model": json.dumps({"port": 4711, "fingerprint": "ff"})}
    offered: list[Any] = [0, {"files": 3, "bytes": 9, "sent": 9}, []]
    far.answer("spark-1", **{**HEAD, "prepare": prepare}, look=steps, says=said, offer_model=offered)
    far.answer("spark-2", **WORKER, look=steps, receive=[0, {"changed": True, "files": 3, "bytes": 9}, []])
    code, reply, _ = far.cluster("spark-1", "spark-2", "--serve", "gpt-oss-20b", "--yes")
    assert code == 0, reply["errors"]
    offer, second = [call for call in far.calls if call["verb"] == "offer-model"]
    taken, last = [call for call in far.calls if call["verb"] == "receive"]
    assert offer["argv"][2:5] == ["1", MODEL, COMMIT]
    assert second["argv"][2:5] == ["1", "org/draft", "d" * 40]
    source = json.loads(taken["stdin"])
    assert source == {"port": 4711, "fingerprint": "ff", "token": offer["stdin"], "address": "192.168.100.10"}
    builds = [call for call in far.calls if call["host"] == "spark-2" and "model" in call["only"]]
    assert builds and builds[0]["began"] > last["ended"], "the worker's own step finds it there"


def test_failure_is_explained_from_the_logs_of_all_nodes_and_undone_on_all(far: FarNodes) -> None:
    far.answer("spark-1", **{**HEAD, "serve": [1, {}, [problem("vLLM has ended before it answered")]]})
    far.answer("spark-2", **{**WORKER, "log": [0, {"text": TOO_LARGE}, []]})
    code, reply, _ = far.cluster("spark-1", "spark-2", "--serve", "gpt-oss-20b", "--yes")
    assert code == 5
    (error,) = reply["errors"]
    assert error["message"].startswith("spark-1: vLLM has ended before it answered; vLLM is stopped")
    assert "memory" in error["cause"].lower() and error["cause"] != "a cause"
    assert error["output"][0].startswith("spark-2: torch.OutOfMemoryError")
    restored = [call for call in far.calls if call["verb"] == "restore"]
    assert {call["host"] for call in restored} == {"spark-1", "spark-2"}
    assert [json.loads(call["stdin"]) for call in restored] == [BEFORE, BEFORE]
    assert _served_by(restored[0])["name"] == "mine"
    assert not _calls(far, "verify")
    assert "serving" not in reply["data"]


def test_worker_that_ends_ends_the_start_on_the_head(far: FarNodes) -> None:
    dead = {**RUNS, "active": "failed", "how": "exit-code, status 1"}
    far.answer("spark-1", **{**HEAD, "serve": [1, {}, [problem("vLLM has ended")]], "after:serve": ["serve", "stop"]})
    far.answer("spark-2", **{**WORKER, "unit": [0, dead, []]})
    code, reply, _ = far.cluster("spark-1", "spark-2", "--serve", "gpt-oss-20b", "--yes")
    assert code == 5
    assert ["serve", "stop"] in [call["argv"][:2] for call in far.calls if call["host"] == "spark-1"]
    told = {error["message"].partition(":")[0]: error for error in reply["errors"]}
    assert told["spark-2"]["message"].startswith(f"spark-2: {VLLM_UNIT} has ended before the head answered")
    assert told["spark-2"]["cause"] == "systemd says of it: exit-code, status 1"
    assert "vLLM was stopped, because spark-2 has failed" in told["spark-1"]["message"]
    assert len(_calls(far, "restore")) == 2


def test_ctrl_c_while_it_is_waited_for_restores_what_was_before(far: FarNodes) -> None:
    far.answer("spark-1", **HEAD, slow__serve=600)
    words = ("cluster", "spark-1", "spark-2", "--serve", "gpt-oss-20b", "--yes", "--json")
    with subprocess.Popen(
        [sys.executable, "-m", "sparkinstall", *words],
        env=far.environment(), cwd=far.lab, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as run:  # fmt: skip
        while ("spark-2", "unit") not in _calls(far, "unit") and run.poll() is None:
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        out, _ = run.communicate(timeout=300)
    assert (run.returncode, json.loads(out)["status"]) == (130, "interrupted")
    assert len(_calls(far, "restore")) == 2
    assert not _calls(far, "log", "verify")


def test_failure_before_services_start_leaves_nothing_to_undo(far: FarNodes) -> None:
    far.answer("spark-2", **WORKER, multi_node__packages=[1, {}, [problem("apt could not install git")]])
    code, _, _ = far.cluster("spark-1", "spark-2", "--serve", "gpt-oss-20b", "--yes")
    assert code == 5
    assert not _calls(far, "serve", "log", "restore")


def test_model_that_the_head_does_not_find_changes_nothing(far: FarNodes) -> None:
    far.answer("spark-1", **{**HEAD, "prepare": [2, {}, [problem("there is no folder /srv/model")]]})
    code, reply, _ = far.cluster("spark-1", "spark-2", "--serve", "/srv/model", "--yes")
    assert code == 5
    assert [error["message"] for error in reply["errors"]] == ["spark-1: there is no folder /srv/model"]
    assert {call["verb"] for call in far.calls} == {"prepare"}
    (asked,) = [call["stdin"] for call in far.calls if call["host"] == "spark-1"]
    assert json.loads(asked)["name"] == "/srv/model", "a path is one of the nodes"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("spark-1", "spark-2", "--serve", "gpt-os-20b"), "there is no recipe 'gpt-os-20b'"),
        (("spark-1", "spark-2", "--serve", "gpt-oss-20b", "--model", "/m"), "both name what is served"),
        (("verify", "spark-1", "--serve", "gpt-oss-20b"), "--serve is not for `cluster verify`"),
    ],
)
def test_bad_usage_is_refused_before_any_request(far: FarNodes, words: tuple[str, ...], says: str) -> None:
    code, reply, _ = far.cluster(*words)
    assert code == 2
    assert says in reply["errors"][0]["message"]
    assert not far.calls


# --- on a node


def test_recipes_and_orders_survive_the_way_to_the_nodes() -> None:
    for recipe in shipped():
        sent = Named(recipe.id, recipe)
        assert serve_together.understood(Named, msgspec.json.encode(sent).decode()) == sent
    order = Order(Served("x", {"serving.model": "/m"}), "/m", shipped()[0], of_the_hub().options)
    assert serve_together.understood(Order, msgspec.json.encode(order).decode()) == order
    with pytest.raises(BadUsage, match="the order of the terminal"):
        serve_together.understood(Order, "{}")


def of_the_hub() -> Wanted:
    """A recipe of a model that is not here, at a commit."""
    return found(Named("x", replace(shipped()[0], model="org/model", revision="a" * 40)))


def test_head_finds_the_model_and_every_node_what_a_failure_restores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, model = tmp_path / "node", write_model(tmp_path / "m", LLAMA)
    root.mkdir()
    monkeypatch.setattr(use, "show", lambda *_: {"InvocationID": "a", "ActiveState": "active"})
    former = open_session(Target(root=root, settings=("serving.model=/srv/former", "serving.memory=0.50")))
    with former.state.hold("test", silent):
        former.state.remember_options(former.options)
    target = Target(root=root, settings=("cluster.role=head", "serving.memory=0.70", "serving.port=9000"))
    told = serve_together.prepared(target, Named(str(model)))
    assert told.order is not None
    assert told.order.served.settings["serving.model"] == str(model)
    assert told.order.options.tensor_parallel == 2
    restored = told.before.options["settings"]
    assert (restored["serving.model"], restored["serving.port"]) == ("/srv/former", 9000)
    assert restored["serving.memory"] == "0.50", "that was for the former model"
    assert (told.before.invocation, told.before.active) == ("a", True)
    assert serve_together.prepared(target, None).order is None
    assert told.order.served.settings["cluster.executor"] == "mp"
    assert [p.name for p in probes(open_session(target).node, told.order.here())] == ["model-files", "port", "fit"]


def test_nodes_serve_without_ray_unless_they_have_it_or_a_token_for_it_or_the_user_wants_it(tmp_path: Path) -> None:
    root, model = tmp_path / "node", write_model(tmp_path / "m", LLAMA)
    units, token = root / "etc/systemd/system", tmp_path / "token"
    units.mkdir(parents=True)
    token.write_text("t" * 64)

    def with_ray(role: str, *settings: str, **more: Any) -> bool:
        target = Target(root=root, settings=(f"cluster.role={role}", *settings), **more)
        spread = serve_settings.spread(wanted(str(model)), open_session(target))
        return open_session(replace(target, served=spread.served)).node.with_ray

    assert [with_ray(role) for role in ("single", "head", "worker")] == [False, False, False]
    assert with_ray("head", "cluster.executor=ray")
    assert with_ray("worker", token_file=token)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"- {{id: two, model: {model}, nodes: 2, tensor_parallel: 2, executor: ray}}\n")
    asked = serve_settings.spread(wanted(str(recipe)), open_session(Target(root=root, settings=("cluster.role=head",))))
    assert asked.served.settings["cluster.executor"] == "ray"
    (units / RAY_UNITS[0]).write_text("# a Ray of the user's own\n")
    assert not with_ray("head")
    (units / RAY_UNITS[0]).write_text(f"# {units / RAY_UNITS[0]}, created by sparkinstall.\n")
    assert [with_ray(role) for role in ("head", "worker")] == [True, False]
    assert not with_ray("head", "cluster.executor=mp")


@pytest.mark.parametrize(
    ("recorded", "now", "says"),
    [
        ("ours", "b", "vLLM is stopped, and no model is served, as before"),
        ("ours", "a", "no model is served, as before"),
        ("none", "a", "nothing was changed"),
        ("theirs", "b", "another run has changed what is served since, so nothing is restored"),
    ],
)
def test_node_restores_what_was_before(
    recorded: str, now: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, model = tmp_path / "node", write_model(tmp_path / "m", LLAMA)
    root.mkdir()
    stopped: list[str] = []
    monkeypatch.setattr(use, "show", lambda *_: {"InvocationID": now, "ActiveState": "active", "LoadState": "loaded"})
    monkeypatch.setattr(use, "stop_for_now", lambda _, unit: stopped.append(unit))
    target = Target(root=root, served=wanted(str(model)).served)
    theirs = Target(root=root, served=Served("theirs", {"serving.model": "/srv/theirs"}))
    session = open_session({"ours": target, "none": Target(root=root), "theirs": theirs}[recorded])
    with session.state.hold("test", silent):
        session.state.remember_options(session.options)
    # The settings of the command line are in it, although the order may not have come so far on this node.
    before = use.Before({"settings": {"serving.port": 9000}}, "a", active=False)
    assert use.restore(open_session(target), target, before) == says
    assert (VLLM_UNIT in stopped) == says.startswith("vLLM is stopped")
    assert open_session(Target(root=root)).node.config.serving.model == (
        "/srv/theirs" if recorded == "theirs" else None
    )


def test_worker_with_ray_computes_in_ray() -> None:
    assert serve_together.unit_of(node_with(cluster__role="worker", serving__model="m")) == RAY_UNITS[1]
    assert serve_together.unit_of(node_with(serving__model="m")) == VLLM_UNIT
    mp = node_with(cluster__role="worker", cluster__executor="mp", serving__model="m")
    assert serve_together.unit_of(mp) == VLLM_UNIT
    assert "port" not in [each.name for each in probes(mp, of_the_hub())]


@pytest.mark.parametrize(
    "change",
    [{"active": "failed"}, {"sub": "auto-restart", "active": "activating"}, {"restarts": "1"}, {"invocation": "c"}],
)
def test_service_that_is_not_the_same_run_any_more_has_ended(change: dict[str, str]) -> None:
    first = msgspec.convert(RUNS, serve_together.UnitState)
    first.require_alive(first)
    with pytest.raises(NotReady, match="has ended before the head answered"):
        replace(first, **change).require_alive(first)


def test_head_says_what_to_run_on_its_workers() -> None:
    (line,) = on_workers(node_with(), " --serve qwen3.5-4b")
    assert line.endswith("multi-node --role worker --head 192.168.100.10 --serve qwen3.5-4b --token-file - --yes")
    (line,) = on_workers(node_with(cluster__executor="mp"))
    assert line == "sparkinstall multi-node --role worker --head 192.168.100.10"


def test_multi_node_serve_in_a_rehearsal_and_beside_a_model_is_refused(tmp_path: Path) -> None:
    words = ("multi-node", "--role", "head", "--serve", "gpt-oss-20b", "--root", str(tmp_path), "--json")
    assert "a rehearsal starts no services" in in_this_process(*words).stdout
    assert "both name what is served" in in_this_process(*words, "--model", "/m").stdout


# --- the model's way to a worker


def test_model_is_copied_from_the_heads_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = FarNodes(tmp_path, CHECKOUT, bootstrap.digest())
    for name, value in {**nodes.environment(), "HF_HUB_CACHE": str(tmp_path / "hub")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    store(tmp_path / "hub" / FOLDER)
    there = nodes.add_real("spark-2", "127.0.0.2", through="env -u HF_HUB_CACHE")

    class Head:
        host, words, member = "spark-1", (), Member("spark-1", "head", 0, "127.0.0.1")

        def call(self, _: type, *argv: str, on_line: Any, stdin: str) -> Reply[Any]:
            monkeypatch.setattr(model_copies, "announce", lambda said: on_line(msgspec.json.encode(said).decode()))
            assert argv[:2] == ("node", "offer-model")
            return Reply(data=model_copies.offer("127.0.0.1", argv[3], argv[4], int(argv[2]), stdin))

    head: Any = Head()
    with ssh.sockets() as sockets:
        worker = RemoteNode(Member("spark-2", "worker", 1, "127.0.0.2"), ssh.Ssh("spark-2", sockets))
        handover = ModelHandover(head, [worker], MODEL, COMMIT)
        with ThreadPoolExecutor(2) as pool:
            offered, taken = pool.map(lambda node: handover.work(node, lambda _: None), (head, worker))
    assert isinstance(taken.data, Fetched) and taken.data.changed and not taken.data.warning, taken
    assert isinstance(offered.data, Offered) and offered.data.sent > 0, "it ends when the worker has all"
    assert (there / ".cache/huggingface/hub" / FOLDER / "snapshots" / COMMIT).is_dir()
