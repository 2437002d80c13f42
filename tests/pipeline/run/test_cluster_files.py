"""manifests/cluster: schemas, units and the cron line; `test_schedule` submits jobs."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from birkhoff.pipeline.artifact.oci_client import OciReference

ROOT = Path(__file__).parents[3]
CLUSTER = ROOT / "manifests" / "cluster"
VERSION = "1.33"
COMMAND = r"birkhoff compress \S+ .*--scheduled"

# Every field of these types in KubeRay v1.7.0, from the API reference that it generates from the types of its CRDs
# (github.com/ray-project/kuberay, docs/reference/api.md at 9c13e713c17859f5c2d13bec324c9548b808c8f2), and of Kueue
# v0.19.2's v1beta2 (github.com/kubernetes-sigs/kueue, config/components/crd/bases at
# c3785e520aeeb0e0a93e8a3785a6e46c51502246).
KUBERAY: dict[str, dict[str, type]] = {
    "RayJobSpec": {
        **dict.fromkeys(["activeDeadlineSeconds", "backoffLimit", "preRunningDeadlineSeconds"], int),
        **dict.fromkeys(["entrypoint", "entrypointResources", "jobId", "managedBy", "runtimeEnvYAML"], str),
        **dict.fromkeys(["clusterSelector", "deletionStrategy", "metadata", "rayClusterSpec"], dict),
        **dict.fromkeys(["submitterConfig", "submitterPodTemplate"], dict),
        **dict.fromkeys(["entrypointNumCpus", "entrypointNumGpus"], float),
        **dict.fromkeys(["shutdownAfterJobFinishes", "suspend"], bool),
        "submissionMode": str,
        "ttlSecondsAfterFinished": int,
    },
    "RayCronJobSpec": {"jobTemplate": dict, "schedule": str, "timeZone": str, "suspend": bool},
    "RayClusterSpec": {
        **dict.fromkeys(["authOptions", "autoscalerOptions", "gcsFaultToleranceOptions", "headGroupSpec"], dict),
        **dict.fromkeys(["headServiceAnnotations", "upgradeStrategy", "historyServerOptions"], dict),
        **dict.fromkeys(["networkPolicy", "tlsOptions"], dict),
        **dict.fromkeys(["enableInTreeAutoscaling", "suspend"], bool),
        **dict.fromkeys(["managedBy", "rayVersion"], str),
        "workerGroupSpecs": list,
    },
    "AuthOptions": {"enableK8sTokenAuth": bool, "mode": str, "secretName": str},
    "GcsFaultToleranceOptions": {
        **dict.fromkeys(["backend", "externalStorageNamespace", "redisAddress"], str),
        **dict.fromkeys(["redisUsername", "redisPassword", "storage"], dict),
    },
    "RedisCredential": {"value": str, "valueFrom": dict},
    "HeadGroupSpec": {
        **dict.fromkeys(["headService", "ingressOptions", "labels", "rayStartParams", "resources", "template"], dict),
        "enableIngress": bool,
        "serviceType": str,
    },
    "WorkerGroupSpec": {
        **dict.fromkeys(["labels", "rayStartParams", "resources", "scaleStrategy", "template"], dict),
        **dict.fromkeys(
            ["idleTimeoutSeconds", "maxReplicas", "minReplicas", "numOfHosts", "priority", "replicas"], int
        ),
        "groupName": str,
        "suspend": bool,
    },
    "ResourceFlavorSpec": {"nodeLabels": dict, "nodeTaints": list, "tolerations": list, "topologyName": str},
    "ClusterQueueSpec": {
        **dict.fromkeys(["admissionChecksStrategy", "admissionScope", "concurrentAdmissionPolicy"], dict),
        **dict.fromkeys(["fairSharing", "flavorFungibility", "namespaceSelector", "preemption"], dict),
        **dict.fromkeys(["cohortName", "queueingStrategy", "stopPolicy"], str),
        "resourceGroups": list,
    },
    "LocalQueueSpec": {"clusterQueue": str, "fairSharing": dict, "stopPolicy": str},
    "ResourceGroup": {"coveredResources": list, "flavors": list},
    "FlavorQuotas": {"name": str, "resources": list},
}


def documents(name: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all((CLUSTER / name).read_text()) if document]


def validate(document: dict[str, Any]) -> None:
    """Hold a document against the schema of Kubernetes, which refuses keys that it does not name."""
    import kubernetes_validate  # takes 3 s, of every process that collects

    kubernetes_validate.validate(document, VERSION, strict=True)


def check_fields(found: dict[str, Any], kind: str) -> None:
    known = KUBERAY[kind]
    assert set(found) <= set(known), kind
    for key, value in found.items():
        assert type(value) is known[key], f"{kind}.{key}: {value!r}"


def test_the_cron_job_keeps_the_schema_and_never_overlaps() -> None:
    found = documents("cronjob.yaml")
    assert [one["kind"] for one in found] == ["CronJob", "ServiceAccount", "Role", "RoleBinding"]
    for one in found:
        validate(one)
    assert found[0]["spec"]["concurrencyPolicy"] == "Forbid"
    with pytest.raises(Exception, match="'schedul'") as refused:
        validate(found[0] | {"spec": {"schedul": "* * * * *"}})
    assert type(refused.value).__name__ == "ValidationError"
    (container,) = found[0]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    subprocess.run(["sh", "-n", "-c", container["args"][0]], check=True)
    (volume,) = found[0]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["volumes"]
    (generator,) = documents("kustomization.yaml")[0]["configMapGenerator"]
    assert volume["configMap"]["name"] == generator["name"]
    assert generator["files"] == ["rayjob.yaml"]


def test_the_pod_mounts_an_image_and_loads_from_it() -> None:
    (pod,) = documents("image-volume.yaml")
    validate(pod)
    (volume,), (container,) = pod["spec"]["volumes"], pod["spec"]["containers"]
    assert OciReference.parse(f"oci://{volume['image']['reference']}").tag == "stable"
    (mount,) = container["volumeMounts"]
    assert mount["name"] == volume["name"]
    assert f"load_state_dict('{mount['mountPath']}')" in container["command"][-1]


def check_job(spec: dict[str, Any]) -> None:
    """A RayJob's spec, also within a RayCronJob."""
    check_fields(spec, "RayJobSpec")
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    assert re.search(COMMAND, spec["entrypoint"])
    check_cluster(spec["rayClusterSpec"])


def check_cluster(cluster: dict[str, Any]) -> None:
    """A RayCluster's spec, and the pods in it."""
    check_fields(cluster, "RayClusterSpec")
    check_fields(cluster["authOptions"], "AuthOptions")
    assert cluster["authOptions"]["mode"] == "token"
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    assert cluster["rayVersion"] == pinned[1]
    assert f"rayproject/ray:{pinned[1]}-" in (CLUSTER / "Dockerfile").read_text()
    check_fields(cluster["headGroupSpec"], "HeadGroupSpec")
    for group in cluster["workerGroupSpecs"]:
        check_fields(group, "WorkerGroupSpec")
        assert {"groupName", "minReplicas", "maxReplicas"} <= set(group)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **group["template"]}
        validate(pod)


def test_the_ray_job_has_only_fields_that_kuberay_knows_and_pods_that_kubernetes_takes() -> None:
    (job,) = documents("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    check_job(job["spec"])


def test_the_ray_cron_job_runs_the_same_job_at_the_same_time() -> None:
    (found,), (job,) = documents("raycronjob.yaml"), documents("rayjob.yaml")
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayCronJob")
    check_fields(found["spec"], "RayCronJobSpec")
    check_job(found["spec"]["jobTemplate"])
    assert found["spec"]["jobTemplate"] == job["spec"]
    assert found["spec"]["schedule"] == documents("cronjob.yaml")[0]["spec"]["schedule"]


def test_the_head_that_survives_knows_its_redis() -> None:
    *others, cluster = documents("raycluster-ft.yaml")
    for one in others:
        validate(one)
    secret, service, redis = others
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    check_cluster(cluster["spec"])
    options = cluster["spec"]["gcsFaultToleranceOptions"]
    check_fields(options, "GcsFaultToleranceOptions")
    check_fields(options["redisPassword"], "RedisCredential")
    host, _, port = options["redisAddress"].partition(":")
    assert (host, int(port)) == (service["metadata"]["name"], service["spec"]["ports"][0]["port"])
    assert service["spec"]["selector"] == redis["spec"]["template"]["metadata"]["labels"]
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    for reference in (options["redisPassword"]["valueFrom"], container["env"][0]["valueFrom"]):
        assert reference["secretKeyRef"]["name"] == secret["metadata"]["name"]
        assert reference["secretKeyRef"]["key"] in secret["stringData"]


def test_the_queue_has_room_for_the_job_and_knows_its_flavors() -> None:
    *flavors, cluster_queue, queue = documents("kueue.yaml")
    assert {one["apiVersion"] for one in (*flavors, cluster_queue, queue)} == {"kueue.x-k8s.io/v1beta2"}
    kinds = [one["kind"] for one in (*flavors, cluster_queue, queue)]
    assert kinds == ["ResourceFlavor", "ResourceFlavor", "ClusterQueue", "LocalQueue"]
    for one in (*flavors, cluster_queue, queue):
        check_fields(one["spec"], f"{one['kind']}Spec")
    assert queue["spec"]["clusterQueue"] == cluster_queue["metadata"]["name"]
    assert queue["metadata"]["name"] == "default"  # which takes what names no queue, such as a RayCronJob's jobs
    (group,) = cluster_queue["spec"]["resourceGroups"]
    check_fields(group, "ResourceGroup")
    assert [one["name"] for one in group["flavors"]] == [one["metadata"]["name"] for one in flavors]
    (job,) = documents("rayjob.yaml")
    assert job["spec"]["shutdownAfterJobFinishes"] is True  # Kueue wants it, and no cluster that is there already
    assert "clusterSelector" not in job["spec"]
    asked = _asked(job["spec"]["rayClusterSpec"])
    for flavor in group["flavors"]:
        check_fields(flavor, "FlavorQuotas")
        quotas = {one["name"]: _number(one["nominalQuota"]) for one in flavor["resources"]}
        assert list(quotas) == group["coveredResources"]
        assert set(asked) <= set(quotas)
        assert all(asked[name] <= quotas[name] for name in asked), flavor["name"]


def _asked(cluster: dict[str, Any]) -> Counter[str]:
    """What the head and the workers ask for together: requests, and limits where they have none."""
    total = Counter[str]()
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        for container in group["template"]["spec"]["containers"]:
            wanted = container["resources"]["limits"] | container["resources"]["requests"]
            for name, text in wanted.items():
                total[name] += group.get("replicas", 1) * _number(text)
    return total


def _number(text: str | int) -> int:
    return int(text) if str(text).isdecimal() else int(str(text).removesuffix("Gi")) << 30


def test_a_field_that_kuberay_lacks_is_found() -> None:
    with pytest.raises(AssertionError, match="RayJobSpec"):
        check_fields({"entrypoint": "true", "deletionPolicy": "DeleteSelf"}, "RayJobSpec")  # of KubeRay 1.3
    with pytest.raises(AssertionError, match="backoffLimit"):
        check_fields({"backoffLimit": "0"}, "RayJobSpec")


@pytest.mark.parametrize(
    ("deployment", "status", "code"),
    [
        ("Complete", "SUCCEEDED", 0),
        ("Failed", "FAILED", 1),
        ("Failed", "RUNNING", 1),  # DeadlineExceeded
        ("Failed", "", 1),  # SubmissionFailed
        ("ValidationFailed", "", 1),
    ],
)
def test_the_cron_job_ends_as_its_ray_job_does(deployment: str, status: str, code: int, tmp_path: Path) -> None:
    (container,) = documents("cronjob.yaml")[0]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    answers = {
        "kubectl": f"""case "$*" in
            create*) echo rayjob.ray.io/x ;;
            *jobDeploymentStatus*) [ -e asked ] && printf {deployment}; touch asked ;;
            *jobStatus*) printf '{status}' ;;
            *message*) echo why ;;
        esac""",
        "sleep": "echo slept",
    }
    for name, answer in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    ended = subprocess.run(
        [*container["command"], *container["args"]], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout.split()) == (code, ["rayjob.ray.io/x", "slept", "why"]), ended.stderr


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd-analyze is not installed")
    for name in ("birkhoff.service", "birkhoff.timer"):
        text = (CLUSTER / name).read_text()
        (tmp_path / name).write_text(text.replace("/opt/birkhoff/.venv/bin/birkhoff", sys.executable))
    for name in ("birkhoff.service", "birkhoff.timer"):
        ended = subprocess.run([verify, "verify", str(tmp_path / name)], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert name not in ended.stderr
    service = (CLUSTER / "birkhoff.service").read_text()
    assert re.search(COMMAND, service)


def test_the_line_of_cron_runs_the_same_command() -> None:
    (line,) = [line for line in (CLUSTER / "crontab").read_text().splitlines() if not line.startswith("#")]
    *times, command = line.split(maxsplit=5)
    assert all(re.fullmatch(r"[0-9*/,-]+", time) for time in times)
    assert re.search(COMMAND, command)
    assert "%" not in command  # cron makes a newline of it
    subprocess.run(["sh", "-n", "-c", command], check=True)
