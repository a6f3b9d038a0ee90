"""What the repository refers to is in the repository: documents, links and their anchors, paths in CONTRIBUTING.md."""

import re
import subprocess
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode


ROOT = Path(__file__).parents[2]
HERE = Path(__file__).resolve()

# Papers are cited by section too ("PADRE §4.4"); no other name in capitals is followed by a section sign.
PAPERS = {"PADRE"}


def tracked() -> list[Path]:
    """Text files that git keeps, or would keep."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode:
        pytest.skip("not a git checkout: there is no list of the repository's files")
    paths = [ROOT / name for name in listing.stdout.splitlines()]
    return [path for path in paths if path.is_file() and path.suffix != ".png" and path.resolve() != HERE]


def pages() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".md"]


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found: dict[str, int] = {}
    out = set()
    for heading in SyntaxTreeNode(MarkdownIt("commonmark").parse(path.read_text())).walk():
        if heading.type != "heading":
            continue
        text = "".join(node.content for node in heading.walk() if node.type in ("text", "code_inline"))
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number = found[slug] = found.get(slug, -1) + 1
        out.add(f"{slug}-{number}" if number else slug)
    return out


def links(path: Path) -> list[str]:
    tree = SyntaxTreeNode(MarkdownIt("commonmark").enable("table").parse(path.read_text()))
    return [
        str(node.attrs["href" if node.type == "link" else "src"])
        for node in tree.walk()
        if node.type in ("link", "image")
    ]


def test_github_anchors(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b_c`, d: (E)!\n\n## Twice\n\n## Twice\n\n```\n# no heading\n```\n")
    assert anchors(page) == {"a-b_c-d-e", "twice", "twice-1"}


def test_every_link_of_a_page_leads_somewhere():
    count = 0
    for page in pages():
        for link in links(page):
            url = urlparse(link)
            if url.scheme:
                assert url.scheme == "https", f"{page.relative_to(ROOT)}: {link}"
                continue
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            assert target.exists(), f"{page.relative_to(ROOT)}: there is no {link}"
            assert target.is_relative_to(ROOT), f"{page.relative_to(ROOT)}: {link} leaves the repository"
            if url.fragment:
                assert url.fragment in anchors(target), f"{page.relative_to(ROOT)}: no heading for {link}"
            count += 1
    assert count > 50


def test_every_document_that_a_file_names_is_in_the_repository():
    """A path that ends in .md leads somewhere, from the root or the file's own folder; a bare name is some page's."""
    found, names = set(), {page.name for page in pages()}
    for path in tracked():
        text = re.sub(r"https?://\S+", "", path.read_text())
        for name in re.findall(r"[\w./-]*\w\.md\b", text):
            here = name in names if "/" not in name else (ROOT / name).exists() or (path.parent / name).exists()
            assert here, f"{path.relative_to(ROOT)} names {name}, which is not in the repository"
            found.add(name)
    assert "docs/methods.md" in found


def test_no_file_cites_a_section_of_a_document_that_is_not_here():
    """ "NAME §3": a name in capitals is a paper, or a document that is missing."""
    for path in tracked():
        for name in re.findall(r"\b([A-Z][A-Z_]{2,})(?:\.md)?[\s#]*§", path.read_text()):
            assert name in PAPERS, f"{path.relative_to(ROOT)} cites {name} §…; name a file of the repository"


def tree_of_contributing() -> list[str]:
    """The paths of the annotated tree: two spaces a level, names, two spaces or more, a comment."""
    (tree,) = re.findall(r"^```\n(\S.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    folders, paths = [], []
    for line in tree.splitlines():
        level = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r"\s{2,}", line.strip())[0].split(" "):
            folders[level:] = [name]
            paths.append("".join(folders).rstrip("/"))
    return paths


def test_every_path_in_the_tree_of_contributing_exists():
    paths = tree_of_contributing()
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing, f"CONTRIBUTING.md names {missing}"
    packages = {str(path.parent.relative_to(ROOT)) for path in tracked() if path.name == "__init__.py"}
    unnamed = {package for package in packages if package.startswith("trl_dllm") and package not in paths}
    assert not unnamed, f"CONTRIBUTING.md says nothing of {sorted(unnamed)}"


def test_the_citation_file_has_what_readers_of_it_need():
    """The Citation File Format's required keys, and those that the project promises."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["title"] == "trl_dllm" and citation["license"] == "Apache-2.0"
    assert all({"type", "title", "authors"} <= reference.keys() for reference in citation["references"])
