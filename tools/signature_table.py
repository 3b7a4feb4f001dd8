"""Write the table of known failures into docs/diagnose.md: a maintainer's tool, run from the repository's root.

PYTHONPATH=. python tools/signature_table.py
"""

from pathlib import Path

from sparkinstall.diagnose.signatures import Signature, load

PAGE = Path(__file__).resolve().parents[1] / "docs/diagnose.md"
BEGIN, END = "<!-- known failures -->\n", "<!-- end -->\n"


def table() -> str:
    """Every signature: name, title, and the fix that it belongs to."""
    rows = [f"| `{each.name}` | {each.title}{_warning(each)} | {each.fix or ''} |" for each in load()]
    return "\n".join(["| failure | what it is | fix |", "|---|---|---|", *rows, ""])


def _warning(signature: Signature) -> str:
    return " (a warning)" if signature.is_warning else ""


def main() -> None:
    """Replace what stands between the two marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
