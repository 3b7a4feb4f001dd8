"""Ask the running Ray for its nodes, within a time limit, and print the addresses of those that are alive.

    ray-nodes.py HEAD:PORT SECONDS [--has ADDRESS] [--count N] [-- COMMAND...]

Wait until the head accepts this node's token, ADDRESS is one of the nodes, and there are N of them; then replace
this process by COMMAND.
"""

# The late imports exist in the node's environment only.
# mypy: disable-error-code="import-not-found"

import argparse
import json
import os
import socket
import sys
import threading
import time
from typing import NoReturn


class Refused(Exception):
    """The head rejects the token."""


def main() -> None:
    asked, command = arguments()
    give_up_at = time.monotonic() + asked.seconds
    # Ray's client may hang if something other than Ray answers.
    watchdog = threading.Timer(asked.seconds + 20, fail, [f"the program that listens at {asked.head} is not Ray"])
    watchdog.daemon = True
    watchdog.start()
    while True:
        problem, found = look(asked)
        if not problem:
            break
        if time.monotonic() > give_up_at:
            fail(f"{problem} (waited {asked.seconds:g} s)")
        time.sleep(1)
    watchdog.cancel()
    if command:
        replace_by(command)
    print(json.dumps(found))


def replace_by(command: list[str]) -> NoReturn:
    try:
        os.execv(command[0], command)
    except OSError as error:
        fail(f"{command[0]} cannot be run: {error.strerror}")


def arguments() -> tuple[argparse.Namespace, list[str]]:
    words, command = sys.argv[1:], list[str]()
    if "--" in words:
        at = words.index("--")
        words, command = words[:at], words[at + 1 :]
    parser = argparse.ArgumentParser()
    parser.add_argument("head")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--has", default="")
    parser.add_argument("--count", type=int, default=0)
    return parser.parse_args(words), command


def look(asked: argparse.Namespace) -> tuple[str, list[str]]:
    """Return in words what is still missing ("" if nothing), and the addresses of the nodes."""
    try:
        found = alive(asked.head)
    except Refused as refusal:
        fail(str(refusal))
    except OSError as error:
        return f"the head does not answer at {asked.head}: {error.strerror or error}", []
    except Exception as error:
        return f"the head at {asked.head} does not answer: {type(error).__name__}", []
    if asked.has and asked.has not in found:
        return f"{asked.has} has not joined the Ray of {asked.head}; its nodes: {', '.join(found) or 'none'}", found
    if len(found) < asked.count:
        return f"{len(found)} of {asked.count} nodes have joined Ray: {', '.join(found)}", found
    return "", found


def alive(head: str) -> list[str]:
    host, _, port = head.rpartition(":")
    socket.create_connection((host, int(port)), timeout=3).close()
    from ray._raylet import GcsClient
    from ray.exceptions import AuthenticationError

    try:
        nodes = GcsClient(address=head).get_all_node_info(timeout=5).values()
    except AuthenticationError as error:
        raise Refused(refusal(head, str(error))) from None
    return sorted({each.node_manager_address for each in nodes if each.state == each.ALIVE})


def refusal(head: str, said: str) -> str:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    if "cannot be opened" in said:
        return f"the token {path} is missing or unreadable"
    return f"the head at {head} rejects this node's token: {path} differs from the head's"


def fail(sentence: str) -> NoReturn:
    print(f"sparkinstall: {sentence}", file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    main()
