"""Take files from another node's `FileServer`, whose address, certificate and token are known."""

import tempfile
from pathlib import Path
from urllib.parse import quote

from msgspec import Struct

from sparkinstall.cluster.protocol import Introduction
from sparkinstall.downloads import Known, fetch
from sparkinstall.events import Tell


class FileClient(Struct, frozen=True):
    """A client of the server at the address `host`."""

    host: str
    server: Introduction

    @property
    def netloc(self) -> str:
        """The address with the port."""
        return f"{self.host}:{self.server.port}"

    @property
    def authorization(self) -> str:
        return f"Bearer {self.server.token}"

    def url(self, path: str) -> str:
        return f"https://{self.netloc}{quote(path)}"

    def get(self, path: str, into: Path, on_bytes: Tell, known: Known | None = None) -> Path:
        """Download a file, as `fetch`."""
        trusted = {"authorization": self.authorization, "fingerprint": self.server.fingerprint}
        return fetch(self.url(path), into, on_bytes, **trusted, known=known)

    def content(self, path: str) -> bytes:
        """Download a small file."""
        with tempfile.TemporaryDirectory() as scratch:
            return self.get(path, Path(scratch, "content"), lambda *_: None).read_bytes()
