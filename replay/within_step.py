"""The second step of a bisect: the first place inside a faulty step, and what kind of fault it was.

What the step read comes first (state, batch, streams), then the sites in order, the learning rate, and what the update
left. Of a step that was not finite the incident holds every array as it was before the update; with
``record.sites: digest`` every site has a digest; else loss, norms and moments bound the place, and the counterfactual
(`counterfactual.py`) tells which gradients explain the moments.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from minitrain.errors import RunError
from minitrain.record.digests import groups, state_digests, tensor_digest
from minitrain.replay.counterfactual import Explained, explain
from minitrain.replay.elements import Elements, compare, of_state, search
from minitrain.replay.rerun import Rerun
from minitrain.replay.states import read_arrays
from minitrain.replay.verifier import Difference, double_bits
from minitrain.replay.which_step import Suspect
from minitrain.tensors import KINDS, canonical_bits, parameter_of, phase_of, shared, sites

Verdict = Literal["arithmetic", "stored_state", "data", "schedule", "transient"]


class Place(NamedTuple):
    """Where the first bad number stands. None where the record does not tell. Bits are hexadecimal."""

    step: int
    phase: str
    site: str
    """The first site whose output is bad; the first recorded number that is, where no site was recorded before it."""
    tensor: str | None = None
    """The parameter that it is about, if it is about one."""
    index: tuple[int, ...] | None = None  # type: ignore[assignment]  # hides tuple's method
    recorded: str | None = None
    replayed: str | None = None
    differing: int | None = None
    elements: int | None = None
    rows: tuple[int, ...] = ()
    """Rows of the batch that are not the stream's."""


class Finding(NamedTuple):
    """A place, the verdict on it, and its proof in a sentence."""

    place: Place
    verdict: Verdict
    proof: str


def examine(run: Rerun, suspect: Suspect) -> Finding:
    """What is wrong in this step. Raises RunError where the record cannot be read."""
    if suspect.kind == "memory":
        return _memory(run)
    if suspect.kind == "arithmetic":
        return _arithmetic(run)
    for look in (_read, _incident, _sites, _rate, _numbers, _update):
        if (found := look(run)) is not None:
            return found
    raise RunError(f"{run.source.path}: expected step {run.step} to differ from its record again, got the same bits")


def _memory(run: Rerun) -> Finding:
    """The step read another state than the one before had left."""
    left, read = run.source.frame(run.step - 1).digest_out, run.frame.digest_in
    return _stored(run, left, read, f"between steps {run.step - 1} and {run.step}", "the step before had left")


def _stored(run: Rerun, left: Any, read: Any, when: str, whose: str) -> Finding:
    names, start = list(run.before.params), run.source.run.start
    kind, n = sorted(np.argwhere(left != read).tolist(), key=lambda place: (place[0] or 3, place[1]))[0]
    clean = groups(run.before)[kind][names[n]]
    try:
        read_state = run.source.incident(run.step) if run.step > start else run.source.run.keyframe(start)
        elements = compare(groups(read_state)[kind][names[n]], clean)
    except RunError:
        elements = search(clean, int(read[kind][n]))
    site, count = f"{KINDS[kind]}.{names[n]}", int((left != read).sum())
    proof = (
        f"step {run.step} read {_tensors(count, site)} with other bits than {whose} ({_told(elements)}); nothing is "
        f"computed {when}"
    )
    return Finding(_place(run, "state", site, elements), "stored_state", proof)


def _arithmetic(run: Rerun) -> Finding:
    """The replay gives the recorded numbers: the first site of it that is not finite."""
    site = run.nonfinite[0] if run.nonfinite else "loss"
    now = run.arrays.get(site)
    kind, _, name = site.partition(".")
    if now is None and kind in KINDS:
        now = groups(run.after)[KINDS.index(kind)][name]
    place = Place(run.step, phase_of(site), site, parameter_of(site))
    if now is not None and now.dtype == np.float32 and len(bad := np.argwhere(~np.isfinite(now))):
        at = tuple(int(i) for i in bad[0])
        bits = f"0x{int(canonical_bits(now)[at]):08x}"
        place = place._replace(index=at, recorded=bits, replayed=bits, differing=len(bad), elements=now.size)
    count = "" if place.differing is None else f"{place.differing} of {place.elements} numbers of "
    proof = (
        f"the replay from the first state on gives the recorded bits up to step {run.step}, and in it {count}{site} "
        f"({place.phase}) are the first that are not finite, out of finite inputs"
    )
    return Finding(place, "arithmetic", proof)


def _read(run: Rerun) -> Finding | None:
    """What the step read: the first state, batch, streams."""
    first_step = run.step == run.source.run.start
    if first_step and not np.array_equal(made := state_digests(run.before), run.frame.digest_in):
        return _stored(run, made, run.frame.digest_in, f"before step {run.step}", "the run has to begin with")
    first = next((d for d in run.differences if d.phase == "data"), None)
    if first is None:
        return None
    rows = tuple(np.flatnonzero(run.frame.rows != run.batch.rows).tolist())
    site = "batch" if first.kind in ("batch", "tokens") else first.site
    place = Place(run.step, "data", site, rows=rows)
    if rows:
        number, ids = int(run.frame.rows[rows[0]]), run.source.data.train.ids
        was = ids[number] if 0 <= number < len(ids) else "no sample of the training split"
        proof = (
            f"{len(rows)} of {len(run.batch.rows)} samples are not those that the stream gives step {run.step}: "
            f"row {rows[0]} held {was}, the stream has {run.batch.ids[rows[0]]} there"
        )
    elif site == "batch":
        proof = "the samples are those of the stream, and the tokens that the engine read are not theirs"
    else:
        proof = f"{site} did not stand where step {run.step} begins to draw"
    return Finding(place, "data", proof)


def _incident(run: Rerun) -> Finding | None:
    """The arrays of a step that was not finite, in the order of the sites, against those of the replay."""
    path = run.source.run.folder.incident(run.step)
    if not path.is_file():
        return None
    then, arrays = read_arrays(path.read_bytes(), str(path)), shared(run.source.config.model)
    for site in sites(run.source.config.model):
        recorded = then.get(arrays.get(site, site))
        if recorded is None or site not in run.arrays:
            continue
        now = run.arrays[site]
        if parameter_of(site) and (value := run.source.config.optimizer.clip_value) is not None:
            now = np.clip(now, -np.float32(value), np.float32(value))
        elements = compare(recorded, now) if recorded.shape == now.shape else None
        if elements:
            earlier = next((d for d in run.differences if d.kind == "site"), None)
            order = sites(run.source.config.model)
            if earlier and order.index(earlier.site) < order.index(site):
                return None  # an array that was written again: the digests know better
            return _transient(run, site, elements)
    return None


def _sites(run: Rerun) -> Finding | None:
    """The first site whose digest is another."""
    order = sites(run.source.config.model)
    found = sorted((d for d in run.differences if d.kind == "site"), key=lambda d: order.index(d.site))
    if not found:
        return None
    first, kinds = found[0], {d.kind for d in run.differences}
    if first.site == "clip" and "grad_norm_clipped" in kinds and "grad_norm" not in kinds:
        return None  # the clip itself: its norms tell more
    loss = next((d for d in run.differences if d.kind == "loss"), None)
    if loss is not None and order.index("loss") < order.index(first.site):
        return None
    if first.site == "clip" or phase_of(first.site) == "backward":
        explained = explain(run)
        if explained and (first.site == "clip" or explained.tensors == [parameter_of(first.site)]):
            return _gradients(run, explained, first)
    now, elements = run.arrays.get(first.site), None
    if now is not None and tensor_digest(now) == first.replayed:  # else it has been written again behind the site
        elements = search(now, first.recorded)
    return _transient(run, first.site, elements, (first.recorded, first.replayed))


def _transient(run: Rerun, site: str, elements: Elements | None, digests: tuple[int, int] | None = None) -> Finding:
    place = _place(run, phase_of(site), site, elements)
    told = _told(elements)
    if digests and not elements:
        told = f"digest 0x{digests[0]:016x} recorded, 0x{digests[1]:016x} replayed"
    proof = (
        f"from the same state, batch and random streams the replay gives {site} other bits ({told}); everything that "
        "was recorded before it is the same"
    )
    return Finding(place, "transient", proof)


def _rate(run: Rerun) -> Finding | None:
    """The learning rate, if nothing before it differs."""
    first = run.differences[0]
    if first.kind != "lr":
        return None
    then, now = run.frame.lr, run.stats.lr
    recorded, replayed = (f"0x{double_bits(x):016x}" for x in (then, now))
    ratio = f", {then / now:.6g} times as high" if now else ""
    return Finding(
        Place(run.step, "update", "lr", recorded=recorded, replayed=replayed),
        "schedule",
        f"the update went by a learning rate of {then:.9g}, the configured schedule says {now:.9g}{ratio}; loss and "
        "norms are the same",
    )


def _numbers(run: Rerun) -> Finding | None:
    """Loss and norms: they tell the phase, and in the backward pass the moments tell more."""
    first = next((d for d in run.differences if d.kind in ("loss", "grad_norm", "grad_norm_clipped")), None)
    if first is None:
        return None
    then, now = (getattr(s, first.kind) for s in (run.frame, run.stats))
    if first.kind == "grad_norm" and (explained := explain(run)):
        return _gradients(run, explained, first)
    recorded, replayed = (f"0x{double_bits(x):016x}" for x in (then, now))
    place = Place(run.step, first.phase, first.site, recorded=recorded, replayed=replayed)
    if first.kind == "grad_norm_clipped" and then == run.frame.grad_norm:
        clip = run.source.config.optimizer.clip
        proof = f"the gradients were not clipped: their norm was {then:.6g}, and optimizer.clip is {clip}"
        return Finding(place, "schedule", proof)
    unseen = "; the sites before it were not recorded (record.sites: digest does)" if run.frame.sites is None else ""
    proof = f"{first.kind} was {then:.9g}, and the replay from the same inputs gives {now:.9g}{unseen}"
    return Finding(place, "transient", proof)


def _gradients(run: Rerun, explained: Explained, first: Difference) -> Finding:
    """Gradients that differ, with what the moments tell of them."""
    norms = f"the norm was {run.frame.grad_norm:.9g}, replayed {run.stats.grad_norm:.9g}"
    forward = "the loss is the same"
    if explained.factor is not None:
        proof = (
            f"{forward}, and every gradient times {explained.factor:g} after the backward pass gives the recorded "
            f"norm ({norms}), m, v and parameters bit for bit"
        )
        return Finding(_place(run, "clip", "clip", None), "transient", proof)
    site = f"grad.{explained.tensors[0]}"
    many = len(explained.tensors)
    what = f"only the gradient of {explained.tensors[0]} is" if many == 1 else f"the gradients of {many} tensors are"
    proof = f"{forward}, {norms}; going by the moments {what} another"
    if first.kind == "site" and phase_of(first.site) == "backward":
        site = first.site
    elif many > 1:
        proof += f"; of those, {site} is the first in the order of the backward pass, so the fault is at or before it"
    elif explained.elements:
        proof += f": of m {_told(explained.elements)}"
    place = _place(run, phase_of(site), site, explained.elements if many == 1 else None)
    return Finding(place._replace(recorded=None, replayed=None), "transient", proof)


def _update(run: Rerun) -> Finding | None:
    """Everything up to the update is the same, and the state that it left is not."""
    changed = [(d.kind, parameter_of(d.site) or "") for d in run.differences if d.kind in KINDS]
    if not changed:
        return None
    kind, name = changed[0]
    table = {p.name: p for p in run.before.params.table}
    if {k for k, _ in changed} == {"param"} and len(changed) > 1 and all(table[n].decays for _, n in changed):
        proof = (
            f"m, v and the learning rate are the same, and {len(changed)} of the tensors that decay are not: the "
            f"update went by another weight_decay than the configured {run.source.config.optimizer.weight_decay:g}"
        )
        return Finding(_place(run, "update", f"{kind}.{name}", None), "schedule", proof)
    elements = of_state(run, kind, name)
    site = f"{kind}.{name}"
    place = _place(run, "update", site, elements)
    apart = {n for k, n in changed if k != "param"} & {n for k, n in changed if k == "param"}
    if apart:
        if run.frame.sites is None:  # else those of the gradients are the same
            place = place._replace(phase="backward", site=f"grad.{name}", recorded=None, replayed=None)
        proof = (
            f"loss and norms are the same, and m, v and parameters of {name} are not: the update read another gradient "
            f"than the replay's, too near to it to move the norm or changed behind it; of {site} {_told(elements)}"
        )
        return Finding(place, "transient", proof)
    others = ", ".join(k for k in ("m", "v", "param") if (k, name) not in changed)
    proof = (
        f"loss, norms and learning rate of step {run.step} are the same, and of the one elementwise update so are "
        f"{others} of {name}: {_tensors(len(changed), site)} was changed after it had been written ({_told(elements)})"
    )
    return Finding(place, "stored_state", proof)


def _place(run: Rerun, phase: str, site: str, elements: Elements | None) -> Place:
    place = Place(run.step, phase, site, parameter_of(site))
    if elements is None:
        return place
    recorded = None if elements.recorded is None else f"0x{elements.recorded:08x}"
    return place._replace(
        index=elements.index,
        recorded=recorded,
        replayed=f"0x{elements.replayed:08x}",
        differing=elements.differing,
        elements=elements.elements,
    )


def _tensors(count: int, first: str) -> str:
    return first if count == 1 else f"{first} and {count - 1} more tensors"


def _told(elements: Elements | None) -> str:
    """How a tensor differs, in words; all the bits stand in the place."""
    if elements is None:
        return "which element is not recorded"
    if elements.factor is not None:
        return f"every element is {elements.factor:g} times what it should be"
    at, then = list(elements.index), elements.recorded
    if then is None:
        return f"element {at} had other bits, which are not recorded"
    changed = then ^ elements.replayed
    if changed.bit_count() == 1 and elements.differing == 1:
        return f"element {at} has bit {changed.bit_length() - 1} flipped"
    count = f"; {elements.differing} of {elements.elements} elements differ" if elements.differing > 1 else ""
    return f"element {at} is {_value(then)}, should be {_value(elements.replayed)}{count}"


def _value(bits: int) -> str:
    return f"{float(np.array(bits, np.uint32).view(np.float32)):.6g}"
