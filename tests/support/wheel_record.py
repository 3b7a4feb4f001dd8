"""The RECORD of a wheel: https://packaging.python.org/en/latest/specifications/recording-installed-packages"""

import base64
import csv
import hashlib
from zipfile import ZipFile


def recorded_hash(content: bytes) -> str:
    """The hash of a file's content as RECORD writes it."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def recorded_sizes(wheel: ZipFile) -> dict[str, str]:
    """Path -> size in bytes, as written; empty if RECORD has none, as for itself."""
    (record,) = (name for name in wheel.namelist() if name.endswith(".dist-info/RECORD") and name.count("/") == 1)
    rows = csv.reader(wheel.read(record).decode().splitlines())
    return {row[0]: row[2] for row in rows if len(row) == 3}
