"""How long tests wait for something else: a process, a thread, a server, a node of Ray."""

PATIENT_SECONDS = 600.0
"""Until it counts as hung. How long a start takes on a busy machine is no part of any test, so it is long: beside other
work a start of Ray took two minutes where it takes ten seconds alone. pytest's own limit, in pyproject.toml, is twice
this, so that the test says first what it waited for."""
