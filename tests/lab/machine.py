"""The settings of this machine with which a node's apt, pip and uv reach the same indexes."""

from __future__ import annotations

import configparser
import os
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.lab.commands import run

PIP_CONF = Path("/etc/pip.conf")
CA_FOLDER = Path("/usr/local/share/ca-certificates")

PASSED_ON = (
    *("PIP_CERT", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_TRUSTED_HOST", "PIP_PROXY"),
    *("PIP_DEFAULT_TIMEOUT", "PIP_DISABLE_PIP_VERSION_CHECK"),
    *("UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS"),
    *("UV_NATIVE_TLS", "UV_SYSTEM_CERTS", "UV_HTTP_TIMEOUT", "UV_INSECURE_HOST"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO"),
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
)
PASSED_ON_TO_APT = (
    "Acquire::http::",
    "Acquire::https::",
    "Acquire::Check-",
    "Acquire::Retries",
    "Acquire::Force",
)


def environment() -> dict[str, str]:
    """The variables with which this machine finds its Python index and trusts it."""
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ}


def named_paths() -> Iterator[Path]:
    """Files and folders of this machine that those variables and pip's configuration name, and that exist."""
    values = [*environment().values(), *_pip_values()]
    for word in " ".join(values).split():
        path = word.removeprefix("file://")
        if path.startswith("/") and Path(path).exists():
            yield Path(path)


def _pip_values() -> Iterator[str]:
    if PIP_CONF.is_file():
        parser = configparser.RawConfigParser()
        parser.read(PIP_CONF)
        for section in parser.sections():
            yield from (value for _, value in parser.items(section))


def certificates() -> list[Path]:
    """Certificate authorities that this machine's owner added."""
    return sorted(CA_FOLDER.glob("**/*.crt"))


@cache
def debian_mirror() -> str | None:
    """The Debian mirror of this machine's sources; None if it does not run Debian."""
    release = platform.freedesktop_os_release()
    if release["ID"] != "debian":
        return None
    listing = run("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)").stdout
    for line in listing.splitlines():
        # A flat repository, such as CUDA's, has no component.
        uri, *suite_and_component = line.split()
        if suite_and_component == [release.get("VERSION_CODENAME"), "main"]:
            return uri
    return None


@cache
def apt_options() -> tuple[str, ...]:
    """This machine's apt settings for proxies, retries and the clock, in apt.conf's syntax."""
    lines = run("apt-config", "dump").stdout.splitlines()
    return tuple(line for line in lines if line.startswith(PASSED_ON_TO_APT) and not line.endswith(' "";'))
