"""Target: names of callables and classes, through the policy and the look-up, for a free and a limited key."""

import json

from pydantic import ValidationError

from fuzz import fuzz_claims
from fuzz.audit import nothing_happens
from fuzz.common import POLICY, TASKS
from fuzz.harness import main
from safedefer.errors import RejectedTask
from safedefer.policy_cache import Gate
from safedefer.refs import UNBOUND, CallableRef
from tests.schema import tasks

GATES: list[Gate] = [POLICY, POLICY.restricted([f"{TASKS}:echo", f"{TASKS}:Point"])]
BOUND = [UNBOUND, tasks.Receipt(1), tasks.Receipt, "text", [], dict, None]


def one_input(data: bytes) -> None:
    """Read ``kind module qualname member bound`` from the lines of the input, and look them up."""
    kind, module, qualname, member, which = (*data.decode("utf-8", "surrogateescape").split("\n", 4), "", "", "", "")[
        :5
    ]
    bound = BOUND[len(which) % len(BOUND)]
    parts = {"kind": kind, "module": module, "qualname": qualname, **({"member": member} if member else {})}
    with nothing_happens():
        try:
            ref = CallableRef.model_validate(parts)
        except ValidationError:
            ref = None
        for gate in GATES:
            if ref is not None:
                _look_up(gate, ref, bound)
            try:
                cls = gate.load_class(f"{module}:{qualname}")
            except RejectedTask:
                continue
            assert cls.__module__ in {TASKS, "builtins"}


def _look_up(gate: Gate, ref: CallableRef, bound: object) -> None:
    try:
        found = gate.load_callable(ref, bound)
    except RejectedTask:
        return
    assert callable(found)
    assert ref.module in {TASKS, "operator", "_operator", "builtins"}, ref
    # What was found is named so again: nothing has a second name but what the policy moved.
    again = gate.callable_ref(found)
    assert str(again) in {str(ref), f"{TASKS}:echo"}, (again, ref)


def seeds() -> list[bytes]:
    """Return the references of the vectors."""
    found = {
        b"function\nos\nsystem\n\n",
        b"builtin\nbuiltins\neval\n\n",
        b"method\ntests.schema.tasks\nReceipt\nsend\n1",
    }
    for payload in fuzz_claims.seeds():
        try:
            call = json.loads(payload)["call"]
            bound = "111" if call["kind"] == "builtin_method" else "1" if "bound" in call else ""
            lines = [call["kind"], call["module"], call["qualname"], call.get("member", ""), bound]
            found.add("\n".join(lines).encode())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # of the invalid vectors
            continue
    return sorted(found)


if __name__ == "__main__":
    main("references", one_input, seeds())
