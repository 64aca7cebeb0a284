"""The registry of types of third parties.

``register_type`` adds one class with a pair of functions. ``register_family`` adds the classes that a library makes
(attrs): the codec carries their objects by attributes, like those of a dataclass. Distributions register either by
the entry-point group ``safedefer.types``: each entry point is a function of the registry, and the registry calls it
once, at the first look-up.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from threading import RLock
from typing import Any, Final, TypeVar

from safedefer.codecs.class_families import ClassFamily
from safedefer.codecs.packs import Pack, PackedType
from safedefer.codecs.types import (
    asyncpg_values,
    freezegun_values,
    generics,
    google_datetimes,
    ndb,
    pydantic_values,
    url_parts,
)
from safedefer.codecs.types import attrs as attrs_types
from safedefer.errors import ConfigurationError

_T = TypeVar("_T")

ENTRY_POINT_GROUP: Final = "safedefer.types"

PACKS: Final[tuple[Pack, ...]] = (
    generics.PACK, pydantic_values.PACK, asyncpg_values.PACK, freezegun_values.PACK, ndb.PACK, *google_datetimes.PACKS, url_parts.PACK,
)  # fmt: skip

#: The tags of the wire format itself.
CORE_TAGS: Final[frozenset[str]] = frozenset(
    [
        "$tuple",
        "$set",
        "$frozenset",
        "$dict",
        "$bytes",
        "$bytearray",
        "$int",
        "$float",
        "$str",
        "$complex",
        "$datetime",
        "$date",
        "$time",
        "$timedelta",
        "$timezone",
        "$zoneinfo",
        "$decimal",
        "$fraction",
        "$uuid",
        "$path",
        "$ip",
        "$range",
        "$slice",
        "$ellipsis",
        "$enum",
        "$namedtuple",
        "$dataclass",
        "$model",
        "$object",
        "$callable",
        "$class",
        "$pattern",
        "$ordereddict",
        "$defaultdict",
        "$deque",
        "$counter",
        "$exception",
        "$ref",
    ]
)

_TAG: Final = re.compile(r"\$[a-z0-9_]{1,64}")


@dataclass(frozen=True, slots=True)
class RegisteredType:
    """One class with its pair of functions."""

    cls: type
    tag: str
    encode: Callable[[Any], object]
    decode: Callable[[Any], object]

    def carries(self, cls: type) -> bool:
        """Whether objects of this class have the tag."""
        return cls is self.cls


class TypeRegistry:
    """The types that third parties registered. Safe to use from several threads."""

    def __init__(self, *, discover: bool = False) -> None:
        self._lock = RLock()
        self._undiscovered = discover
        # By id of the class, which the entry keeps alive: a class as a key would run the hash of its metaclass.
        self._types: dict[int, RegisteredType] = {}
        self._tags: dict[str, RegisteredType] = {}
        self._families: dict[str, ClassFamily] = {}
        self._pending: tuple[Pack, ...] = PACKS if discover else ()
        self._packed: tuple[PackedType, ...] = ()
        #: Generic pydantic models with arguments, by both (``type_arguments``).
        self.generics: dict[Any, type] = {}
        #: Plans of classes that a policy admitted, by id of the class (``class_layout.Plan``).
        self.plans: dict[int, Any] = {}
        #: Classes that a policy admitted and no pack carries, by id.
        self._unpacked: dict[int, type] = {}
        if discover:
            attrs_types.register(self)

    def register_type(
        self, cls: type[_T], tag: str, encode: Callable[[_T], object], decode: Callable[[Any], _T]
    ) -> None:
        """Carry objects whose type is exactly ``cls`` as ``{tag: encode(obj)}``.

        Args:
            cls: The class. Objects of subclasses are not carried.
            tag: ``$`` and up to 64 of ``[a-z0-9_]``, such as ``$ndb_key``; the same at both ends.
            encode: Returns a value that can be carried, from which ``decode`` makes an equal object.
            decode: Returns an object whose type is exactly ``cls``. A holder of a key chooses its argument.

        Raises:
            ConfigurationError: The tag is malformed or taken, or the class is registered already.
        """
        entry = RegisteredType(cls, tag, encode, decode)
        with self._lock:
            if entry in (self._tags.get(tag), self._types.get(id(cls))):
                return
            self._check_tag(tag)
            if id(cls) in self._types:
                raise ConfigurationError(f"{cls!r} is registered as {self._types[id(cls)].tag}; register it once")
            self._types[id(cls)] = self._tags[tag] = entry
            self._unpacked = {}

    def register_family(self, family: ClassFamily) -> None:
        """Carry the objects of the classes of a family.

        Raises:
            ConfigurationError: The tag is malformed or taken.
        """
        with self._lock:
            if self._families.get(family.tag) == family:
                return
            self._check_tag(family.tag)
            self._families[family.tag] = family

    def _check_tag(self, tag: str) -> None:
        if _TAG.fullmatch(tag) is None:
            raise ConfigurationError(f"{tag!a} is not a tag; write '$' and 1 to 64 of a-z, 0-9 and _")
        if tag in CORE_TAGS or tag in self._tags or tag in self._families:
            raise ConfigurationError(f"the tag {tag} is taken; choose another")

    def keep_generic(self, key: Any, cls: type, most: int) -> None:
        """Keep a generic model with arguments, and forget the oldest above ``most``. What has objects lives on without us."""
        with self._lock:
            while len(self.generics) >= most:
                oldest = id(self.generics.pop(next(iter(self.generics))))
                self.plans.pop(oldest, None)
                self._unpacked.pop(oldest, None)
            self.generics[key] = cls

    def by_class(self, cls: type) -> RegisteredType | PackedType | None:
        """Return the entry of exactly this class. What the user registered comes before the packs."""
        self.discover()
        entry = self._types.get(id(cls))
        if entry is not None:
            return entry
        packs = self._packs()
        return None if id(cls) in self._unpacked else self._pack_of(cls, packs)

    def _pack_of(self, cls: type, packs: Iterable[PackedType]) -> PackedType | None:
        return next((each for each in packs if each.carries(cls) and not self._is_users(each.tag)), None)

    def keep_unpacked(self, cls: type) -> None:
        """Remember that no pack carries a class, until one more is known. The class is one that a policy admitted."""
        if id(cls) not in self._unpacked:
            with self._lock:  # a pack that another thread has just unpacked is asked too
                if self._pack_of(cls, self._packed) is None:
                    self._unpacked[id(cls)] = cls

    def by_tag(self, tag: str) -> RegisteredType | PackedType | ClassFamily | None:
        """Return the entry of a tag. A token chooses the tag, so nothing is discovered or imported for it."""
        entry = self._tags.get(tag) or self._families.get(tag)
        return entry if entry is not None else next((each for each in self._packs() if each.tag == tag), None)

    def _is_users(self, tag: str) -> bool:
        return tag in self._tags or tag in self._families

    def _packs(self) -> tuple[PackedType, ...]:
        """Return the types of the packs whose libraries the process has imported."""
        for pack in self._pending:
            if pack.module in sys.modules:
                self._unpack(pack)
        return self._packed

    def _unpack(self, pack: Pack) -> None:
        with self._lock:
            if pack not in self._pending:  # another thread was first
                return
            try:
                self._packed += tuple(pack.types())
                self._unpacked = {}
            except (AttributeError, KeyError):  # the library is being imported; or is an older one, without the types
                return
            self._pending = tuple(each for each in self._pending if each is not pack)

    def family_of(self, cls: type) -> ClassFamily | None:
        """Return the family that a class belongs to. Nothing is discovered: the class may be one that a token names."""
        return next((family for family in self._families.values() if family.matches(cls)), None)

    def discover(self) -> None:
        """Load the entry points, once: when a handler starts, or the first object that may be registered is encoded.

        Raises:
            ConfigurationError: An entry point cannot be loaded, or registers a tag or class that is taken.
        """
        if not self._undiscovered:
            return
        with self._lock:
            if not self._undiscovered:  # another thread was first
                return  # type: ignore[unreachable,unused-ignore]
            self._undiscovered = False  # an entry point that uses the registry does not start over
            try:
                for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
                    _load(point.name, point.load, self)
            except ConfigurationError:
                self._undiscovered = True
                raise


def _load(name: str, load: Callable[[], Callable[[TypeRegistry], object]], registry: TypeRegistry) -> None:
    try:
        load()(registry)
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"the entry point {name} of {ENTRY_POINT_GROUP} failed: {error!r}; fix or uninstall its distribution"
        ) from error


#: The default registry.
REGISTRY: Final = TypeRegistry(discover=True)


def register_type(cls: type[_T], tag: str, encode: Callable[[_T], object], decode: Callable[[Any], _T]) -> None:
    """Register a type in the default registry. See ``TypeRegistry.register_type``."""
    REGISTRY.register_type(cls, tag, encode, decode)
