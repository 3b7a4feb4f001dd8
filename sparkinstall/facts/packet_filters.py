"""Detect other packet filters on this node: ufw, firewalld, own nftables or iptables rules."""

import json
from collections.abc import Mapping
from typing import Any

from sparkinstall.system import Reader

# Absolute paths: an ordinary user's PATH has no sbin.
NFT = "/usr/sbin/nft"
TABLE = ("inet", "sparkinstall")

# Chains of programs that filter only their own traffic.
_OWN_TRAFFIC = ("DOCKER", "LIBVIRT", "KUBE-", "CNI-", "NETAVARK", "ts-", "f2b-")
_OWN_TABLES = ("f2b-table", "docker-bridges")
_DROPPING = {"drop", "reject", "vmap", "queue"}

Chain = tuple[str, str, str]


def another(on: Reader) -> str:
    """Describe the active firewall that is not ours; "" if there is none.

    The kernel's rules are read only if nft is installed. Tables of Docker, fail2ban and the like do not count.
    """
    return _ufw(on) or _firewalld(on) or _nftables(on) or _legacy(on)


def _ufw(on: Reader) -> str:
    lines = (on.read("/etc/ufw/ufw.conf") or b"").decode(errors="replace").splitlines()
    return "ufw" if any(line.replace('"', "").strip().lower() == "enabled=yes" for line in lines) else ""


def _firewalld(on: Reader) -> str:
    unit = "/usr/lib/systemd/system/firewalld.service"
    return "firewalld" if on.entry(unit) and on.ask("systemctl", "-q", "is-active", "firewalld").ok else ""


def _nftables(on: Reader) -> str:
    answer = on.ask(NFT, "-j", "list", "ruleset", root=True)
    chain = filtering_chain(answer.out) if answer.ok else None
    return f"the nftables chain {' '.join(chain)}" if chain else ""


def filtering_chain(ruleset: str) -> Chain | None:
    """Return family, table and name of a chain that drops incoming packets; `ruleset` is nft's JSON."""
    items = json.loads(ruleset)["nftables"]
    chains = {_place(each["chain"], "name"): each["chain"] for each in items if "chain" in each}
    rules: dict[Chain, list[Any]] = {}
    for rule in (each["rule"] for each in items if "rule" in each):
        rules.setdefault(_place(rule, "chain"), []).append(rule["expr"])
    for place, chain in chains.items():
        filters = chain.get("hook") == "input" and chain.get("type") == "filter" and not _is_own_traffic(place)
        if filters and (chain.get("policy") == "drop" or _drops(place, rules, set())):
            return place
    return None


def _place(of: Mapping[str, Any], name: str) -> Chain:
    return of["family"], of["table"], of[name]


def _is_own_traffic(chain: Chain) -> bool:
    family, table, name = chain
    return (family, table) == TABLE or table in _OWN_TABLES or name.startswith(_OWN_TRAFFIC)


def _drops(chain: Chain, rules: Mapping[Chain, list[Any]], seen: set[Chain]) -> bool:
    if chain in seen or _is_own_traffic(chain):
        return False
    seen.add(chain)
    for expressions in rules.get(chain, ()):
        if any(_DROPPING & set(each) or _rejects(each) for each in expressions):
            return True
        targets = [each[jump]["target"] for each in expressions for jump in ("jump", "goto") if jump in each]
        if any(_drops((*chain[:2], target), rules, seen) for target in targets):
            return True
    return False


def _rejects(expression: Mapping[str, Any]) -> bool:
    """Return whether an expression is iptables' REJECT, which nft's JSON shows as `xt`."""
    extension = expression.get("xt") or {}
    return extension.get("type") == "target" and extension.get("name") in ("REJECT", "TARPIT")


def _legacy(on: Reader) -> str:
    for names, program in (("ip_tables_names", "iptables-legacy"), ("ip6_tables_names", "ip6tables-legacy")):
        # The program would load the kernel module even if nobody uses it.
        if b"filter" in (on.read(f"/proc/net/{names}") or b"").split():
            answer = on.ask(f"/usr/sbin/{program}", "-S", root=True)
            if legacy_drops(answer.out.splitlines()):
                return program.removesuffix("-legacy")
    return ""


def legacy_drops(lines: list[str]) -> bool:
    """Return whether a listing of iptables drops or rejects incoming packets."""
    return "-P INPUT DROP" in lines or _legacy_chain_drops("INPUT", lines, set())


def _legacy_chain_drops(chain: str, lines: list[str], seen: set[str]) -> bool:
    if chain in seen or chain.startswith(_OWN_TRAFFIC):
        return False
    seen.add(chain)
    targets = [line.split(" -j ")[1].split()[0] for line in lines if line.startswith(f"-A {chain} ") and " -j " in line]
    return any(each in ("DROP", "REJECT") or _legacy_chain_drops(each, lines, seen) for each in targets)
