"""Key files: no secret of a refused one shows, no limit of a key is lost to a typo, and nobody else may change it."""

import base64
import json
import os
import secrets
import traceback

import pytest

from safedefer import settings
from safedefer.app import App
from safedefer.cli import processes
from safedefer.errors import ConfigurationError, WeakKey
from safedefer.keys import Key, Keyring
from safedefer.policy import Policy
from safedefer.queues.postgres.queue import PostgresQueue
from safedefer.queues.sqlite.queue import SQLiteQueue
from safedefer.settings import Settings
from tests import sample_tasks

SECRETS = [bytes(range(200 + n, 232 + n)) for n in (0, 10, 20)]
TEXTS = [base64.urlsafe_b64encode(secret).rstrip(b"=").decode() for secret in SECRETS]


def jwk(index=0, **changes):
    return {"kty": "oct", "kid": f"k{index}", "k": TEXTS[index], "safedefer_state": "active"} | changes


def jwks(*keys, **more):
    return json.dumps({"keys": list(keys), **more})


def chained(error):
    """Return an exception and all that it was raised from or during, suppressed ones too."""
    found, pending = [], [error]
    while pending:
        each = pending.pop()
        if each is not None and each not in found:
            found.append(each)
            pending += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]
    return found


def shown_by(error, *, but):
    """Return the text of every exception of a chain, and of every local variable of its frames but the test's own (None: but this file's)."""
    texts = []
    for each in chained(error):
        texts += [str(each), repr(each), repr(vars(each)), repr(each.args)]
        for frame, _ in traceback.walk_tb(each.__traceback__):
            if frame.f_code is not but and (but is not None or frame.f_code.co_filename != __file__):
                texts += [f"{name}={value!r}" for name, value in frame.f_locals.items()]
    return "\n".join(texts)


def assert_hidden(error, but):
    text = shown_by(error, but=but)
    for secret, spelled in zip(SECRETS, TEXTS, strict=True):
        for form in (spelled, spelled[4:20], repr(secret)[2:-1], repr(secret[8:16])[2:-1], secret.hex()):
            assert form not in text


REFUSED = {
    "a weak one among good ones": jwks(jwk(), jwk(1, safedefer_state="revoked"), jwk(2, k="QUJD")),
    "two active": jwks(jwk(), jwk(1), jwk(2)),
    "none active": jwks(jwk(safedefer_state="revoked"), jwk(1, safedefer_state="revoked")),
    "the same kid": jwks(jwk(), jwk(1, kid="k0", safedefer_state="revoked")),
    "the same secret": jwks(jwk(), jwk(1, k=TEXTS[0], safedefer_state="revoked")),
    "no base64url": jwks(jwk(), jwk(1, k=TEXTS[1] + "=="), jwk(2)),
    "no ASCII": jwks(jwk(), jwk(1, k=TEXTS[1] + "é"), jwk(2)),
    "half a character": jwks(jwk(), jwk(1, k=TEXTS[1] + "\udc80"), jwk(2)),
    "an impossible queue": jwks(jwk(), jwk(1, safedefer_queues=["a b"])),
    "an unknown state": jwks(jwk(), jwk(1, safedefer_state=TEXTS[2])),
    "another type": jwks(jwk(), jwk(1, k=[TEXTS[1]])),
    "cut": jwks(jwk(), jwk(1))[:-9],
    "a misspelled member": jwks(jwk(), jwk(1, safedefer_queue=["mail"])),
    "an own error": jwks(jwk(), jwk(1, kid="a" * 65)),
}


@pytest.mark.parametrize("label", REFUSED)
def test_no_frame_of_a_refused_key_file_holds_a_secret(label, tmp_path, monkeypatch):
    path = tmp_path / "keys.json"
    path.write_text(REFUSED[label])
    path.chmod(0o600)
    settings = Settings(keys_file=path)
    with pytest.raises(ConfigurationError) as caught:
        settings.keyring()
    assert_hidden(caught.value, test_no_frame_of_a_refused_key_file_holds_a_secret.__code__)


@pytest.mark.parametrize("wrong", [
    lambda: Keyring.from_text(f"a:{TEXTS[0]},b:{TEXTS[1]}".encode()),
    lambda: Keyring.from_text([f"a:{TEXTS[0]}"]),
    lambda: Keyring.from_jwks(json.loads(jwks(jwk()))),
    lambda: Keyring.from_jwks(jwks(jwk()) + "\udc80"),
    lambda: Keyring.from_jwks([jwks(jwk())]),
], ids=range(5))  # fmt: skip
def test_what_is_no_text_at_all_is_refused_and_shows_no_secret(wrong):
    with pytest.raises(ConfigurationError) as caught:
        wrong()
    assert_hidden(caught.value, wrong.__code__)


@pytest.mark.parametrize("wrong", [f"a:{TEXTS[0]},b:{TEXTS[1]}=", f"a:{TEXTS[0]},b:{TEXTS[1]},b:{TEXTS[2]}", TEXTS[0]])
def test_no_frame_of_refused_settings_holds_a_secret(monkeypatch, wrong):
    monkeypatch.setenv("SAFEDEFER_KEYS", wrong)
    monkeypatch.delenv("SAFEDEFER_KEYS_FILE", raising=False)
    with pytest.raises(ConfigurationError) as caught:
        Settings.load().keyring()
    assert_hidden(caught.value, test_no_frame_of_refused_settings_holds_a_secret.__code__)


def test_no_frame_of_another_wrong_setting_holds_a_secret(monkeypatch):
    monkeypatch.setenv("SAFEDEFER_KEYS", f"a:{TEXTS[0]}")
    monkeypatch.setenv("SAFEDEFER_CONCURRENCY", "many")
    with pytest.raises(ConfigurationError, match="SAFEDEFER_CONCURRENCY") as caught:
        Settings.load()
    assert_hidden(caught.value, test_no_frame_of_another_wrong_setting_holds_a_secret.__code__)


# --- A kid that tells the secret --------------------------------------------------------------------------------------

TELLING = {
    "the secret": TEXTS[0],
    "the secret in another case": TEXTS[0].swapcase(),
    "a name and half of the secret": f"prod-{TEXTS[0][:22]}",
    "the end of the secret": TEXTS[0][-16:],
    "the secret in hex": SECRETS[0].hex(),
    "half of it in hex, in capitals": f"K_{SECRETS[0].hex().upper()[10:42]}",
}


@pytest.mark.parametrize("label", TELLING)
def test_a_kid_that_has_a_part_of_the_secret_in_it_is_refused(label):
    """Every token and every log line about the key shows the kid."""
    kid = TELLING[label]
    for make in (
        lambda: Keyring.from_text(f"{kid}:{TEXTS[0]}"),
        lambda: Keyring.from_jwks(jwks(jwk(kid=kid))),
        lambda: Key(kid, SECRETS[0]),
    ):
        with pytest.raises(WeakKey, match="a kid has a part of a secret in it") as caught:
            make()
        assert_hidden(caught.value, None)


def test_a_kid_that_has_a_part_of_another_keys_secret_in_it_is_refused():
    for read, text in (
        (Keyring.from_text, f"a:{TEXTS[0]},{TEXTS[0][:20]}:{TEXTS[1]}"),
        (Keyring.from_jwks, jwks(jwk(), jwk(1, kid=TEXTS[0], safedefer_state="revoked"))),
    ):
        with pytest.raises(WeakKey, match="a kid has a part of a secret in it") as caught:
            read(text)
        assert_hidden(caught.value, test_a_kid_that_has_a_part_of_another_keys_secret_in_it_is_refused.__code__)


def test_a_secret_of_text_is_looked_for_too():
    with pytest.raises(WeakKey, match="a kid has a part"):
        Key("correct-horse-battery", b"correct-horse-battery-staple-0123456789")


@pytest.mark.parametrize("kid", ["a", TEXTS[0][:15], "2026-11-28_prod_eu-west-1_orders"])
def test_a_kid_of_few_characters_of_it_is_chance(kid):
    assert Key(kid, SECRETS[0]).kid == kid


def test_what_was_refused_while_it_was_made_has_a_repr():
    """A traceback with local variables shows it: its ``repr`` must not raise."""
    assert repr(object.__new__(Policy)) == "Policy()"
    assert "unfinished" in repr(object.__new__(Key))
    assert repr(object.__new__(Keyring)) == "Keyring()"
    assert repr(object.__new__(App))
    for cls in (SQLiteQueue, PostgresQueue):
        assert repr(object.__new__(cls))


# --- What tasks inherit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SAFEDEFER_KEYS", "safedefer_keys"])
@pytest.mark.parametrize("command", ["serve", "dispatch", "run"])
@pytest.mark.parametrize("spec", [None, "some:app"])
def test_processes_that_run_tasks_take_the_keys_out_of_the_environment(monkeypatch, name, command, spec):
    """With an application given as ``module:app`` they stayed there, for every program that a task starts."""
    monkeypatch.setattr(settings, "_taken", {})
    monkeypatch.delenv("SAFEDEFER_KEYS", raising=False)
    monkeypatch.setenv(name, f"a:{TEXTS[0]}")
    monkeypatch.setenv("SAFEDEFER_POLICY", "tests.sample_tasks")
    monkeypatch.setenv("SAFEDEFER_QUEUE", "memory://")
    app = App.from_settings()
    monkeypatch.setattr(processes, "load_app", lambda _: app)
    monkeypatch.setattr(processes, "configure", lambda _: None)
    monkeypatch.setattr(processes, "_supervise", lambda *_, **__: None)
    monkeypatch.setattr(processes, "_run", lambda *_: None)
    more = ["--to", "http://127.0.0.1:1"] if command == "dispatch" else []
    getattr(processes, command).main([*([spec] if spec else []), *more], standalone_mode=False)
    assert not [found for found in os.environ if found.upper() == "SAFEDEFER_KEYS"]
    assert App.from_settings().serialize(sample_tasks.add, 1), "a task cannot defer another"
    monkeypatch.setenv("SAFEDEFER_KEYS", f"b:{TEXTS[1]}")
    assert Settings.load().keyring().active.kid == "b"
    assert TEXTS[0] not in repr(settings._taken)


MISSPELLED = {
    "safedefer_queue": "safedefer_queues", "safedefer_pattern": "safedefer_patterns", "safedefer_queuse": "safedefer_queues",
    "safe_defer_queues": "safedefer_queues", "Safedefer_queues": "safedefer_queues", "SAFEDEFER_PATTERNS": "safedefer_patterns",
    "safedefer-patterns": "safedefer_patterns", "safedefer.state": "safedefer_state", "safedeferpickle": "safedefer_pickle",
    "safdefer_queues": "safedefer_queues", "savedefer_patterns": "safedefer_patterns", "safedefer_stat": "safedefer_state",
    "_safedefer_queues": "safedefer_queues", " safedefer_queues": "safedefer_queues", "\u0455afedefer_queues": "safedefer_queues",
    "safedefer_unheard_of": "safedefer_", "queues": "safedefer_queues", "patterns": "safedefer_patterns", "State": "safedefer_state",
    "pickle": "safedefer_pickle", "safedefer": "safedefer_",
}  # fmt: skip


@pytest.mark.parametrize("name", MISSPELLED)
def test_a_misspelled_member_is_refused_with_the_nearest_known_name(name):
    with pytest.raises(ConfigurationError, match=MISSPELLED[name]) as caught:
        Keyring.from_jwks(jwks(jwk(**{name: ["mail"]})))
    assert ascii(name) in str(caught.value)


def test_a_member_of_a_key_beside_the_keys_is_refused():
    with pytest.raises(ConfigurationError, match=r"safedefer_queues.*inside a key"):
        Keyring.from_jwks(jwks(jwk(), safedefer_queues=["mail"]))


def test_members_of_others_are_ignored():
    others = {
        "use": "sig",
        "key_ops": ["sign"],
        "x5t": "",
        "exp": 1,
        "iat": 1,
        "ext": True,
        "revoked": {},
        "name": "",
        "d": "",
        "desc": "",
    }
    assert Keyring.from_jwks(jwks(jwk(**others), comment="", id=1)).active.kid == "k0"


# --- Who may change or read the file --------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o700)
    made = folder / "keys.json"
    made.write_text(jwks(jwk()))
    made.chmod(0o600)
    return made


def load(path):
    return Settings(keys_file=path).keyring().active.kid


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666, 0o660])
def test_a_file_that_others_may_write_is_refused(path, mode):
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match=r"may be changed by others.*chmod 600"):
        load(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_file_of_ours_that_others_may_read_is_refused_as_ssh_does(path, mode):
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match=r"may be read by others.*chmod 600"):
        load(path)


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_file_of_our_own_is_read(path, mode):
    path.chmod(mode)
    assert load(path) == "k0"


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@needs_root
def test_a_file_of_somebody_else_is_refused(path):
    os.chown(path, 12_345, -1)
    with pytest.raises(ConfigurationError, match=r"belongs to the user 12345.*chown"):
        load(path)


@needs_root
@pytest.mark.parametrize(
    ("owner", "mode", "fine"), [(0, 0o644, True), (0, 0o640, True), (0, 0o664, False), (12_345, 0o644, False)]
)
def test_a_file_that_root_gives_to_a_service_may_be_read_by_others(path, monkeypatch, owner, mode, fine):
    """As ssh decides: the mode of what another user owns is theirs to choose, and Kubernetes mounts secrets so."""
    path.chmod(mode)
    os.chown(path, owner, -1)
    os.chown(path.parent, 0, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 54_321)
    if fine:
        assert load(path) == "k0"
    else:
        with pytest.raises(ConfigurationError, match="the key file"):
            load(path)


def test_a_folder_that_others_may_write_is_refused_unless_only_owners_may_delete_there(path):
    path.parent.chmod(0o777)
    with pytest.raises(ConfigurationError, match=r"folder .*keys' of .* may be changed by others.*chmod o-w"):
        load(path)
    path.parent.chmod(0o1777)
    assert load(path) == "k0"


def test_a_folder_further_up_counts_too(path, tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigurationError, match="may be changed by others"):
        load(path)


@needs_root
def test_a_folder_of_somebody_else_is_refused(path):
    os.chown(path.parent, 12_345, -1)
    with pytest.raises(ConfigurationError, match=r"folder .* belongs to the user 12345"):
        load(path)


def test_a_link_is_judged_with_the_folder_that_it_is_in(path, tmp_path):
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    link = open_folder / "keys.json"
    link.symlink_to(path)
    assert load(link) == "k0"
    open_folder.chmod(0o777)
    with pytest.raises(ConfigurationError, match="open' of .*may be changed by others"):
        load(link)


def test_keys_come_through_a_pipe_too():
    ours, theirs = os.pipe()
    os.write(theirs, jwks(jwk()).encode())
    os.close(theirs)
    try:
        assert load(f"/dev/fd/{ours}") == "k0"
    finally:
        os.close(ours)


@pytest.mark.parametrize("swapped", ["{secret}:new", "{secret}:", "ok-1:{other},{secret}:x"])
def test_a_secret_in_the_place_of_its_name_is_not_quoted(swapped):
    secret, other = (secrets.token_urlsafe(40) for _ in range(2))
    for read in (
        lambda: Keyring.from_text(swapped.format(secret=secret, other=other)),
        lambda: Keyring.from_jwks(json.dumps({"keys": [{"kty": "oct", "kid": secret, "k": "new"}]})),
    ):
        with pytest.raises(ConfigurationError) as caught:
            read()
        assert secret[:16] not in str(caught.value)


# --- Symbolic links ---------------------------------------------------------------------------------------------------


@needs_root
def test_a_link_of_somebody_else_to_a_file_of_roots_is_refused(path, tmp_path):
    """Its owner chooses which of the files that root owns is read for keys: one of a package's examples, say."""
    link = tmp_path / "keys-here"
    link.symlink_to(path.parent)
    again = tmp_path / "again"
    again.symlink_to("keys-here")
    assert load(link / path.name) == "k0"
    os.chown(link, 12_345, -1, follow_symlinks=False)
    for way in (link / path.name, again / path.name, tmp_path / "keys" / ".." / "keys-here" / path.name):
        with pytest.raises(ConfigurationError, match=r"the symbolic link .*keys-here' belongs to the user 12345"):
            load(way)
    file = tmp_path / "file"
    file.symlink_to(path)
    os.chown(file, 12_345, -1, follow_symlinks=False)
    with pytest.raises(ConfigurationError, match="the symbolic link"):
        load(file)


def test_a_file_that_is_replaced_while_it_is_judged_is_not_read(path, monkeypatch):
    other = path.with_name("other.json")
    other.write_text(jwks(jwk(kid="other")))
    other.chmod(0o600)
    judge = settings.trouble_with_folders

    def replace(name):
        other.replace(path)
        return judge(name)

    monkeypatch.setattr(settings, "trouble_with_folders", replace)
    with pytest.raises(ConfigurationError, match="was replaced while it was read"):
        load(path)


def test_a_way_of_links_without_end_has_one(tmp_path):
    (tmp_path / "a").symlink_to("b/x")
    (tmp_path / "b").symlink_to("a/x")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load(tmp_path / "a")
    assert settings.trouble_with_folders(str(tmp_path / "a")) is None
