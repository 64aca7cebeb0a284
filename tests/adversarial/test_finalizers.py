from __future__ import annotations

import gc
import subprocess

import pytest

from safedefer.errors import PolicyViolation, UnencodableArgument
from safedefer.policy import Policy
from tests.zoo.exactly import carry_one, decode_one

HOME = __name__
ran = []


class Own:
    """Its own finalizer is the developer's word."""

    def __del__(self):
        ran.append(type(self).__name__)


class Inherited(subprocess.Popen):
    """Its finalizer polls a process whose number the token would choose."""

    def __init__(self):
        self.returncode = 0


def test_an_inherited_finalizer_of_a_class_outside_the_policy_never_meets_a_decoded_state():
    tree = {"$object": {"class": f"{HOME}:Inherited", "state": {"pid": 1, "returncode": None, "_child_created": True}}}
    with pytest.raises(PolicyViolation, match="subprocess:Popen"):
        decode_one(tree, policy=Policy(HOME))


def test_it_is_refused_at_the_sender_too():
    value = Inherited()
    value._child_created = False
    with pytest.raises(UnencodableArgument, match="Popen"):
        carry_one(value, _policy=Policy(HOME))


def test_a_class_with_a_finalizer_of_its_own_is_carried():
    value = Own()
    arrived = carry_one(value, _policy=Policy(HOME))
    assert type(arrived) is Own
    ran.clear()
    del arrived, value
    gc.collect()
    assert ran == ["Own", "Own"]
