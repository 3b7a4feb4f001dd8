"""Serve one model on several nodes: ask them, bring the model, wait for an answer, and restore all after a failure."""

import threading
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from sparkinstall.cluster.artifacts import Handover
from sparkinstall.cluster.orchestrate import Cluster, Done
from sparkinstall.cluster.protocol import Arriving, Fetched, ModelSource, Offered, Reply, announced
from sparkinstall.cluster.remote import OnLine, RemoteNode
from sparkinstall.core.model_step import pinned
from sparkinstall.core.readiness import NotReady
from sparkinstall.core.serve import Answering
from sparkinstall.core.serve_checks import lowered
from sparkinstall.core.serve_settings import Named
from sparkinstall.core.serve_together import Prepared, UnitState
from sparkinstall.errors import Interrupted, Problem
from sparkinstall.recipes import Change

_STARTING = ("head", "workers")
"""The phases that start services."""
_ANSWER = "answer"
# Seconds between two looks at a worker.
_LOOK = 5.0
# Lost contacts in a row after which a worker counts as ended.
_LOST = 6


class UnitLog(Struct, frozen=True):
    """The log of the last start of vLLM on a node; `text` is empty if it cannot be read."""

    text: str = ""


class Restored(Struct, frozen=True):
    """What was restored on a node, in words."""

    words: str = ""


class Together:
    """The serving of one model by the nodes of a cluster."""

    def __init__(self, cluster: Cluster, named: Named, limit: float) -> None:
        self._cluster, self._named, self._limit = cluster, named, limit
        self._head = cluster.nodes[0]
        self._prepared: dict[str, Prepared] = {}
        self._over = threading.Event()
        self._fell = ""
        self.changes: Sequence[Change] = ()
        self.answering: Answering | None = None

    # --- before

    def prepare(self) -> None:
        """Ask the head what is meant, and every node what it has; then every request says what is to be served.

        Raises:
            Barrier: a node does not answer, or there is no such model.
        """
        self._cluster.on_each("prepare", self._prepare)
        self._cluster.barrier()
        found = self._prepared[self._head.host]
        assert found.order is not None, "the head was asked"
        order, self.changes = found.order, found.changes
        known = {host: each.memory for host, each in self._prepared.items() if each.memory is not None}
        if known:
            host, least = min(known.items(), key=lambda each: each[1] or 0.0)
            several = len(self._cluster.nodes) > 1
            served, more = lowered(order.served, least or 0.0, f"{host} has no more available", several=several)
            order, self.changes = replace(order, served=served), (*self.changes, *more)
        self._cluster.order = _text(order)
        settings = order.served.settings
        revision, recipe, arguments = (settings.get(f"serving.{name}") for name in ("revision", "recipe", "arguments"))
        self._models = list(pinned(order.model, revision, recipe, arguments or ()))
        self._cluster.bring_model = self._bring if self._models else None

    def _prepare(self, node: RemoteNode, on_line: OnLine) -> Reply[Prepared]:
        given = _text(self._named) if node is self._head else ""
        reply = node.call(Prepared, "node", "prepare", *node.words, on_line=on_line, stdin=given)
        if reply.data:
            self._prepared[node.host] = reply.data
        return reply

    # --- the model

    def _bring(self, nodes: Sequence[RemoteNode]) -> None:
        """Copy the models from the head to nodes that lack them; one that gets no copy downloads it."""
        for model, commit in self._models:
            handover = ModelHandover(self._head, nodes, model, commit)
            self._cluster.on_each("copy", handover.work, [self._head, *nodes])

    # --- the answer

    def wait(self) -> None:
        """Wait until a whole streamed answer has come from the head, while every node lives.

        Raises:
            Barrier: none has come.
        """
        self._cluster.on_each(_ANSWER, self._answer)
        self._cluster.barrier()
        changed = any(done.outcome == "changed" and done.phase in _STARTING for done in self._cluster.done)
        if self.answering:
            self.answering = replace(self.answering, changed=changed, changes=self.changes)

    def _answer(self, node: RemoteNode, on_line: OnLine) -> Reply[Answering]:
        if node is not self._head:
            return self._watched(node)
        try:
            reply = node.call(Answering, "serve", "wait", "--limit", f"{self._limit:g}", on_line=on_line)
        finally:
            self._over.set()
        if self._fell:
            return Reply(problems=(NotReady(f"vLLM was stopped, because {self._fell} has failed"),))
        self.answering = reply.data
        return reply

    def _watched(self, node: RemoteNode) -> Reply[Answering]:
        """Look at a worker until the head has answered; if it ends, end the head's start too."""
        first, lost = None, 0
        while not self._over.wait(_LOOK if first else 0):
            try:
                now = self._state(node)
                first, lost = first or now, 0
                now.require_alive(first)
            except NotReady as problem:
                self._end(node)
                return Reply(problems=(problem,))
            except Interrupted:
                raise
            except Problem as problem:
                lost += 1
                if lost >= _LOST:
                    self._end(node)
                    return Reply(problems=(problem,))
                self._over.wait(_LOOK)
        return Reply()

    def _state(self, node: RemoteNode) -> UnitState:
        reply = node.call(UnitState, "node", "unit", *node.words, on_line=_unheard)
        if reply.data is None:
            raise next(iter(reply.problems), Problem(f"{node.host} does not tell the state of its services"))
        return reply.data

    def _end(self, node: RemoteNode) -> None:
        """Stop vLLM on the head, whose wait then ends."""
        if not self._over.is_set():
            self._fell = self._fell or node.host
            self._head.call(Struct, "serve", "stop", on_line=_unheard)

    # --- after a failure

    @property
    def started(self) -> bool:
        """Whether a phase that starts services has begun."""
        return any(done.phase in (*_STARTING, _ANSWER) for done in self._cluster.done)

    def logs(self) -> Mapping[str, str]:
        """Return the logs of the last start by host."""
        found: dict[str, str] = {}

        def read(node: RemoteNode, on_line: OnLine) -> Reply[UnitLog]:
            reply = node.call(UnitLog, "node", "log", *node.words, on_line=on_line)
            found[node.host] = reply.data.text if reply.data else ""
            # It explains a failure and is none; the text is long, and `done` is printed.
            return Reply()

        self._cluster.on_each("logs", read)
        return found

    def restore(self) -> str:
        """Stop what was started on every node, and restore what was served before; return that in words."""
        words: dict[str, str] = {}

        def work(node: RemoteNode, on_line: OnLine) -> Reply[Restored]:
            argv = ("node", "restore", "--order", self._cluster.order, *node.words)
            before = _text(self._prepared[node.host].before)
            reply = node.call(Restored, *argv, on_line=on_line, stdin=before)
            words[node.host] = reply.data.words if reply.data else "not restored"
            return reply

        self._cluster.on_each("restore", work)
        return _in_words(words)

    def first_failure(self) -> Problem | None:
        """Return what failed first: that of the node that ended by itself."""
        bad = [done for done in self._cluster.done if done.outcome == "failed" and done.problems]
        own = [done for done in bad if done.host == self._fell]
        return next((done.problems[0] for done in _answers(own) or own or bad), None)


def _answers(ended: Iterable[Done]) -> list[Done]:
    return [done for done in ended if done.phase == _ANSWER]


def _in_words(words: Mapping[str, str]) -> str:
    if len(set(words.values())) == 1:
        return next(iter(words.values()))
    return "; ".join(f"{host}: {text}" for host, text in words.items())


def _text(message: Struct) -> str:
    return msgspec.json.encode(message).decode()


def _unheard(line: str) -> None:
    del line


class ModelHandover(Handover):
    """Copies a model at a commit from the head's cache to those of workers."""

    def __init__(self, head: RemoteNode, workers: Sequence[RemoteNode], model: str, commit: str) -> None:
        super().__init__(head, workers, ())
        self._model, self._commit = model, commit

    def _serve(self, on_line: OnLine) -> Reply[Offered | Fetched]:
        argv = ("node", "offer-model", str(len(self._workers)), self._model, self._commit, *self._head.words)
        return self._head.call(Offered, *argv, on_line=self._offer.listen(on_line), stdin=self._token)

    def _fetch(self, node: RemoteNode, on_line: OnLine) -> Reply[Offered | Fetched]:
        found = self._offer.wait()
        if found is None:
            return Reply(data=Fetched(warning=f"{self._head.host} offers no model: this node downloads it"))
        source = ModelSource(found.port, found.fingerprint, self._token, self._head.member.address)

        def told(line: str) -> None:
            came = announced(line, Arriving)
            on_line(line if came is None else came.words)

        return node.call(Fetched, "node", "receive", on_line=told, stdin=_text(source))
