"""Words that readers stumbled over stay out of messages, help and documents."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BANNED = (
    "expected to go without", "cannot be told", "is told", "so many prompts", "none of yours",
    "is none of", "asked class recognised", "obedience", "taught by", "awakened network",
)  # fmt: skip


def phrases_in(text):
    return [phrase for phrase in BANNED if phrase in " ".join(text.split())]


def texts_of(path):
    """(line, text) of a document, or of the strings of a module."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(re.split(r"\n\s*\n", source), 1)
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


FILES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "src/dkdm/**/*.py", "src/dkdm/**/*.j2", "examples/*.py")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # it says what was so
)


def test_no_phrase_of_the_list_is_read_by_anyone():
    found = [
        f"{path.relative_to(ROOT)}, {line}: {phrase}"
        for path in FILES
        for line, text in texts_of(path)
        for phrase in phrases_in(text)
    ]
    assert len(FILES) > 100
    assert not found, "\n".join(found)


@pytest.mark.parametrize("text", ["this\nis  told twice", "run.x is none of a network of yours"])
def test_a_phrase_is_found_across_lines(text):
    assert phrases_in(text)
