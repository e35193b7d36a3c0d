"""The pages name what is there: files, folders, classes, links, decisions."""

import importlib
import re
from itertools import pairwise
from pathlib import Path

import pytest

from tests.conftest import ROOT

DOCS = ROOT / "docs"
PACKAGES = {
    "kvstore": ROOT / "kvstore",
    "kvstored": ROOT / "daemon" / "kvstored",
    "kvstored_client": ROOT / "client" / "kvstored_client",
}
PAGES = sorted(
    [*DOCS.rglob("*.md"), *(ROOT / "bench").glob("*.md"), *(ROOT / "kernel").glob("*.md"), *ROOT.glob("*.md")]
)
ARCHITECTURE = (DOCS / "architecture.md").read_text()
WORDS_MAX = 30


def rows(page: str) -> list[list[str]]:
    """The cells of the rows of a page's tables, headings left out."""
    lines = [line for line in page.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def resolved(name: str) -> object:
    """The object that a dotted name stands for: a module, a class, or a field of a class."""
    parts = name.split(".")
    for at in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:at]))
        except ModuleNotFoundError:
            continue
        for part in parts[at:]:
            fields = vars(found).get("__annotations__", {})
            found = fields[part] if part in fields else getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def test_the_glossary_has_at_most_thirty_words_and_no_word_twice():
    words = [word for word, *_ in rows((DOCS / "glossary.md").read_text())[1:]]
    assert len(words) <= WORDS_MAX
    assert len(set(words)) == len(words)


def test_each_word_of_the_glossary_has_one_class_that_exists_and_that_no_other_word_has():
    named = {}
    for word, _, where in rows((DOCS / "glossary.md").read_text())[1:]:
        names = re.findall(r"`([\w.]+)`", where)
        assert len(names) == 1, f"{word}: {where}"
        assert resolved(names[0]) is not None
        named[word] = names[0]
    assert len(set(named.values())) == len(named)


def folders(package: str) -> set[str]:
    return {path.name for path in PACKAGES[package].iterdir() if (path / "__init__.py").exists()} - {"_pb"}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_map_lists_every_folder_once_in_its_table_and_in_the_picture(package):
    section = ARCHITECTURE.split(f"### {package}: ")[1].split("\n#")[0]
    listed = [cells[0] for cells in rows(section)[1:]]
    assert sorted(listed) == sorted(f"`{name}/`" for name in folders(package))
    pictured = set(re.findall(r'\["(\w+)/"\]', subgraph(package)))
    assert pictured == folders(package)


def test_every_file_and_folder_that_the_map_names_exists():
    there = {str(path.relative_to(ROOT)) for top in (*PACKAGES.values(), ROOT / "tests") for path in top.rglob("*")}
    named = set(re.findall(r"`((?:\w+/)*\w+(?:\.py|/))`", ARCHITECTURE))
    missing = [name for name in named if not any(f"/{path}".endswith(f"/{name.rstrip('/')}") for path in there)]
    assert sorted(missing) == []
    assert len(named) > 40


def subgraph(package: str) -> str:
    return ARCHITECTURE.split(f"subgraph {package}[")[1].split("\n    end")[0]


def arrows() -> list[tuple[str, str]]:
    """The solid arrows of the picture, as modules: ("kvstored.doors", "kvstored.calls"), ..."""
    modules, plain = {}, []
    for package in PACKAGES:
        for name, label in re.findall(r'(\w+)\["([\w.]+)/?"\]', subgraph(package)):
            modules[name] = f"{package}.{label.removesuffix('.py')}"
    picture = ARCHITECTURE.split("```mermaid")[1].split("```")[0]
    for line in picture.splitlines():
        steps = [re.findall(r"\b(\w+)(?:\[[^\]]*\])?(?= &|$)", step.strip()) for step in line.split("-->")]
        plain += [(a, b) for one, two in pairwise(steps) for a in one for b in two]
    return [(modules[a], modules[b]) for a, b in plain]


def imports(module: str) -> set[str]:
    package, name = module.split(".")
    place = PACKAGES[package] / name
    sources = place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]
    text = "\n".join(path.read_text() for path in sources)
    named = set(re.findall(r"^\s*from (kv\w+\.\w+)[\w.]* import", text, re.MULTILINE))
    return named | {f"{top}.{name}" for top, name in re.findall(r"^\s*from (kv\w+) import (\w+)", text, re.MULTILINE)}


def test_every_solid_arrow_of_the_picture_is_an_import_and_none_has_a_way_back():
    drawn = arrows()
    assert len(drawn) > 20
    assert [(a, b) for a, b in drawn if b not in imports(a)] == []
    assert [(a, b) for a, b in drawn if a in imports(b)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_links_and_names_only_files_that_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    if page.name != "CHANGELOG.md":  # it tells of files as they were
        folder = "kvstore|daemon|client|tests|docs|bench|examples|tools"
        named = re.findall(rf"(?<![\w/.])((?:{folder})/[\w/]+\.\w+)\b", text)
        made = re.findall(r"^\*\*`([^`]+)`\*\* \(new\)$", text, re.MULTILINE)  # by a recipe, in its own example
        assert [name for name in named if not (ROOT / name).exists() and name not in made] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_to_a_heading_finds_it(page):
    for target, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", page.read_text()):
        text = (page.parent / target).read_text() if target else page.read_text()
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-") for words in headings}
        assert heading in anchors, f"{target}#{heading}"


def test_decisions_are_numbered_without_gaps_and_say_what_was_decided_and_whether_it_holds():
    index = (DOCS / "decisions" / "README.md").read_text()
    pages = sorted(path for path in (DOCS / "decisions").glob("*.md") if path.name != "README.md")
    assert [path.name[:4] for path in pages] == [f"{number:04}" for number in range(1, len(pages) + 1)]
    for path in pages:
        text = path.read_text()
        assert text.startswith(f"# {path.name[:4]}: "), path.name
        assert "**Status:**" in text, path.name
        assert "**Decided:**" in text, path.name
        assert f"]({path.name})" in index, path.name
    assert len(rows(index)) == 1 + len(pages)


def test_a_decision_named_by_its_number_exists():
    pages = {path.name[:4] for path in Path(DOCS / "decisions").glob("[0-9]*.md")}
    for page in PAGES:
        if page.name != "CHANGELOG.md":
            assert set(re.findall(r"decisions? (\d{4})", page.read_text())) <= pages, page
