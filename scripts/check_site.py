"""Check the built documentation. Standard library only.

`python scripts/check_site.py site` prints one line per problem and exits with 1 if there are any: a
link or an image that leads nowhere, an anchor that no page has, and anything that a page would
fetch from elsewhere. Ordinary links to other sites are fine, and are not followed.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src"}
LEADING = {"a", "area"}
IN_CSS = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)")


class Page(HTMLParser):
    """What a page fetches, where it leads and the anchors it has."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.fetched: list[str] = []
        self.leads: list[str] = []
        self.ids: set[str] = set()
        self._in_style = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        self._in_style = tag == "style"
        if tag in LEADING and "href" in found:
            self.leads.append(found["href"])
        elif tag == "link" and found.get("rel") not in ("canonical", "prev", "next"):
            self.fetched.append(found.get("href", ""))
        elif tag in FETCHED and FETCHED[tag] in found:
            self.fetched.append(found[FETCHED[tag]])
        self.fetched += addresses_in_css(found.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.fetched += addresses_in_css(data)


def addresses_in_css(text: str) -> list[str]:
    """The files that a style sheet asks for."""
    return [first or second for first, second in IN_CSS.findall(text)]


def check_site(root: Path) -> list[str]:
    """The problems of a built site, in the order of its pages."""
    pages = {path: Page(path) for path in sorted(root.rglob("*.html"))}
    if not pages:
        return [f"{root} has no page; build it with `make docs`"]
    problems = [
        problem
        for page in pages.values()
        for address in page.fetched + page.leads
        if (problem := _problem(address, page, pages, root, address not in page.leads))
    ]
    for sheet in sorted(root.rglob("*.css")):
        for address in addresses_in_css(sheet.read_text(encoding="utf-8")):
            if _is_elsewhere(address):
                problems.append(f"{sheet.relative_to(root).as_posix()} fetches {address}")
    return problems


def _is_elsewhere(address: str) -> bool:
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme in ("http", "https", "ftp")


def _problem(
    address: str, page: Page, pages: dict[Path, Page], root: Path, fetched: bool
) -> str | None:
    """What is wrong with an address on a page."""
    name, parts = page.path.relative_to(root).as_posix(), urlsplit(address)
    if _is_elsewhere(address):
        return f"{name} fetches {address}" if fetched else None
    if parts.scheme:  # data, mailto, javascript
        return None
    base = root if parts.path.startswith("/") else page.path.parent
    target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else page.path
    if target.is_dir():
        target /= "index.html"
    if not target.exists():
        return f"{name} leads to {address}, which does not exist"
    wanted, there = unquote(parts.fragment), pages.get(target)
    if wanted and there is not None and wanted not in there.ids:
        return f"{name} leads to {address}, but that page has no such anchor"
    return None


def main(arguments: list[str]) -> int:
    """Print the problems, return the exit code."""
    root = Path(arguments[0] if arguments else "site").resolve()
    problems = check_site(root)
    for problem in problems:
        print(problem)
    print(f"check_site: {len(problems) or 'no'} problem{'s' if len(problems) != 1 else ''}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
