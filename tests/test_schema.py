"""``schema/``: generated files are current, schemas are schemas, every vector is judged as it says."""

import ast
import asyncio
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from base64 import urlsafe_b64decode
from typing import Annotated, get_args

import jsonschema
import pytest
from pydantic import Field, TypeAdapter, ValidationError

from safedefer.claims import Claims
from safedefer.codecs.registry import CORE_TAGS
from safedefer.codecs.typed import CallData, TypedCodec
from safedefer.errors import RejectedTask
from safedefer.execution.prepare import prepare
from safedefer.keys import Keyring
from safedefer.options import Limits, Serves
from safedefer.policy import Policy
from safedefer.refs import UNBOUND, KindName
from safedefer.signing import Verifier
from safedefer.task import VerifiedPointer
from tests.schema import schemas, values, vectors
from tests.schema.files import ROOT, generated

VALID = json.loads((ROOT / "vectors/valid.json").read_text())
INVALID = json.loads((ROOT / "vectors/invalid.json").read_text())
CODECS = {"typed": TypedCodec()}


def _ids(document):
    return [pytest.param(test, id=f"{test['tcId']} {test['comment']}") for test in document["tests"]]


@pytest.fixture(scope="module")
def verifier():
    config = VALID["config"]
    policy = Policy(*config["policy"], moved=config["moved"])
    policy.load()
    return Verifier(
        Keyring.from_jwks(json.dumps(VALID["keys"])),
        policy,
        serves=Serves(environment=config["environment"], queues=config["queues"], targets=config["targets"]),
        limits=Limits(),
    )


def judge(verifier, test):
    """Verify, follow the pointer, import, decode, bind: all that a handler does before the call."""
    config = VALID["config"]
    url = test.get("url", config["url"])
    task = verifier.verify(test["token"].encode(), url=url, now=config["now"], queue=test.get("queue"))
    if isinstance(task, VerifiedPointer):
        task = verifier.verify_stored(task, test["stored"].encode(), url=url, now=config["now"])
    return prepare(task, CODECS)


# --- Generated files ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", generated(), ids=lambda path: path.name)
def test_generated_files_are_current(path):
    assert path.read_text() == generated()[path], "run: python -m tests.schema"


@pytest.mark.parametrize("name", schemas.documents())
def test_every_schema_obeys_the_metaschema_and_has_an_id(name):
    document = json.loads((ROOT / f"{name}.schema.json").read_text())
    assert document["$schema"] == jsonschema.Draft202012Validator.META_SCHEMA["$id"]
    assert document["$id"] == f"urn:safedefer:schema:{name}:1"
    jsonschema.Draft202012Validator.check_schema(document)


def test_there_are_enough_vectors_of_every_kind_and_tag():
    assert VALID["numberOfTests"] == len(VALID["tests"]) >= 60
    assert INVALID["numberOfTests"] == len(INVALID["tests"]) >= 200
    assert {call["kind"] for _, call, _, _ in values.KINDS} == set(get_args(KindName))
    text = "".join(test["payload"] for test in VALID["tests"])
    assert {tag for tag in CORE_TAGS if f'"{tag}"' not in text} == set()
    for document in (VALID, INVALID):
        tokens = [(test["token"], test.get("stored"), test.get("queue"), test.get("url")) for test in document["tests"]]
        comments = [(test["comment"], *test["flags"]) for test in document["tests"]]
        assert len(set(comments)) == len(comments)
        if document is INVALID:
            assert len(set(tokens)) == len(tokens)


# --- Vectors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("test", _ids(VALID))
def test_a_valid_vector_runs_and_gives_what_it_says(test, verifier):
    result = judge(verifier, test)()
    if inspect.isawaitable(result):
        result = asyncio.run(_await(result))
    assert repr(result) == _as_shown_here(test["python"])


def _as_shown_here(text):
    """Python 3.12 and later show an OrderedDict as a dict of its items; the vectors show it as pairs."""
    if sys.version_info < (3, 12):
        return text
    return re.sub(r"OrderedDict\((\[.*?\])\)", lambda shown: f"OrderedDict({dict(ast.literal_eval(shown[1]))!r})", text)


async def _await(result):
    return await result


@pytest.mark.parametrize("test", _ids(INVALID))
def test_an_invalid_vector_is_refused_with_its_slug(test, verifier):
    with pytest.raises(RejectedTask) as rejection:
        judge(verifier, test)
    assert rejection.value.slug == test["slug"]


@pytest.mark.parametrize("case", values.VALUES, ids=lambda case: case[0])
def test_a_value_has_one_spelling(case):
    _, tree, _ = case
    policy = Policy("tests.schema.tasks", "operator:add")
    text = json.dumps({"args": [tree], "kwargs": {}}).encode()
    decoded = CODECS["typed"].decode(CallData(UNBOUND, [tree], {}), policy, text=text)
    again = CODECS["typed"].encode(decoded, policy).args[0]
    assert json.dumps(again) == json.dumps(tree)


# --- Schemas against vectors ----------------------------------------------------------------------


def _payload(token):
    segment = token.split(".")[1]
    return json.loads(urlsafe_b64decode(segment + "=" * (-len(segment) % 4)))


@pytest.fixture(scope="module")
def claims_schema():
    return jsonschema.Draft202012Validator(json.loads((ROOT / "claims.schema.json").read_text()))


@pytest.mark.parametrize("test", _ids(VALID))
def test_the_claims_of_a_valid_vector_obey_the_schema(test, claims_schema):
    claims_schema.validate(_payload(test["token"]))


#: What no JSON Schema can say, times compared, and what this validator gets wrong: its ``$`` is Python's.
UNSAID = re.compile(r"exp before nbf|exp over 92 days|a newline behind|above the|a count with a fraction of zero")


@pytest.mark.parametrize(
    "test", _ids({"tests": [test for test in INVALID["tests"] if test["flags"][0] in {"Claims", "Regex"}]})
)
def test_wrong_claims_do_not_obey_the_schema(test, claims_schema):
    assert claims_schema.is_valid(_payload(test["token"])) == bool(UNSAID.search(test["comment"]))


def test_the_header_and_the_keys_of_the_vectors_obey_their_schemas():
    header, keys = (
        jsonschema.Draft202012Validator(json.loads((ROOT / f"{name}.schema.json").read_text()))
        for name in ("header", "keys")
    )
    header.validate(json.loads(vectors.header()))
    keys.validate(VALID["keys"])
    assert not header.is_valid({"alg": "none", "kid": "now", "typ": "safedefer+jwt"})
    assert not keys.is_valid({"keys": [{"kty": "RSA", "kid": "a", "k": "b"}]})


# --- Patterns mean the same elsewhere --------------------------------------------------------------


def _patterns(node):
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "pattern" and isinstance(value, str):
                yield value
            elif key == "patternProperties":
                yield from value
            yield from _patterns(value)
    elif isinstance(node, list):
        for item in node:
            yield from _patterns(item)


ENDINGS = [
    "",
    "\n",
    "\r",
    "\r\n",
    "\u2028",
    "\u2029",
    "\0",
    "\nx",
    "\u0661",
    "\u00e9",
    "\u017f",
    "\u212a",
    "\uff21",
    " ",
    ".",
]


@pytest.mark.skipif(shutil.which("node") is None and "CI" not in os.environ, reason="no node here; CI has one")
def test_patterns_mean_the_same_in_ecmascript_and_in_the_validating_engine():
    """The engine of pydantic is Rust's; ``fullmatch`` is what this library means; ECMAScript is the schemas' own."""
    patterns = sorted(
        {p for name in schemas.documents() for p in _patterns(json.loads((ROOT / f"{name}.schema.json").read_text()))}
    )
    starts = [
        "a", "A_9-", "0123456789abcdef", "0" * 64, "os.path", "echo", "_", "_1", "__x", "X-A", "a b", "00-" + "0" * 32 + "-" + "a" * 16 + "-01",
        "test:default:default:/_ah/queue/deferred", 'a:b:c:/"x\\', "a:b:c://x", "a:b:c:/", "a" * 64, "a" * 65, "",
    ]  # fmt: skip
    texts = [start + end for start in starts for end in ENDINGS] + [end + start for start in starts for end in ENDINGS]
    program = """
      const {patterns, texts} = JSON.parse(require("fs").readFileSync(0, "utf8"));
      console.log(JSON.stringify(patterns.map(p => { const r = new RegExp(p, "u"); return texts.map(t => r.test(t)); })));
    """
    done = subprocess.run(
        ["node", "-e", program],
        input=json.dumps({"patterns": patterns, "texts": texts}),
        capture_output=True,
        text=True,
        check=True,
    )
    for pattern, found in zip(patterns, json.loads(done.stdout), strict=True):
        rust = TypeAdapter(Annotated[str, Field(pattern=pattern)])
        for text, ecmascript in zip(texts, found, strict=True):
            python = re.fullmatch(pattern.removeprefix("^").removesuffix("$"), text) is not None
            try:
                rust.validate_python(text)
                accepted = True
            except ValidationError:
                accepted = False
            assert (ecmascript, accepted) == (python, python), (pattern, text)


def test_every_claim_is_described_in_prose():
    prose = (ROOT / "README.md").read_text()
    assert [name for name in Claims.__annotations__ if f"`{name}`" not in prose] == []
    assert [tag for tag in CORE_TAGS if tag not in prose] == []
