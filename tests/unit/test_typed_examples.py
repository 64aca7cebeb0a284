"""The examples of the format's description decode, and encode to the same text."""

import json
import re
from pathlib import Path

import pytest

from safedefer.codecs.registry import CORE_TAGS
from tests.zoo.exactly import decode_one, tree_of

README = (Path(__file__).parents[2] / "schema" / "README.md").read_text(encoding="utf-8")
TYPED = README[README.index("## Typed values") :]
EXAMPLES = re.findall(r"`(\{\"\$[a-z]+\":.*?\})`(?= \||,)", TYPED)
NAMES = {
    "shop.models:Order": "Node", "shop.models:Color": "Color", "shop.geo:Point": "Point", "shop.models:Line": "AttrsDict",
    "shop.api:Cart": "OnlyModel", "shop.models:Cart": "Node",
}  # fmt: skip


def local(example):
    """The example with the names of classes that exist here."""
    for name, ours in NAMES.items():
        example = example.replace(name, f"tests.zoo.values:{ours if '$dataclass' not in example else 'Single'}")
    return example.replace('"shop.tasks","qualname":"ship"', '"tests.zoo.values","qualname":"top"')


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_what_the_codec_writes(example):
    tree = json.loads(local(example))
    assert tree_of(decode_one(tree)) == tree


def test_every_tag_has_an_example():
    assert {f"${tag}" for tag in re.findall(r"\{\"\$([a-z]+)\"", TYPED)} >= CORE_TAGS - {"$frozenset", "$ordereddict"}
    assert all(f"`{tag}`" in TYPED for tag in CORE_TAGS - {"$ref"})
