"""What is in `deploy/` is what the Dask operator, the API server and a strict platform take."""

from __future__ import annotations

import copy
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dask
import jsonschema
import kubernetes_validate
import pytest
import yaml
from dask.utils import parse_bytes, parse_timedelta
from manifests import (
    BASE,
    DEPLOY,
    OVERLAYS,
    Doc,
    arguments,
    containers,
    crd_schema,
    environment,
    expand,
    of_kind,
    option,
    pods,
    render,
    settings,
)

from dfx.cli import parser
from dfx.cluster import cluster_spec
from dfx.errors import CallError

FOLDERS = [BASE, *OVERLAYS]
DASK = ("DaskCluster", "DaskAutoscaler")
FOREIGN = ("Certificate", "Issuer")
"""Kinds of cert-manager, whose schemas no package has."""
KUBERNETES = ("1.30", kubernetes_validate.latest_version())


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def docs(request: pytest.FixtureRequest) -> list[Doc]:
    return render(request.param)


def the(docs: list[Doc], kind: str) -> Doc:
    [found] = of_kind(docs, kind)
    return found


def validate_crd(doc: Doc) -> None:
    jsonschema.Draft4Validator(crd_schema(doc["kind"])).validate(doc)


def test_dask_objects_have_only_fields_that_the_operators_definitions_have(docs: list[Doc]) -> None:
    found = of_kind(docs, *DASK)
    assert found
    for doc in found:
        validate_crd(doc)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("worker.spec.containers.0.resources.limits", {"nvidia.com/gpu": 1}),  # an integer is refused
        ("worker.spec.containers.0.lifecycle", {"preStop": {"sleep": {"seconds": 5}}}),  # what follows is pruned
        ("worker.spec.containers.0.livenessProbe", {"grpc": {"port": 8787}}),
        ("worker.spec.initContainers", [{"name": "sidecar", "restartPolicy": "Always"}]),
        ("worker.spec.resourceClaims", [{"name": "gpu"}]),
        ("worker.replica", 2),
        ("scheduler.service.ports.0.targetPort", 8786),
    ],
)
def test_the_closed_definitions_refuse_what_a_cluster_refuses_or_drops(path: str, value: Any) -> None:
    doc = copy.deepcopy(the(render(BASE), "DaskCluster"))
    *parents, last = path.split(".")
    node: Any = doc["spec"]
    for part in parents:
        node = node[int(part)] if part.isdigit() else node[part]
    node[last] = value
    with pytest.raises(jsonschema.ValidationError):
        validate_crd(doc)


@pytest.mark.parametrize("kubernetes", KUBERNETES)
def test_all_objects_are_valid_kubernetes_also_what_the_operator_makes_of_them(
    docs: list[Doc], kubernetes: str
) -> None:
    made = [doc for cluster in of_kind(docs, "DaskCluster") for doc in expand(cluster)]
    assert [doc["kind"] for doc in made] == ["Deployment", "Service", "Deployment"]
    for doc in [*docs, *made]:
        if doc["kind"] not in DASK + FOREIGN:
            kubernetes_validate.validate(doc, kubernetes, strict=True)


def test_every_pod_is_admitted_under_restricted_pod_security(docs: list[Doc]) -> None:
    for name, template in pods(docs):
        spec = template["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & set(spec), name
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        for volume in spec["volumes"]:
            [kind] = set(volume) - {"name"}
            assert kind in {"configMap", "emptyDir", "projected", "secret"}, volume
            assert kind != "emptyDir" or "sizeLimit" in volume[kind]
        for container in containers(template):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert not any("hostPort" in port for port in container.get("ports", []))
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted <= {volume["name"] for volume in spec["volumes"]}, name


def test_every_container_has_the_packages_version_as_image_and_a_limit_of_memory(docs: list[Doc]) -> None:
    for _, template in pods(docs):
        for container in containers(template):
            assert container["image"] == f"dfx:{version('dfx')}"
            assert parse_bytes(container["resources"]["limits"]["memory"]) >= parse_bytes(
                container["resources"]["requests"]["memory"]
            )
            for quantity in container["resources"].values():
                for amount in quantity.values():
                    assert re.fullmatch(r"\d+(\.\d+)?(m|[kMGT]i?)?", amount), amount


def test_a_workers_limit_bounds_dask_and_shared_memory(docs: list[Doc]) -> None:
    template = dict(pods(docs))["dfx-default-worker-0123456789"]
    [worker] = template["spec"]["containers"]
    limit = parse_bytes(worker["resources"]["limits"]["memory"])
    variables = environment(docs, worker)
    dask_limit = parse_bytes(option(arguments(worker, variables), "--memory-limit"))
    memory = [volume["emptyDir"] for volume in template["spec"]["volumes"] if "emptyDir" in volume]
    shm = sum(parse_bytes(found["sizeLimit"]) for found in memory if found.get("medium") == "Memory")
    assert dask_limit <= 0.9001 * limit
    assert dask_limit + shm <= limit
    assert option(arguments(worker, variables), "--local-directory") == "/scratch"
    assert {"name": "scratch", "mountPath": "/scratch"} in worker["volumeMounts"]


def test_gpus_are_a_string_in_limits_and_the_smoke_test_asks_for_none() -> None:
    for folder in FOLDERS:
        worker = the(render(folder), "DaskCluster")["spec"]["worker"]["spec"]
        gpus = worker["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        assert gpus == (None if folder.name == "cpu-smoke" else "1")
        assert ("nvidia.com/gpu" in json.dumps(worker)) == (gpus == "1")


def test_a_group_fits_its_quota_and_only_a_lone_group_is_autoscaled(docs: list[Doc]) -> None:
    quota = int(the(docs, "ResourceQuota")["spec"]["hard"]["requests.nvidia.com/gpu"])
    assert the(docs, "DaskCluster")["spec"]["worker"]["replicas"] <= quota
    assert not of_kind(docs, "DaskJob", "DaskWorkerGroup")
    for autoscaler in of_kind(docs, "DaskAutoscaler"):
        assert autoscaler["spec"]["cluster"] == the(docs, "DaskCluster")["metadata"]["name"]
        assert 1 <= autoscaler["spec"]["minimum"] <= autoscaler["spec"]["maximum"] <= quota


def test_dask_is_configured_for_the_operator_and_for_nodes_that_vanish(docs: list[Doc]) -> None:
    variables = settings(docs, "dask-config")
    found = dask.config.collect_env({name: text for name, text in variables.items() if name.startswith("DASK_")})
    routes = dask.config.get("distributed.scheduler.http.routes", config=found)
    usual = yaml.safe_load((Path(dask.__file__).parents[1] / "distributed/distributed.yaml").read_text())
    assert set(routes) == {"distributed.http.scheduler.api", *usual["distributed"]["scheduler"]["http"]["routes"]}
    assert parse_timedelta(dask.config.get("distributed.comm.timeouts.tcp", config=found)) >= 15
    assert parse_timedelta(dask.config.get("distributed.scheduler.worker-ttl", config=found)) >= 30
    known = dask.config.collect_yaml([str(Path(dask.__file__).parents[1] / "distributed/distributed.yaml")])
    known = dask.config.merge(*known)
    for name in variables:
        if name.startswith("DASK_DISTRIBUTED"):  # a typo would be a setting that nobody reads
            dask.config.get(name[5:].lower().replace("__", "."), config=known)


def test_an_idle_cluster_ends_but_not_while_a_driver_waits_for_its_first_worker(docs: list[Doc]) -> None:
    idle = the(docs, "DaskCluster")["spec"]["idleTimeout"]
    assert 0 < int(settings(docs, "dfx-run")["DFX_WAIT"]) < idle


def test_ports_have_the_names_that_operator_and_monitoring_look_for(docs: list[Doc]) -> None:
    scheduler, service, worker = expand(the(docs, "DaskCluster"))
    ports = {
        doc["metadata"]["name"]: {
            port["name"]: port["containerPort"] for port in doc["spec"]["template"]["spec"]["containers"][0]["ports"]
        }
        for doc in (scheduler, worker)
    }
    assert ports["dfx-scheduler"] == {"tcp-comm": 8786, "http-dashboard": 8787}
    assert ports["dfx-default-worker-0123456789"] == {"http-dashboard": 8787, "tcp-comm": 8788, "tcp-nanny": 8789}
    assert {port["name"]: port["port"] for port in service["spec"]["ports"]} == ports["dfx-scheduler"]
    assert all(port["targetPort"] == port["name"] for port in service["spec"]["ports"])
    assert service["spec"]["selector"].items() <= scheduler["spec"]["template"]["metadata"]["labels"].items()


def test_selectors_find_the_pods_that_they_are_meant_for() -> None:
    docs = render(OVERLAYS[0])  # rendered, so that labels are there
    found = {name: template["metadata"]["labels"] for name, template in pods(docs)}
    assert len(found) == 3

    def selected(selector: Doc) -> set[str]:
        wanted = selector.get("matchLabels", {}).items()
        return {name.split("-")[1] for name, labels in found.items() if wanted <= labels.items()}

    assert selected(the(docs, "PodDisruptionBudget")["spec"]["selector"]) == {"scheduler"}
    policies = {doc["metadata"]["name"]: doc["spec"] for doc in of_kind(docs, "NetworkPolicy")}
    everyone = {"scheduler", "default", "run"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name in ("dns", "dask", "prometheus", "storage"):
        assert selected(policies[name]["podSelector"]) == everyone
    assert selected(policies["dask"]["ingress"][0]["from"][0]["podSelector"]) == everyone
    assert selected(policies["operator"]["podSelector"]) == {"scheduler"}
    assert selected(policies["kubernetes-api"]["podSelector"]) == {"run"}
    monitor = yaml.safe_load((DEPLOY / "monitoring/podmonitor.yaml").read_text())
    assert selected(monitor["spec"]["selector"]) == everyone
    spread = the(docs, "DaskCluster")["spec"]["worker"]["spec"]["topologySpreadConstraints"][0]
    assert selected(spread["labelSelector"]) == {"default"}


def test_probes_ask_for_a_port_that_is_there(docs: list[Doc]) -> None:
    for name, template in pods(docs):
        [container] = template["spec"]["containers"]
        if name == "dfx-run":
            continue
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/health", "port": "http-dashboard"}, name


def test_an_evicted_driver_is_replaced_and_a_bad_call_is_not_repeated(docs: list[Doc]) -> None:
    job = the(docs, "Job")["spec"]
    assert job["podReplacementPolicy"] == "Failed"
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    ignore, fail = job["podFailurePolicy"]["rules"]
    assert ignore == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert (fail["action"], fail["onExitCodes"]["values"]) == ("FailJob", [1, 2])
    assert fail["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]


def test_commands_of_dfx_are_ones_that_it_has(docs: list[Doc]) -> None:
    [driver] = the(docs, "Job")["spec"]["template"]["spec"]["containers"]
    found = arguments(driver, environment(docs, driver))
    assert found[:2] == ["dfx", "extract"]
    parser().parse_args(found[1:])
    worker = the(docs, "DaskCluster")["spec"]["worker"]["spec"]
    found = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert found[:2] == ["dfx", "worker-retire"]
    assert float(option(found, "--timeout")) < worker["terminationGracePeriodSeconds"]
    parser().parse_args(found[1:])


def test_the_driver_may_do_what_keep_cluster_does_and_no_more(docs: list[Doc]) -> None:
    allowed = {
        "daskclusters": {"get", "create"},
        "daskautoscalers": {"get", "create"} if of_kind(docs, "DaskAutoscaler") else set(),
        "daskworkergroups": {"get"},
        "deployments": {"get"},
        "services": {"get"},
        "configmaps": {"get", "patch"},
    }
    for rule in the(docs, "Role")["rules"]:
        [resource] = rule["resources"]
        assert set(rule["verbs"]) <= allowed[resource]
        assert "resourceNames" in rule or rule["verbs"] == ["create"]
    assert not of_kind(docs, "ClusterRole", "ClusterRoleBinding")
    binding = the(docs, "RoleBinding")
    assert [subject["name"] for subject in binding["subjects"]] == ["dfx-driver"]
    for name, template in pods(docs):
        token = [c["name"] for c in containers(template) if "token" in {m["name"] for m in c["volumeMounts"]}]
        assert token == (["keep-cluster"] if name == "dfx-run" else [])


def test_settings_and_secrets_that_containers_name_are_there(docs: list[Doc]) -> None:
    for _, template in pods(docs):
        for container in containers(template):
            environment(docs, container)
            secrets = [source["secretRef"]["name"] for source in container.get("envFrom", []) if "secretRef" in source]
            assert secrets in ([], ["dfx-s3"])


@pytest.mark.parametrize("gpus", [0, 1, 2])
@pytest.mark.parametrize("kubernetes", KUBERNETES)
def test_clusters_made_from_python_are_taken_by_the_operator_and_by_kubernetes(gpus: int, kubernetes: str) -> None:
    spec = cluster_spec("dfx", "dfx:0.1.0", 3, gpus_per_worker=gpus, env={"A": "1"}, service_account="dfx-worker")
    validate_crd(spec)
    made = expand(spec)
    for doc in made:
        kubernetes_validate.validate(doc, kubernetes, strict=True)
    [worker] = made[2]["spec"]["template"]["spec"]["containers"]
    assert worker["resources"]["limits"].get("nvidia.com/gpu") == (str(gpus) if gpus else None)
    assert worker["args"][:2] == ["dask", "worker"]
    assert ("--preload-nanny" in worker["args"]) == (gpus > 1)
    assert "distributed.http.scheduler.api" in str(spec["spec"]["scheduler"]["spec"]["containers"][0]["env"])


@pytest.mark.parametrize("wrong", [{"n_workers": 0}, {"gpus_per_worker": -1}, {"memory": "1GGG"}])
def test_a_cluster_that_can_not_be_is_refused_before_it_is_asked_for(wrong: dict[str, Any]) -> None:
    with pytest.raises(CallError):
        cluster_spec(**{"name": "dfx", "image": "dfx:0.1.0", "n_workers": 1} | wrong)
