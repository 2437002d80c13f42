"""manifests/cluster: schemas, units and the cron line; `test_schedule` submits jobs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "manifests" / "cluster"
VERSION = "1.33"
COMMAND = r"birkhoff compress \S+ .*--scheduled"

# Fields of KubeRay's v1 CRDs that these files use (ray-operator/apis/ray/v1/rayjob_types.go, raycluster_types.go).
RAY_JOB: dict[str, type] = {
    "entrypoint": str,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "backoffLimit": int,
    "activeDeadlineSeconds": int,
    "submissionMode": str,
    "rayClusterSpec": dict,
}
GROUP: dict[str, type] = {
    "groupName": str,
    "replicas": int,
    "minReplicas": int,
    "maxReplicas": int,
    "rayStartParams": dict,
    "template": dict,
}


def documents(name: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all((CLUSTER / name).read_text()) if document]


def check_fields(found: dict[str, Any], known: dict[str, type]) -> None:
    assert set(found) <= set(known)
    for key, value in found.items():
        assert type(value) is known[key], f"{key}: {value!r}"


def test_the_cron_job_keeps_the_schema_and_never_overlaps() -> None:
    found = documents("cronjob.yaml")
    assert [one["kind"] for one in found] == ["CronJob", "ServiceAccount", "Role", "RoleBinding"]
    for one in found:
        kubernetes_validate.validate(one, VERSION, strict=True)
    assert found[0]["spec"]["concurrencyPolicy"] == "Forbid"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(found[0] | {"spec": {"schedul": "* * * * *"}}, VERSION, strict=True)
    (container,) = found[0]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    subprocess.run(["sh", "-n", "-c", container["args"][0]], check=True)
    (volume,) = found[0]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["volumes"]
    (generator,) = documents("kustomization.yaml")[0]["configMapGenerator"]
    assert volume["configMap"]["name"] == generator["name"]
    assert generator["files"] == ["rayjob.yaml"]


def test_the_ray_job_has_only_fields_that_kuberay_knows_and_pods_that_kubernetes_takes() -> None:
    (job,) = documents("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    check_fields(job["spec"], RAY_JOB)
    assert re.search(COMMAND, job["spec"]["entrypoint"])
    cluster = job["spec"]["rayClusterSpec"]
    assert set(cluster) == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    assert cluster["rayVersion"] == pinned[1]
    assert f"rayproject/ray:{pinned[1]}-" in (CLUSTER / "Dockerfile").read_text()
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        check_fields(group, GROUP)
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **group["template"]}
        kubernetes_validate.validate(pod, VERSION, strict=True)


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
    assert "SuccessExitStatus=22" in service


def test_the_line_of_cron_runs_the_same_command() -> None:
    (line,) = [line for line in (CLUSTER / "crontab").read_text().splitlines() if not line.startswith("#")]
    *times, command = line.split(maxsplit=5)
    assert all(re.fullmatch(r"[0-9*/,-]+", time) for time in times)
    assert re.search(COMMAND, command)
    assert "%" not in command  # cron makes a newline of it
    subprocess.run(["sh", "-n", "-c", command], check=True)
