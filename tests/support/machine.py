"""A folder that is taken for a machine of its own, and not for a rehearsal of one."""

from sparkinstall.system.local import LocalReader


class Machine(LocalReader):
    """Reads beneath the folder; what it asks programs, this machine answers."""

    @property
    def rehearsal(self) -> bool:
        return False

    def real(self, path: str) -> str:
        return self.root + path
