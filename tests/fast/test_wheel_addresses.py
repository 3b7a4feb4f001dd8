"""A wheel that a stack names by its address and that cannot be downloaded: the error names it and another stack."""

from pathlib import Path

import pytest

from sparkinstall import stacks
from sparkinstall.config import Config
from sparkinstall.errors import CommandFailed
from sparkinstall.node import Node
from sparkinstall.resources.venv import explain_failed_install
from sparkinstall.system import Result, failure_of
from tests.support.rehearsals import SETTINGS, Rehearsal, envelope, output_of
from tests.support.tiny_stack import no_index, tiny_stack

# Nothing listens at the port for "discard".
ADDRESS = "https://127.0.0.1:9/whl/vllm-0.18.1%2Bcu130-py3-none-any.whl"
OTHER_STACK = "`--stack 0.29.0`"


def test_wheel_at_an_unreachable_address_is_named_with_another_stack(tmp_path: Path) -> None:
    stack = tiny_stack(tmp_path / "stack", locked=False)
    wheels = f"{{wheels: [{{url: '{ADDRESS}'}}]}}"
    stack.write_text(stack.read_text().replace("{}", wheels))
    node = Rehearsal(tmp_path / "node", (*SETTINGS, "--stack", str(stack), "--platform", "aarch64"))
    run = node.all("--json", **{**no_index(stack), "UV_HTTP_RETRIES": "0"})
    error = next(each for each in envelope(run)["errors"] if "127.0.0.1" in each["cause"])
    assert run.returncode == 1, output_of(run)
    assert error["cause"].endswith(ADDRESS) and "cannot be downloaded" in error["cause"]
    assert "allow this node to reach 127.0.0.1" in error["hint"] and OTHER_STACK in error["hint"]


# The message of uv 0.13.8 for an address without the file, with placeholders for its arguments.
NOT_FOUND = """error: Failed to download `{name} @ {url}`
  cause: Failed to fetch: {url}
  cause: HTTP status client error (404 File not found) for url ({url})"""


@pytest.mark.parametrize("number", range(4))
def test_wheel_missing_at_its_address_is_named_with_another_stack(number: int, tmp_path: Path) -> None:
    node = arm_node(tmp_path)
    pin = node.wheels.wheels[number]
    failure = failed_install(NOT_FOUND.format(name=pin.name, url=pin.url), node)
    assert pin.url and pin.url in failure.cause
    assert OTHER_STACK in failure.hint and f"reach {pin.url.split('/')[2]}," in failure.hint


def test_unreachable_index_is_named_without_another_stack(tmp_path: Path) -> None:
    said = (
        "  cause: Failed to fetch: https://index.example/simple/vllm/\n"
        "  cause: error sending request for url (https://index.example/simple/vllm/)"
    )
    failure = failed_install(said, arm_node(tmp_path))
    assert failure.cause.startswith("the package index cannot be reached") and "--stack" not in failure.hint


def test_install_on_a_full_disk_is_not_a_matter_of_its_address(tmp_path: Path) -> None:
    node = arm_node(tmp_path)
    fetch = f"error: Failed to fetch: `{node.wheels.wheels[0].url}`\n  cause: No space left on device (os error 28)"
    failure = failed_install(fetch, node)
    assert failure.cause.startswith("the disk is full") and failure.hint.startswith("free some space")


def failed_install(said: str, node: Node) -> CommandFailed:
    failure = failure_of(Result(("uv", "pip", "install"), 1, said, ""))
    assert isinstance(failure, CommandFailed)
    return explain_failed_install(failure, node)


def arm_node(root: Path) -> Node:
    return Node(Config(), stacks.load("0.18.1"), "aarch64", "x86_64", True, False, str(root), root / "cache")
