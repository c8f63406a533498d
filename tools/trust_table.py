"""python -m tools.trust_table: writes the table of docs/trust.md from the tests.

A test is in the table by its marks, @pytest.mark.trust(SECTION, WHAT IS TRIED). Tests with the same
marks share a row. Rows are in the order of SECTIONS, then of their first test.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "trust.md"
START, END = "<!-- python -m tools.trust_table writes from here -->\n", "<!-- to here -->\n"
SECTIONS = (
    "Pictures",
    "Uploads",
    "Text",
    "What the model writes",
    "Protocol",
    "Load and interruptions",
    "Faults",
    "Isolation",
    "Dependencies",
)


def main() -> None:
    """Rewrite the page."""
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def updated(page: str) -> str:
    """The page with the table that the tests give."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return before + START + "\n" + table() + "\n" + END + after


def table() -> str:
    """A Markdown table for each section."""
    rows: dict[str, dict[str, list[str]]] = {section: {} for section in SECTIONS}
    for section, what, test in marks():
        rows[section].setdefault(what, []).append(f"`{test}`")
    return "\n".join(
        f"### {section}\n\n| what is tried | tests |\n|---|---|\n"
        + "".join(f"| {what} | {', '.join(tests)} |\n" for what, tests in rows[section].items())
        for section in SECTIONS
    )


def marks() -> Iterator[tuple[str, str, str]]:
    """(section, what is tried, FILE::TEST) of each mark, in the files' and the lines' order."""
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for decorator in getattr(node, "decorator_list", ()):
                called = isinstance(decorator, ast.Call) and ast.unparse(decorator.func)
                if called == "pytest.mark.trust":
                    section, what = (ast.literal_eval(argument) for argument in decorator.args)
                    yield section, what, f"{path.name}::{node.name}"


if __name__ == "__main__":
    main()
