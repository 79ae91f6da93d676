"""The pages of the documentation and the fenced blocks in them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```\s*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, title, text, and the line of the page that its text begins on."""

    language: str
    title: str
    text: str
    line: int


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        language, _, rest = match["info"].strip().partition(" ")
        title = re.search(r'title="([^"]*)"', rest)
        first = text.count("\n", 0, match.start("body")) + 1
        found.append(Block(language, title[1] if title else "", match["body"], first))
    return found


def commands(page: Path) -> list[str]:
    """The command lines of a page's console and bash blocks, continued lines joined."""
    lines = []
    for block in blocks(page):
        if block.language in ("console", "bash"):
            shell = block.text.replace("\\\n", " ").splitlines()
            lines += [line.strip().removeprefix("$ ") for line in shell if block.language == "bash" or line[:2] == "$ "]
    return lines
