"""The part of the page about recording a run, looking into its record, listening at its sites, and its metrics."""

from __future__ import annotations

from measure.recording import STEPS, TURNS

from report.bars import heard_more, more
from report.results import Figure, Tree


def recording(tree: Tree) -> str:
    if "recording" not in tree:
        return ""
    rounds = tree["recording"]["rounds"]
    lines = [
        "## Recording",
        "",
        f"The mean time of {STEPS} default steps, until everything is on disk, against that of steps that are not "
        f"recorded, the fastest of {TURNS} turns by the fastest within a round; *processor* is the time of all threads "
        "together. "
        "*free* leaves the second core to the recorder's threads, *pinned* gives the whole process one core. "
        "Validations are left out, and so is making the folder.",
        "",
        "| core | recorded | ms a step | longer | processor | bytes a step | bytes a parameter and step |",
        "|---|---|---|---|---|---|---|",
    ]
    parameters = tree["sizes"]["default"]["about"]["parameters"]
    for place, ways in rounds[0].items():
        for way, first in ways.items():
            least = min(r[place][way]["step_s"] for r in rounds)
            cells = [place, way, f"{1e3 * least:.3f}", "", "", "", ""]
            if way != "not recorded":
                cells[3:5] = (
                    Figure(more(tree, place, way, key)).show("{:+.1f} %") for key in ("step_s", "processor_s")
                )
                cells[5:] = f"{first['bytes']:,.0f}", f"{first['bytes'] / parameters:.2f}"
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def forensics(tree: Tree) -> str:
    if "forensics" not in tree:
        return ""
    rounds = tree["forensics"]["rounds"]
    told = {
        "`minitrain train` (2000 steps, every step recorded)": "training_s",
        "`minitrain replay RUN --step 500`": "replay_s",
        "`minitrain verify RUN`": "verify_s",
        "`minitrain info RUN`": "info_s",
        "`minitrain replay RUN --nan-bisect`, nothing is wrong": "bisect_nothing_s",
        "`minitrain replay RUN --nan-bisect --blind`, a parameter became NaN at step 731": "bisect_nan_s",
        "`minitrain diff A B`, different from step 500 on": "diff_s",
    }
    lines = ["## Looking into a recorded run", "", "| from the shell, nothing pinned | s |", "|---|---|"]
    lines += [f"| {what} | {Figure([r[key] for r in rounds]).show('{:.2f}')} |" for what, key in told.items()]
    reads = Figure([r["moments_s"] for r in rounds]).show("{:.2f}", 1e3)
    return "\n".join([*lines, f"\n`run.moments(t)` of an open run: {reads} ms."]) + "\n"


def hooks(tree: Tree) -> str:
    if "hooks" not in tree:
        return ""
    rounds = tree["hooks"]["rounds"]
    lines = ["## Listening", "", "| once | ns |", "|---|---|"]
    lines += [
        f"| {what} | {Figure([r['fires'][what] for r in rounds]).show('{:.1f}', 1e9)} |" for what in rounds[0]["fires"]
    ]
    lines += ["", "| a default step with | µs | longer |", "|---|---|---|"]
    for what in rounds[0]["steps"]:
        least = min(r["steps"][what] for r in rounds)
        longer = Figure(heard_more(rounds, what)).show("{:+.1f} %")
        lines.append(f"| {what} | {1e6 * least:.0f} | {longer} |")
    return "\n".join(lines) + "\n" + _least_of_probes(rounds)


def _least_of_probes(rounds: list[Tree]) -> str:
    """What the arithmetic of the statistics takes, wherever the elements come from."""
    elements = rounds[0].get("elements")
    if not elements:
        return ""
    each = [(r["fires"]["a probe, 4096 elements"] - r["fires"]["a probe, 0 elements"]) / 4096 for r in rounds]
    share = Figure([100 * elements * s / r["steps"]["nobody"] for s, r in zip(each, rounds, strict=True)])
    return (
        f"\nAll sites of a step show {elements:,} elements. At {Figure(each).show('{:.3f}', 1e9)} ns an element, which "
        f"is what a probe takes in the first cache, their ten statistics are {share.show('{:.1f} %')} of a step. The "
        "rest of what probes cost is reading the elements from where they are.\n"
    )


def metrics(tree: Tree) -> str:
    if "metrics" not in tree:
        return ""
    rounds = tree["metrics"]["rounds"]
    off, on = (Figure([r[key] for r in rounds]).show("{:.2f} s") for key in ("off_s", "on_s"))
    longer = Figure([100 * (r["on_s"] / r["off_s"] - 1) for r in rounds]).show("{:.1f} %")
    page, work = (Figure([r[key] for r in rounds]).show("{:.2f} s") for key in ("page_s", "page_processor_s"))
    return (
        "## Metrics\n\nThe loop of a default run of 2000 steps, not recorded, with log, validations and checkpoints; "
        "both ways in turn, every step the fastest of its kind in six turns.\n\n"
        "| without metrics | with all seven panels | longer | `minitrain dashboard RUN`, apart | its processor time |\n"
        "|---|---|---|---|---|\n"
        f"| {off} | {on} | {longer} | {page} | {work} |\n"
    )
