"""The files of ``examples/deploy``: read by the programs that they are for, where these are installed."""

import fnmatch
import json
import re
import shutil
import subprocess

import click
import pytest
from ruamel.yaml import YAML

from safedefer.cli import main
from tests.acceptance.processes import ROOT
from tests.ports import ReservedPort

DEPLOY = ROOT / "examples" / "deploy"
CLOUD_RUN = ROOT / "examples" / "cloud-run"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


def options(command):
    """Return the options of a ``safedefer`` command, as the command line reads them."""
    assert command[0].rpartition("/")[2] == "safedefer"
    context = main.make_context("safedefer", list(command[1:]))
    name, found, rest = main.resolve_command(context, [*context._protected_args, *context.args])
    assert isinstance(found, click.Command)
    return found.make_context(name, rest, parent=context).params


def settings_of(names):
    documented = (ROOT / "docs" / "reference" / "settings.md").read_text()
    assert {name for name in names if f"| `{name}` |" not in documented} == set()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_is_one_that_systemd_reads(tmp_path):
    unit = (DEPLOY / "shop-tasks.service").read_text()
    file = tmp_path / "shop-tasks.service"
    file.write_text(re.sub(r"=/srv/shop/\.venv/bin/safedefer.*", "=/bin/true", unit))
    done = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "shop-tasks.service" in line]) == (0, [])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_exposes_little():
    unit = str(DEPLOY / "shop-tasks.service")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", unit],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-200:] + done.stderr


def test_the_unit_waits_longer_than_the_drain_and_names_settings_that_there_are():
    unit = (DEPLOY / "shop-tasks.service").read_text()
    run = options(re.search(r"^ExecStart=(.*)", unit, re.MULTILINE)[1].split())
    assert int(re.search(r"TimeoutStopSec=(\d+)", unit)[1]) > run["drain"]
    settings_of(re.findall(r"^Environment=(\w+)=", unit, re.MULTILINE))
    assert options(re.search(r"^ExecStartPre=(.*)", unit, re.MULTILINE)[1].split()) is not None


def test_the_probes_ask_where_the_pods_answer():
    deployment, job = YAML(typ="safe").load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    run = options(container["command"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert str(run["health"]) .rpartition(":")[2].strip("')") == str(ports["health"])  # fmt: skip
    for probe, page in (("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        assert container[probe]["httpGet"] == {"path": page, "port": "health"}
    assert pod["terminationGracePeriodSeconds"] > run["drain"]
    settings_of(variable["name"] for variable in container["env"])
    (migrate,) = job["spec"]["template"]["spec"]["containers"]
    assert migrate["command"] == ["safedefer", "migrate"]
    assert migrate["image"] == container["image"]


def test_the_image_starts_a_command_that_there_is():
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    run = options(json.loads(re.search(r"^CMD (.*)", dockerfile, re.MULTILINE)[1]))
    assert run["processes"] == 2
    settings_of(re.findall(r"(SAFEDEFER_\w+)=", dockerfile))


def test_both_pods_satisfy_the_standard_restricted():
    deployment, job = YAML(typ="safe").load_all((DEPLOY / "kubernetes.yaml").read_text())
    for pod in (deployment["spec"]["template"]["spec"], job["spec"]["template"]["spec"]):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
            }  # fmt: skip


def test_no_pod_has_a_token_of_the_cluster_or_variables_of_its_services():
    # A Service named ``safedefer`` makes ``SAFEDEFER_PORT``, which is warned of as no setting.
    deployment, job = YAML(typ="safe").load_all((DEPLOY / "kubernetes.yaml").read_text())
    for pod in (deployment["spec"]["template"]["spec"], job["spec"]["template"]["spec"]):
        assert (pod["automountServiceAccountToken"], pod["enableServiceLinks"]) == (False, False)


def test_a_migration_that_fails_leaves_its_log():
    # With ``OnFailure`` the pod is deleted at the last failure, and its log with it.
    _, job = YAML(typ="safe").load_all((DEPLOY / "kubernetes.yaml").read_text())
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_the_keys_are_for_the_group_of_the_pods_alone():
    deployment, _ = YAML(typ="safe").load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (mode,) = [volume["secret"]["defaultMode"] for volume in pod["volumes"] if "secret" in volume]
    assert (int(str(mode), 8), pod["securityContext"]["fsGroup"]) == (0o440, pod["securityContext"]["runAsUser"])


def test_the_page_applies_the_job_by_a_label_that_it_has():
    deployment, job = YAML(typ="safe").load_all((DEPLOY / "kubernetes.yaml").read_text())
    page = (ROOT / "docs/how-to/deploy.md").read_text()
    (name, value) = re.search(r"kubectl apply -f kubernetes.yaml -l (\w+)=(\w+)", page).groups()
    assert job["metadata"]["labels"] == {name: value}
    assert name not in deployment["metadata"].get("labels", {})
    for kind, manifest in (("job", job), ("deployment", deployment)):
        assert f"{kind}/{manifest['metadata']['name']}" in page
    secrets = re.findall(r"secret(?:Name: |KeyRef: \{name: )([\w-]+)", (DEPLOY / "kubernetes.yaml").read_text())
    assert set(secrets) == set(re.findall(r"kubectl create secret generic ([\w-]+)", page))


def test_the_image_of_cloud_run_drains_before_it_is_killed():
    dockerfile = (CLOUD_RUN / "Dockerfile").read_text()
    (command,) = re.findall(r"^CMD exec (.*)", dockerfile, re.MULTILINE)
    assert options(command.replace("$PORT", "8080").split())["drain"] < 10
    assert f"\nCMD exec {command}\n" in (ROOT / "docs/how-to/from-app-engine-to-cloud-tasks.md").read_text()
    settings_of(re.findall(r"SAFEDEFER_\w+", (CLOUD_RUN / "README.md").read_text()))
    instructions = [line for line in dockerfile.splitlines() if not line.startswith("#")]
    assert "\n".join(instructions) in (ROOT / "docs/how-to/from-app-engine-to-cloud-tasks.md").read_text()
    assert "USER nobody" in instructions


def test_what_no_image_may_have_is_not_uploaded_either():
    # ``gcloud`` knows nothing of a .dockerignore: without a file of its own it uploads the keys.
    assert "#!include:.dockerignore" in (CLOUD_RUN / ".gcloudignore").read_text().splitlines()


def test_the_image_takes_no_keys_and_needs_no_packaging():
    ignored = (DEPLOY / ".dockerignore").read_text().splitlines()
    assert (CLOUD_RUN / ".dockerignore").read_text().splitlines() == ignored
    for kept_out in (".env", ".venv", "keys.json", "old-keys.json", "safedefer.db", "tasks.db-wal"):
        # At any depth: Docker matches a pattern without ``**/`` at the top alone.
        assert any(fnmatch.fnmatchcase(f"**/{kept_out}", pattern) for pattern in ignored if pattern[0] != "#"), kept_out
    (install,) = re.findall(r"^RUN pip install(.*)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert "." not in install.split()  # the shop of the how-tos has no pyproject.toml


def test_no_health_page_is_where_prometheus_listens():
    monitoring = (ROOT / "examples/monitoring/README.md").read_text()
    (target,) = re.findall(r"targets: .*:(\d+)\"", monitoring)
    texts = [path.read_text() for path in DEPLOY.iterdir()] + [(ROOT / "docs/how-to/observe.md").read_text()]
    ports = {port for text in texts for port in re.findall(r"--health(?:\", \"|, \"| )(?:0\.0\.0\.0:)?(\d+)", text)}
    assert ports == {target}
    assert target != "9090"


@pytest.mark.skipif(NGINX is None, reason="needs nginx")
def test_tasks_of_every_size_pass_nginx(project, tmp_path, request):
    project.environment["SAFEDEFER_INLINE_LIMIT"] = "1000000"  # the whole token is in the request
    _, url = project.start("serve", "--port", "0")
    kept = ReservedPort()
    request.addfinalizer(kept.close)
    server = (DEPLOY / "nginx.conf").read_text()
    server = re.sub(r"    server 10\.0\.0\.11:8080;\n    server 10\.0\.0\.12:8080;", f"    server {url[7:]};", server)
    server = server.replace("listen 443 ssl", f"listen 127.0.0.1:{kept.number}")
    server = re.sub(r"    ssl_certificate.*\n", "", server)
    config = tmp_path / "nginx.conf"
    folders = "".join(
        f"{name}_temp_path {tmp_path}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config.write_text(
        f"daemon off; master_process off; pid {tmp_path}/nginx.pid; error_log stderr; events {{}}\nhttp {{ access_log off; {folders}\n{server}}}\n"
    )
    proxy = subprocess.Popen([NGINX, "-p", tmp_path, "-c", config], stderr=subprocess.PIPE, text=True)
    project.processes.append(proxy)
    project.start("dispatch", "--to", kept.url, wait_for_line=False)
    small, large = project.defer("t.work, 1"), project.defer("t.work, 2")
    project.until(lambda: project.results() == [1, 2])
    big = project.defer(f"t.measure, {'x' * 3!r} * 200_000")
    states = f"from safedefer.deferred import current_app; q = current_app().queue; print(*[q.find(i).state for i in {[small, large, big]!r}])"
    project.until(lambda: project.python(states).split() == ["succeeded"] * 3)
