"""`results/family.md`, drawn from the rows."""

from typing import Any

from tests.family.members import MEMBERS
from tests.harness.benchmarks.common import table

Row = dict[str, Any]

_HEAD = [
    *("member", "code", "builds", "compresses, MB", "loads", "SQNR, dB", "box", "point", "everything", "exports"),
]

_STEPS = ("builds", "masks", "compresses", "loads", "sqnr_db", "everything", "exports")

_ABOUT = """# The family

`.venv-family/bin/python -m tests.harness.benchmarks family`, after `make setup-family`, with BIRKHOFF_UPSTREAM naming a
folder of the publishers' clones (`tests/family/conftest.py` lists them). Each row is one member at its full
architecture, built by its publishers' own code, on one picture. All weights are random (drawn so that the signal
lives) but those of LiteMedSAM, which are trained: in the other rows sizes, SQNR and numbers of masks show that a step
runs, not how well a trained model compresses.

- *code*: the package or the clone that builds the member, and whose predictor its masks are compared with.
- *builds*: weights in millions; *as published*: all names and shapes are those of the published file, where they are
  known.
- *compresses*: bytes of the checkpoint and of its version, profile `balanced`, each tensor checked. Masks of trained
  weights are proven too; random ones (`proof: false`) find nothing that could be.
- *loads*: HyperLinear layers after `load_into` into the model that Birkhoff built for the artifact: by its tensors, by
  its transformers configuration (stored with it, or the user's own where it names another package's backbone) or by a
  `--builder`. No tensor is missing and none is left over.
- *SQNR*: the compressed model's image embedding against the original's. A RepViT of random weights (EdgeSAM, EdgeTAM)
  amplifies every error on its way.
- *box*, *point*: pixels whose mask differs from that of the member's own predictor, of those of the picture; same
  weights, not compressed. Both masks are cut at the predictor's median logit, so that half of the pixels are inside;
  LiteMedSAM's and MedSAM's code gives masks alone, and takes no points (*not offered*).
  *side 256*: all weights, on squares of that side (the first absolute positions of each row and column), where 1024
  would take minutes and show the same.
- *everything*: masks that the compressed model's mask generator keeps, and the points that it asked at.
- *exports*: the exported dense checkpoint fits the publishers' code with `strict=True`."""


def markdown(rows: dict[str, Row]) -> str:
    """The page: the table, what has no result and why, and where each row was made."""
    there = [rows[member.name] for member in MEMBERS if member.name in rows]
    absent = [member.name for member in MEMBERS if member.name not in rows]
    sections = [_ABOUT, table(_HEAD, [_cells(row) for row in there])]
    if absent:
        sections.append(f"Not run yet: {', '.join(absent)}.")
    reasons = [
        f"- {row['name']}, {step}: {row[step]['reason']}" for row in there for step in _STEPS if _reason(row, step)
    ]
    if reasons:
        sections.append("Without a result:\n\n" + "\n".join(reasons))
    sections.append("Made on (`+`: that commit with later changes):\n\n" + "\n".join(_conditions(there)))
    return "\n\n".join(sections) + "\n"


def failed(row: Row) -> bool:
    """Whether a step of a row ended without a result."""
    return any(_reason(row, step) for step in _STEPS)


def _reason(row: Row, step: str) -> str | None:
    cell = row.get(step)
    return cell.get("reason") if isinstance(cell, dict) else None


def _conditions(rows: list[Row]) -> list[str]:
    """A line for each set of conditions, the load left to each row."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        made = row["made_on"]
        about = "; ".join(f"{key} {value}" for key, value in made.items() if key != "load")
        load = made["load"].partition(" ")[0]
        groups.setdefault(about, []).append(
            f"{row['name']} ({sum(row.get('seconds', {}).values()):.0f} s, load {load})"
        )
    return [f"- {about}: {', '.join(names)}" for about, names in groups.items()]


def _cells(row: Row) -> list[str]:
    return [
        row["name"],
        row.get("code", ""),
        _cell(row, "builds", lambda c: f"{c['weights'] / 1e6:.1f} M{_published(c['published'])}"),
        _cell(row, "compresses", lambda c: f"{c['bytes'] / 1e6:.1f} → {c['stored'] / 1e6:.1f}"),
        _cell(row, "loads", lambda c: f"{c['compressed']}, by {c['by']}"),
        _cell(row, "sqnr_db", lambda c: f"{c:.1f}"),
        _cell(row, "masks", lambda c: _pixels(row, c, "box")),
        _cell(row, "masks", lambda c: _pixels(row, c, "point")),
        _cell(row, "everything", lambda c: f"{c['masks']} at {c['points']} points"),
        _cell(row, "exports", lambda c: "strict"),
    ]


def _published(found: str) -> str:
    return {"equal": ", as published", "no layout": ""}.get(found, f", {found} from the published file")


def _cell(row: Row, step: str, show: Any) -> str:
    if step not in row:
        return "not reached"
    return "below" if _reason(row, step) else str(show(row[step]))


def _pixels(row: Row, cell: dict[str, Any], kind: str) -> str:
    if kind not in cell:
        return "not offered"
    side = f", side {row['side']}" if row.get("side") else ""
    return f"{cell[kind]['pixels']} of {cell[kind]['of'] / 1000:.0f} k{side}"
