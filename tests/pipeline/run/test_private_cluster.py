"""A cluster that a run starts is its user's and this machine's alone, whatever Ray's defaults are."""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from birkhoff.pipeline.errors import WorkerError
from birkhoff.pipeline.run import cluster as module
from birkhoff.pipeline.run.cluster import Cluster
from tests.patience import PATIENT_SECONDS

pytestmark = pytest.mark.slow
NOBODY = 65534
LISTENS = "0A"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def cluster(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("RAY_TMPDIR", "/tmp")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
        patch.setenv("PYTHONPATH", "/mine:")
        with Cluster(None) as found:
            yield found


@pytest.fixture(scope="module")
def folder(cluster: Cluster) -> Path:
    """Ours, above the one that Ray made."""
    return Path(cluster.ray._private.worker._global_node.get_temp_dir_path()).parent


def family(cluster: Cluster) -> list[int]:
    """Every process of the cluster, and this one."""
    assert cluster._reaper is not None
    return [*module_family(cluster._reaper._mark), os.getpid()]


def module_family(mark: str) -> list[int]:
    from birkhoff.pipeline.run.cleanup import Family

    return Family(mark).alive()


def listening() -> dict[str, str]:
    """Local address in hex, by inode, of every socket on this machine that listens."""
    lines = [line for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {words[9]: words[1].partition(":")[0] for line in lines if (words := line.split())[3] == LISTENS}


def test_its_token_is_in_no_file_and_on_no_command_line(cluster: Cluster, home: Path, folder: Path) -> None:
    token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert not (home / ".ray").exists()
    for pid in family(cluster):
        assert token.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    held = [path for path in folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert held == []


def test_its_ports_are_on_loopback(cluster: Cluster) -> None:
    known, found = listening(), set[str]()
    for pid in family(cluster):
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            try:
                name = str(handle.readlink())
            except OSError:
                continue
            if name.startswith("socket:[") and name[8:-1] in known:
                found.add(known[name[8:-1]])
    assert found
    assert found <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_it_consists_of_what_a_run_needs(cluster: Cluster) -> None:
    """Each program of Ray's in Python takes two seconds of a processor to start."""
    titles = [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in family(cluster)]
    for program in ("monitor.py", "log_monitor.py", "dashboard/dashboard.py"):
        assert [title for title in titles if program in title] == []


def test_its_folder_is_closed_after_it_started(folder: Path) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder.stat().st_uid == os.geteuid()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be bound to processors here")
def test_it_has_the_processors_that_its_run_is_bound_to() -> None:
    asked = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from birkhoff.pipeline.run.cluster import Cluster\n"
        "with Cluster(None) as cluster: found = cluster.ray.cluster_resources()['CPU']\n"
        "print(found)"
    )
    found = subprocess.run([sys.executable, "-c", asked], check=True, capture_output=True, text=True)
    assert found.stdout == "1.0\n"


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="another user needs root and setpriv")
class TestAnotherUser:
    """What somebody else on the same machine can do; `setpriv` makes us one."""

    @staticmethod
    def as_nobody(code: str, *, timeout: float = PATIENT_SECONDS, **variables: str) -> str:
        """Standard output of Python code, run as another user; `TIMEOUT` where it did not end."""
        environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1", **variables}
        words = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", sys.executable, "-c", code]
        try:
            ran = subprocess.run(words, env=environment, cwd="/", capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return "TIMEOUT"
        return ran.stdout

    def test_reads_no_file_and_no_environment(self, cluster: Cluster, folder: Path) -> None:
        code = (
            "import os\n"
            "for path in {paths}:\n"
            "    try:\n"
            "        os.listdir(path) if os.path.isdir(path) else open(path, 'rb').read()\n"
            "        print('READ', path)\n"
            "    except OSError as error:\n"
            "        print('denied', path)\n"
        )
        paths = [str(folder), str(folder / "r"), *(f"/proc/{pid}/environ" for pid in family(cluster))]
        said = self.as_nobody(code.format(paths=paths))
        assert "READ" not in said
        assert said.count("denied") == len(paths)

    def test_runs_nothing_without_the_token(self, cluster: Cluster) -> None:
        address = cluster.ray.get_runtime_context().gcs_address
        code = (
            "from ray._raylet import GcsClient\n"
            f"client = GcsClient(address={address!r})\n"
            "print('IN', client.internal_kv_keys(b'', namespace=None, timeout=5) is not None)\n"
        )
        if "ok" not in self.as_nobody("import ray; print('ok')"):
            pytest.skip("another user cannot import the Ray of this environment")
        variables = {"RAY_AUTH_MODE": "token"}
        assert "IN" in self.as_nobody(code, **variables, RAY_AUTH_TOKEN=os.environ["RAY_AUTH_TOKEN"])  # it would work
        with ThreadPoolExecutor() as pool:  # each waits in vain
            wrong = pool.submit(self.as_nobody, code, timeout=20, **variables, RAY_AUTH_TOKEN="0" * 64)
            none = pool.submit(self.as_nobody, code, timeout=20)
        assert "IN" not in wrong.result()
        assert "IN" not in none.result()


def test_settings_are_what_they_were_once_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that is joined later gets the token and the addresses of its own."""
    import ray

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "theirs")
    clusters = ray._private.ray_constants.ENABLE_RAY_CLUSTER
    with module._private(ray, {}):
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert os.environ["RAY_AUTH_TOKEN"] != "theirs"
        assert not ray._private.ray_constants.ENABLE_RAY_CLUSTER
    assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]) == ("disabled", "theirs")
    assert clusters == ray._private.ray_constants.ENABLE_RAY_CLUSTER


class TestARayThatDoesOtherwise:
    class Ray:
        __version__ = "9.9"

        @staticmethod
        def nodes() -> list[dict[str, str]]:
            return [{"NodeManagerAddress": "10.0.0.7"}]

    def test_is_not_used(self, tmp_path: Path) -> None:
        with pytest.raises(WorkerError, match=r"Ray 9\.9 serves 10\.0\.0\.7, expected 127\.0\.0\.1 alone; use"):
            module._check_private(tmp_path, self.Ray)

    def test_a_file_system_without_permissions(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tmp_path.chmod(0o777)
        monkeypatch.setattr(Path, "chmod", lambda *_: None)
        with pytest.raises(WorkerError, match="others can enter Ray's folder; set RAY_TMPDIR"):
            module._check_private(tmp_path, self.Ray)


def test_workers_have_the_users_python_path_behind_what_hides_a_module(cluster: Cluster, folder: Path) -> None:
    shown = cluster.ray.remote(os.getenv).options(num_cpus=0)
    assert cluster.ray.get(shown.remote("PYTHONPATH"), timeout=PATIENT_SECONDS).startswith(f"{folder}/hidden:/mine:")


def test_the_drivers_own_settings_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    with module._private(pytest.importorskip("ray"), {"PYTHONPATH": "/hidden:/mine"}):
        assert os.environ["PYTHONPATH"] == "/hidden:/mine"
    assert os.environ["PYTHONPATH"] == "/mine"
    monkeypatch.delenv("PYTHONPATH")
    with module._private(pytest.importorskip("ray"), {"PYTHONPATH": "/hidden"}):
        pass
    assert "PYTHONPATH" not in os.environ
