"""What the journal says is ours, for checks and probes: they get no journal."""

import json

from sparkinstall.system import Reader

JOURNAL = "/var/lib/sparkinstall/journal.jsonl"


def is_ours(on: Reader, subject: str) -> bool:
    """Return whether the journal has a change of `subject`, or of something below that path."""
    return f'"subject": {json.dumps(subject)[:-1]}'.encode() in (on.read(JOURNAL) or b"")
