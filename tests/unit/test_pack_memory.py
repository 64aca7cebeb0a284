"""What the registry remembers of classes that no pack carries ends with the next registration."""

from safedefer.codecs.packs import Pack, PackedType
from safedefer.codecs.registry import TypeRegistry


class Plain: ...


def pack(*classes, module="sys"):
    return Pack(module, lambda: [PackedType("$packed", classes, repr, Plain)])


def test_a_class_that_was_carried_as_an_object_is_carried_by_a_pack_that_comes_later():
    registry = TypeRegistry()
    assert registry.by_class(Plain) is None
    registry.keep_unpacked(Plain)
    registry._pending = (pack(Plain),)
    entry = registry.by_class(Plain)
    assert entry is not None
    assert entry.tag == "$packed"


def test_a_class_that_a_pack_carries_is_not_remembered_as_one_that_none_does():
    registry = TypeRegistry()
    registry._pending = (pack(Plain),)
    registry.by_class(Plain)
    registry.keep_unpacked(Plain)
    assert registry.by_class(Plain).tag == "$packed"


def test_a_class_that_was_carried_as_an_object_can_be_registered():
    registry = TypeRegistry()
    registry.keep_unpacked(Plain)
    registry.register_type(Plain, "$plain", repr, lambda text: Plain())
    assert registry.by_class(Plain).tag == "$plain"


def test_a_tag_of_the_users_still_takes_a_type_from_its_pack():
    registry = TypeRegistry()
    registry._pending = (pack(Plain),)
    registry.register_type(int, "$packed", repr, int)
    assert registry.by_class(Plain) is None
