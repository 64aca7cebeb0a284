"""An admitted class: what it inherits from a class outside the policy is not admitted with it."""

import enum
import inspect
from types import FunctionType

import pytest

from safedefer.errors import InvalidClaims, NotDeferrable, PolicyViolation, RejectedTask, UnencodableArgument
from safedefer.policy import Policy
from safedefer.refs import CallableRef, find_member
from tests.adversarial import heirs, victim
from tests.adversarial.forge import make_app, mint, post
from tests.zoo.exactly import carry, decode_one

HERE = heirs.__name__
CLASSES = [cls for _, cls in inspect.getmembers(heirs, inspect.isclass) if cls.__module__ == HERE]
POLICY = Policy(HERE)


def an_object(cls):
    try:
        return cls()
    except Exception:
        return cls.RED if cls is heirs.Color else cls.__new__(cls)


def inherited(cls):
    """Every attribute that the class has from elsewhere, under each kind that a token could claim."""
    for name in sorted({name for base in cls.__mro__ for name in vars(base)} | {name for name in dir(type(cls))}):
        try:
            definer, raw = find_member(cls, name)
        except RejectedTask:
            continue
        if definer.__module__ != HERE:
            yield name, definer, raw


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_no_inherited_member_of_an_outside_class_is_admitted(cls):
    bound = an_object(cls)
    members = list(inherited(cls))
    assert len(members) > 10
    for name, definer, raw in members:
        for kind, target in (
            ("method", bound),
            ("classmethod", cls),
            ("builtin_method", bound),
            ("builtin_method", cls),
        ):
            admitted = None
            try:
                ref = CallableRef(kind=kind, module=HERE, qualname=cls.__qualname__, member=name)
                admitted = POLICY.load_callable(ref, *(() if kind == "classmethod" else (target,)))
            except (RejectedTask, ValueError):
                continue
            raise AssertionError((cls, name, definer, admitted, raw))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_sender_is_told_the_same(cls):
    bound = an_object(cls)
    for name, definer, raw in inherited(cls):
        if type(raw) is FunctionType and not name.startswith("__"):
            with pytest.raises(NotDeferrable):
                POLICY.callable_ref(getattr(bound, name))
        elif type(raw) is classmethod and not name.startswith("__"):
            with pytest.raises(NotDeferrable):
                POLICY.callable_ref(getattr(cls, name))
        assert definer is not cls


PYDANTIC = [
    "parse_raw",
    "parse_file",
    "parse_obj",
    "model_construct",
    "construct",
    "model_validate",
    "model_validate_json",
    "model_rebuild",
    "from_orm",
    "update_forward_refs",
]


@pytest.mark.parametrize("member", PYDANTIC)
def test_the_class_methods_of_a_pydantic_model_do_not_run(member, tmp_path):
    """``parse_raw(b, proto="pickle", allow_pickle=True)`` unpickles; any model inherits it."""
    app = make_app(policy=Policy(HERE))
    call = {"kind": "classmethod", "module": HERE, "qualname": "Model", "member": member}
    evil = b"cos\nmkdir\n(S'" + str(tmp_path / "owned").encode() + b"'\ntR."
    args = [{"$bytes": __import__("base64").b64encode(evil).decode()}]
    status, headers, _ = post(app, mint(call=call, args=args, kwargs={"proto": "pickle", "allow_pickle": True}))
    assert (status, headers["Safedefer-Outcome"]) == (500, "rejected")
    assert not (tmp_path / "owned").exists()
    app.close()


def test_own_members_run_and_a_pattern_of_its_own_admits_an_inherited_one():
    """The control."""
    own = CallableRef(kind="classmethod", module=HERE, qualname="Model", member="make")
    assert POLICY.load_callable(own)() == heirs.Model()
    named = Policy(HERE, f"{HERE}:Model.model_construct")
    inherited = CallableRef(kind="classmethod", module=HERE, qualname="Model", member="model_construct")
    assert named.load_callable(inherited)(a=2) == heirs.Model(a=2)
    for other in ("Root", "Config"):
        with pytest.raises(PolicyViolation):
            named.load_callable(CallableRef(kind="classmethod", module=HERE, qualname=other, member="model_construct"))
    assert (
        Policy(HERE).load_callable(
            CallableRef(kind="method", module=HERE, qualname="Right", member="shared"), heirs.Right()
        )()
        == "right"
    )


def test_an_inherited_member_of_an_admitted_base_runs_and_of_another_module_needs_that_module():
    ref = CallableRef(kind="method", module=HERE, qualname="Right", member="shared")
    with pytest.raises(PolicyViolation):
        Policy(f"{HERE}:Left").load_callable(ref, heirs.Right())
    assert Policy(f"{HERE}:Right", f"{HERE}:Left").load_callable(ref, heirs.Right())() == "right"


@pytest.mark.parametrize("name", ["Worker", "Case", "Server"])
def test_a_class_that_inherits_its_construction_from_elsewhere_is_no_callee(name):
    """``threading.Thread(target=...)`` by any other name."""
    with pytest.raises(PolicyViolation):
        POLICY.load_callable(CallableRef(kind="class", module=HERE, qualname=name))


def test_a_class_with_a_construction_of_its_own_is_a_callee_whatever_its_base():
    ref = CallableRef(kind="class", module=HERE, qualname="Handler")
    assert POLICY.load_callable(ref) is heirs.Handler


DUNDERS = sorted({name for cls in CLASSES for name in dir(cls) if name.startswith("__")})


@pytest.mark.parametrize("member", DUNDERS)
def test_no_special_method_has_a_name_on_the_wire(member):
    from safedefer.claims import read_claims
    from tests.schema import vectors

    call = {"kind": "method", "module": HERE, "qualname": "Model", "member": member, "bound": None}
    with pytest.raises(InvalidClaims):
        read_claims(vectors.compact(vectors.claims(call={**call, "bound": 1})).encode())


KEYED = {"$object": {"class": f"{HERE}:Keyed"}}
HASHED = {
    "a member of a set": {"$set": [KEYED]},
    "below what a reference in a set names": [
        {"$dataclass": [f"{HERE}:Holder", {"held": KEYED}]},
        {"$set": [{"$ref": 1}]},
    ],
    "below a reference that is a key": [
        {"$dataclass": [f"{HERE}:Holder", {"held": KEYED}]},
        {"$dict": [[{"$ref": 1}, 1]]},
    ],
    "what a reference in a frozen set names": [KEYED, {"$frozenset": [{"$tuple": [{"$ref": 1}]}]}],
}


@pytest.mark.parametrize("where", HASHED)
def test_no_inherited_hash_of_an_outside_class_runs_however_it_is_reached(where):
    """That of an object outside keys was not asked about when a reference inside one led to what holds it."""
    victim.RAN.clear()
    with pytest.raises(RejectedTask, match="inherits from one that may not run"):
        decode_one(HASHED[where], policy=POLICY)
    assert victim.RAN == []
    decode_one(HASHED[where], policy=Policy(HERE, f"{victim.__name__}:Counted"))
    assert "__hash__" in victim.RAN


def test_the_sender_of_an_inherited_hash_is_told_and_what_is_no_key_arrives():
    held = heirs.Holder(heirs.Keyed())
    with pytest.raises(UnencodableArgument, match="victim:Counted"):
        carry(held, {held}, _policy=POLICY)
    (arrived, keys) = carry(held, {heirs.Holder(1)}, _policy=POLICY).args
    assert type(arrived.held) is heirs.Keyed
    assert keys == {heirs.Holder(1)}


class Marks(victim.Number, enum.Flag):
    A = 1
    B = 2


def test_no_combination_of_flags_is_made_by_an_outside_class():
    victim.RAN.clear()
    with pytest.raises(RejectedTask, match="combination of flags"):
        decode_one({"$enum": [f"{__name__}:Marks", 3]}, policy=Policy(__name__))
    with pytest.raises(UnencodableArgument, match="not found by its name"):
        carry(Marks.A | Marks.B, _policy=Policy(__name__))
    assert victim.RAN == [("__new__", 3)], "the sender's own"
    assert carry(Marks.A, _policy=Policy(__name__)).args[0] is Marks.A
