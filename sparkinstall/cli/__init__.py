"""The command line: one file a verb. The only typer and rich of the project."""
