"""How long tests wait for something else: a process, a thread, a server, a node of Ray."""

PATIENT_SECONDS = 600.0
"""Until it counts as hung. How long a start takes on a busy machine is no part of any test, so it is long: beside other
work a start of Ray took two minutes where it takes ten seconds alone. pytest's own limit, in pyproject.toml, is twice
this, so that the test says first what it waited for."""

RAY_SETTINGS = {
    "RAY_raylet_start_wait_time_s": f"{PATIENT_SECONDS / 4:.0f}",
    "RAY_agent_register_timeout_ms": f"{PATIENT_SECONDS * 1000:.0f}",
    "RAY_worker_register_timeout_seconds": f"{PATIENT_SECONDS:.0f}",
}
"""Environment of a Ray that a test starts itself. Without it Ray gives up a start whose node has not come up within
30 s; with it after a quarter of `PATIENT_SECONDS`, so that there is time to start again where the node has died."""

RAY_GAVE_UP = "timed out during startup"
"""What Ray says then."""
