"""Checks a built site: every link leads to a page and to an anchor in it, and every public name has a heading.

python docs/_site/check_site.py build/site

mkdocs checks what authors write; this reads what browsers get, so links of docstrings, of tables made from rows and of
the theme are looked at too. Addresses beyond the site are not.
"""

from __future__ import annotations

import html.parser
import pathlib
import posixpath
import sys
import urllib.parse

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from public_names import origin, public_modules


class Anchors(html.parser.HTMLParser):
    """The links of a page, the anchors in it, and images without a text in their place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.bare_images: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := values.get(key))}
        if link := values.get("href" if tag in ("a", "link") else "src"):
            self.links.add(link)
        if tag == "img" and not values.get("alt"):
            self.bare_images.append(values.get("src") or "")


def main(site: pathlib.Path) -> int:
    """Prints what is broken; the exit status says whether anything is."""
    pages = {path.relative_to(site).as_posix(): Anchors(path.read_text()) for path in sorted(site.rglob("*.html"))}
    faults = [fault for name, page in pages.items() if name != "404.html" for fault in _broken(site, name, page, pages)]
    shown = set[str]().union(*(page.anchors for page in pages.values()))
    for module, names in public_modules().items():
        faults += [
            f"{module}.{name} is on no page: has it a docstring, and does docs/_site/public_names.py see it?"
            for name in names
            if not {f"{module}.{name}", origin(module, name)} & shown
        ]
    links = sum(len(page.links) for page in pages.values())
    print("\n".join([*faults, f"{len(pages)} pages, {links} links, {len(faults)} faults"]))
    return bool(faults)


def _broken(site: pathlib.Path, name: str, page: Anchors, pages: dict[str, Anchors]) -> list[str]:
    faults = [f"{name}: the image {image} has no alternative text." for image in page.bare_images]
    for link in sorted(page.links):
        parts = urllib.parse.urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), urllib.parse.unquote(parts.path)))
        target = name if not parts.path else target
        if (site / target).is_dir():
            target = posixpath.normpath(posixpath.join(target, "index.html"))
        if not (site / target).is_file():
            faults.append(f"{name}: no file for {link}.")
        elif parts.fragment and target in pages and urllib.parse.unquote(parts.fragment) not in pages[target].anchors:
            faults.append(f"{name}: no anchor for {link}.")
    return faults


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
