"""The URL of a Cloud Tasks engine."""

import pytest

from safedefer.errors import ConfigurationError
from safedefer.queues.addresses import place
from safedefer.queues.cloudtasks.address import CloudTasksAddress

BASE = "cloudtasks://p-1/europe-west1"
ACCOUNT = "service_account=tasks@p-1.iam.gserviceaccount.com"


def test_a_url_says_where_tasks_are_kept_where_they_go_and_who_sends_them():
    url = f"{BASE}?address=https://tasks.example.com/app/&{ACCOUNT}&service_account=old@p-1.iam.gserviceaccount.com"
    found = CloudTasksAddress.parse(f"{url}&target.mail=https://mail.example.com")
    assert found.parent == "projects/p-1/locations/europe-west1"
    assert found.address == "https://tasks.example.com/app"
    assert found.service_accounts == ("tasks@p-1.iam.gserviceaccount.com", "old@p-1.iam.gserviceaccount.com")
    assert found.audiences == {"https://tasks.example.com/app", "https://mail.example.com"}
    assert found.issuers == {"https://accounts.google.com", "accounts.google.com"}
    assert found.keys_url == "https://www.googleapis.com/oauth2/v3/certs"
    assert (found.any_sender, found.endpoint) == (False, None)
    assert CloudTasksAddress.parse(f"{url}&audience=tasks").audiences == {"tasks"}


def test_an_emulator_signs_with_its_own_keys_and_may_be_reached_without_tls():
    url = f"{BASE}?endpoint=http://127.0.0.1:8123&address=http://127.0.0.1:8080&{ACCOUNT}"
    found = CloudTasksAddress.parse(url)
    assert found.issuers == {"http://127.0.0.1:8123"}
    assert found.keys_url == "http://127.0.0.1:8123/oauth2/v3/certs"


def test_tasks_may_go_to_the_app_engine_application():
    found = CloudTasksAddress.parse(f"{BASE}?app_engine=yes")
    assert (found.address, found.service_accounts) == (None, ())


@pytest.mark.parametrize(("url", "text"), [
    ("cloudtasks://p-1?address=https://a.example", "project and a location"),
    ("cloudtasks://p-1/a/b?address=https://a.example", "project and a location"),
    ("cloudtasks:///europe-west1", "project and a location"),
    (f"{BASE}?address=https://a.example&{ACCOUNT}#x", "project and a location"),
    (f"{BASE}?address", "malformed"),
    (f"{BASE}?address=https://a.example&{ACCOUNT}&adress=x", "did you mean address"),
    (f"{BASE}?address=https://a.example&address=https://b.example&{ACCOUNT}", "twice"),
    (f"{BASE}?address=&{ACCOUNT}", "empty"),
    (BASE, "where tasks are sent"),
    (f"{BASE}?{ACCOUNT}", "where tasks are sent"),
    (f"{BASE}?address=https://a.example&app_engine=yes&{ACCOUNT}", "where tasks are sent"),
    (f"{BASE}?app_engine=true", "yes, or left out"),
    (f"{BASE}?app_engine=yes&{ACCOUNT}", "no OIDC tokens"),
    (f"{BASE}?address=https://a.example", "service_account"),
    (f"{BASE}?address=https://a.example&service_account=tasks", "no e-mail address"),
    (f"{BASE}?address=http://a.example&{ACCOUNT}", "must be https"),
    (f"{BASE}?address=ftp://a.example&{ACCOUNT}", "no address"),
    (f"{BASE}?address=https://a.example?x=1&{ACCOUNT}", "no address"),
    (f"{BASE}?address=https://u:p@a.example&{ACCOUNT}", "no address"),
    (f"{BASE}?address=https://[a.example&{ACCOUNT}", "no address"),
    (f"{BASE}?address=https://a.example:0&{ACCOUNT}", "no address"),
    (f"{BASE}?address=https://a.example:x&{ACCOUNT}", "no address"),
    (f"{BASE}?address=https://a.example&{ACCOUNT}&unsafe_accept_any_sender=1", "yes, or left out"),
])  # fmt: skip
def test_a_url_that_is_wrong_is_refused_and_says_what_to_write(url, text):
    with pytest.raises(ConfigurationError, match=text):
        CloudTasksAddress.parse(url)


def test_what_is_shown_of_a_url_has_no_parameters():
    assert place(f"{BASE}?address=https://tasks.example.com&{ACCOUNT}") == BASE
    assert place("cloudtasks://example.com:p-1/europe-west1?app_engine=yes") == "cloudtasks://..."
