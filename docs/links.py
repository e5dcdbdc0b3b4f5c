"""Every link and anchor in a folder of HTML pages leads somewhere: `python3 docs/links.py FOLDER`."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links of a page, and what they can lead to in it."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.ids = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.add(value)
            elif name == "id":
                self.ids.add(value)


def flaws(pages):
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                yield f"{path}: {link} leads nowhere"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                yield f"{path}: {link} has no such place"


folder = Path(sys.argv[1]).resolve()
# mdBook serves 404.html from any place, and print.html is all pages in one.
files = [file for file in folder.rglob("*.html") if file.name not in ("404.html", "print.html")]
found = sorted(flaws({file: Page(file.read_text()) for file in files}))
print("\n".join(found) if found else f"{len(files)} pages, all links lead somewhere")
sys.exit(bool(found) or not files)
