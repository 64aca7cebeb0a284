"""The test vectors of ``schema/vectors``, in the shape of Wycheproof's: deterministic, keys and clock fixed."""

import hashlib
import hmac
import itertools
import json
from base64 import urlsafe_b64encode

from tests.schema import invalid_arguments, invalid_claims, values

NOW = 1_900_000_000
DAY = 86_400
URL = "/_ah/queue/deferred"
TASKS = "tests.schema.tasks"

#: kid: state and limits. The secret of a key is the SHA-256 of "safedefer test vectors, key <kid>".
KEYS = {
    "now": {"safedefer_state": "active"},
    "before": {"safedefer_state": "verify_only"},
    "stolen": {"safedefer_state": "revoked"},
    "mail-only": {"safedefer_state": "verify_only", "safedefer_queues": ["mail"]},
    "narrow": {"safedefer_state": "verify_only", "safedefer_patterns": [f"{TASKS}:echo", f"{TASKS}:Point"]},
    "pickles": {"safedefer_state": "verify_only", "safedefer_pickle": True},
}
CONFIG = {
    "now": NOW,
    "policy": [TASKS, "operator:add", "builtins:str.upper", "builtins:list.count", "builtins:dict.fromkeys"],
    "moved": {f"{TASKS}:former": f"{TASKS}:echo", f"{TASKS}:OldPoint": f"{TASKS}:Point"},
    "environment": "test",
    "queues": ["default", "mail"],
    "targets": ["default"],
    "url": URL,
}


def encode(data):
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def secret(kid):
    return hashlib.sha256(f"safedefer test vectors, key {kid}".encode()).digest()


def jwks():
    return {
        "keys": [
            {"kty": "oct", "alg": "HS256", "kid": kid, "k": encode(secret(kid)), **more} for kid, more in KEYS.items()
        ]
    }


def header(kid="now", order=(0, 1, 2), typ="safedefer+jwt", alg="HS256"):
    members = (f'"alg":"{alg}"', f'"kid":"{kid}"', f'"typ":"{typ}"')
    return "{" + ",".join(members[i] for i in order) + "}"


def claims(**changes):
    """The claims of a plain task; ``None`` leaves one out."""
    base = {
        "v": 1,
        "jti": "0123456789abcdef0123456789abcdef",
        "iat": NOW,
        "nbf": NOW,
        "exp": NOW + 31 * DAY,
        "aud": f"test:default:default:{URL}",
        "cty": "typed",
        "call": {"kind": "function", "module": TASKS, "qualname": "echo"},
        "args": [],
        "kwargs": {},
    }
    return {name: value for name, value in {**base, **changes}.items() if value is not None}


def compact(document):
    return json.dumps(document, separators=(",", ":"), ensure_ascii=True)


def mint(payload, *, kid="now", head=None, key=None, mac=None):
    """Sign whatever bytes: every part can be wrong."""
    payload = (
        payload if isinstance(payload, bytes) else (payload if isinstance(payload, str) else compact(payload)).encode()
    )
    signing_input = f"{encode((header(kid) if head is None else head).encode())}.{encode(payload)}"
    digest = hmac.digest(secret(key or kid), signing_input.encode(), "sha256") if mac is None else mac
    return f"{signing_input}.{encode(digest)}"


def pointer(stored, **changes):
    raw = stored.encode()
    blob = {"id": "fedcba9876543210fedcba9876543210", "sha256": hashlib.sha256(raw).hexdigest(), "length": len(raw)}
    return claims(**{"call": None, "args": None, "kwargs": None, "blob": blob, **changes})


def document(kind, tests, notes):
    used = sorted({flag for test in tests for flag in test["flags"]})
    assert set(used) == set(notes), set(used) ^ set(notes)
    return {
        "algorithm": "HS256",
        "schema": "urn:safedefer:schema:claims:1",
        "kind": kind,
        "numberOfTests": len(tests),
        "notes": {flag: notes[flag] for flag in used},
        "config": CONFIG,
        "keys": jwks(),
        "tests": [{"tcId": number, **test} for number, test in enumerate(tests, 1)],
    }


# --- Valid ----------------------------------------------------------------------------------------

VALID_NOTES = {
    "Kind": "one of the seven kinds of callables",
    "Value": "an argument; `python` is its repr in Python",
    "Header": "the header's three members in another order",
    "Key": "another key than the active one",
    "Json": "another spelling of the same JSON",
    "Time": "at the edge of the time window",
    "Claim": "an optional claim",
    "Moved": "a name that the policy maps to another",
    "Pointer": "an oversize task: `stored` is the token that the pointer names",
}


def valid():
    return document("valid", list(_valid()), VALID_NOTES)


def _ok(comment, flag, payload, python, **more):
    token = more.pop("token", None) or mint(payload, **{k: more.pop(k) for k in ("kid", "head") if k in more})
    text = payload if isinstance(payload, str) else compact(payload)
    return {
        "comment": comment,
        "flags": [flag],
        "token": token,
        "payload": text,
        "result": "valid",
        "python": python,
        **more,
    }


def _valid():
    for comment, call, args, python in values.KINDS:
        yield _ok(comment, "Kind", claims(call=call, args=args), python)
    for comment, tree, python in values.VALUES:
        yield _ok(comment, "Value", claims(args=[tree]), f"(({python},), {{}})")
    yield _ok("keyword arguments", "Value", claims(kwargs={"a": 1, "é": {"$tuple": []}}), "((), {'a': 1, 'é': ()})")
    yield _ok(
        "one list in two arguments and a keyword",
        "Value",
        claims(args=[[1], {"$ref": 0}], kwargs={"same": {"$ref": 0}}),
        "(([1], [1]), {'same': [1]})",
    )
    for order in itertools.permutations(range(3)):
        names = [("alg", "kid", "typ")[i] for i in order]
        yield _ok(f"header: {', '.join(names)}", "Header", claims(), "((), {})", head=header(order=order))
    yield _ok("a rotated key", "Key", claims(), "((), {})", kid="before")
    yield _ok("a key of one queue, for it", "Key", claims(aud=f"test:mail:default:{URL}"), "((), {})", kid="mail-only")
    yield _ok(
        "a narrow key, within it",
        "Key",
        claims(args=[{"$class": f"{TASKS}:Point"}]),
        f"((<class '{TASKS}.Point'>,), {{}})",
        kid="narrow",
    )
    yield _ok("a key that may sign pickles signs typed arguments", "Key", claims(), "((), {})", kid="pickles")
    reverse = dict(reversed(claims().items()))
    yield _ok("claims in another order", "Json", reverse, "((), {})")
    yield _ok("white space", "Json", json.dumps(claims(args=["a"]), indent="\t") + "\r\n ", "(('a',), {})")
    escaped = compact(claims(args=["a/b"])).replace('"args"', '"\\u0061rgs"').replace("a/b", "\\u0061\\/b")
    yield _ok("escapes that nobody needs", "Json", escaped, "(('a/b',), {})")
    yield _ok(
        "UTF-8 that is not escaped", "Json", json.dumps(claims(args=["é€😀"]), ensure_ascii=False), "(('é€😀',), {})"
    )
    yield _ok(
        "numbers in other spellings",
        "Json",
        compact(claims()).replace('"args":[]', '"args":[1E2,-0,-0.0,1e-400]'),
        "((100.0, 0, -0.0, 0.0), {})",
    )
    yield _ok("nbf ten seconds ahead", "Time", claims(nbf=NOW + 10), "((), {})")
    yield _ok("iat ten seconds ahead", "Time", claims(iat=NOW + 10), "((), {})")
    yield _ok("exp ten seconds past", "Time", claims(nbf=NOW - 20, exp=NOW - 10), "((), {})")
    yield _ok("92 days", "Time", claims(exp=NOW + 92 * DAY), "((), {})")
    yield _ok("exp is nbf", "Time", claims(exp=NOW), "((), {})")
    yield _ok("an old iat", "Time", claims(iat=0), "((), {})")
    yield _ok("a name", "Claim", claims(name="a" * 500), "((), {})")
    yield _ok("the dead letter that is run again", "Claim", claims(retry_of="f" * 64), "((), {})")
    root = {"retry_of": "f" * 64, "root": {"id": "e" * 16, "kid": "before"}}
    yield _ok("a re-run, and the first task of its chain", "Claim", claims(**root), "((), {})")
    yield _ok(
        "a re-run within the queues of the first task's key",
        "Claim",
        claims(aud=f"test:mail:default:{URL}", retry_of="f" * 16, root={"id": "f" * 16, "kid": "mail-only"}),
        "((), {})",
    )
    yield _ok(
        "a re-run within the patterns of the first task's key",
        "Claim",
        claims(args=[{"$class": f"{TASKS}:Point"}], retry_of="f" * 16, root={"id": "f" * 16, "kid": "narrow"}),
        f"((<class '{TASKS}.Point'>,), {{}})",
    )
    retry = {
        "min_backoff_seconds": 0.5,
        "max_backoff_seconds": 3600,
        "task_age_limit": 2**31 - 1,
        "max_doublings": 0,
        "task_retry_limit": 2**31 - 1,
    }
    yield _ok("all retry options", "Claim", claims(retry=retry), "((), {})")
    yield _ok("one retry option", "Claim", claims(retry={"task_retry_limit": 0}), "((), {})")
    yield _ok("retry options that give none", "Claim", claims(retry={}), "((), {})")
    for seconds in (1, 1.5, 86_400):
        yield _ok(f"a deadline of {seconds} seconds", "Claim", claims(deadline=seconds), "((), {})")
    yield _ok("headers", "Claim", claims(headers={"X-Tenant": "7 \t~", "if-none-match": ""}), "((), {})")
    yield _ok("a trace", "Claim", claims(trace="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"), "((), {})")
    yield _ok("the shortest id", "Claim", claims(jti="A-Z_a-z_0123456-"), "((), {})")
    yield _ok(
        "a function that has moved",
        "Moved",
        claims(call={"kind": "function", "module": TASKS, "qualname": "former"}),
        "((), {})",
    )
    yield _ok(
        "a class inside the arguments that has moved",
        "Moved",
        claims(args=[{"$namedtuple": [f"{TASKS}:OldPoint", 1, 2]}]),
        "((Point(x=1, y=2),), {})",
    )
    stored = mint(claims(args=["x" * 100]))
    yield _ok("a pointer and its stored token", "Pointer", pointer(stored), f"(({'x' * 100!r},), {{}})", stored=stored)
    shared = {
        "name": "big",
        "headers": {"X-Tenant": "7"},
        "retry": {"task_retry_limit": 1},
        "deadline": 60,
        "retry_of": "f" * 16,
        "root": {"id": "e" * 16, "kid": "now"},
        "trace": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }
    whole = mint(claims(args=[2], **shared))
    yield _ok(
        "a pointer with all claims of its stored token", "Pointer", pointer(whole, **shared), "((2,), {})", stored=whole
    )
    other = mint(claims(name="big", args=[1]), kid="before")
    yield _ok("a stored token of another key", "Pointer", pointer(other, name="big"), "((1,), {})", stored=other)


# --- Invalid --------------------------------------------------------------------------------------

INVALID_NOTES = {
    "Framing": "not three canonical base64url segments",
    "Header": "a header that no key of the ring could have written",
    "Signature": "a MAC of something else",
    "Revoked": "a key that is revoked",
    "Json": "a payload that is not strict JSON",
    "Claims": "claims that are missing, unknown, null, of another type, or out of range",
    "Regex": "a text that a pattern refuses in every engine, if it is anchored at both ends of the text",
    "Audience": "a token for somebody else",
    "Time": "too early or too late",
    "Capability": "what the key that signed may not name, or that of the first task of a chain of re-runs",
    "Root": "a re-run whose chain began with a key that is no longer believed",
    "Policy": "what the policy does not admit",
    "Callable": "a name that does not lead back to a callable of that kind",
    "Value": "arguments that do not decode",
    "Pointer": "a stored token that is not the one that was pointed to",
}


def invalid():
    return document("invalid", list(_invalid()), INVALID_NOTES)


def _no(comment, flag, slug, token, **more):
    return {"comment": comment, "flags": [flag], "token": token, "result": "invalid", "slug": slug, **more}


def _invalid():
    yield from _framing()
    yield from _headers()
    yield from _signatures()
    for comment, payload in invalid_claims.JSON.items():
        yield _no(comment, "Json", "invalid-claims", mint(payload(compact(claims())) if callable(payload) else payload))
    for comment, changes in invalid_claims.changes(NOW).items():
        yield _no(comment, "Claims", "invalid-claims", mint(_changed(changes)))
    for comment, changes in invalid_claims.REGEX.items():
        yield _no(comment, "Regex", "invalid-claims", mint(_changed(changes)))
    yield from _audiences()
    yield from _times()
    yield from _roots()
    for comment, slug, kid, changes in invalid_arguments.NAMES:
        flag = {"capability-exceeded": "Capability", "policy-violation": "Policy"}.get(slug, "Callable")
        yield _no(comment, flag, slug, mint(claims(**changes), kid=kid))
    for comment, tree in invalid_arguments.VALUES.items():
        yield _no(comment, "Value", "invalid-arguments", mint(claims(args=[tree])))
    yield from _pointers()


def _changed(changes):
    """Claims with changes by dotted name; the string ``<absent>`` removes a member."""
    document = json.loads(compact(claims()))
    for name, value in changes.items():
        *path, last = name.split(".")
        place = document
        for step in path:
            place = place[step]
        if value == "<absent>":
            del place[last]
        else:
            place[last] = value
    return document


def _framing():
    good = mint(claims())
    head, payload, mac = good.split(".")
    odd = mint(claims(args=["ab"]))  # a payload whose length leaves unused bits
    assert len(odd.split(".")[1]) % 4 in (2, 3)
    cases = {
        "nothing": "",
        "one segment": head,
        "two segments": f"{head}.{payload}",
        "an empty MAC": f"{head}.{payload}.",
        "four segments": f"{good}.",
        "five segments, as an encrypted token": f"{good}.{mac}.{mac}",
        "a dot in front": f".{good}",
        "an empty payload": f"{head}..{mac}",
        "a space in front": f" {good}",
        "a newline behind": f"{good}\n",
        "a carriage return and newline behind": f"{good}\r\n",
        "a zero behind": f"{good}\0",
        "a zero within": f"{head}\0.{payload}.{mac}",
        "a byte order mark": f"\ufeff{good}",
        "quoted": f'"{good}"',
        "a scheme": f"Bearer {good}",
        "padding of the MAC": f"{good}=",
        "padding of the payload": odd.replace(".", ".", 1).replace(f".{odd.split('.')[1]}.", f".{odd.split('.')[1]}=."),
        "padding of the header": f"{head}=.{payload}.{mac}",
        "plus for minus": _last(good, mac, mac[:5] + "+" + mac[6:]),
        "slash for underscore": _last(good, mac, mac[:5] + "/" + mac[6:]),
        "a letter beyond ASCII": _last(good, mac, mac[:5] + "é" + mac[6:]),
        "a full-width letter": _last(good, mac, mac[:5] + "\uff21" + mac[6:]),
        "a newline within the MAC": _last(good, mac, mac[:5] + "\n" + mac[6:]),
        "a MAC that is a character short": good[:-1],
        "a MAC that is a character long": f"{good}A",
        "a MAC of half the length": _last(good, mac, mac[:21]),
        "a MAC of twice the length": f"{good}{mac}",
        "unused bits in the MAC": _last(good, mac, mac[:-1] + _stray(mac[-1])),
        "all unused bits in the MAC": _last(good, mac, mac[:-1] + _stray(mac[-1], 3)),
        "unused bits in the payload": odd.replace(
            odd.split(".")[1], odd.split(".")[1][:-1] + _stray(odd.split(".")[1][-1])
        ),
        "a payload of impossible length": f"{head}.{'A' * 5}.{mac}",
        "a header of impossible length": f"{'A' * 5}.{payload}.{mac}",
        "a header that is too long": f"{'A' * 516}.{payload}.{mac}",
        "flattened JSON serialization": compact({"protected": head, "payload": payload, "signature": mac}),
        "general JSON serialization": compact(
            {"payload": payload, "signatures": [{"protected": head, "signature": mac}]}
        ),
        "commas for dots": good.replace(".", ","),
        "URL-encoded": good.replace(".", "%2E"),
        "a pickle": "\x80\x04K*.",
    }
    for comment, token in cases.items():
        assert token != good, comment
        yield _no(comment, "Framing", "malformed-token", token)


def _last(token, old, new):
    return token[: -len(old)] + new


_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def _stray(character, bits=1):
    return _ALPHABET[_ALPHABET.index(character) | bits]


def _headers():
    plain = header()
    cases = {
        "no header": "",
        "alg: none": header(alg="none"),
        "alg: None": header(alg="None"),
        "alg: hs256": header(alg="hs256"),
        "alg: HS384": header(alg="HS384"),
        "alg: HS512": header(alg="HS512"),
        "alg: RS256": header(alg="RS256"),
        "alg: ES256": header(alg="ES256"),
        "alg: PBES2-HS256+A128KW": header(alg="PBES2-HS256+A128KW"),
        "alg: null": plain.replace('"HS256"', "null"),
        "alg: a list": plain.replace('"HS256"', '["HS256"]'),
        "no alg": plain.replace('"alg":"HS256",', ""),
        "typ: JWT": header(typ="JWT"),
        "typ: SAFEDEFER+JWT": header(typ="SAFEDEFER+JWT"),
        "typ: application/safedefer+jwt": header(typ="application/safedefer+jwt"),
        "no typ": plain.replace(',"typ":"safedefer+jwt"', ""),
        "an unknown kid": header("nobody"),
        "kid in capitals": header("NOW"),
        "kid: a newline behind": header("now\\n"),
        "kid: a raw newline behind": header("now\n"),
        "kid: a space in front": header(" now"),
        "kid: a path": header("../../../../dev/null"),
        "kid: SQL": header("' OR 1=1 --"),
        "kid: a shell": header("|sleep 5"),
        "kid: a number": plain.replace('"now"', "0"),
        "kid: null": plain.replace('"now"', "null"),
        "kid: a list": plain.replace('"now"', '["now"]'),
        "kid: empty": header(""),
        "kid: escaped": header("n\\u006fw"),
        "no kid": plain.replace('"kid":"now",', ""),
        "the decoy's kid": header("decoy"),
        "two kids": plain.replace('"kid":"now"', '"kid":"before","kid":"now"'),
        "two algs": plain.replace('"alg":"HS256"', '"alg":"none","alg":"HS256"'),
        "an escaped second alg": plain.replace('"alg":"HS256"', '"alg":"HS256","\\u0061lg":"none"'),
        "crit": plain[:-1] + ',"crit":["exp"],"exp":0}',
        "crit: empty": plain[:-1] + ',"crit":[]}',
        "b64: false": plain[:-1] + ',"b64":false,"crit":["b64"]}',
        "zip": plain[:-1] + ',"zip":"DEF"}',
        "cty": plain[:-1] + ',"cty":"JWT"}',
        "jwk": plain[:-1] + f',"jwk":{{"kty":"oct","k":"{encode(secret("x"))}"}}}}',
        "jku": plain[:-1] + ',"jku":"https://keys.example/jwks"}',
        "x5u": plain[:-1] + ',"x5u":"https://keys.example/x"}',
        "x5c": plain[:-1] + ',"x5c":["AA=="]}',
        "an unknown member": plain[:-1] + ',"x":1}',
        "white space": plain.replace(":", ": "),
        "white space behind": plain + " ",
        "an empty object": "{}",
        "an empty list": "[]",
        "a list of the object": f"[{plain}]",
        "not JSON": "safedefer",
        "escaped member name": plain.replace('"alg"', '"\\u0061lg"'),
    }
    for comment, head in cases.items():
        yield _no(f"header: {comment}", "Header", "unknown-key", mint(claims(), head=head))


def _signatures():
    good = mint(claims())
    head, payload, mac = good.split(".")
    raw = hmac.digest(secret("now"), f"{head}.{payload}".encode(), "sha256")
    text = compact(claims()).encode()

    def forged(comment, mac, **more):
        return _no(comment, "Signature", "bad-signature", mint(text, mac=mac, **more))

    yield forged("first bit", bytes([raw[0] ^ 128]) + raw[1:])
    yield forged("last bit", raw[:-1] + bytes([raw[-1] ^ 1]))
    yield forged("middle byte", raw[:16] + bytes([raw[16] ^ 255]) + raw[17:])
    yield forged("zeros", bytes(32))
    yield forged("ones", b"\xff" * 32)
    yield forged("reversed", raw[::-1])
    yield forged("of the payload without the header", hmac.digest(secret("now"), payload.encode(), "sha256"))
    yield forged("of the decoded bytes", hmac.digest(secret("now"), header().encode() + b"." + text, "sha256"))
    yield forged("of the header alone", hmac.digest(secret("now"), head.encode(), "sha256"))
    yield forged("of nothing", hmac.digest(secret("now"), b"", "sha256"))
    yield forged("SHA-512, cut", hmac.digest(secret("now"), f"{head}.{payload}".encode(), "sha512")[:32])
    yield forged("SHA-256 without a key", hashlib.sha256(f"{head}.{payload}".encode()).digest())
    yield forged("an empty key", hmac.digest(b"", f"{head}.{payload}".encode(), "sha256"))
    yield forged("the kid as key", hmac.digest(b"now", f"{head}.{payload}".encode(), "sha256"))
    yield forged(
        "the secret's text as key", hmac.digest(encode(secret("now")).encode(), f"{head}.{payload}".encode(), "sha256")
    )
    yield _no("another key of the ring", "Signature", "bad-signature", mint(text, key="before"))
    yield _no("another key under a rotated kid", "Signature", "bad-signature", mint(text, kid="before", key="now"))
    reordered = encode(header(order=(2, 1, 0)).encode())
    yield _no("the header reordered after signing", "Signature", "bad-signature", f"{reordered}.{payload}.{mac}")
    changed = encode(compact(claims(args=[1])).encode())
    yield _no("the payload changed after signing", "Signature", "bad-signature", f"{head}.{changed}.{mac}")
    case = ("A" if payload[8] != "A" else "B").join((payload[:8], payload[9:]))
    yield _no("one character of the payload changed", "Signature", "bad-signature", f"{head}.{case}.{mac}")
    yield _no(
        "payload and MAC swapped between tokens",
        "Signature",
        "bad-signature",
        f"{head}.{payload}.{mint(claims(args=[2])).split('.')[2]}",
    )
    yield _no("a wrong MAC under a revoked kid", "Signature", "bad-signature", mint(text, kid="stolen", mac=bytes(32)))
    yield _no("a revoked key", "Revoked", "revoked-key", mint(text, kid="stolen"))
    yield _no("a revoked key, back-dated", "Revoked", "revoked-key", mint(claims(iat=0), kid="stolen"))
    yield _no("a revoked key, a payload that is no JSON", "Revoked", "revoked-key", mint(b"\x80", kid="stolen"))


def _audiences():
    cases = {
        "another environment": "prod:default:default:" + URL,
        "the environment in capitals": "Test:default:default:" + URL,
        "another queue": "test:other:default:" + URL,
        "another target": "test:default:other:" + URL,
        "another URL": "test:default:default:/admin",
        "a URL below": f"test:default:default:{URL}/x",
        "a URL above": "test:default:default:/_ah/queue",
        "a slash behind": f"test:default:default:{URL}/",
        "a slash doubled": "test:default:default:/_ah//queue/deferred",
        "a dot segment": "test:default:default:/_ah/queue/./deferred",
        "an escaped letter": "test:default:default:/_ah/queue/%64eferred",
        "a URL in capitals": f"test:default:default:{URL.upper()}",
    }
    for comment, aud in cases.items():
        yield _no(comment, "Audience", "wrong-audience", mint(claims(aud=aud)))
    yield _no("a queue header that disagrees", "Audience", "wrong-audience", mint(claims()), queue="mail")
    yield _no("a queue header in capitals", "Audience", "wrong-audience", mint(claims()), queue="Default")
    yield _no("an empty queue header", "Audience", "wrong-audience", mint(claims()), queue="")
    yield _no("called on another URL", "Audience", "wrong-audience", mint(claims()), url="/elsewhere")
    yield _no("called on the URL with a query", "Audience", "wrong-audience", mint(claims()), url=f"{URL}?x=1")


def _times():
    yield _no("nbf eleven seconds ahead", "Time", "not-yet-valid", mint(claims(nbf=NOW + 11)))
    yield _no("nbf a month ahead", "Time", "not-yet-valid", mint(claims(nbf=NOW + 30 * DAY, exp=NOW + 60 * DAY)))
    yield _no("iat eleven seconds ahead", "Time", "not-yet-valid", mint(claims(iat=NOW + 11)))
    yield _no("exp eleven seconds past", "Time", "expired-task", mint(claims(nbf=NOW - 20, exp=NOW - 11)))
    yield _no("exp in 1970", "Time", "expired-task", mint(claims(iat=0, nbf=0, exp=0)))


def _roots():
    def rerun(comment, slug, kid, root, **more):
        flag = "Capability" if slug == "capability-exceeded" else "Root"
        changed = claims(retry_of="f" * 16, root={"id": "f" * 16, "kid": root}, **more)
        return _no(comment, flag, slug, mint(changed, kid=kid))

    call = {"kind": "function", "module": TASKS, "qualname": "other"}
    yield rerun("a re-run whose first key is revoked", "revoked-key", "now", "stolen")
    yield rerun("a re-run whose first key is unknown", "unknown-key", "now", "lost")
    yield rerun("a re-run in a queue that the first key may not name", "capability-exceeded", "now", "mail-only")
    yield rerun(
        "a re-run of a callable that the first key may not name", "capability-exceeded", "now", "narrow", call=call
    )
    yield rerun(
        "a re-run with a class that the first key may not name",
        "capability-exceeded",
        "now",
        "narrow",
        args=[{"$class": f"{TASKS}:Order"}],
    )
    yield rerun(
        "a re-run signed by a key of one queue",
        "capability-exceeded",
        "mail-only",
        "mail-only",
        aud=f"test:mail:default:{URL}",
    )
    yield rerun("a re-run signed by a key of some patterns", "capability-exceeded", "narrow", "narrow")


def _pointers():
    stored = mint(claims(args=["x"]))

    def points(comment, slug, claims, stored, **more):
        return _no(comment, "Pointer", slug, mint(claims, **more), stored=stored)

    yield points("a stored token of another length", "invalid-claims", pointer(stored), stored + "A")
    yield points("another stored token of the same length", "invalid-claims", pointer(stored), mint(claims(args=["y"])))
    twice = mint(pointer(stored))
    yield points("a pointer to a pointer", "invalid-claims", pointer(twice), twice)
    others = {
        "jti": "f" * 32,
        "aud": f"test:mail:default:{URL}",
        "nbf": NOW - 1,
        "exp": NOW + DAY,
        "name": "other",
        "headers": {"X-A": "1"},
        "retry": {},
        "deadline": 1,
        "retry_of": "f" * 16,
        "trace": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }
    for name, value in others.items():
        yield points(
            f"pointer and stored token of another {name}", "invalid-claims", pointer(stored, **{name: value}), stored
        )
    rerun = {"retry_of": "f" * 16, "root": {"id": "f" * 16, "kid": "now"}}
    again = mint(claims(**rerun))
    yield points(
        "pointer and stored token of another root",
        "invalid-claims",
        pointer(again, **rerun | {"root": {"id": "e" * 16, "kid": "now"}}),
        again,
    )
    forged = mint(claims(), mac=bytes(32))
    yield points("a stored token with a forged MAC", "bad-signature", pointer(forged), forged)
    revoked = mint(claims(), kid="stolen")
    yield points("a stored token of a revoked key", "revoked-key", pointer(revoked), revoked)
    away = mint(claims(aud=f"prod:default:default:{URL}"))
    yield points("a stored token for another environment", "wrong-audience", pointer(away), away)
    junk = "x" * 100
    yield points("a stored token that is none", "malformed-token", pointer(junk), junk)
    narrow = mint(claims(call={"kind": "function", "module": TASKS, "qualname": "other"}), kid="narrow")
    yield points("a stored token of a key that may not", "capability-exceeded", pointer(narrow), narrow)
