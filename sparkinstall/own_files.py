"""Read a whole file: what cannot be read is told apart from what is not there, and no pipe is waited for."""

import errno
import os
import stat
from pathlib import Path

LARGEST = 1 << 30
"""Bytes. Nothing that sparkinstall reads whole is larger."""
_PART = 1 << 16


def read_regular(path: str | Path, limit: int = LARGEST, *, follow: bool = True) -> bytes:
    """Return the content of a regular file.

    Args:
        limit: the largest size, in bytes.
        follow: also read the file that a link leads to.

    Raises:
        OSError: it cannot be read; also for a pipe, a socket, a device, a file that is too large, and for a link
            without `follow`: `strerror` says so.
    """
    mode = os.stat(path, follow_symlinks=follow).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a link" if stat.S_ISLNK(mode) else "it is not a regular file", str(path))
    # A pipe that has just taken the file's place must not stop us.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        content = bytearray()
        # In small parts: a file of /proc/sys cannot be read into a large buffer.
        while part := file.read(_PART):
            content += part
            if len(content) > limit:
                raise too_large(path, limit)
    return bytes(content)


def too_large(path: str | Path, limit: int) -> OSError:
    """Return the error of a file that has more than `limit` bytes."""
    # Not EFBIG: that is said of a file that is written.
    return OSError(errno.EOVERFLOW, f"it is larger than {limit} bytes", str(path))
