"""Read interfaces in /sys: attributes, driver, card."""

from sparkinstall.errors import NeedsRoot
from sparkinstall.system import Reader

NET = "/sys/class/net"
RDMA = "/sys/class/infiniband"
CONNECTX_DRIVER = "mlx5_core"
_MELLANOX = "0x15b3"


def text_of(on: Reader, path: str) -> str:
    """Return the stripped content of a kernel file; "" if it is missing or unreadable.

    Some files can be opened but not read, such as `carrier` of an interface that is down (EINVAL).
    """
    try:
        return (on.read(path) or b"").decode(errors="replace").strip()
    except (OSError, NeedsRoot):
        return ""


def driver_of(on: Reader, interface: str) -> str:
    """Return the name of an interface's driver; "" for a virtual interface."""
    link = on.entry(f"{NET}/{interface}/device/driver")
    return link.target.rpartition("/")[2] if link else ""


def is_connectx(on: Reader, interface: str) -> bool:
    return driver_of(on, interface) == CONNECTX_DRIVER or text_of(on, f"{NET}/{interface}/device/vendor") == _MELLANOX
