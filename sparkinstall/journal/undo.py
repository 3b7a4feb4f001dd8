"""Undo everything from the journal alone, last change first."""

import posixpath
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec import Struct

from sparkinstall.errors import Problem, storage_problem
from sparkinstall.events import Emit, silent
from sparkinstall.journal.journal import Journal, Record, fingerprint
from sparkinstall.journal.state_dir import StateFolder
from sparkinstall.system import KIND_WORDS, RESTORED_FIRST, UNDO_FUNCTIONS, Entry, System, Undo, Undone
from sparkinstall.system.local import staged

_META = ("mode", "uid", "gid", "mtime_ns")


class Change(Struct, frozen=True):
    """All records of one subject combined: the first original, and our last content."""

    undo: Undo
    records: tuple[Record, ...]


def changes(records: list[Record]) -> list[Change]:
    """Return one `Change` per subject, in the order in which they are undone."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.undo.kind, record.undo.subject), []).append(record)
    found = []
    for (kind, subject), group in groups.items():
        undo = Undo(kind, subject, group[0].undo.before, group[-1].undo.after)
        found.append(Change(undo, tuple(group)))
    return sorted(found, key=lambda change: change.records[0].n, reverse=True)


def undo_change(change: Change, on: System, journal: Journal) -> Undone:
    """Undo one change; the outcome is `nothing` if it is no longer there."""
    try:
        if own := OWN_KINDS.get(change.undo.kind):
            return _observed(change, own(change, on, journal), on)
        if undo := UNDO_FUNCTIONS.get(change.undo.kind):
            return undo([record.undo for record in change.records], on)
        return Undone(
            change.undo.subject, "failed", f"this version cannot undo a change of the kind {change.undo.kind}"
        )
    except (Problem, OSError) as error:
        problem = error if isinstance(error, Problem) else storage_problem(error, "undoing it")
        why = problem.cause or " ".join(problem.output[-1:])
        said = f"{problem.message}: {why}" if why else problem.message
        return Undone(change.undo.subject, "failed", f"{said} - {problem.hint}" if problem.hint else said)
    except KeyError as missing:
        return Undone(change.undo.subject, "failed", f"the journal's record of it has no usable {missing}")


def _observed(change: Change, result: Undone, on: System) -> Undone:
    """Return the result if the former state is there again: a program may report success and have done nothing."""
    path, before = change.undo.subject, change.undo.before
    if result.outcome in ("restored", "removed") and not _same(now := fingerprint(on, path), before):
        found = KIND_WORDS.get(now["kind"], "nothing")
        return Undone(path, "failed", f"no error was reported, but {found} is there, not what was there before")
    return result


def _undo_path(change: Change, on: System, journal: Journal) -> Undone:
    path, before = change.undo.subject, change.undo.before
    now = fingerprint(on, path)
    if _same(now, before):
        on.remove(staged(path))
        # A killed uninstall may have restored the content but not yet the metadata.
        _restore_meta(path, before, on)
        return Undone(path, "nothing")
    if not any(_same(now, record.undo.after) for record in change.records):
        where = f"; its original is {journal.home}/originals/{before['sha256']}" if "sha256" in before else ""
        return Undone(path, "kept", f"changed since by another program or user{where}")
    if before["kind"] == "absent":
        on.remove(path)
        return Undone(path, "removed")
    _restore(path, before, on, journal)
    return Undone(path, "restored")


def _restore(path: str, before: Mapping[str, Any], on: System, journal: Journal) -> None:
    if before["kind"] == "link":
        on.link(path, before["target"])
        return
    on.write(path, journal.original(before["sha256"]), before["mode"])
    _restore_meta(path, before, on)


def _restore_meta(path: str, before: Mapping[str, Any], on: System) -> None:
    now = on.entry(path)
    if now is None or "mtime_ns" not in before:
        return
    if (now.mode, now.uid, now.gid, now.mtime_ns) != tuple(before[name] for name in _META):
        on.restore_meta(path, before["mode"], before["uid"], before["gid"], before["mtime_ns"])


def _same(now: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    return all(now[name] == then.get(name) for name in now)


def _undo_dir(change: Change, on: System, _journal: Journal) -> Undone:
    path = change.undo.subject
    if (was := on.entry(path)) is None:
        return Undone(path, "nothing")
    if was.kind != "dir":
        return _not_a_folder(path, was)
    if on.remove_dir(path):
        return Undone(path, "removed")
    return Undone(path, "kept", _not_empty(on.names(path)))


def _undo_tree(change: Change, on: System, journal: Journal) -> Undone:
    path, before = change.undo.subject, change.undo.before
    was = on.entry(path)
    if was and was.kind == "link" and _leads_into_a_tree(path, was, journal):
        on.remove(path)
    elif was and was.kind != "dir":
        return _not_a_folder(path, was)
    else:
        on.clear(path)
    if before["kind"] == "dir":
        on.make_dir(path, before["mode"])
        _restore_meta(path, before, on)
    return Undone(path, "removed" if was else "nothing")


def _leads_into_a_tree(path: str, link: Entry, journal: Journal) -> bool:
    """Return whether a link that `System.switch` could have made is at `path`."""
    leads = posixpath.normpath(posixpath.join(posixpath.dirname(path), link.target))
    trees = (record.undo.subject for record in journal.records() if record.undo.kind == "tree")
    return any(leads.startswith(f"{tree}/") for tree in trees)


def _not_a_folder(path: str, was: Entry) -> Undone:
    leads = f" to {was.target}" if was.kind == "link" else ""
    return Undone(path, "kept", f"{was.words}{leads} is in the place of the folder that sparkinstall made")


OWN_KINDS: dict[str, Callable[[Change, System, Journal], Undone]] = {
    "path": _undo_path,
    "dir": _undo_dir,
    "tree": _undo_tree,
}
"""Kinds whose former content is in the journal; all others are registered beside their resource."""


def undo_all(state: StateFolder, emit: Emit = silent) -> list[Undone]:
    """Undo every change in the journal, last first; remove the state too unless something was kept.

    Raises:
        Busy: another run holds the node.
        JournalDamaged: the journal cannot be read; nothing was changed.
    """
    with state.hold("uninstall", emit):
        journal = state.journal()
        own, others = _apart(changes(journal.records()), state)
        results, staying = _undone(others, state.system, journal)
        # Do not keep records of folders only: what is in them now is not ours.
        if any(change.undo.kind != "dir" or result.outcome == "failed" for change, result in staying):
            journal.rewrite([record for each in (*own, *(change for change, _ in staying)) for record in each.records])
        elif strangers := state.remove({each.undo.subject: each.undo.before["kind"] for each in reversed(own)}):
            results.append(Undone(str(state.home), "kept", _not_empty(strangers)))
    return results


def undo_step(state: StateFolder, step: str) -> list[Undone]:
    """Undo every change of one step, last first; remove the state too if nothing else was changed on the node.

    The caller holds the node.

    Raises:
        JournalDamaged: as `undo_all`.
    """
    journal = state.journal()
    records = journal.records()
    results, staying = _undone(changes([each for each in records if each.step == step]), state.system, journal)
    kept = {record.n for change, _ in staying for record in change.records}
    left = [each for each in records if each.step != step or each.n in kept]
    failed = any(result.outcome == "failed" for _, result in staying)
    own, others = _apart(changes(left), state)
    if failed or any(change.undo.kind != "dir" for change in others):
        # A folder that other steps use now stays until they are undone.
        journal.rewrite(left)
    else:
        state.remove({each.undo.subject: each.undo.before["kind"] for each in reversed(own)})
    return results


def _undone(found: Sequence[Change], on: System, journal: Journal) -> tuple[list[Undone], list[tuple[Change, Undone]]]:
    """Undo changes, and return the results, and which of the changes stay with their results."""
    staying: list[tuple[Change, Undone]] = []
    results: list[Undone] = []
    for change in found:
        results.append(_undone_after(change, staying, on, journal))
        if results[-1].outcome in ("kept", "failed"):
            staying.append((change, results[-1]))
    return results, staying


def _undone_after(change: Change, staying: Sequence[tuple[Change, Undone]], on: System, journal: Journal) -> Undone:
    """Undo a change; it stays in the journal too if it depends on a file that stays, until that is undone."""
    subject, first = change.undo.subject, RESTORED_FIRST.get(change.undo.kind)
    needed = [result for each, result in staying if first and each.undo.subject.startswith(first(subject))]
    if failed := [each.subject for each in needed if each.outcome == "failed"]:
        return Undone(subject, "failed", f"{failed[0]} comes first, and could not be undone")
    result = undo_change(change, on, journal)
    if needed and result.outcome != "failed":
        return Undone(subject, "kept", f"in part, as {needed[0].subject} was kept")
    return result


def _not_empty(names: Sequence[str]) -> str:
    return f"it is not empty: {', '.join(names[:3])}"


def _apart(found: list[Change], state: StateFolder) -> tuple[list[Change], list[Change]]:
    """Split off the parent folders of the state, which are removed last."""
    ours = {str(each) for each in (state.home, *state.home.parents)}
    own = [t for t in found if t.undo.kind == "dir" and state.system.real(t.undo.subject) in ours]
    return own, [t for t in found if t not in own]
