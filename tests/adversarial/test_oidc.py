"""Who may post a task from Cloud Tasks: forged, foreign, old and malformed OIDC tokens, and keys that cannot be had."""

import base64
import hashlib
import hmac
import json
import threading

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from safedefer.errors import QueueUnavailable
from safedefer.queues.cloudtasks.emulator.tokens import TokenSigner
from safedefer.queues.cloudtasks.oidc import PublicKeys, SenderCheck, read_keys

NOW = 1_800_000_000
EMAIL = "tasks@p-1.iam.gserviceaccount.com"
AUDIENCE = "https://tasks.example.com"
ISSUER = "https://accounts.google.com"
GOOGLE = TokenSigner()
KID = GOOGLE.jwks()["keys"][0]["kid"]
CLAIMS = {
    "iss": ISSUER, "aud": AUDIENCE, "email": EMAIL, "email_verified": True, "iat": NOW - 60, "exp": NOW + 3540, "sub": "1",
}  # fmt: skip


class Clock:
    now = float(NOW)

    def __call__(self):
        return self.now


class Served:
    """A key server that counts requests."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.fetches = 0

    def __call__(self):
        self.fetches += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def check(served=None, clock=None):
    clock = clock or Clock()
    keys = PublicKeys(served or Served(GOOGLE.jwks()), clock)
    return SenderCheck(keys, issuers={ISSUER}, audiences={AUDIENCE}, emails={EMAIL}, clock=clock)


def signed(claims=CLAIMS, *, by=GOOGLE, header=(), algorithm="RS256", **changes):
    claims = {**claims, **changes} if isinstance(claims, dict) else claims
    headers = {"kid": KID, **dict(header)}
    return jwt.PyJWS().encode(json.dumps(claims).encode(), by._key, algorithm=algorithm, headers=headers)


def segment(value):
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


def test_a_token_of_ours_is_taken():
    assert check().allows(bearer(signed()))
    assert check().allows({"authorization": f"bearer {signed()}"})
    assert check().allows(CIMultiDict(bearer(signed())))


@pytest.mark.parametrize("changes", [
    {"aud": "https://other.example.com"}, {"aud": AUDIENCE + "/"}, {"aud": [AUDIENCE]}, {"aud": {AUDIENCE: 1}}, {"aud": None},
    {"iss": "https://accounts.example.com"}, {"iss": [ISSUER]}, {"iss": ""},
    {"email": "stranger@p-1.iam.gserviceaccount.com"}, {"email": EMAIL.upper()}, {"email": [EMAIL]}, {"email": None},
    {"email_verified": "true"}, {"email_verified": 1}, {"email_verified": False}, {"email_verified": None},
    {"email_verified": [True]},
    {"exp": NOW - 10}, {"exp": str(NOW + 60)}, {"exp": NOW + 60.0}, {"exp": True}, {"exp": None}, {"exp": [NOW + 60]},
    {"exp": {"a": 1}},
    {"iat": NOW + 11}, {"iat": str(NOW)}, {"iat": None}, {"iat": {}}, {"iat": False}, {"iat": -1e400},
    {"nbf": NOW + 11}, {"nbf": "0"}, {"nbf": []}, {"nbf": None},
], ids=str)  # fmt: skip
def test_a_token_with_another_claim_is_refused(changes):
    assert not check().allows(bearer(signed(**changes)))


@pytest.mark.parametrize("missing", ["iss", "aud", "email", "email_verified", "iat", "exp"])
def test_a_token_without_a_claim_is_refused(missing):
    assert not check().allows(bearer(signed({name: value for name, value in CLAIMS.items() if name != missing})))


@pytest.mark.parametrize("claims", [[], "text", 1, None, [CLAIMS], {}], ids=str)
def test_a_token_whose_payload_is_no_claims_is_refused(claims):
    assert not check().allows(bearer(signed(claims)))


def test_clocks_may_differ_by_ten_seconds():
    assert check().allows(bearer(signed(exp=NOW - 9)))
    assert check().allows(bearer(signed(iat=NOW + 10)))
    assert check().allows(bearer(signed(nbf=NOW + 10)))


def test_alg_none_and_no_signature_are_refused():
    payload = segment(CLAIMS)
    for alg in ("none", "None", "NONE", "", None, ["RS256"], {"RS256": 1}, 1):
        header = segment({"alg": alg, "kid": KID, "typ": "JWT"})
        for signature in ("", "SIGNATURE_REMOVED_BY_GOOGLE"):
            assert not check().allows(bearer(f"{header}.{payload}.{signature}"))
    front = signed().rpartition(".")[0]
    assert not check().allows(bearer(f"{front}.SIGNATURE_REMOVED_BY_GOOGLE"))
    assert not check().allows(bearer(f"{front}."))


@pytest.mark.parametrize("alg", ["HS256", "RS256"])
def test_a_mac_with_the_public_key_is_refused(alg):
    public = GOOGLE._key.public_key()
    secrets = [
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.PEM, PublicFormat.PKCS1),
        json.dumps(GOOGLE.jwks()["keys"][0]).encode(),
        GOOGLE.jwks()["keys"][0]["n"].encode(),
    ]
    front = f"{segment({'alg': alg, 'kid': KID})}.{segment(CLAIMS)}"
    for secret in secrets:
        mac = hmac.new(secret, front.encode(), hashlib.sha256).digest()
        assert not check().allows(bearer(f"{front}.{segment(mac)}"))


@pytest.mark.parametrize("algorithm", ["RS384", "RS512", "PS256"])
def test_other_algorithms_of_the_right_key_are_refused(algorithm):
    assert not check().allows(bearer(signed(algorithm=algorithm)))


def test_a_token_of_another_algorithm_causes_no_fetch():
    served = Served(GOOGLE.jwks())
    for alg in ("none", "HS256", "PS256"):
        front = f"{segment({'alg': alg, 'kid': KID})}.{segment(CLAIMS)}"
        assert not check(served).allows(bearer(f"{front}.e30"))
    assert served.fetches == 0


def test_a_token_signed_by_a_stranger_is_refused_whatever_key_it_names():
    stranger = TokenSigner()
    foreign = stranger.jwks()["keys"][0]
    assert not check().allows(bearer(signed(by=stranger)))
    for header in (
        {"kid": foreign["kid"]}, {"jwk": foreign}, {"jku": "http://127.0.0.1:1/keys"}, {"x5u": "http://127.0.0.1:1/x"},
        {"kid": "../../dev/null"}, {"kid": ""},
    ):  # fmt: skip
        assert not check().allows(bearer(signed(by=stranger, header=header)))


@pytest.mark.parametrize("kid", [None, 1, True, [KID], {KID: 1}, KID[:-1], KID + "\0", "k" * 5000], ids=repr)
def test_a_key_id_that_is_none_of_the_signers_is_refused(kid):
    front = f"{segment({'alg': 'RS256', 'kid': kid})}.{segment(CLAIMS)}"
    assert not check().allows(bearer(f"{front}.{signed().rpartition('.')[2]}"))


def test_a_changed_payload_is_refused():
    header, _, signature = signed().split(".")
    assert not check().allows(bearer(f"{header}.{segment({**CLAIMS, 'sub': '2'})}.{signature}"))


@pytest.mark.parametrize("headers", [
    {}, {"Authorization": ""}, {"Authorization": "Bearer"}, {"Authorization": "Bearer "}, {"Authorization": "Basic eDp5"},
    bearer("a.b"), bearer("a.b.c.d"), bearer("....."), bearer("\ud800.\udfff.x"), bearer("é.é.é"), bearer("\0"),
    bearer(segment(b"[" * 3000) + ".e30.e30"), bearer("x" * 9000),
    {"Authorization": signed()}, {"X-Serverless-Authorization": f"Bearer {signed()}"},
], ids=lambda headers: str(headers)[:40].encode("ascii", "replace").decode())  # fmt: skip
def test_malformed_headers_are_refused_and_raise_nothing(headers):
    assert check().allows(headers) is False


def test_two_tokens_and_joined_values_are_refused():
    both = CIMultiDict([("Authorization", f"Bearer {signed()}"), ("authorization", f"Bearer {signed()}")])
    assert not check().allows(both)
    assert not check().allows({"Authorization": f"Bearer {signed()}, Bearer {signed()}"})


def test_a_huge_token_is_refused_before_it_is_read():
    served = Served(GOOGLE.jwks())
    assert not check(served).allows(bearer(signed(filler="x" * 8_192)))
    assert served.fetches == 0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ONE = check()


@settings(max_examples=60)
@given(name=st.sampled_from(["iss", "aud", "email", "email_verified", "exp", "iat", "nbf"]), value=json_values)
def test_whatever_a_claim_holds_is_an_answer_and_no_error(name, value):
    allowed = ONE.allows(bearer(signed(**{name: value})))
    right = name in CLAIMS and CLAIMS[name] == value and type(value) is type(CLAIMS.get(name))
    assert allowed is (right or (name in {"iat", "nbf"} and type(value) is int and value <= NOW + 10)
                       or (name == "exp" and type(value) is int and value > NOW - 10))  # fmt: skip


@settings(max_examples=40)
@given(header=st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "b64", "zip", "jwk"]), json_values))
def test_whatever_a_header_holds_is_an_answer_and_no_error(header):
    token = f"{segment(header)}.{segment(CLAIMS)}.{signed().rpartition('.')[2]}"
    assert ONE.allows(bearer(token)) is False


# --- The signer's keys ------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_looked_for_once_a_minute_at_most():
    served, clock = Served(GOOGLE.jwks()), Clock()
    one = check(served, clock)
    for number in range(50):
        assert not one.allows(bearer(signed(header={"kid": f"k{number}"})))
    assert served.fetches == 1
    clock.now += 59.9
    assert not one.allows(bearer(signed(header={"kid": "other"})))
    assert served.fetches == 1
    clock.now += 0.2
    assert not one.allows(bearer(signed(header={"kid": "other"})))
    assert served.fetches == 2


def test_a_new_key_is_fetched_when_it_is_seen():
    new = TokenSigner()
    clock = Clock()
    one = check(Served(GOOGLE.jwks(), {"keys": GOOGLE.jwks()["keys"] + new.jwks()["keys"]}), clock)
    assert one.allows(bearer(signed()))
    clock.now += 60
    assert one.allows(bearer(signed(by=new, header={"kid": new.jwks()["keys"][0]["kid"]})))


def test_without_keys_the_answer_is_not_known_and_is_asked_for_once_a_minute():
    served, clock = Served(OSError("no route"), OSError("no route"), GOOGLE.jwks()), Clock()
    one = check(served, clock)
    for _ in range(5):
        with pytest.raises(QueueUnavailable):
            one.allows(bearer(signed()))
    assert served.fetches == 1
    clock.now += 60
    with pytest.raises(QueueUnavailable):
        one.allows(bearer(signed()))
    clock.now += 60
    assert one.allows(bearer(signed()))
    assert served.fetches == 3


def test_known_keys_verify_while_the_server_is_away_and_for_a_day_at_most():
    served, clock = Served(GOOGLE.jwks(), OSError("no route")), Clock()
    one = check(served, clock)
    assert one.allows(bearer(signed()))
    clock.now += 86_400
    assert one.allows(bearer(signed(iat=NOW, exp=NOW + 90_000)))
    with pytest.raises(QueueUnavailable):
        one.allows(bearer(signed(header={"kid": "new"})))
    clock.now += 60
    with pytest.raises(QueueUnavailable):
        one.allows(bearer(signed(iat=NOW, exp=NOW + 90_000)))


def test_a_key_that_was_withdrawn_verifies_no_more():
    served, clock = Served(GOOGLE.jwks(), {"keys": []}), Clock()
    one = check(served, clock)
    assert one.allows(bearer(signed()))
    clock.now += 6 * 3600 + 1
    assert not one.allows(bearer(signed(iat=NOW, exp=NOW + 90_000)))


def test_many_threads_fetch_once():
    started, served = threading.Barrier(8), Served(GOOGLE.jwks())
    one, results = check(served), []

    def ask():
        started.wait(60)
        results.append(one.allows(bearer(signed())))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (results, served.fetches) == ([True] * 8, 1)


@pytest.mark.parametrize("document", [
    None, [], "x", {}, {"keys": None}, {"keys": {}}, {"keys": GOOGLE.jwks()["keys"] * 2}, {"keys": [{}] * 65},
    {"keys": [{"kty": "RSA", "kid": "a", "n": 1, "e": "AQAB"}]},
], ids=lambda document: str(document)[:30])  # fmt: skip
def test_a_document_that_is_no_key_set_gives_no_keys(document):
    with pytest.raises(QueueUnavailable):
        check(Served(document)).allows(bearer(signed()))


def test_keys_for_other_uses_and_short_ones_are_left_out():
    jwk = GOOGLE.jwks()["keys"][0]
    short = rsa.generate_private_key(public_exponent=65_537, key_size=1_024).public_key()
    small = {**json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(short)), "kid": "short"}
    oct_key = {"kty": "oct", "k": segment(b"x" * 32), "kid": "oct"}
    others = [
        {**jwk, "kid": "enc", "use": "enc"},
        {**jwk, "kid": "ps", "alg": "PS256"},
        {**jwk, "kid": 1},
        small,
        oct_key,
        7,
    ]
    assert list(read_keys({"keys": [*others, jwk]})) == [KID]


def test_keys_come_over_http_without_redirects_and_in_bounds(tmp_path):
    import http.server

    import requests

    from safedefer.queues.cloudtasks.oidc import fetch_keys

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            statuses = {"/keys": 200, "/long": 200, "/moved": 302, "/gone": 404}
            self.send_response(statuses[self.path])
            self.send_header("Location", "/keys")
            self.end_headers()
            body = json.dumps(GOOGLE.jwks()).encode()
            self.wfile.write(b" " * 300_000 + body if self.path == "/long" else body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert fetch_keys(f"{url}/keys") == GOOGLE.jwks()
        for path in ("/long", "/moved", "/gone"):
            with pytest.raises(ValueError):
                fetch_keys(f"{url}{path}")
        server.shutdown()
    with pytest.raises(requests.RequestException):
        fetch_keys(f"{url}/keys")
