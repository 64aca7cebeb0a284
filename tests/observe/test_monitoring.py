"""``examples/monitoring``: alert rules and dashboard ask for metrics and labels that there are.

Prometheus's own checker reads and tests the rules where it is installed (Debian: ``prometheus``).
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from safedefer.observe.counts import COUNTERS, GAUGES, HISTOGRAMS
from safedefer.observe.metrics import of_processes, of_store
from safedefer.observe.store import QueueReading, StoreReading

FOLDER = Path(__file__).resolve().parents[2] / "examples/monitoring"
#: Labels that Prometheus adds.
ADDED = {"instance", "job", "le", "alertname", "alertstate"}


def known():
    """Return the labels of every sample by its name."""
    found = {name: set(labels) for name, (_, labels) in (COUNTERS | GAUGES).items()}
    for name, (_, labels) in HISTOGRAMS.items():
        found |= {f"{name}_{suffix}": set(labels) for suffix in ("bucket", "count", "sum")}
    for family in (*of_store(StoreReading({"q": QueueReading()}, 1)), *of_processes(1, 1)):
        found |= {sample.name: set(sample.labels) for sample in family.samples}
    return found


def rules():
    document = YAML(typ="safe").load(FOLDER / "alerts.yml")
    return [rule for group in document["groups"] for rule in group["rules"]]


def dashboard():
    return json.loads((FOLDER / "dashboard.json").read_text())


def expressions():
    yield from ((rule["alert"], rule["expr"]) for rule in rules())
    for panel in dashboard()["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel["targets"])
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]


@pytest.mark.parametrize(("where", "expression"), [pytest.param(*each, id=each[0]) for each in expressions()])
def test_an_expression_asks_for_what_there_is(where, expression):
    metrics = known()
    named = re.findall(r"safedefer_\w+", expression)
    assert named
    assert set(named) <= set(metrics)
    labels = {label for name in named for label in metrics[name]} | ADDED
    used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression))
    for grouped in re.findall(r"(?:by|ignoring|on) \(([^)]*)\)", expression):
        used |= set(re.findall(r"\w+", grouped))
    assert used <= labels
    assert expression.count("(") == expression.count(")")


def test_every_metric_is_on_the_dashboard():
    shown = " ".join(
        expression for panel in dashboard()["panels"] for expression in (t["expr"] for t in panel["targets"])
    )
    assert {name for name in known() if name not in shown} == {"safedefer_attempt_seconds_count"}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_and_what_to_do(rule):
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert set(rule["annotations"]) == {"summary", "description"}
    used = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
    grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", rule["expr"])))) or ADDED
    assert used <= grouped


def test_lag_dead_letters_targets_and_refusals_have_an_alert_each():
    alerts = {rule["alert"]: rule["expr"] for rule in rules()}
    assert "safedefer_queue_lag_seconds" in alerts["SafedeferLag"]
    assert "safedefer_dead_letters" in alerts["SafedeferDeadLetters"]
    assert "safedefer_target_down" in alerts["SafedeferTargetIsDown"]
    assert "safedefer_requests_refused_total" in alerts["SafedeferRefusals"]


def test_the_test_of_the_rules_knows_every_alert():
    text = (FOLDER / "alerts.test.yml").read_text()
    assert {rule["alert"] for rule in rules()} == set(re.findall(r"Safedefer\w+", text))


def test_prometheus_reads_the_rules_and_they_fire_where_they_should():
    promtool = shutil.which("promtool")
    for arguments in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts.test.yml"]):
        if promtool is not None:
            done = subprocess.run(
                [promtool, *arguments], cwd=FOLDER, capture_output=True, text=True, check=False, timeout=120
            )
            assert done.returncode == 0, done.stdout + done.stderr
        assert (FOLDER / arguments[-1]).exists()


def test_panels_have_places_of_their_own_and_a_title():
    panels = dashboard()["panels"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23
    assert len({panel["title"] for panel in panels}) == len({panel["id"] for panel in panels}) == len(panels)
