"""Personal data and secrets are masked in any surroundings; what a reader needs is kept."""

import json
import string
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sparkinstall.redaction import redact
from sparkinstall.support.mask import Known, Mask

FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

KNOWN = Known(
    hosts=("kitchen.example.org", "kitchen", "vm"),
    users=("alice", "max", "Alice Smith"),
    homes=("/home/alice", "/root"),
    serials=("1324500012345", "0123456789abcdef0123456789abcdef"),
    networks=("Casa Verde",),
)


def masked(text: str) -> str:
    return Mask(KNOWN).text(text)


MASKED = {
    "a host": ("on kitchen: up", "on <host-1>: up"),
    "a host in full": ("kitchen.example.org:6379", "<host-1>:6379"),
    "a name between two colours": ("x\x1b[31malice\x1b[0my", "x <user-1> y"),
    "a short host": ("vm systemd[1]: up", "<host-1> systemd[1]: up"),
    "a host that a factory named": ("spark-3fa2 and gx10-00ab", "<host-1> and <host-2>"),
    "a host of the LAN": ("ssh printer.local", "ssh <host-1>"),
    "a peer as torch writes it": ("connect to [office-box]:29500", "connect to [<host-1>]:29500"),
    "a user": ("of alice, Alice and ALICE", "of <user-1>, <user-1> and <user-1>"),
    "a user in a word": ("/data/alice_models/x", "/data/<user-1>_models/x"),
    "a user after a colour": ("\x1b[31malice\x1b[0m", "<user-1>"),
    "a user after a line end in JSON": (r"one\nalice", r"one\n<user-1>"),
    "a short user": ("User=max", "User=<user-1>"),
    "a whole name": ("by Alice Smith", "by <user-1>"),
    "the home": ("/home/alice/.cache /root/x '/root'", "~/.cache ~/x '~'"),
    "another's home": ("/node/home/bob/x", "/node/home/<user-1>/x"),
    "an address": ("192.168.1.5:80 10.0.0.7 8.8.8.8", "<ip-1>:80 <ip-2> <ip-3>"),
    "an address in a name": ("node:192.168.1.5 raylet.192.168.1.5 ip-10.0.0.1", "node:<ip-1> raylet.<ip-1> ip-<ip-2>"),
    "IPv6": ("[2a02:8071::1]:80 fe80::1a2b:3cff:fe4d:5e6f%eth0", "[<ip-1>]:80 <ip-2>%eth0"),
    "a GID of an address": ("0000:0000:0000:0000:0000:ffff:c0a8:0105 192.168.1.5", "<ip-1> <ip-1>"),
    "a MAC": ("48:b0:2d:aa:bb:cc 48-B0-2D-AA-BB-CC enx48b02daabbcc", "<mac-1> <mac-1> enx<mac-1>"),
    "a MAC after a colon": ("MAC:48:b0:2d:aa:bb:cc", "MAC:<mac-1>"),
    "a GUID": ("node_guid: e89e:4903:0012:3456", "node_guid: <guid-1>"),
    "a GUID in hex": ("sys_image_guid 0xe89e490300123456", "sys_image_guid <guid-1>"),
    "a UUID": ("GPU-12345678-1234-1234-1234-123456789abc", "GPU-<uuid-1>"),
    "a serial number that is known": ("x1324500012345 1324500012345", "x1324500012345 <serial-1>"),
    "a serial number that is unknown": ("Serial Number      : 132450009", "Serial Number      : <serial-1>"),
    "a serial number of a disk": ("ID_SERIAL_SHORT=S5GXNX0T", "ID_SERIAL_SHORT=<serial-1>"),
    "the machine id": ("_MACHINE 0123456789abcdef0123456789abcdef", "_MACHINE <serial-1>"),
    "e-mail": ("mail a.b+c@example.com now", "mail <mail-1> now"),
    "a Wi-Fi": ("SSID: My Home Net\nnext", "SSID: <ssid-1>\nnext"),
    "a Wi-Fi in quotes": ("associate with SSID 'My Home' now", "associate with SSID '<ssid-1>' now"),
    "a Wi-Fi that is known": ("to Casa Verde now", "to <ssid-1> now"),
    "a token by its shape": ("x hf_abcdefghijklmnopqrstuv y", "x [hidden] y"),
    "a token by its name": ("HF_TOKEN=abc NGC_API_KEY='a b'", "HF_TOKEN=[hidden] NGC_API_KEY='[hidden]'"),
    "a password": ('password: "my pass word", x', 'password: "[hidden]", x'),
    "a key as Python writes it": ("{'api_key': ['abc123']}", "{'api_key': ['[hidden]']}"),
    "a key that is given": ("vllm serve --api-key s3cret --port 8", "vllm serve --api-key [hidden] --port 8"),
    "several keys that are given": (
        "--api-key k1 'k 2' k3 --port 8",
        "--api-key [hidden] '[hidden] [hidden]' [hidden] --port 8",
    ),
    "a key and its value with =": ("serve --api-key=k1 Qwen/Q", "serve --api-key=[hidden] Qwen/Q"),
    "a key in a list": (
        "['--api-key', 'topsecretkey1', 'k2', '--port']",
        "['--api-key', '[hidden]', '[hidden]', '--port']",
    ),
    "a key with a dash in front": ("--api-key=-k1 --api-key --port 8", "--api-key=[hidden] --api-key --port 8"),
    "a key in a list of JSON": ('"--api-key", "k1", "k2"]', '"--api-key", "[hidden]", "[hidden]"]'),
    "another key in a list": ("['--ssl-key-password', 'k1', '--port']", "['--ssl-key-password', '[hidden]', '--port']"),
    "several keys as Python writes them": (
        "{'api_key': ['k1', 'k2'], 'port': 8}",
        "{'api_key': ['[hidden]', '[hidden]'], 'port': 8}",
    ),
    "keys of which one has a shape": (f"'api_key': ['hf_{'a' * 20}', 'k2']", "'api_key': ['[hidden]', '[hidden]']"),
    "keys as JSON writes them": ('{"api_keys": ["k1", "k2"]}', '{"api_keys": ["[hidden]", "[hidden]"]}'),
    "keys over many lines": (
        '"passwords": ["x"], "secret": [\n "k1",\n "k2"\n]',
        '"passwords": ["[hidden]"], "secret": [\n "[hidden]",\n "[hidden]"\n]',
    ),
    "keys of the environment": ("VLLM_API_KEYS=foo MY_KEYS=bar", "VLLM_API_KEYS=[hidden] MY_KEYS=[hidden]"),
    "a token of no kind": ('{"token": "k1"} token: k2', '{"token": "[hidden]"} token: [hidden]'),
    "a secret in JSON in JSON": (r'"{\"password\": \"k1\", \"n\": 5}"', r'"{\"password\": \"[hidden]\", \"n\": 5}"'),
    "a header": ("Authorization: Basic dTpw", "Authorization: Basic [hidden]"),
    "a header as Python writes it": ("{'Authorization': 'Bearer k1'}", "{'Authorization': 'Bearer [hidden]'}"),
    "a header as a server keeps it": ("(b'authorization', b'Bearer k1')", "(b'authorization', b'Bearer [hidden]')"),
    "a signed address": (
        "x.co/f?token=k1&n=1&sig=k2 /g?X-Amz-Signature=k3",
        "x.co/f?token=[hidden]&n=1&sig=[hidden] /g?X-Amz-Signature=[hidden]",
    ),
    "a key of the kernel's command line": ("ro rd.luks.key=/k1 quiet", "ro rd.luks.key=[hidden] quiet"),
    "a user of curl": (
        "curl -s -u me:k1 x; curl --user 'me:k 2'",
        "curl -s -u [hidden] x; curl --user '[hidden] [hidden]'",
    ),
    "a key block": ("-----BEGIN OPENSSH PRIVATE KEY-----\nabc\nde\n-----END OPENSSH PRIVATE KEY-----", "[hidden]"),
    "a password in an address": ("https://me:pw@host.example/x", "https://[hidden]@host.example/x"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "shown"), MASKED.values(), ids=MASKED)
def test_mask_of_personal_data_replaces_it(text: str, shown: str) -> None:
    assert masked(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "NCCL 2.28.9, driver 580.95.05, kernel 6.11.0-1016-nvidia",
        "torch==2.10.0+cu130 nvidia-cublas==13.1.0.3 nvidia_cublas-13.1.0.3-py3-none-manylinux.whl",
        "cudnn version 9.10.2.21, NVIDIA driver: 580.95.05.1, libnccl 2.28.9.1",
        "127.0.0.1 0.0.0.0:8000 255.255.255.0 192.168.100.10/24 192.168.101.11 224.0.0.251 ::1 [::]:80",
        "0000:0000:0000:0000:0000:ffff:c0a8:640a",
        "ff:ff:ff:ff:ff:ff 00:00:00:00:00:00 0000:0000:0000:0000",
        "build-id 9c1185a5c5e9fc54612808977ee8f548b2258d31",
        "sha256 e67239212c395bfdb398a7519491840d06fdf6b599c299f97c7ed0109777bba1",
        "enp1s0f0np0 enP2p1s0f1np1 rocep1s0f0 enP7s7 0000000F:01:00.0 10de:2e12",
        "c10::Error std::vector x[::2] 12:34:56 2026-11-21T16:35:46Z",
        "max_model_len --max-num-seqs vm.swappiness /proc/sys/vm/drop_caches maximum",
        "/home/nvidia/x root nvidia ubuntu localhost spark",
        "/opt/models/Qwen3.5-122B-A10B-FP8 Qwen/Qwen3-Omni-30B",
        "token_ids: [1, 2] tokens: 7 max_tokens=9 Time per token: 12.5 ms, pad token: <|end|> ?max_tokens=5",
        "docker run -u 1000:1000 --user me; usage: --api-key",
        "curl --user-agent x",
        "max_tokens: 5 eos_token='</s>' api_key=None tokenizer=qwen RAY_AUTH_MODE=token",
        "RAY_AUTH_TOKEN_PATH=/opt/sparkinstall/ray-token --token-file x",
        "getty@tty1.service actions/checkout@v4.1 git@github.com:NVIDIA/nccl.git",
        "Serial Number : N/A; serial console; ~/.local/bin threading.local",
        "SSID none; the password is asked for; the serial port",
    ],
)
def test_mask_of_technical_text_keeps_it(text: str) -> None:
    assert masked(text) == text


def test_mask_of_a_repeated_value_gives_the_same_name() -> None:
    mask = Mask(KNOWN)
    assert mask.text("10.0.0.7 10.0.0.8") == "<ip-1> <ip-2>"
    assert mask.data({"b": ["10.0.0.8", "10.0.0.9"]}) == {"b": ["<ip-2>", "<ip-3>"]}
    assert mask.summary() == "3 addresses"


def test_mask_summary_counts_each_kind() -> None:
    mask = Mask(KNOWN)
    assert mask.summary() == ""
    mask.text("alice@kitchen /home/alice HF_TOKEN=x 10.0.0.7")
    assert mask.summary() == "1 host name, 1 user name, 1 address, the home folder, credentials"


def test_mask_of_data_follows_the_keys() -> None:
    found = Mask(KNOWN).data(
        {
            "serial": 123456, "serial_number": "", "password": "x y", "hf_token": None, "version": "1.2.3.4",
            "ssid": "a b", "arguments": ["--api-key", "s3cret", "--port", "8000"], "tokens": 3,
            "more": ["vllm", "--api-key", "a", "b", 5, "--port", 8000, True], "api_keys": ["a", 7], "token": "t",
            "of curl": ["/usr/bin/curl", "-u", "me:a", "-s", "x"], "of docker": ["docker", "-u", "1:1"], "passwd": 12,
            "token_ids": [1, 2], "nested": [{"api_key": "k"}, True], "/home/alice": "n/a",
        }
    )  # fmt: skip
    assert found == {
        "serial": "<serial-1>", "serial_number": "", "password": "[hidden]", "hf_token": None, "version": "1.2.3.4",
        "ssid": "<ssid-1>", "arguments": ["--api-key", "[hidden]", "--port", "8000"], "tokens": 3,
        "more": ["vllm", "--api-key", "[hidden]", "[hidden]", "[hidden]", "--port", 8000, True],
        "api_keys": ["[hidden]", "[hidden]"], "token": "[hidden]",
        "of curl": ["/usr/bin/curl", "-u", "[hidden]", "-s", "x"], "of docker": ["docker", "-u", "1:1"],
        "passwd": "[hidden]", "token_ids": [1, 2], "nested": [{"api_key": "[hidden]"}, True], "~": "n/a",
    }  # fmt: skip


# --- in any surroundings

letters = st.text(string.ascii_lowercase, min_size=5, max_size=9)
octet = st.integers(0, 255).map(str)
pairs = st.integers(1, 254).map("{:02x}".format)
SECRETS: dict[str, st.SearchStrategy[str]] = {
    "hosts": st.tuples(letters, st.integers(100, 999)).map(lambda both: f"{both[0]}-{both[1]}"),
    "users": letters.map(lambda name: f"q{name}x"),
    "serials": st.text("0123456789ABCDEF", min_size=9, max_size=14).map(lambda text: f"S{text}"),
    "networks": st.tuples(letters, letters).map(lambda both: f"Net {both[0].title()} {both[1].title()}"),
    "ipv4": st.tuples(st.sampled_from(["10", "172", "203", "88"]), octet, octet, octet).map(".".join),
    "ipv6": st.tuples(pairs, pairs).map(lambda both: f"2a02:8071:1{both[0]}::{both[1]}ff"),
    "mac": st.lists(pairs, min_size=6, max_size=6).map(":".join),
    "uuid": st.uuids().map(str),
    "mail": letters.map(lambda name: f"{name}@example.com"),
    "token": letters.map(lambda name: f"hf_{name}{'Z' * 20}"),
}
# Without a digit, a hex letter or a dot, which would be part of the secret.
around = st.text(" \t\n\r,;|()[]{}<>\"'!?*&^%$#~`\\ÄéЖ中", max_size=8)
gap = st.sampled_from([" ", "\n", '"', "'", "(", ")", ",", "\t", " = ", "; ", "\x1b[1m"])


@st.composite
def secret_texts(draw: st.DrawFn) -> tuple[str, list[str], Known]:
    secrets = {kind: draw(each) for kind, each in SECRETS.items()}
    order = draw(st.permutations(list(secrets)))
    text = "".join(f"{draw(around)}{draw(gap)}{secrets[kind]}{draw(gap)}" for kind in order)
    known = Known(**{kind: (secrets[kind],) for kind in ("hosts", "users", "serials", "networks")})
    return text, list(secrets.values()), known


@FEW
@given(secret_texts())
def test_mask_of_any_text_leaves_no_secret(made: tuple[str, list[str], Known]) -> None:
    text, secrets, known = made
    shown = Mask(known).text(text)
    assert [secret for secret in secrets if secret.lower() in shown.lower()] == []


@FEW
@given(secret_texts())
def test_mask_of_any_data_leaves_no_secret_and_valid_json(made: tuple[str, list[str], Known]) -> None:
    text, secrets, known = made
    value: Any = {"said": text, "lines": text.split(" "), "deep": [{"x": {text: 1.5}}, None, True], "number": 3}
    shown = Mask(known).data(value)
    again = json.loads(json.dumps(shown))
    assert again == shown and again["number"] == 3 and again["deep"][1:] == [None, True]
    assert [secret for secret in secrets if secret.lower() in json.dumps(shown, ensure_ascii=False).lower()] == []


@FEW
@given(secret_texts())
def test_mask_twice_changes_nothing(made: tuple[str, list[str], Known]) -> None:
    text, _, known = made
    mask = Mask(known)
    once = mask.text(text)
    assert mask.text(once) == once
    assert Mask(known).text(once) == once


@FEW
@given(
    st.text(max_size=200)
    | st.lists(st.sampled_from([*(text for text, _ in MASKED.values()), "\\", '"', "=", ": "])).map("".join)
)
@example("SERIAL_NUMBER=<serial-1>x SSID: a<ip-1>b password: [hidden]c")
@example("alice@kitchen@alice.example.com://alice@")
@example("\x1b[\x1b[0m0malice")
def test_mask_twice_of_any_text_changes_nothing(text: str) -> None:
    once = Mask(KNOWN).text(text)
    assert Mask(KNOWN).text(once) == once


words = st.text(string.ascii_letters + string.digits + "\\\"' -_/", min_size=1, max_size=12).map(
    lambda text: f"Zq{text}"
)
WAYS: list[Callable[[list[str]], Any]] = [
    lambda keys: ["vllm", "--api-key", *keys, "--port", "8000"],
    lambda keys: {"api_keys": keys, "n": 1},
    lambda keys: {"flag": "--api-key", "name": 5, "api_key": keys},
    lambda keys: {"said": f"vllm serve --api-key {keys[0]}", "n": 5},
    lambda keys: {"said": json.dumps(["--api-key", *keys]), "n": 5},
    lambda keys: {"said": f"non-default args: { {'api_key': keys} }", "--api-key": 5},
    lambda keys: {"Authorization": f"Bearer {keys[0]}", "n": 5},
    lambda keys: {"said": f"curl -u {keys[0]} https://x/?token={keys[-1]}", "-u": 5},
]


@FEW
@given(st.lists(words, min_size=1, max_size=3), st.sampled_from(WAYS))
def test_redact_of_json_keeps_its_keys(keys: list[str], way: Callable[[list[str]], Any]) -> None:
    made = way(keys)
    for indent in (None, 1):
        shown = json.loads(redact(json.dumps(made, indent=indent)))
        assert list(shown) == list(made) or isinstance(made, list)
        assert len(shown) == len(made)


simple = st.text(string.ascii_letters + string.digits, min_size=1, max_size=12).map(lambda text: f"Zq{text}")


@FEW
@given(st.lists(simple, min_size=1, max_size=3), st.sampled_from(WAYS))
def test_redact_and_mask_leave_no_api_key(keys: list[str], way: Callable[[list[str]], Any]) -> None:
    made = way(keys)
    for text in (json.dumps(made), json.dumps(made, indent=1), repr(made)):
        assert "Zq" not in redact(text) and "Zq" not in masked(text)
    assert "Zq" not in repr(Mask(KNOWN).data(made))


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "-",
        ":",
        "1.",
        "aa:",
        "a@",
        "a.",
        "token",
        "serial ",
        "=",
        "\\",
        "'",
        "SSID: ",
        "--api-key ",
        "'--api-key', ",
        "?token",
        "api_key: ['",
        "curl -u ",
        "--key",
        "authorization: ",
        "token: ",
        "--api-key 'a ",
        'api_keys=["a", ',
    ],
)
def test_mask_of_a_long_line_is_fast(unit: str) -> None:
    """A log may be one long line: the time of a pattern must not grow with the square of its length."""
    short, long = (_seconds_to_mask(unit * (length // len(unit))) for length in (15_000, 60_000))
    assert long < 10 * short + 0.5


def _seconds_to_mask(text: str) -> float:
    """Of the processor: others may use it too."""
    mask, began = Mask(KNOWN), time.process_time()
    mask.text(text)
    return time.process_time() - began
