"""`make docs`: the site builds without a warning, its links lead somewhere, and it loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from markdown_it import MarkdownIt


ROOT = Path(__file__).parents[2]
# Links that a browser follows only when the reader does.
OUTWARD = {"a"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("material") is None, reason="mkdocs-material is not installed: pip install .[docs]"),
]


class Page(HTMLParser):
    """A page's anchors, the links in it by tag, and how many elements of each kind its article has."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[tuple[str, str]] = []
        self.count: dict[str, int] = {}
        self._inside = False
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self._inside |= tag == "article"
        if self._inside:
            self.count[tag] = self.count.get(tag, 0) + 1
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        self.links += [(tag, found[name]) for name in ("href", "src") if found.get(name)]

    def handle_endtag(self, tag):
        self._inside &= tag != "article"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = {
        **os.environ,
        "NO_MKDOCS_2_WARNING": "1",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_page_is_there(site, pages):
    for page in (ROOT / "docs").glob("*.md"):
        built = site / ("index.html" if page.stem == "index" else f"{page.stem}/index.html")
        assert built in pages, page.name
    assert site / "source" / "CONTRIBUTING" / "index.html" in pages
    assert site / "source" / "recipes/llada_8b/grpo/config_gsm8k_step_merge.yaml" / "index.html" in pages
    assert (site / "search" / "search_index.json").is_file()


def test_every_link_leads_somewhere(site, pages):
    count = 0
    for path, page in pages.items():
        for _, link in page.links:
            url = urlparse(link)
            if url.scheme:
                assert url.scheme in ("https", "data"), f"{path}: {link}"
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file() and target.is_relative_to(site), f"{path.relative_to(site)}: {link}"
            if url.fragment and not url.fragment.startswith("__") and target in pages:
                assert unquote(url.fragment) in pages[target].anchors, f"{path.relative_to(site)}: {link}"
            count += 1
    assert count > 1000


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for path, page in pages.items():
        for tag, link in page.links:
            assert tag in OUTWARD or not urlparse(link).netloc, f"{path.relative_to(site)} loads {link}"
        assert not re.search(r"(src|href)=[\"']?//", path.read_text()), path
    for path in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", path.read_text()), path


def test_the_site_shows_what_github_shows(site, pages):
    """Lists, tables and blocks that the two readers of Markdown read differently would be missing."""
    for page in (ROOT / "docs").glob("*.md"):
        if page.stem == "api":
            continue
        html = MarkdownIt("commonmark").enable("table").render(page.read_text())
        built = pages[site / ("index.html" if page.stem == "index" else f"{page.stem}/index.html")]
        formulas = page.read_text().count("```math")
        for tag in ("li", "tr", "h2", "h3", "img", "strong"):
            assert built.count.get(tag, 0) == len(re.findall(rf"<{tag}[ >]", html)), f"{page.name}: <{tag}>"
        assert built.count.get("math", 0) == formulas
        assert built.count.get("pre", 0) == html.count("<pre>") - formulas, f"{page.name}: <pre>"
