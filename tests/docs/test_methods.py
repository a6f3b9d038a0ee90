"""docs/methods.md says which test holds each identity; the tests exist, and so do the sections that comments cite."""

import re
from pathlib import Path


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/methods.md").read_text()
SOURCES = [p for folder in ("trl_dllm", "tests", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))]


def identities() -> dict[int, str]:
    """The numbered paragraphs of §7."""
    section = re.search(r"^## 7\. Identities\n(.*?)^## 8\.", PAGE, re.M | re.S)[1]
    parts = re.split(r"^(\d+)\. ", section, flags=re.M)[1:]
    return {int(number): text for number, text in zip(parts[::2], parts[1::2], strict=True)}


def test_every_identity_names_tests_that_exist():
    defined = set(re.findall(r"^def (test_\w+)\(", "\n".join(p.read_text() for p in SOURCES), re.M))
    found = identities()
    assert list(found) == list(range(1, 17))
    for number, text in found.items():
        named = re.findall(r"`(test_\w+)`", text)
        assert named or text.startswith("Not yet: "), f"identity {number} names no test"
        assert not set(named) - defined, f"identity {number}: {sorted(set(named) - defined)} are in no test file"
    assert not set(re.findall(r"`(test_\w+)`", PAGE)) - defined


def test_a_test_named_after_an_identity_belongs_to_one():
    built = {number for number, text in identities().items() if not text.startswith("Not yet: ")}
    for path in SOURCES:
        for number in re.findall(r"^def test_identity_(\d+)_", path.read_text(), re.M):
            assert int(number) in built, f"{path.relative_to(ROOT)}: identity {number} is not in docs/methods.md §7"


def test_every_section_that_a_comment_cites_exists():
    sections = set(re.findall(r"^#{2,3} (\d(?:\.\d)?)\.? ", PAGE, re.M))
    assert {"1.1", "2.6", "3", "7"} <= sections
    cited = 0
    for path in [*SOURCES, *(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        text = path.read_text()
        # "docs/methods.md §2.2, §3.2 and §7": every number up to the next word that is not "and".
        for match in re.finditer(r"methods\.md((?:[,\s]|\band\b|§\d(?:\.\d)?)*)", text):
            for section in re.findall(r"§(\d(?:\.\d)?)", match[1]):
                assert section in sections, f"{path.relative_to(ROOT)} cites §{section}, which docs/methods.md lacks"
                cited += 1
    assert cited > 0
    own = set(re.findall(r"\((?:[^()]*, )?§(\d(?:\.\d)?)\)", PAGE))  # "(§2.5)"; the papers' follow their name
    assert own and own <= sections


def test_a_file_that_speaks_of_an_identity_says_where_it_stands():
    for path in SOURCES:
        text = path.read_text()
        numbers = {int(n) for n in re.findall(r"\bidentit(?:y|ies) (\d+)", text, re.I)}
        if numbers and path != Path(__file__):
            assert "docs/methods.md" in text, f"{path.relative_to(ROOT)}: say docs/methods.md §7 in its docstring"
            assert numbers <= set(identities()), path
