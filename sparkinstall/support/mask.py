"""Replace personal and machine-identifying data with stable placeholders, so that a text can be made public.

A value has the same placeholder, such as `<ip-1>`, everywhere in one output, so that a reader can follow it.
In doubt a value counts as personal.
"""

import re
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any

from msgspec import Struct

from sparkinstall.redaction import HIDDEN, LISTED, hide_in, redact

_WORDS = {
    "host": ("host name", "host names"), "user": ("user name", "user names"), "ip": ("address", "addresses"),
    "mac": ("MAC address", "MAC addresses"), "guid": ("GUID", "GUIDs"), "uuid": ("UUID", "UUIDs"),
    "serial": ("serial number or machine id", "serial numbers or machine ids"),
    "mail": ("e-mail address", "e-mail addresses"), "ssid": ("network name", "network names"),
}  # fmt: skip
_PLACEHOLDER = re.compile(rf"(<(?:{'|'.join(_WORDS)})-\d+>|{re.escape(HIDDEN)})")
_ROUNDS = 6
# A name may directly follow a colour code or an escaped line end of JSON.
_COLOUR = r"(?:\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b\n]*(?:\x07|\x1b\\)?|\x1b|(?:\\u001b|\\x1b|\\033)\[[0-9;]*m)"
_COLOURS = re.compile(_COLOUR)
_COLOUR_BETWEEN = re.compile(rf"(?<=\w){_COLOUR}+(?=\w)")
_FRONT = r"(?:(?<![A-Za-z0-9])|(?<=\\[nrtbf])|(?<=\\u[0-9A-Fa-f]{4}))"
_BACK = r"(?![A-Za-z0-9])"

# Common names of machines and users: they identify nobody and are words of every log.
_COMMON_NAMES = frozenset(
    {
        *("admin", "cluster", "daemon", "debian", "default", "dgx", "dgx-spark", "domain", "gb10", "gpu", "guest"),
        *("gx10", "head", "home", "host", "internet", "linux", "local", "localdomain", "localhost", "machine"),
        *("network", "nobody", "node", "nvidia", "ray", "root", "server", "service", "spark", "sparkinstall"),
        *("system", "test", "ubuntu", "user", "users", "vllm", "worker"),
    }
)
_MACHINES_OWN = ("0.0.0.0/32", "127.0.0.0/8", "192.168.100.0/24", "192.168.101.0/24", "224.0.0.0/4", "255.0.0.0/8")
_STAY = tuple(IPv4Network(each) for each in _MACHINES_OWN)
_GO = tuple(IPv6Network(each) for each in ("2000::/3", "fc00::/7", "fe80::/10", "fec0::/10", "::ffff:0:0/96"))

_HEX = "[0-9A-Fa-f]"
_IPV4 = re.compile(r"(?<!\d)(?<!\d\.)(?:\d{1,3}\.){3}\d{1,3}(?!\d|\.\d)")
_IPV6 = re.compile(
    rf"(?:(?<![0-9A-Za-z_:])|(?<=[A-Za-z_]:)){_HEX}{{0,4}}:(?:{_HEX}{{0,4}}:){{1,6}}{_HEX}{{0,4}}"
    r"(?:\.\d{1,3}){0,3}(?![0-9A-Za-z_])"
)
_VERSION_BEFORE = re.compile(
    r"(?:[=~<>!]=\s*|\bv|\b[Vv]ersion\w*\W{1,4}|\b(?:driver|firmware|nvidia[-_][a-z0-9_-]+|lib(?:nccl|nv|cu)[a-z0-9_-]*|"
    r"cu(?:da|dnn|blas|fft|rand|solver|sparse|file|pti)[a-z0-9_-]*)[\s(:=-]{0,6})$"
)
_WHEEL_BEHIND = re.compile(r"[-+](?:py\d|cp\d|\d|[a-z]+\d)")
_MAC = re.compile(
    rf"(?:(?<![0-9A-Za-z:])|(?<=[0-9A-Za-z]:)){_HEX}{{2}}([:-])(?:{_HEX}{{2}}\1){{4,18}}{_HEX}{{2}}(?!{_HEX})"
)
_GUID = re.compile(rf"(?<!{_HEX})(?<!{_HEX}:)(?:{_HEX}{{4}}:){{3}}{_HEX}{{4}}(?!:?{_HEX})")
_NAMED_ID = re.compile(
    r"(?i)((?:guid|phys_(?:switch|port)_id|switchid|portid|machine[-_ ]?id|boot[-_ ]?id|eui\.|wwn-0x)[\"']?\s*[:=]?\s*"
    r"[\"']?)((?:0x)?[0-9a-f]{12,32})(?![0-9a-f])"
)
_MAC_IN_A_NAME = re.compile(rf"(?a)\b((?:enx|wlx))({_HEX}{{12}})\b")
_UUID = re.compile(rf"(?<!{_HEX}){_HEX}{{8}}(?:-{_HEX}{{4}}){{3}}-{_HEX}{{12}}(?!{_HEX})")
_MAIL = re.compile(r"(?a)(?<![\w.+%-])[\w.+%-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.([A-Za-z]{2,})\b")
_UNITS = ("service", "socket", "timer", "slice", "mount", "target", "device", "path", "scope", "swap")
_HOME = re.compile(r"(/home/)([A-Za-z_][\w.-]*)")
_FACTORY = re.compile(r"(?ai)(?<![\w-])(?:spark|gx10|promaxgb10|zgx)-[0-9a-f]{4,8}(?![\w-])")
_IN_THE_LAN = re.compile(
    r"(?ai)(?<![\w./~-])(?!(?:threading|plumbum|system|self)\.local)[a-z0-9][\w-]*\.(?:local|lan|home\.arpa|fritz\.box)(?![\w-]|\.\w)"
)
_TORCH_PEER = re.compile(r"(?<=\[)[A-Za-z][\w.-]*(?=\]:\d{2,5}\b)")

_KEY_BLOCK = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S)
_TOKENS = re.compile(
    r"(?a)\b(?:hf_[A-Za-z0-9]{20,}|(?:gh[pousr]_|github_pat_|glpat-|sk-|nvapi-|xox[bp]-)[\w-]{16,}|AKIA[A-Z0-9]{12,}|"
    r"eyJ[\w-]{8,}\.[\w-]+\.[\w-]+)"
)
_SECRET_KEY = (
    r"passwords?|passwd|passphrase|psk|secret|secret[_-]key|api[_-]?keys?|luks\.key|access[_-]key|private[_-]?key|credentials?|"
    r"(?:hf|hub|auth|access|refresh|bearer|ray|ngc|gh|github|session|api|wandb|cluster|private)[_-]?token|"
    # `token` alone may also be a word of a model or a figure of a benchmark.
    r"(?:(?<![\w-])|(?<=\\[nrt]))token(?![\"']?\s*[:=]\s*(?:[\"']?<|[\d.]{1,8}(?![\w.-])))"
)
# `token` with a delimiter, to skip lines about tokens per second.
_SECRET_WORDS = (
    *("pass", "psk", "secret", "key", "credential"),
    *("token=", "token:", "token'", 'token"', "token ", "token\t", "token\\"),
)
_SERIAL_KEY = r"(?<![A-Za-z])serial(?:[ _-]?(?:number|num|no|nr|short))?\.?|(?<![A-Za-z0-9])s/?n"
_SSID_KEY = r"(?<![A-Za-z])e?ssid"
_VALUE = r"([\[({]?)(?:(\"(?:[^\"\\\n]|\\.)*\"?)|('(?:[^'\\\n]|\\.)*'?)|(BARE))"
_EMPTY_VALUE = re.compile(r"(?i)[\"']?(?:none|null|nil|true|false|n/a|\[?n/a\]?|not \w+|to be filled.*|\*+|)[\"']?")
_NUMBERS = re.compile(r"[\d.]+")
_FLAG = re.compile(r"--[\w-]*(?:keys?|token|password|secret)")
_USER = ("-u", "--user", "--proxy-user")


def _keyed(key: str, bare: str, equals: str = r"[\"']?\s*[:=]\s*") -> re.Pattern[str]:
    return re.compile(rf"(?i)((?:{key}){equals}){_VALUE.replace('BARE', bare)}")


_LISTED_SECRETS = re.compile(rf"(?i)((?:{_SECRET_KEY}){LISTED}")
# JSON inside a JSON string.
_ESCAPED_SECRET = re.compile(rf"(?i)((?:{_SECRET_KEY})\\\"\s*:\s*)(\\\"(?:[^\"\\\n]|\\[^\"\n])*(?:\\\"|$))")
_KEYED_SECRET = _keyed(_SECRET_KEY, r"(?![\[({]+(?:\s|$))[^\s\"',;)}\]]+")
_ENV_SECRET = re.compile(
    r"(?a)\b([A-Z][A-Z0-9_]*(?:TOKEN|PASS|_KEYS?|_PAT)=)()(?:(\"[^\"\n]*\"?)|('[^'\n]*'?)|([^\s\"',;]+))"
)
_GIVEN_SECRET = re.compile(
    r"((?<!-)--[\w-]{0,40}(?:key|token|password|secret)(?:[= ]|[\"']\s*,\s*(?=[\"'](?!-))))()"
    r"(?:(\"[^\"\n]*\"?)|('[^'\n]*'?)|([^\s\"'-]\S*))"
)
_KEYED_SERIAL = _keyed(_SERIAL_KEY, r"(?=[\w./-]*\d)[\w./-]{4,}")
_KEYED_SSID = _keyed(_SSID_KEY, r"[^\n\"',;<\\]+")
_QUOTED_SSID = _keyed(_SSID_KEY, r"(?!)", r"\s+")


class Known(Struct, frozen=True):
    """Personal data known for this node. `homes`: the user's home folders; `serials`: includes machine ids."""

    hosts: tuple[str, ...] = ()
    users: tuple[str, ...] = ()
    homes: tuple[str, ...] = ()
    serials: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()


Replacement = Callable[[re.Match[str]], str]
Rule = tuple[tuple[str, ...], re.Pattern[str], Replacement]
"""(words, pattern, replacement): the pattern is tried only if the lower-case line contains one of the words."""


class Mask:
    """The placeholders of one output."""

    def __init__(self, known: Known | None = None) -> None:
        self._numbers: dict[str, dict[str, int]] = {}
        self._home = self._secret = False
        self._known = known or Known()
        self._rules = [*self._of_secrets(), *self._of_shapes(), *self._of_names()]

    def text(self, text: str) -> str:
        """Return `text` masked and without colours. Masking twice changes nothing more."""
        text = _COLOURS.sub("", _COLOUR_BETWEEN.sub(" ", text)) if _COLOURS.search(text) else text
        if "PRIVATE KEY-----" in text:
            text = _KEY_BLOCK.sub(self._hidden, text)
        if "[\n" in text:
            # A list may span many lines, and only the first has the key.
            text = self._without_lists(self._without_credentials(text))
        return "\n".join(map(self._line, text.split("\n")))

    def _line(self, line: str) -> str:
        for _ in range(_ROUNDS):
            # A replacement may expose a value to an earlier rule.
            before, line = line, self._once(line)
            if line == before:
                break
        return line

    def _once(self, line: str) -> str:
        line = self._without_credentials(line)
        lower = line.lower()
        if ("[" in line or "(" in line) and any(word in lower for word in _SECRET_WORDS):
            line = self._without_lists(line)
        for words, pattern, replacement in self._rules:
            if any(word in lower for word in words) and pattern.search(line):
                parts = _PLACEHOLDER.split(line)
                line = "".join(part if at % 2 else pattern.sub(replacement, part) for at, part in enumerate(parts))
        return line

    def _without_credentials(self, text: str) -> str:
        hidden = redact(text)
        self._secret = self._secret or hidden != text
        return hidden

    def _without_lists(self, text: str) -> str:
        return _LISTED_SECRETS.sub(self._in_pieces, text)

    def data(self, value: Any, key: str = "") -> Any:
        """Mask JSON values; the name of a key may mark its value as personal."""
        if isinstance(value, Mapping):
            return {self.text(str(name)): self.data(each, str(name)) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return self._list(value, key)
        if isinstance(value, str) or (_is_number(value) and _kind_of(key) in ("serial", "secret")):
            return self._under(key, str(value))
        return value

    def _list(self, values: list[Any] | tuple[Any, ...], key: str) -> list[Any]:
        """Mask a list. It may be a command: an option for secrets takes all values up to the next option."""
        shown, secret, curl = [], False, False
        for value in values:
            option = isinstance(value, str) and value.startswith("-")
            hide = secret and not option and (isinstance(value, str) or _is_number(value))
            self._secret = self._secret or hide
            shown.append(HIDDEN if hide else self.data(value, key))
            if isinstance(value, str):
                curl = curl or value.rpartition("/")[2] == "curl"
                secret = bool(_FLAG.fullmatch(value) or (curl and value in _USER)) if option else secret
        return shown

    def _under(self, key: str, value: str) -> str:
        kind = _kind_of(key)
        if "version" in key.lower() and _NUMBERS.fullmatch(value):
            return value
        if kind is None or _EMPTY_VALUE.fullmatch(value) or _PLACEHOLDER.fullmatch(value):
            return self.text(value)
        if kind == "secret":
            self._secret = True
            return HIDDEN
        return self._placeholder(kind, value)

    def summary(self) -> str:
        """Return in words what was masked; empty if nothing was."""
        counts = [(kind, len(self._numbers.get(kind, ()))) for kind in _WORDS]
        parts = [f"{count} {_WORDS[kind][count > 1]}" for kind, count in counts if count]
        parts += ["the home folder"] * self._home + ["credentials"] * self._secret
        return ", ".join(parts)

    def _placeholder(self, kind: str, value: str) -> str:
        numbers = self._numbers.setdefault(kind, {})
        return f"<{kind}-{numbers.setdefault(value.lower(), len(numbers) + 1)}>"

    # --- the rules, in order

    def _of_secrets(self) -> list[Rule]:
        secret = self._value("secret")
        return [
            (("_", "-", "akia", "eyj"), _TOKENS, self._hidden),
            (('\\"',), _ESCAPED_SECRET, self._in_pieces),
            (_SECRET_WORDS, _KEYED_SECRET, secret),
            (("token=", "pass=", "_key=", "_keys=", "_pat="), _ENV_SECRET, secret),
            (("--",), _GIVEN_SECRET, secret),
        ]

    def _of_shapes(self) -> list[Rule]:
        return [
            (("@",), _MAIL, self._mail),
            *((("/",), pattern, self._at_home) for pattern in _folders(self._known.homes)),
            (("/home/",), _HOME, self._other_home),
            *_names(self._known.serials, self._whole("serial")),
            ((":",), _IPV6, self._ipv6),
            (("-",), _UUID, self._whole("uuid")),
            (("guid", "_id", "-id", " id", "portid", "switchid", "eui.", "wwn-"), _NAMED_ID, self._behind("guid")),
            (("enx", "wlx"), _MAC_IN_A_NAME, self._mac_in_a_name),
            ((":", "-"), _MAC, self._mac),
            ((":",), _GUID, self._guid),
            ((".",), _IPV4, self._ipv4),
            (("serial", "sn", "s/n"), _KEYED_SERIAL, self._value("serial")),
            (("ssid",), _KEYED_SSID, self._value("ssid")),
            (("ssid",), _QUOTED_SSID, self._value("ssid")),
        ]

    def _of_names(self) -> list[Rule]:
        return [
            *_names(self._known.networks, self._whole("ssid")),
            *_names(self._known.hosts, self._host, r"(?<![\w/.-])", r"(?![\w/-]|\.\w)"),
            (("spark-", "gx10-", "zgx-", "gb10-"), _FACTORY, self._host),
            ((".local", ".lan", ".home.arpa", ".fritz.box"), _IN_THE_LAN, self._host),
            (("]:",), _TORCH_PEER, self._host),
            *_names(self._known.users, self._whole("user")),
        ]

    def _whole(self, kind: str) -> Replacement:
        return lambda found: self._placeholder(kind, found[0])

    def _behind(self, kind: str) -> Replacement:
        """Return a replacement that keeps group 1 and masks group 2."""
        return lambda found: found[1] + self._placeholder(kind, found[2])

    def _value(self, kind: str) -> Replacement:
        """Return a replacement for a value after its key, quoted or bare."""

        def replacement(found: re.Match[str]) -> str:
            quoted = found[3] or found[4]
            value = (quoted[1:].rstrip(quoted[0]) if quoted else found[5]).strip()
            if _EMPTY_VALUE.fullmatch(value):
                return found[0]
            put = self._hidden(found) if kind == "secret" else self._placeholder(kind, value)
            closed = quoted[-1:] if quoted and len(quoted) > 1 and quoted[-1] == quoted[0] else ""
            return f"{found[1]}{found[2]}{quoted[:1] if quoted else ''}{put}{closed}"

        return replacement

    def _hidden(self, _found: re.Match[str]) -> str:
        self._secret = True
        return HIDDEN

    def _in_pieces(self, found: re.Match[str]) -> str:
        hidden = hide_in(found)
        self._secret = self._secret or hidden != found[0]
        return hidden

    # --- exceptions: values that match a pattern but identify nobody

    def _host(self, found: re.Match[str]) -> str:
        return found[0] if found[0].lower() in _COMMON_NAMES else self._placeholder("host", found[0])

    def _mail(self, found: re.Match[str]) -> str:
        stays = found[1].lower() in _UNITS or found[0].startswith("git@")
        return found[0] if stays else self._placeholder("mail", found[0])

    def _at_home(self, _found: re.Match[str]) -> str:
        self._home = True
        return "~"

    def _other_home(self, found: re.Match[str]) -> str:
        return found[0] if found[2].lower() in _COMMON_NAMES else found[1] + self._placeholder("user", found[2])

    def _mac(self, found: re.Match[str]) -> str:
        # The null address and broadcast: 00:00:... and ff:ff:...
        stays = set(found[0].lower()) - {":", "-"} in ({"0"}, {"f"})
        return found[0] if stays else self._placeholder("mac", found[0].replace("-", ":"))

    def _mac_in_a_name(self, found: re.Match[str]) -> str:
        pairs = [found[2][at : at + 2] for at in range(0, 12, 2)]
        return found[1] + self._placeholder("mac", ":".join(pairs))

    def _guid(self, found: re.Match[str]) -> str:
        return found[0] if set(found[0]) <= set("0:") else self._placeholder("guid", found[0])

    def _ipv4(self, found: re.Match[str]) -> str:
        around, first, end = found.string, found.start(), found.end()
        if _VERSION_BEFORE.search(around[max(0, first - 40) : first]) or _WHEEL_BEHIND.match(around[end : end + 4]):
            return found[0]
        address = _address(found[0])
        return self._address(found[0], address) if isinstance(address, IPv4Address) else found[0]

    def _ipv6(self, found: re.Match[str]) -> str:
        for text in (found[0], found[0].removesuffix(":")):
            address = _address(text)
            if isinstance(address, IPv6Address):
                return self._address(text, address) + found[0][len(text) :]
        return found[0]

    def _address(self, text: str, address: IPv4Address | IPv6Address) -> str:
        if isinstance(address, IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        if isinstance(address, IPv4Address):
            stays = any(address in network for network in _STAY)
        else:
            stays = not any(address in network for network in _GO)
        return text if stays else self._placeholder("ip", str(address))


def _address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None


def _folders(given: tuple[str, ...]) -> list[re.Pattern[str]]:
    homes = sorted({each.rstrip("/") for each in given} - {""}, key=lambda each: (-len(each), each))
    return [re.compile(rf"(?<![\w.~-]){re.escape(each)}(?![\w-]|\.\w)") for each in homes]


def _names(
    given: tuple[str, ...], replacement: Replacement, front: str = r"(?<![\w-])", back: str = r"(?![\w-])"
) -> list[Rule]:
    """Return a rule for each known name, longest first, without common names.

    A short name (max, vm) is part of too many other words: `front` and `back` are its boundaries.
    """
    rules: list[Rule] = []
    distinctive = {each for each in given if len(each) > 1 and each.lower() not in _COMMON_NAMES}
    for name in sorted(distinctive, key=lambda each: (-len(each), each)):
        first, last = (_FRONT, _BACK) if len(name) > 4 else (front, back)
        rules.append(((name.lower(),), re.compile(f"{first}{re.escape(name)}{last}", re.IGNORECASE), replacement))
    return rules


_KINDS = tuple(
    (re.compile(rf"(?:{pattern})$", re.IGNORECASE), kind)
    for pattern, kind in ((f"{_SECRET_KEY}|authorization", "secret"), (_SERIAL_KEY, "serial"), (_SSID_KEY, "ssid"))
)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind_of(key: str) -> str | None:
    return next((kind for pattern, kind in _KINDS if pattern.search(key)), None)
