"""Fixes 3 and 7: systemd starts Ray at the QSFP address, with all variables set before."""

from collections.abc import Iterable, Mapping
from functools import partial
from shlex import quote
from typing import Any

from sparkinstall import payloads, ray_ports
from sparkinstall.layout import unit_path
from sparkinstall.node import Node
from sparkinstall.probes import Probe
from sparkinstall.probes import ray as probe
from sparkinstall.resources import Resource, systemd
from sparkinstall.resources.files import File
from sparkinstall.resources.ray_token import RayToken, by_hand
from sparkinstall.resources.secret_files import NamedSecret
from sparkinstall.resources.systemd import Cause, Service, UnitFile
from sparkinstall.resources.template import Template
from sparkinstall.steps import Step
from sparkinstall.system import Reader

# Seconds to wait for the address, for the head, and for joining. With the first two, five starts take longer than
# systemd's start limit interval (ray.service.j2): a node whose card is off while the other node is off must not give
# up before that one is on again.
_ADDRESS, _HEAD, _JOINED = 120, 120, 90
NO_ADDRESS = Cause(
    r"is on no interface",
    "this node's address on the QSFP link is on no interface",
    "check that the cable is plugged in and the other node is on (else DGX OS may switch the card off), and run "
    "`sparkinstall run network`; or set the address with --address",
)
"""The cause for the error of `before_start`."""
# Bytes. By default Ray takes 30 % of the memory, which the model needs; vLLM uses little of it.
_OBJECT_STORE = 2 * 2**30


class Ray(Step):
    name = "ray"
    why = "Ray on the QSFP link, as a service"
    needs = ("env-files", "firewall")
    phase = "services"
    impact = "vLLM cannot run on several nodes."

    def wanted(self, node: Node) -> bool:
        return node.with_ray

    def resources(self, node: Node) -> Iterable[Resource]:
        yield RayToken(node)
        yield before_start(node)
        yield File(node.ray_nodes, payloads.as_file("ray_nodes"))
        path = unit_path(node.ray_unit)
        if node.hub_token:
            yield NamedSecret(node.hub_token, "hub.token_file")
        yield UnitFile(path, "ray.service.j2", partial(_values, node), noted_in=node.units_record)
        depends = (path, node.env_file, node.ray_token, node.venv_stamp, node.before_start, node.ray_nodes)
        secrets = (node.hub_token,) if node.hub_token else ()
        yield Service(node.ray_unit, lambda _: depends, node.started_record(node.ray_unit), causes(node), secrets)

    def probes(self, node: Node) -> Iterable[Probe]:
        return probe.probes(node)


def before_start(node: Node) -> Template:
    """Return the script that delays a service until its address is configured."""

    def values(on: Reader) -> Mapping[str, Any]:
        return {"patience": _ADDRESS, "roce_gid": quote(on.real(node.roce_gid))}

    return Template(node.before_start, "before-start.sh.j2", values, mode=0o755)


def _values(node: Node, on: Reader) -> Mapping[str, Any]:
    cluster = node.config.cluster
    return {
        "role": node.role,
        "name": node.ray_unit.removesuffix(".service"),
        "user": systemd.setting(node.user),
        "env_file": systemd.setting(on.real(node.env_file)),
        "hub_offline": node.config.hub.offline,
        "hub_token": node.hub_token,
        "before_start": systemd.program(on.real(node.before_start)),
        "python": systemd.program(on.real(node.python)),
        "ray": systemd.program(on.real(f"{node.venv}/bin/ray")),
        "ray_nodes": systemd.word(on.real(node.ray_nodes)),
        "head": cluster.head,
        "ray_port": cluster.ray_port,
        "object_store": _OBJECT_STORE,
        "patience": {"head": _HEAD, "joined": _JOINED, "whole": _ADDRESS + _HEAD + _JOINED + 30},
        "ports": {name: value for name, value in vars(ray_ports).items() if name.isupper()},
    }


def causes(node: Node) -> tuple[Cause, ...]:
    """Return known messages of Ray and our scripts at a failed start, with cause and hint."""
    worker = node.role == "worker"
    return (
        Cause(
            r"rejects this node's token|InvalidAuthToken|RAY_AUTH_TOKEN_PATH is set but|cannot be read$",
            "this node's token differs from the head's",
            by_hand(node) if worker else "remove the token if it is damaged, then run `sparkinstall run ray`",
        ),
        NO_ADDRESS,
        Cause(
            r"the head does not answer",
            "the head does not answer",
            "on the head: `systemctl status ray-head`, and `sparkinstall run ray`; then run this again",
        ),
        Cause(
            r"is trying to use a port number|already running at|Address already in use",
            "another program uses one of Ray's ports, most likely a Ray that was started by hand",
            "stop that Ray with `ray stop`, or choose another port with `cluster.ray_port`, then run this again",
        ),
        Cause(
            r"No space left on device",
            "the file system of /tmp, where Ray keeps logs and sockets, is full",
            "free some space, then run this again",
        ),
        Cause(
            r"has not joined the Ray",
            "Ray runs, but this node has not joined it",
            "check that the firewall accepts the QSFP link in both directions, then run this again",
        ),
    )
