"""sparkinstall on a machine whose clock is wrong: it begins at CLOCK_SECONDS after the epoch."""

import os
import time
from typing import Any


def main() -> None:
    """Run sparkinstall with a wrong clock; the programs that it runs have the right one."""
    began, real_time, real_gmtime = time.time(), time.time, time.gmtime

    def wrong() -> float:
        return real_time() - began + float(os.environ["CLOCK_SECONDS"])

    clock: Any = time
    clock.time = wrong
    clock.gmtime = lambda seconds=None: real_gmtime(wrong() if seconds is None else seconds)
    from sparkinstall.__main__ import main as run

    run()


if __name__ == "__main__":
    main()
