"""The image and what runs it, without Docker: the installer's environment serves, and the files conform to schemas.

`docker/prove.py` builds and runs the image itself; tests/test_selfhost.py runs the proxy and Prometheus.
"""

from __future__ import annotations

import configparser
import copy
import json
import re
import shlex
import subprocess
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase
from typer.main import get_command
from typer.testing import CliRunner

import jepakit
from jepakit._ray import OWN
from jepakit.cli import app
from jepakit_service.http.routes import STEADY
from jepakit_service.ray_environment import NODE_ENVIRONMENT
from jepakit_service.settings import ServeSettings, load
from jepakit_service.telemetry.metrics import Metrics

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "docs" / "deploy"
SCHEMAS = ROOT / "tests" / "schemas"


def systemd_unit() -> str:
    """The systemd unit in docs/operate.md."""
    (unit,) = re.findall(r"^```ini\n(.*?)^```$", (ROOT / "docs" / "operate.md").read_text(), re.MULTILINE | re.DOTALL)
    return str(unit)


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load((ROOT / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def kubernetes() -> Any:
    """The objects in kuberay.yaml and deploy-job.yaml, by kind."""
    files = [(DEPLOY / name).read_text() for name in ("kuberay.yaml", "deploy-job.yaml")]
    made = {item["kind"]: item for text in files for item in yaml.safe_load_all(text)}
    assert {kind: item["apiVersion"] for kind, item in made.items()} == {
        "RayService": "ray.io/v1", "PodDisruptionBudget": "policy/v1", "NetworkPolicy": "networking.k8s.io/v1", "Job": "batch/v1",
    }  # fmt: skip
    return made


@pytest.fixture(scope="module")
def ray_service(kubernetes: Any) -> Any:
    return kubernetes["RayService"]


def default(setting: str) -> Any:
    return ServeSettings.model_fields[setting].default


def test_every_stage_that_is_run_is_not_roots_and_wants_keys() -> None:
    stages = (ROOT / "Dockerfile").read_text().split("\nFROM ")
    final = {stage.split("\n")[0].split(" AS ")[1]: stage for stage in stages[1:]}
    assert list(final)[-1] == "serve", "a build without --target makes the last stage"
    for name in ("serve", "train"):
        assert re.search(r"^USER 10001:10001$", final[name], re.MULTILINE)
    assert "JEPAKIT_SERVE_API_KEY_FILE=/keys/keys" in final["serve"]


def test_what_the_image_sets_goes_before_a_file_of_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = (ROOT / "Dockerfile").read_text()
    variables = dict(re.findall(r"(JEPAKIT_SERVE_\w+)=(\S+)", image))
    documented = (ROOT / "docs" / "operate.md").read_text()
    assert len(variables) == 3
    monkeypatch.setattr("os.environ", variables | {"JEPAKIT_SERVE_API_KEY_FILE": __file__})
    (tmp_path / "settings.yaml").write_text("{bundles: [b], host: 127.0.0.1, port: 1, api_key_file: none, replicas: 3}")
    settings = load({}, tmp_path / "settings.yaml")
    assert (settings.host, settings.port, settings.api_key_file, settings.replicas) == ("0.0.0.0", 8000, __file__, 3)
    for name in variables:
        assert f"`{name}`" in documented
        assert f"`{name.removeprefix('JEPAKIT_SERVE_').lower()}`" in documented


def test_the_build_is_given_what_the_package_is_made_of_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert all((ROOT / path).exists() for path in allowed)
    project = (ROOT / "pyproject.toml").read_text()
    packages = re.search(r"^dev-mode-dirs = (\[.*\])$", project, re.MULTILINE)
    assert packages is not None
    needed = {*json.loads(packages[1]), "pyproject.toml", "README.md", "LICENSE", "NOTICE", "requirements.lock"}
    assert allowed == needed | {"docker/install.sh", "docker/healthcheck.py"}


@pytest.mark.parametrize("name", ["compose.yaml", "docker/compose.gpu.yaml"])
def test_compose_files_are_of_the_published_schema(name: str) -> None:
    schema = json.loads((SCHEMAS / "compose-spec.json").read_text())
    jsonschema.Draft7Validator(schema).validate(yaml.safe_load((ROOT / name).read_text()))


@pytest.mark.parametrize("name", ["compose.yaml", "docker/compose.gpu.yaml"])
def test_a_build_can_be_given_a_name_so_that_the_one_before_stays(name: str) -> None:
    image = yaml.safe_load((ROOT / name).read_text())["services"]["jepakit"]["image"]
    assert re.fullmatch(r"jepakit:\$\{JEPAKIT_TAG:-(latest|gpu)\}", image)


def test_extras_can_be_chosen_for_either_image(compose: Any) -> None:
    gpu = yaml.safe_load((ROOT / "docker/compose.gpu.yaml").read_text())
    for file, extras in ((compose, "serve,codecs,tracing"), (gpu, "serve,codecs,tracing,gpu")):
        assert file["services"]["jepakit"]["build"]["args"] == {"EXTRAS": f"${{JEPAKIT_EXTRAS:-{extras}}}"}


def test_every_container_is_hardened_and_only_loopback_is_published(compose: Any) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert int(service["user"].split(":")[0]) > 0, name
        assert service["mem_limit"], name
        assert service["pids_limit"], name
        for port in service.get("ports", []):
            assert ":-127.0.0.1:" in port, name
    assert "ports" not in compose["services"]["jepakit"]
    assert list(compose["services"]["jepakit"]["networks"]) == ["inner"]
    assert compose["networks"]["inner"]["internal"]
    assert compose["networks"]["inner"]["driver_opts"] == {"com.docker.network.bridge.inhibit_ipv4": "true"}


def test_limits_of_the_container_and_the_proxy_fit_the_services_own(compose: Any) -> None:
    service = compose["services"]["jepakit"]
    assert int(service["shm_size"].removesuffix("g")) << 30 > OWN["object_store_memory"]
    assert int(service["stop_grace_period"].removesuffix("s")) > 2 * default("drain_s")
    proxy = (ROOT / "docker" / "proxy" / "nginx.conf").read_text()
    for directive in ("client_max_body_size", "client_body_buffer_size"):
        assert f"{directive} {default('max_body_mb')}m;" in proxy
    uncounted = [
        block for block in re.findall(r"location [^{]*\{[^}]*proxy_pass[^}]*\}", proxy) if "limit_conn" not in block
    ]
    assert uncounted
    for block in uncounted:
        assert "client_max_body_size 1k;" in block
        assert "client_body_buffer_size 1k;" in block
    read = re.search(r"proxy_read_timeout (\d+)s;", proxy)
    assert read is not None
    assert int(read[1]) > default("request_timeout_s")
    body = re.search(r"client_body_timeout (\d+)s;", proxy)
    assert body is not None
    grace = compose["services"]["proxy"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) >= int(body[1]) + int(read[1]), "a stop would cut requests short"


def strict(schema: Any) -> Any:
    """The schema as the API server applies it on `kubectl apply`: an undescribed field is an error."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {name: strict(part) for name, part in schema.items()}
    described = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if described and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result["additionalProperties"] = False
    return result


def test_the_kuberay_manifest_is_of_the_published_schema_and_a_typo_would_be_seen(ray_service: Any) -> None:
    schema = strict(json.loads((SCHEMAS / "rayservice-v1.json").read_text()))
    jsonschema.validate(ray_service["spec"], schema)
    for path in (
        ("rayClusterConfig", "headGroupSpec"),
        ("rayClusterConfig", "workerGroupSpecs", 0, "template", "spec"),
    ):
        wrong = copy.deepcopy(ray_service["spec"])
        place = wrong
        for step in path:
            place = place[step]
        place["replicaz"] = 1
        with pytest.raises(jsonschema.ValidationError, match="replicaz"):
            jsonschema.validate(wrong, schema)


def test_the_serve_config_is_one_and_its_arguments_are_settings(ray_service: Any) -> None:
    with warnings.catch_warnings(action="ignore"):  # Ray's own, of pydantic
        from ray.serve.schema import ServeDeploySchema
    config = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    assert yaml.safe_load(ray_service["spec"]["serveConfigV2"]) == config
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert set(application.args) <= set(ServeSettings.model_fields)
    # Ray passes over what it does not know.
    assert set(config) <= set(ServeDeploySchema.model_fields)
    assert set(config["applications"][0]) <= set(type(application).model_fields)


def pods(ray_service: Any) -> Iterator[Any]:
    cluster = ray_service["spec"]["rayClusterConfig"]
    yield cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["template"]


def check_hardened(pod: Any) -> Any:
    """A pod's only container, checked not to run as root and not to write to its root."""
    assert pod["spec"]["securityContext"]["runAsUser"] == 10001
    (container,) = pod["spec"]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    return container


def mounts(pod: Any, claim: str) -> list[tuple[str, bool]]:
    """Where a pod mounts a claim, and whether it may write there."""
    volumes = {volume["name"]: volume.get("persistentVolumeClaim", {}) for volume in pod["spec"]["volumes"]}
    return [
        (mount["mountPath"], not (mount.get("readOnly") or volumes[mount["name"]].get("readOnly")))
        for mount in pod["spec"]["containers"][0]["volumeMounts"]
        if volumes[mount["name"]].get("claimName") == claim
    ]


def test_pods_are_not_roots_cannot_write_to_their_root_and_lie_behind_the_network_policy(kubernetes: Any) -> None:
    ray_service, policy = kubernetes["RayService"], kubernetes["NetworkPolicy"]
    assert ray_service["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    for pod in pods(ray_service):
        assert pod["metadata"]["labels"].items() >= policy["spec"]["podSelector"]["matchLabels"].items()
        container = check_hardened(pod)
        assert mounts(pod, "jepakit-bundles") == [("/bundles", False)]
        assert {entry["name"]: entry["value"] for entry in container["env"]} == NODE_ENVIRONMENT
    scrape = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}}
    assert {"from": [scrape], "ports": [{"port": 8000}]} in policy["spec"]["ingress"]
    # Ray's log files lie in /tmp, which is memory there.
    assert NODE_ENVIRONMENT.keys() >= {"RAY_ROTATION_MAX_BYTES", "RAY_ROTATION_BACKUP_COUNT", "RAY_event_stats"}


def test_a_worker_stays_while_nodes_are_emptied_and_workers_lie_on_different_nodes(kubernetes: Any) -> None:
    budget = kubernetes["PodDisruptionBudget"]["spec"]
    (group,) = kubernetes["RayService"]["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert 0 < budget["minAvailable"] < group["minReplicas"]
    chosen = budget["selector"]["matchLabels"].items()
    head, worker = pods(kubernetes["RayService"])
    assert worker["metadata"]["labels"].items() >= chosen
    assert not head["metadata"]["labels"].items() >= chosen, "the head serves nothing"
    (spread,) = worker["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"].items() == chosen


def test_the_job_deploys_into_the_folder_that_the_service_watches(kubernetes: Any) -> None:
    pod = kubernetes["Job"]["spec"]["template"]
    schema = strict(json.loads((SCHEMAS / "rayservice-v1.json").read_text()))
    spec = copy.deepcopy(kubernetes["RayService"]["spec"])
    spec["rayClusterConfig"]["headGroupSpec"]["template"] = pod
    jsonschema.validate(spec, schema)
    command, *arguments = check_hardened(pod)["args"]
    given = get_command(app).commands[command].make_context(command, arguments).params  # type: ignore[attr-defined]
    assert mounts(pod, "jepakit-bundles") == [(str(given["folder"]), True)]
    assert yaml.safe_load((DEPLOY / "serve.yaml").read_text())["applications"][0]["args"]["bundles"] == [
        str(given["folder"])
    ]
    assert given["url"] == f"http://{kubernetes['RayService']['metadata']['name']}-serve-svc:8000"
    assert mounts(pod, "jepakit-exports") == [("/exports", False)]
    assert given["bundle"].is_relative_to("/exports")
    assert kubernetes["Job"]["spec"]["backoffLimit"] == 0
    allowed = kubernetes["NetworkPolicy"]["spec"]["ingress"][1]
    (among,) = allowed["from"][0]["podSelector"]["matchExpressions"]
    assert pod["metadata"]["labels"][among["key"]] in among["values"]
    assert allowed["ports"] == [{"port": 8000}]


def check_counted(expression: str, shown: str = "") -> None:
    """Assert that a PromQL expression uses metrics, and only those of the service or NVIDIA's exporter, and labels that they
    have; and that those in `shown`, its text for people, are left by it."""
    metrics = Metrics()
    counted = {family.name for family in metrics.families()}
    labels = {
        label for one in vars(metrics).values() if isinstance(one, MetricWrapperBase) for label in one._labelnames
    }
    kept = {label for words in re.findall(r"by \(([^)]*)\)", expression) for label in words.split(", ")}
    assert kept <= labels | {"replica", "le", "gpu", "name"}, expression
    assert not kept or set(re.findall(r"\{\{ ?(?:\$labels\.)?(\w+) ?\}\}", shown)) <= kept, shown
    names = re.findall(r"\b(?:jepakit|process|DCGM)_\w+", expression)
    assert names
    for name in names:
        assert name.startswith("DCGM_") or re.sub("_(bucket|sum|total)$", "", name) in counted, name
    for routes in re.findall('route!~"(.+?)"', expression):
        assert set(routes.split("|")) <= set(STEADY), "each matches a route's whole label"


def test_alerts_ask_for_what_the_service_counts_and_their_numbers_are_the_shipped_ones(compose: Any) -> None:
    (group,) = yaml.safe_load((ROOT / "docker" / "prometheus" / "rules.yml").read_text())["groups"]
    alerts = {rule["alert"]: rule["expr"] for rule in group["rules"]}
    for rule in group["rules"]:
        check_counted(rule["expr"], rule["annotations"]["summary"])
    for expression in re.findall(r"`(\w[^`]*\[5m\][^`]*)`", (ROOT / "docs" / "operate.md").read_text()):
        check_counted(expression)
    documented = re.findall(r"^\| `(Jepakit\w+)` \|", (ROOT / "docs" / "operate.md").read_text(), re.MULTILINE)
    assert documented == list(alerts)
    assert alerts["JepakitMissing"].endswith(f" < {default('replicas')}")
    assert float(alerts["JepakitSlow"].split(">")[1]) == default("request_timeout_s") / 2
    limit = re.fullmatch(r"\$\{JEPAKIT_MEMORY:-(\d+)g\}", compose["services"]["jepakit"]["mem_limit"])
    most = re.search(r"> ([\d.]+) \* 1024 \^ 3$", alerts["JepakitMemory"])
    assert limit is not None
    assert most is not None
    assert 1 < int(limit[1]) - float(most[1]) < 2
    assert "./docker/prometheus:/etc/prometheus:ro" in compose["services"]["prometheus"]["volumes"]


def test_the_dashboard_asks_for_what_the_service_counts_and_no_panel_lies_on_another() -> None:
    dashboard = json.loads((ROOT / "docker" / "grafana" / "dashboards" / "jepakit.json").read_text())
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        mine = set(product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
        assert not mine & cells, panel["title"]
        assert max(x for x, _ in mine) < 24
        cells |= mine
        for target in panel["targets"]:
            check_counted(target["expr"], target["legendFormat"])
            assert panel["type"] != "stat" or target["instant"], (
                "the last value of an hour hides that there is none now"
            )
    (ready,) = (panel for panel in dashboard["panels"] if panel["title"] == "Ready")
    assert ready["targets"][0]["expr"].endswith(" or vector(0)")
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_unit_of_systemd_starts_with_the_machine_and_a_service_that_wants_keys(tmp_path: Path) -> None:
    unit = configparser.ConfigParser()
    unit.read_string(systemd_unit())
    assert unit["Install"]["WantedBy"] == "multi-user.target"
    assert unit["Service"]["KillMode"] == "mixed", "Ray's processes must not get the signal"
    assert unit.getint("Service", "TimeoutStopSec") > 2 * default("drain_s")
    assert (unit["Service"]["Restart"], unit["Unit"]["StartLimitIntervalSec"]) == ("always", "0"), "a mount may be late"
    (tmp_path / "keys").touch()
    given = unit["Service"]["ExecStart"].replace("/etc/jepakit", str(tmp_path))
    _, *arguments = shlex.split(given)
    done = CliRunner().invoke(app, [*arguments, "--print-config"], catch_exceptions=False)
    assert yaml.safe_load(done.output)["api_key_file"] == str(tmp_path / "keys")


@pytest.mark.slow
def test_the_installer_builds_an_environment_that_serves_without_torch(
    exported: Callable[..., Path], tmp_path: Path
) -> None:
    from tests.test_pipeline import serving

    subprocess.run(["sh", str(ROOT / "docker" / "install.sh"), str(tmp_path / "env"), "serve"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    found = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False)
    assert found.returncode == 1, "the serving image must not hold torch"
    with (
        serving(exported(image_size=32), "--no-ray", program=python.with_name("jepakit")) as url,
        jepakit.Client(url) as client,
    ):
        assert client.verify(exported(image_size=32)) < 1e-5
