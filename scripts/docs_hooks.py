"""What mkdocs does besides: pages from files outside docs/, and doctests shown as code.

In the repository a page may link to any file. On the site, links to other pages stay links, and
those to files that are no pages become plain text; a file that does not exist is a warning, which
`mkdocs build --strict` makes an error.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # files of the repository that are pages of the site
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
WIDE = ("migrating.md",)  # pages that show code side by side, where a table of contents would be
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
DOCTEST = re.compile(r"^>>> .*\n?(?:^.+\n?)*", re.MULTILINE)
_log = logging.getLogger("mkdocs.hooks.docs")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are kept outside docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=site_links(text, source, page)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns the links of a page in docs/ to what they are on the site."""
    uri = page.file.src_uri
    if uri in WIDE:
        page.meta["hide"] = ["toc"]
    return markdown if uri in PAGES.values() else site_links(markdown, f"docs/{uri}", uri)


def site_links(text: str, source: str, page: str) -> str:
    """Returns Markdown with the links that a page of the site has.

    Args:
        text: Markdown with links as they are right in the repository.
        source: Where it is kept, from the root of the repository.
        page: What it is on the site, from the root of docs/.
    """
    parts = FENCED.split(text)
    parts[::2] = [LINK.sub(_turned(source, page), part) for part in parts[::2]]
    return "".join(parts)


def _turned(source: str, page: str) -> Callable[[re.Match[str]], str]:
    def turn(match: re.Match[str]) -> str:
        words, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if not path or ":" in path:
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        there = PAGES.get(file) or (file[5:] if file.startswith("docs/") else None)
        if there is None:
            if not (ROOT / file).exists():
                _log.warning("%s links to %s, which does not exist", source, file)
            return words
        return f"[{words}]({posixpath.relpath(there, posixpath.dirname(page))}{hash_}{anchor})"

    return turn


class Readable(griffe.Extension):
    """Shows doctests as code, which Markdown would take for quotations, and defaults as values."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes what is shown of one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = fenced_doctests(obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Puts in the value where a default is the name of a private constant of its file."""
        for parameter in func.parameters:
            name = str(parameter.default)
            constant = func.module.members.get(name) if name.startswith("_") else None
            if isinstance(constant, griffe.Attribute):
                parameter.default = constant.value


def fenced_doctests(text: str) -> str:
    """Puts every doctest of a docstring into a fence."""
    return DOCTEST.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text)
