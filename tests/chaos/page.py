"""The report: what was done, what was lost, and which promises broke."""

import statistics
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# kind of row: (heading, what was promised, what its seconds are)
KINDS = {
    "kill": (
        "Kills",
        "The next start goes on from the newest committed checkpoint and says so; nothing that was "
        "committed is lost, nothing else is read.",
        "until all ranks had ended",
    ),
    "damage": (
        "Damaged checkpoints",
        "The next start passes over it, says why, and takes the copy in the object store, or else "
        "the next one that is valid.",
        "",
    ),
    "disk": (
        "Full disks",
        "The run ends with one line that says so; what was committed stays and is gone on from.",
        "until all ranks had ended",
    ),
    "two_jobs": (
        "Second jobs on one run directory",
        "The second is refused with exit code 2; the first goes on.",
        "until the second had ended",
    ),
    "stop": (
        "Stops",
        "All ranks end with 33, and no completed step is lost (0 where the run was done already).",
        "until all ranks had ended",
    ),
    "round": (
        "Machines that come and go",
        "No deadlock, and the next step within 15 s of the loss of a machine.",
        "until the next step",
    ),
    "end": (
        "Ends of the runs",
        "Each step was done on its own samples, in order; losses are those of a run that was left "
        "alone: bit for bit at one layout, to 1e-5 where layouts changed.",
        "",
    ),
}


def summarize(rows):
    """Counts and times of each kind of injection.

    Args:
        rows: `long_run.Row`s.
    """
    summary = {}
    for kind in KINDS:
        mine = [row for row in rows if row.kind == kind]
        if mine:
            summary[kind] = {
                "count": len(mine),
                "broken": sum(bool(row.problems) for row in mine),
                "lost_steps": _spread([row.lost_steps for row in mine]),
                "seconds": _spread([row.seconds for row in mine]),
            }
            for moment in {row.moment for row in mine} if kind == "round" else ():
                seconds = [row.seconds for row in mine if row.moment == moment]
                summary[kind][f"seconds {moment}"] = _spread(seconds)
    return summary


def write_page(result, path):
    """Writes the page of a result; returns its path.

    Args:
        result: As `__main__` writes it to JSON.
        path: Of the page.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    groups = [
        (kind, *KINDS[kind], [row for row in result["injections"] if row["kind"] == kind])
        for kind in KINDS
    ]
    page = environment.get_template("page.html").render(
        result=result,
        groups=[group for group in groups if group[-1]],
        broken=[row for row in result["injections"] if row["problems"]],
    )
    path.write_text(page)
    return path


def _spread(values):
    return {"median": round(statistics.median(values), 2), "worst": round(max(values), 2)}
