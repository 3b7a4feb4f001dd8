"""What has the name of ours and is not: recognized before anything is changed, unless the journal lists it."""

import os
from pathlib import Path

import pytest

from sparkinstall.core import checks
from sparkinstall.events import silent
from sparkinstall.facts.packet_filters import NFT, TABLE
from sparkinstall.node import Node
from sparkinstall.probes.preflight import preflight
from sparkinstall.resources import Conflict, Drift
from sparkinstall.resources.firewall import UNDO, LiveTable
from sparkinstall.resources.venv import environment_of
from sparkinstall.steps.nccl import Nccl
from sparkinstall.system import Undo
from sparkinstall.system.local import LocalReader
from tests.support.machine import OnASpark
from tests.support.nodes import NODE, node_of, system_of
from tests.support.rehearsals import envelope, in_this_process

PREFIX = "opt/sparkinstall"


def prefix_check(root: Path, node: Node) -> tuple[str, str]:
    (probe,) = (each for each in preflight(node) if each.name == "prefix")
    (result,) = checks.look([probe], LocalReader(str(root)), silent)
    return result.verdict, result.found


# --- the folders below the prefix


def make(place: Path, what: str) -> None:
    place.parent.mkdir(parents=True)
    if what == "file":
        place.write_text("theirs")
    elif what == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(place.parent if what == "link" else "/nowhere")


@pytest.mark.parametrize("what", ["file", "link", "dangling", "pipe"])
def test_something_else_in_the_place_of_our_folder_is_a_conflict_of_the_plan(tmp_path: Path, what: str) -> None:
    root, place = tmp_path / "node", tmp_path / f"node/{PREFIX}/venv"
    make(place, what)
    run = in_this_process("plan", "--root", root, "--json", "--only", "environment")
    states = [each for step in envelope(run)["data"]["steps"] for each in step["resources"]]
    (conflict,) = [each for each in states if each["state"] == "conflict"]
    assert str(place) in conflict["message"] and f"mv {place}" in conflict["hint"]
    run = in_this_process("all", "--root", root, "--json", "--only", "environment")
    (error,) = envelope(run)["errors"]
    assert (run.returncode, error["code"]) == (1, "blocked") and str(place) in error["message"]
    assert not (root / "var").exists(), "nothing was changed"


@pytest.mark.parametrize("what", ["file", "link", "dangling", "pipe"])
def test_something_else_in_the_place_of_the_nccl_folder_is_a_conflict(tmp_path: Path, what: str) -> None:
    make(tmp_path / PREFIX / "nccl", what)
    (library, *_) = Nccl().resources(node_of(tmp_path, nccl__mode="source"))
    state = library.check(LocalReader(str(tmp_path)))
    assert isinstance(state, Conflict) and str(tmp_path / PREFIX / "nccl") in state.message


@pytest.mark.parametrize("journal", [False, True], ids=["fresh", "set-up"])
@pytest.mark.parametrize("name", ["venv", "nccl", "env"])
def test_folder_of_another_program_fails_the_preflight(tmp_path: Path, name: str, journal: bool) -> None:
    node = node_of(tmp_path)
    if journal:
        system_of(tmp_path).write("/etc/other", b"ours")
    (tmp_path / PREFIX / name).mkdir(parents=True)
    verdict, found = prefix_check(tmp_path, node)
    assert verdict == "fail" and f"contains {name}, which no journal of ours lists" in found
    system_of(tmp_path).promise(Undo("tree", f"/{PREFIX}/{name}", {"kind": "absent"}, {"kind": "dir"}))
    assert prefix_check(tmp_path, node)[0] == "pass"


@pytest.mark.parametrize(("target", "verdict"), [("../data", "pass"), ("/nowhere", "fail"), ("../../out", "fail")])
def test_prefix_behind_a_link_is_used_if_it_leads_to_a_folder_of_the_node(
    tmp_path: Path, target: str, verdict: str
) -> None:
    root = tmp_path / "node"
    for folder in (root / "data", root / "opt", tmp_path / "out"):
        folder.mkdir(parents=True)
    (root / PREFIX).symlink_to(target)
    said, found = prefix_check(root, node_of(root))
    assert said == verdict, found
    if verdict == "fail":
        assert str(root / PREFIX) in found


def test_environment_in_a_folder_is_no_conflict(tmp_path: Path) -> None:
    node = node_of(tmp_path)
    Path(f"{tmp_path}{node.venv}").mkdir(parents=True)
    assert isinstance(environment_of(node).check(LocalReader(str(tmp_path))), Drift)


# --- the table of nftables


@pytest.mark.parametrize("journal", ["", "other", "ours"])
def test_table_of_our_name_is_foreign_unless_the_journal_lists_it(tmp_path: Path, journal: str) -> None:
    name = " ".join(TABLE)
    nft = tmp_path / NFT.lstrip("/")
    nft.parent.mkdir(parents=True)
    nft.touch()
    if journal:
        subject = name if journal == "ours" else "/etc/other"
        system_of(tmp_path).promise(Undo(UNDO, subject, {"kind": "absent"}, {"kind": "table"}))
    on = OnASpark(tmp_path, {NFT: f"table {name}\n", "ss": "", "unshare": "a listing"})
    state = LiveTable(NODE).check(on)
    if journal == "ours":
        assert isinstance(state, Drift)
    else:
        assert isinstance(state, Conflict) and name in state.message and f"nft delete table {name}" in state.hint
