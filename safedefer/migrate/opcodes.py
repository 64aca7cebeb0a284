"""Reads a pickle without ``pickle``: an interpreter of the opcodes that make data, with bounds. It calls, imports and hashes nothing.

What names, constructs or fills something is handed to ``Makers``. Opcodes of old-style instances, persistent ids, the extension registry,
keyword construction and buffers out of band are refused.
"""

from __future__ import annotations

import codecs
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final, Protocol

from safedefer.errors import InvalidArguments

_MOST_BYTES: Final = 1_048_576
#: Values that are pushed, and entries of the memo.
_MOST_VALUES: Final = 100_000
#: Bytes of an integer: about the 4,300 digits that tasks may have.
_MOST_INTEGER: Final = 1_785
_PROTOCOL: Final = 5
_MARK: Final = object()


class RawText(bytes):
    """A ``str`` of Python 2 that is no UTF-8: the state of a datetime, or what nobody can read."""

    __slots__ = ()


class Makers(Protocol):
    """What a pickle may name, make and fill."""

    def name(self, module: str, name: str) -> Any:
        """Return what stands for a name."""
        ...

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Return what a construction makes (``REDUCE``)."""
        ...

    def new(self, cls: Any, arguments: tuple[Any, ...]) -> Any:
        """Return an empty object (``NEWOBJ``)."""
        ...

    def build(self, value: Any, state: Any) -> None:
        """Fill an object (``BUILD``)."""
        ...

    def key(self, value: Any) -> Any:
        """Return a value that may be hashed."""
        ...


def refuse(text: str) -> InvalidArguments:
    """Return the error of a pickle that is not read."""
    return InvalidArguments(f"the pickled task is not read: {text}")


class Interpreter:
    """Reads one pickle."""

    def __init__(self, data: bytes, makers: Makers) -> None:
        if type(data) is not bytes:
            raise refuse("it is no bytes; give the body as it was stored")
        if len(data) > _MOST_BYTES:
            raise refuse("it has over 1 MiB; pass an id in the new code")
        self._data = data
        self._at = 0
        self._makers = makers
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._pushed = 0

    def read(self) -> Any:
        """Return the value.

        Raises:
            InvalidArguments: It is malformed, too large, or has an opcode that is not read.
        """
        try:
            while (code := self._take(1)[0]) != ord("."):
                step = _STEPS.get(code)
                if step is None:
                    raise refuse(f"the opcode 0x{code:02x} may run code, or none has it; defer the task anew")
                step(self)
        except (
            ValueError,
            IndexError,
            KeyError,
            TypeError,
            AttributeError,
            struct.error,
            Warning,
            OverflowError,
            MemoryError,
        ) as error:
            if isinstance(error, InvalidArguments):
                raise
            raise refuse("it is malformed; defer the task anew") from error
        if len(self._stack) != 1 or self._at != len(self._data) or self._stack[0] is _MARK:
            raise refuse("something is left over; defer the task anew")
        return self._stack[0]

    # --- Bytes ---

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if count < 0 or end > len(self._data):
            raise refuse("it ends too early; give the whole body")
        found, self._at = self._data[self._at : end], end
        return found

    def _line(self) -> bytes:
        end = self._data.index(b"\n", self._at)
        found, self._at = self._data[self._at : end], end + 1
        return found

    def _number(self, form: str) -> int:
        found: int = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return found

    # --- The stack ---

    def _push(self, value: Any) -> None:
        self._pushed += 1
        if self._pushed > _MOST_VALUES:
            raise refuse("it has over 100,000 values; pass an id in the new code")
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise refuse("a mark stands where a value does; defer the task anew")
        return value

    def _top(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            raise refuse("a value is filled that is none; defer the task anew")
        return self._stack[-1]

    def _marked(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise refuse("a mark is missing; defer the task anew")
        found = self._stack[at + 1 :]
        del self._stack[at:]
        return found

    def _remember(self, at: int) -> None:
        if at < 0 or len(self._memo) > _MOST_VALUES or self._stack[-1] is _MARK:
            raise refuse("its memo is malformed; defer the task anew")
        self._memo[at] = self._stack[-1]

    # --- Values ---

    def _text(self, raw: bytes) -> None:
        try:
            self._push(raw.decode())
        except UnicodeDecodeError:
            self._push(RawText(raw))

    def _integer(self, raw: bytes) -> None:
        if len(raw) > _MOST_INTEGER:
            raise refuse("an integer is too long; pass it as text in the new code")
        self._push(int.from_bytes(raw, "little", signed=True))

    def _decimal(self, text: bytes) -> None:
        self._push({b"00": False, b"01": True}[text] if text in {b"00", b"01"} else int(text.rstrip(b"L")))

    def _quoted(self, text: bytes) -> None:
        if text[:1] not in {b"'", b'"'} or text[-1:] != text[:1]:
            raise refuse("a text is malformed; defer the task anew")
        self._text(codecs.escape_decode(text[1:-1])[0])

    def _fill(self, values: list[Any]) -> None:
        self._top(list).extend(values)

    def _pairs(self, target: dict[Any, Any], values: list[Any]) -> dict[Any, Any]:
        for n in range(0, len(values), 2):
            target[self._makers.key(values[n])] = values[n + 1]
        return target

    def _fill_dict(self, values: list[Any]) -> None:
        if len(values) % 2:
            raise refuse("a key has no value; defer the task anew")
        target = self._stack[-1]
        if type(target) is not dict and type(target) is not OrderedDict:
            raise refuse("a value is filled that is no dict; defer the task anew")
        self._pairs(target, values)

    def _set(self, values: list[Any]) -> set[Any]:
        return {self._makers.key(each) for each in values}

    def _name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise refuse("a name is no text; defer the task anew")
        self._push(self._makers.name(module, name))

    def _stack_global(self) -> None:
        name = self._pop()
        self._name(self._pop(), name)

    def _make(self, maker: Callable[[Any, tuple[Any, ...]], Any]) -> None:
        arguments = self._pop()
        if type(arguments) is not tuple:
            raise refuse("arguments are no tuple; defer the task anew")
        self._push(maker(self._pop(), arguments))

    def _build(self) -> None:
        state = self._pop()
        self._makers.build(self._stack[-1], state)

    def _tuple(self, count: int) -> None:
        found = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(found)))

    def _protocol(self) -> None:
        if self._take(1)[0] > _PROTOCOL:
            raise refuse("its protocol is none that is known")


def _steps() -> dict[int, Callable[[Interpreter], object]]:
    """Return what each opcode does. Others are refused."""
    i = Interpreter
    named: dict[bytes, Callable[[Interpreter], object]] = {
        b"\x80": i._protocol, b"\x95": lambda s: s._take(8), b"(": lambda s: s._push(_MARK), b"0": i._pop, b"1": i._marked,
        b"N": lambda s: s._push(None), b"\x88": lambda s: s._push(True), b"\x89": lambda s: s._push(False),
        b"I": lambda s: s._decimal(s._line()), b"L": lambda s: s._decimal(s._line()), b"F": lambda s: s._push(float(s._line())),
        b"J": lambda s: s._push(s._number("<i")), b"K": lambda s: s._push(s._number("<B")), b"M": lambda s: s._push(s._number("<H")),
        b"\x8a": lambda s: s._integer(s._take(s._number("<B"))), b"\x8b": lambda s: s._integer(s._take(s._number("<i"))),
        b"G": lambda s: s._push(struct.unpack(">d", s._take(8))[0]),
        b"S": lambda s: s._quoted(s._line()), b"T": lambda s: s._text(s._take(s._number("<i"))), b"U": lambda s: s._text(s._take(s._number("<B"))),
        b"V": lambda s: s._push(s._line().decode("raw-unicode-escape")),
        b"X": lambda s: s._push(s._take(s._number("<I")).decode()), b"\x8c": lambda s: s._push(s._take(s._number("<B")).decode()),
        b"\x8d": lambda s: s._push(s._take(s._number("<Q")).decode()),
        b"B": lambda s: s._push(s._take(s._number("<I"))), b"C": lambda s: s._push(s._take(s._number("<B"))),
        b"\x8e": lambda s: s._push(s._take(s._number("<Q"))), b"\x96": lambda s: s._push(bytearray(s._take(s._number("<Q")))),
        b"t": lambda s: s._push(tuple(s._marked())), b")": lambda s: s._push(()), b"\x85": lambda s: s._tuple(1),
        b"\x86": lambda s: s._tuple(2), b"\x87": lambda s: s._tuple(3),
        b"]": lambda s: s._push([]), b"l": lambda s: s._push(s._marked()), b"a": lambda s: s._fill([s._pop()]), b"e": lambda s: s._fill(s._marked()),
        b"}": lambda s: s._push({}), b"d": lambda s: s._push(s._pairs({}, s._marked())),
        b"s": lambda s: s._fill_dict([s._pop(), s._pop()][::-1]), b"u": lambda s: s._fill_dict(s._marked()),
        b"\x8f": lambda s: s._push(set()), b"\x91": lambda s: s._push(frozenset(s._set(s._marked()))),
        b"g": lambda s: s._push(s._memo[int(s._line())]), b"h": lambda s: s._push(s._memo[s._number("<B")]),
        b"j": lambda s: s._push(s._memo[s._number("<I")]), b"p": lambda s: s._remember(int(s._line())),
        b"q": lambda s: s._remember(s._number("<B")), b"r": lambda s: s._remember(s._number("<I")), b"\x94": lambda s: s._remember(len(s._memo)),
        b"c": lambda s: s._name(s._line().decode("ascii"), s._line().decode("ascii")), b"\x93": i._stack_global,
        b"R": lambda s: s._make(s._makers.call), b"\x81": lambda s: s._make(s._makers.new), b"b": i._build,
    }  # fmt: skip
    named[b"\x90"] = _add
    return {code[0]: step for code, step in named.items()}


def _add(reader: Interpreter) -> None:
    values = reader._set(reader._marked())
    reader._top(set).update(values)


_STEPS: Final = _steps()
