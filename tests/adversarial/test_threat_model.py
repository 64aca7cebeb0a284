"""The threat model and the promises name tests: all of them exist."""

import re
from pathlib import Path

import pytest

import safedefer
from tests.mutation.defences import DEFENCES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ["docs/explanation/threat-model.md", "docs/explanation/promises.md"]
SOURCES = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("doc", DOCS)
def test_every_test_that_is_named_exists(doc):
    text = (ROOT / doc).read_text()
    names = re.findall(r"`(test_\w+)(\.\.\.)?`", text)
    assert [name for name, cut in names if f"def {name}{'' if cut else '('}" not in SOURCES] == []
    files = re.findall(r"(?<![\w./])[\w-][\w/-]*\.(?:py|json|md)\b", text)
    assert len(files) > 5
    assert [
        name for name in files if not any((ROOT / base / name).exists() for base in ("", "tests", "docs/explanation"))
    ] == []


@pytest.mark.parametrize("doc", DOCS)
def test_every_part_of_a_test_s_name_that_selects_one_does(doc):
    for path, word in re.findall(r"(tests/\S+\.py) -k (\w+)", (ROOT / doc).read_text()):
        assert re.search(rf"def test_\w*{word}", (ROOT / path).read_text()), (path, word)


def test_every_defence_that_is_taken_away_for_the_tests_to_notice_stands_where_its_row_says():
    package = ROOT / "safedefer"
    if not package.is_dir():  # the installed package is tested
        package = Path(safedefer.__file__).parent
    assert [(name, old) for name, old, *_ in DEFENCES if old not in (package / name).read_text()] == []
