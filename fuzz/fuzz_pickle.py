"""Target: pickles that a holder of a key wrote, through the scanner and the reader."""

import codecs
import pickle
import sys
from base64 import b64encode
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import PurePosixPath

import cloudpickle

from fuzz.audit import nothing_happens
from fuzz.common import POLICY
from fuzz.harness import main
from safedefer.codecs.pickled import PickledCodec
from safedefer.codecs.typed import CallData
from safedefer.errors import RejectedTask
from safedefer.refs import UNBOUND
from tests.schema import tasks

CODEC = PickledCodec()
for _name in ("raw_unicode_escape", "unicode_escape", "latin-1"):
    codecs.lookup(_name)  # pickletools decodes the arguments of opcodes that are refused afterwards
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def one_input(data: bytes) -> None:
    """Decode a pickle: whatever it is, it imports, runs and opens nothing."""
    text = b64encode(data).decode()
    call = CallData(UNBOUND, [text, _PYTHON, cloudpickle.__version__], {})
    with nothing_happens():
        try:
            values = CODEC.decode(call, POLICY, text=b"")
        except RejectedTask:
            return
    assert type(values.args) is tuple
    assert type(values.kwargs) is dict


class _Evil:
    def __init__(self, *parts: object) -> None:
        self.parts = parts

    def __reduce__(self) -> tuple[object, ...]:
        return self.parts  # type: ignore[return-value]


def seeds() -> list[bytes]:
    """Return pickles of calls, good and evil, and of other protocols."""
    values = [
        (), 1, -(2**70), 1.5, "é", b"x" * 300, bytearray(b"a"), [1, [2]], {"a": {1}}, frozenset({1}), (1, (2,)), Decimal(1), datetime.now(UTC),
        Counter("ab"), OrderedDict(a=1), defaultdict(list, a=[1]), deque([1], 2), PurePosixPath("a"), ValueError("x"), tasks.Receipt(1),
        tasks.Point(1, 2), tasks.Order(1), tasks.Color.RED, tasks.Customer(name="a"), tasks.Receipt, tasks.echo, tasks.Names([1]), tasks.Labels(a=1),
        _Evil(eval, ("1",)), _Evil(getattr, (1, "real")), _Evil(tasks.echo, (1,)), _Evil(tasks.Receipt, (1,), {"x": 1}), _Evil(list, ([1],), None, iter([1])),
        _Evil(__import__("os").system, ("true",)), _Evil(__import__("subprocess").Popen, (["true"],)),
    ]  # fmt: skip
    call = [pickle.dumps(((), (value,), {}), protocol) for value in values for protocol in (5, 2)]
    return [*call, pickle.dumps(((tasks.Receipt(1),), (), {"a": 1}), 5), b"cos\nsystem\n(S'true'\ntR.", b"\x80\x05."]


if __name__ == "__main__":
    main("pickle", one_input, seeds())
