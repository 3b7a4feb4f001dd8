"""Print which NCCL this process has loaded, as JSON: `bound`, `version`, `mapped`."""

import contextlib
import ctypes
import json


class _Found(ctypes.Structure):
    """`Dl_info` of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_void_p),
        ("at", ctypes.c_void_p),
    )


def loaded_nccl() -> dict[str, object]:
    """Return `bound` (the file that NCCL resolves to), its `version` (22809 is 2.28.9) and every `mapped` libnccl."""
    version, found, everything = ctypes.c_int(), _Found(), ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        everything.ncclGetVersion(ctypes.byref(version))
        everything.dladdr(ctypes.cast(everything.ncclGetVersion, ctypes.c_void_p), ctypes.byref(found))
    with open("/proc/self/maps") as lines:
        mapped = sorted({line.split(maxsplit=5)[-1].strip() for line in lines if "/libnccl" in line})
    return {"bound": (found.file or b"").decode(), "version": version.value, "mapped": mapped}


if __name__ == "__main__":
    print(json.dumps(loaded_nccl()))
