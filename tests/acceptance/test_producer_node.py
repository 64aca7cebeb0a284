"""``examples/producer-node``: another language mints a task from the format's description, and Python runs it."""

import json
import os
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from tests.adversarial.forge import NOW, URL, make_app, post
from tests.schema import tasks, vectors

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "producer-node"

pytestmark = pytest.mark.skipif(
    shutil.which("npm") is None and "CI" not in os.environ, reason="no node here; CI has one"
)


@pytest.fixture(scope="module")
def producer(tmp_path_factory):
    """The example with its one dependency installed, outside of the checkout."""
    folder = tmp_path_factory.mktemp("producer") / "producer-node"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("node_modules"))
    install = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts", "--loglevel=error"]
    subprocess.run(install, cwd=folder, check=True, capture_output=True, timeout=110)
    return folder


def run_node(folder, *arguments):
    done = subprocess.run(["node", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def run(token):
    app = make_app()
    try:
        return app.run(token.encode())
    finally:
        app.close()


OPTIONS = json.dumps({"environment": "test", "now": NOW})
KEY = f"now:{vectors.encode(vectors.secret('now'))}"


def test_a_token_of_the_npm_package_jose_runs_in_the_python_handler(producer, ran):
    token = run_node(
        producer, "mint.js", KEY, "tests.adversarial.victim:note", '[42, "é"]', '{"copy_to": null}', OPTIONS
    )
    app = make_app()
    status, headers, _ = post(app, token.encode(), path=URL)
    assert (status, headers["Safedefer-Outcome"]) == (200, "succeeded")
    assert ran == [((42, "é"), {"copy_to": None})]
    assert post(app, token.encode())[1]["Safedefer-Outcome"] == "duplicate"
    app.close()


def test_retry_options_and_a_deadline_are_signed_and_read(producer, ran):
    options = {**json.loads(OPTIONS), "retry": {"task_retry_limit": 3, "min_backoff_seconds": 0.5}, "deadline": 90}
    token = run_node(producer, "mint.js", KEY, "tests.adversarial.victim:note", "[]", "{}", json.dumps(options))
    app = make_app()
    claims = app.verify(token.encode()).claims
    assert (claims["retry"], claims["deadline"]) == (options["retry"], 90)
    assert post(app, token.encode())[1]["Safedefer-Outcome"] == "succeeded"
    app.close()


def test_values_that_json_has_no_word_for_arrive_as_python_s_own(producer):
    program = """
        import { mint, typed } from "./producer.js";
        const values = [
            1n, 2n ** 70n, 1.5, Infinity, new Uint8Array([0, 255]), new Date(1900000000123), new Date(1900000000000),
            new Set([1]), new Map([[1, "a"]]), { $tuple: [] }, { a: [null, true] }, "\\u{1f600}",
        ];
        const [kid, k] = process.argv[1].split(":");
        process.stdout.write(await mint({ kid, k }, "tests.schema.tasks:echo", typed(values), {}, JSON.parse(process.argv[2])));
    """
    token = run_node(producer, "--input-type=module", "-e", program, KEY, OPTIONS)
    args, kwargs = run(token)
    when = datetime.fromtimestamp(NOW, UTC).replace(tzinfo=ZoneInfo("UTC"))
    assert kwargs == {}
    assert args == (
        1, 2**70, 1.5, float("inf"), b"\0\xff", when.replace(microsecond=123_000), when, {1}, {1: "a"}, {"$tuple": []}, {"a": [None, True]}, "\U0001f600",
    )  # fmt: skip
    assert [type(arg) for arg in args[:4]] == [int, int, float, float]


def test_jose_verifies_what_python_signs_and_refuses_what_was_changed(producer):
    app = make_app()
    token = app.serialize(tasks.echo, 1).decode()
    app.close()
    program = """
        import { compactVerify } from "jose";
        const [token, k] = process.argv.slice(1);
        const options = { algorithms: ["HS256"] };
        const key = Buffer.from(k, "base64url");
        const { payload, protectedHeader } = await compactVerify(token, key, options);
        let refused = false;
        try { await compactVerify(token.slice(0, -3) + "AAA", key, options); } catch { refused = true; }
        console.log(JSON.stringify({ header: protectedHeader, claims: JSON.parse(new TextDecoder().decode(payload)), refused }));
    """
    said = json.loads(run_node(producer, "--input-type=module", "-e", program, token, KEY.partition(":")[2]))
    assert said["header"] == {"alg": "HS256", "kid": "now", "typ": "safedefer+jwt"}
    assert said["claims"]["args"] == [1]
    assert said["refused"]


@pytest.fixture
def ran():
    from tests.adversarial import victim

    victim.RAN.clear()
    return victim.RAN
