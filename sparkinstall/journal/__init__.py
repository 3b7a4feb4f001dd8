"""The journal, the System that writes to it, and the undo functions that read it."""
