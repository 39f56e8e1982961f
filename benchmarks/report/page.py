"""RESULTS.md, from the stored figures."""

from __future__ import annotations

from collections.abc import Iterator

from sides import PEERS

from report.bars import Bar, BitBar, bars
from report.results import Race, Tree, same_bits
from report.watching import forensics, hooks, metrics, recording

HEAD = """\
# Benchmark results

Written by `make bench` (`python benchmarks/run.py`): do not edit, run it again. The figures behind this page are in
`results/results.json`; `python benchmarks/run.py --parts` renders them without measuring.

![A step of each peer, in times of minitrain's](results/race.png)
"""

READING = """\
## How to read this

- A step is forward, backward, clipping by the global norm and AdamW, in float32, of the same model (DESIGN.md) from the
  same weights on the same batches. Every side is a process of its own, pinned to as many cores as it has threads; the
  sides run in turn, A B C A B C, in as many rounds as said. The first steps of a process are not counted.
- *smallest* is the fastest step of all rounds, *median* the median of the rounds' medians. In brackets: from the least
  to the greatest round. *ratio* is a step of that side over a step of minitrain, smallest by smallest within a round,
  then the median of the rounds: above 1 minitrain is faster.
- *of peak*: the FLOPs of a step's matrix products over its smallest time, as a share of the fused multiply-adds that
  `peak.c` does in the same round on as many cores. Attention counts in full, padding too, backward as twice forward.
- *from core to core and back*: of a cache line, before minitrain's turn, by `round_trip.c`. Some 60 ns are cores that
  share their last cache. Threads that exchange lines after every product of a step of 1.6 ms are slow on cores that do
  not, whatever the code; a virtual machine cannot choose, and its host may move it between two rounds.
- *Default* are the first batches of the built-in corpus, of which half is padding. minitrain leaves out what its
  backward pass would multiply by zeros there (to the same bits), the peers do not; so *of peak* says less of it.
  *Default without padding* is the same size with a token at every position, as are all other sizes.
- *import* is what a fresh process needs to import the side, *first step* its first call, compilation included (with an
  empty cache; in brackets with a full one where that differs). *memory* is the peak of the process.
- *loss* and *norm* (of the gradients, before clipping) are those of the last step: equal to rounding, if all compute
  the same model.
- *same bits*: parameters after some steps, over threads and instruction sets: [Identity of bits](#identity-of-bits).
"""

SIDES_SAID = """\
## The sides

- **PyTorch eager, as first written** (`torch`): attention by hand with a mask and softmax, AdamW with its defaults.
- **PyTorch eager, at its best** (`torch-best`): one product for query, key and value, the rotation as a complex
  product, fused causal attention (SDPA) without a mask, fused AdamW. Single trials of real-valued rotation,
  flushing denormals, another malloc and huge pages showed no clear gain.
- **torch.compile** (`torch-compile`): the same with the rotation in real numbers, for which it has code; model and loss
  compiled for static shapes, fused AdamW. {compile_tried}
- **JAX** (`jax`): the whole step in one `jit`, state donated, batches on the device before the clock starts.
  {jax_tried}
- **NumPy** (`numpy`): by hand, on OpenBLAS, float32 throughout, in place where it can be, gradients and moments flat,
  the optimizer in pieces that fit into the cache.
"""
COMPILE_TRIED = "Single trials of compiling the optimizer too and of `max-autotune` showed no clear gain."
JAX_TRIED = """\
One flat vector for the optimizer and `jax.nn.dot_product_attention` showed no clear gain. Left out because it is
  experimental: XLA's fusion of graphs into XNNPACK, a quarter faster at M in a single trial on a busy machine."""

NOT_MEASURED = """\
- Not measured: bfloat16, accelerators, more than two threads, processors of other makes. On an AMD processor MKL, in
  PyTorch, keeps to AVX2, so where there is AVX-512 the fair comparison is minitrain held to AVX2.
"""


def page(tree: Tree) -> str:
    parts = [HEAD, _where(tree), READING, _bars(tree)]
    parts += [_size(size) for size in tree["sizes"].values() if "race" in size]
    parts += [_identity(tree), _command(tree), recording(tree), forensics(tree), hooks(tree), metrics(tree)]
    parts.append(_not_won(tree))
    parts.append(SIDES_SAID.format(compile_tried=COMPILE_TRIED, jax_tried=JAX_TRIED))
    return "\n".join(part for part in parts if part)


def _where(tree: Tree) -> str:
    """Machine, versions and command: once where all was measured at once, else for every part."""
    measured: dict[str, tuple[Tree, list[str]]] = {}

    def note(about: Tree, what: str) -> None:
        key = f"{about['date']} {about['command']}"
        measured.setdefault(key, (about, []))[1].append(what)

    for name, size in tree["sizes"].items():
        if "race" in size:
            note(size["race"]["about"], f"race {name}")
        for side, found in size.get("identity", {}).items():
            note(found["about"], f"bits {name} {side}")
    for part in ("command", "recording", "forensics", "hooks", "metrics"):
        if part in tree:
            note(tree[part]["about"], part)
    lines = ["## Where and when", ""]
    for about, what in measured.values():
        vectors = ", ".join(isa for isa in about["isas"])
        lines += [
            f"- {about['date']}, `{about['command']}`, commit {about['commit']}; load {about['load_before']} before"
            + (f", {about['load_after']} after the race." if "load_after" in about else "."),
            f"  {about['machine']}, {about['system']}; instruction sets {vectors}.",
            f"  minitrain {about['minitrain']}, Python {about['python']}, {about['compiler']} for the peak.",
        ]
        if len(measured) > 1:
            lines.append(f"  Measured: {', '.join(what)}.")
    lines.append(f"- Peers: {', '.join(_peer_versions(tree)) or 'none'}.")
    missing = {side: None for size in tree["sizes"].values() for side in size.get("race", {}).get("left_out", [])}
    if missing:
        lines.append(f"- Left out, because they could not be installed: {', '.join(missing)}.")
    quiet = [v for size in tree["sizes"].values() if "race" in size for v in _busy(Race(size, 1))]
    if quiet:
        share = min(quiet)
        warning = "" if share > 0.97 else ": **this machine was not quiet**, take times and ratios with a grain of salt"
        lines.append(f"- Of its core the timed process got at least {100 * share:.0f} %{warning}.")
    return "\n".join(lines) + "\n"


def _busy(race: Race) -> list[float]:
    return [r[entrant]["busy"] for r in race.rounds for entrant in race.entrants]


def _peer_versions(tree: Tree) -> list[str]:
    versions: dict[str, None] = {}
    for size in tree["sizes"].values():
        for r in size.get("race", {}).get("rounds", []):
            for sides in r.values():
                for side in PEERS:
                    for package, version in sides.get(side, {}).get("versions", {}).items():
                        versions[f"{package} {version}"] = None
    return list(versions)


def _bars(tree: Tree) -> str:
    lines = ["## The bars", "", "| what | bar | measured | met |", "|---|---|---|---|"]
    return "\n".join([*lines, *(bar.row() for bar in bars(tree))]) + "\n"


def _size(size: Tree) -> str:
    about = size["about"]
    m = about["model"]
    lines = [
        f"## {about['title']}",
        "",
        f"{m['n_layer']} layers, width {m['d_model']}, {m['n_head']} heads, inner width {m['d_ff']}, vocabulary "
        f"{m['vocab_size']}, {about['batch_size']} × {m['max_seq_len']} tokens: {about['parameters']:,} parameters, "
        f"{about['flops'] / 1e9:,.3g} GFLOP a step. {about['steps']} steps a process.",
        "",
    ]
    for threads in (1, 2):
        race = Race(size, threads)
        if race.entrants:
            lines += _table(size, race, threads)
    return "\n".join(lines)


def _table(size: Tree, race: Race, threads: int) -> Iterator[str]:
    peak = max(race.rounds[0]["peak"], key=lambda isa: race.rounds[0]["peak"][isa])
    peaks = [r["peak"][peak] for r in race.rounds]
    cores = "1 thread" if threads == 1 else f"{threads} threads"
    trip = f", {race.round_trip.show('{:.0f}')} ns from core to core and back" if race.round_trip else ""
    rounds = f"{len(race.rounds)} round{'s' * (len(race.rounds) > 1)}"
    yield f"**{cores}**, {rounds}, peak {max(peaks):.0f} GFLOP/s ({peak}){trip}"
    yield ""
    yield (
        "| side | smallest, ms | median, ms | ratio | of peak | import, s | first step, s | memory, MB | loss | norm |"
        " same bits |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    first = race.rounds[0]
    for entrant in race.entrants:
        ratio = race.ratio(entrant, "minitrain").show("{:.2f}") if "minitrain" in race.entrants else ""
        cells = [
            entrant,
            f"{1e3 * race.smallest(entrant):.4g}",
            race.figure(entrant, "step_s", "median").show("{:.4g}", 1e3),
            "1" if entrant == "minitrain" else ratio,
            f"{100 * race.peak_share(entrant).middle:.0f} %",
            f"{race.figure(entrant, 'import_s').middle:.2f}",
            _first_step(race, entrant),
            f"{race.figure(entrant, 'memory_mb').middle:.0f}",
            f"{first[entrant]['losses'][-1]:.6f}",
            f"{first[entrant]['norms'][-1]:.5f}",
            same_bits(size.get("identity", {}).get(entrant, {}).get("runs", [])),
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    for entrant in race.failed:
        yield f"`{entrant}` failed in at least one round and is left out."
        yield ""
    if "minitrain" in race.entrants:
        yield _agreement(race)
        yield ""


def _first_step(race: Race, entrant: str) -> str:
    cold, *warm = [r[entrant]["first_step_s"] for r in race.rounds]
    cached = warm and min(warm) < cold / 2 and cold > 1
    return f"{cold:.2f} ({min(warm):.2f})" if cached else f"{race.figure(entrant, 'first_step_s').middle:.2f}"


def _agreement(race: Race) -> str:
    """Does every side compute the same model? Rounding differs, and grows with the steps."""
    first = race.rounds[0]
    mine = first["minitrain"]

    def worst(key: str, place: int) -> float:
        return max(abs(first[e][key][place] / mine[key][place] - 1) for e in race.entrants)

    start, end = worst("losses", 0), worst("losses", -1)
    norm = max(worst("norms", 0), worst("norms", -1))
    verdict = "the same model" if max(start, end) < 1e-4 and norm < 1e-3 else "**not the same model**"
    return (
        f"Against minitrain's the losses differ by at most {start:.0e} (relative) at the first step and {end:.0e} at "
        f"the last, the norms by {norm:.0e}: {verdict}."
    )


def _identity(tree: Tree) -> str:
    lines = [
        "## Identity of bits",
        "",
        "Each run is a fresh process from the same weights, with as many threads and held to the instructions named "
        "(PyTorch by `ATEN_CPU_CAPABILITY` and the variables of MKL and oneDNN, JAX by `xla_cpu_max_isa`, NumPy by "
        "`OPENBLAS_CORETYPE` and `NPY_DISABLE_CPU_FEATURES`, minitrain by `MINITRAIN_ISA` and by compiling with -O1). "
        "Of minitrain parameters, m and v are compared, of peers parameters; torch.compile compiles anew each time. "
        "At M and L a peer runs no further once two of its runs differ.",
        "",
        "| size | side | steps | over | digests | same bits |",
        "|---|---|---|---|---|---|",
    ]
    for name, size in tree["sizes"].items():
        for side, found in size.get("identity", {}).items():
            runs = [run for run in found["runs"] if "digest" in run]
            for steps in sorted({run["steps"] for run in runs}):
                here = [run for run in runs if run["steps"] == steps]
                over = " × ".join(
                    "{" + ", ".join(dict.fromkeys(str(run[key]) for run in here)) + "}"
                    for key in ("isa", "threads", "build")
                    if key in here[0]
                )
                digests = len({run["digest"] for run in here})
                count = f"{digests} in {len(here)} runs"
                lines.append(f"| {name} | {side} | {steps} | {over} | {count} | {same_bits(here)} |")
    if len(lines) == 6:
        return ""
    default = tree["sizes"].get("default", {}).get("identity", {}).get("minitrain", {})
    last = [run["digest"] for run in default.get("runs", []) if "digest" in run and run["steps"] > 20]
    if default.get("golden") and last:
        is_golden = all(digest == default["golden"] for digest in last)
        told = "is" if is_golden else "**is not**"
        lines += ["", f"minitrain's digest at the default size {told} the one of `minitrain selftest`."]
    return "\n".join(lines) + "\n"


def _command(tree: Tree) -> str:
    if "command" not in tree:
        return ""
    rounds = tree["command"]["rounds"]
    training = ", ".join(f"{r['training_s']:.2f} s" for r in rounds)
    whole = ", ".join(f"{r['wall_s']:.2f} s" for r in rounds)
    return (
        "## The whole command\n\n`minitrain train` with its defaults: 2000 steps with log, record, metrics, "
        f"validation, checkpoints and the picture, nothing pinned. Training took {training}; the whole process "
        f"{whole}.\n"
    )


def _not_won(tree: Tree) -> str:
    lines = [f"- {bar.name}: {_why(bar)}." for bar in bars(tree) if bar.met() not in ("yes", "not measured")]
    lines += [f"- {bar.name}: not measured." for bar in bars(tree) if bar.met() == "not measured"]
    for size in tree["sizes"].values():
        for threads in (1, 2) if "race" in size else ():
            lines += _ahead(size["about"]["title"], Race(size, threads), threads)
    return "\n".join(["## What is not won", "", *lines, NOT_MEASURED])


def _why(bar: Bar | BitBar) -> str:
    return f"{bar.row().split('|')[3].strip()}, the bar is {bar.row().split('|')[2].strip()}"


def _ahead(title: str, race: Race, threads: int) -> Iterator[str]:
    """Where a peer is better than minitrain, in any column."""
    if "minitrain" not in race.entrants:
        return
    columns = (
        ("step", ("step_s", "min"), "{:.4g} ms", 1e3),
        ("import", ("import_s",), "{:.2f} s", 1),
        ("first step", ("first_step_s",), "{:.2f} s", 1),
        ("memory", ("memory_mb",), "{:.0f} MB", 1),
    )
    for what, path, form, scale in columns:
        mine = race.figure("minitrain", *path).middle
        ahead = [
            f"{peer} {form.format(scale * theirs)}"
            for peer in PEERS
            if peer in race.entrants and (theirs := race.figure(peer, *path).middle) < mine
        ]
        if ahead:
            yield f"- {title}, {threads} thread{'s' * (threads > 1)}, {what}: {form.format(scale * mine)}, but " + (
                ", ".join(ahead) + "."
            )
