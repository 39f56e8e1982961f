"""The state behind a faulty step, out of the record, so that the steps behind the fault can be checked too."""

from __future__ import annotations

from minitrain.errors import RunError
from minitrain.inject import Injector, maybe_inject
from minitrain.model import make_backend
from minitrain.optim import Recurrence
from minitrain.record.digests import has_digest
from minitrain.replay.source import RecordedRun
from minitrain.state import State
from minitrain.tensors import Tensors


def state_behind(source: RecordedRun, t: int, before: Tensors, live: Tensors) -> State:
    """State t as step t-1 left it and step t read it: from the record and the replay of that step, or from what was
    kept of an incident. ``before`` are the parameters that the step read, ``live`` those that the replay has now.

    Raises RunError where it cannot be had.
    """
    try:
        return _left(source, t, before, live)
    except RunError as error:
        if not source.run.folder.incident(t).exists():
            raise error
        return source.incident(t)


def _left(source: RecordedRun, t: int, before: Tensors, live: Tensors) -> State:
    """m and v are read; each tensor of parameters is what the replay has, or what follows from the one before the step
    and the recorded moments: whichever has the digest that was recorded.
    """
    run, moments, params = source.run, source.run.moments(t), before.copy()
    follow = Recurrence(run.config.optimizer, params, make_backend(run.config.training.backend))
    settings = maybe_inject("optimizer", t - 1, run.config.optimizer, Injector(run.config))
    follow(moments.m.flat, moments.v.flat, run.frame(t - 1).lr, t, settings)
    for (name, tensor), recorded in zip(params.items(), run.digests(t)[0].tolist(), strict=True):
        if has_digest(live[name], recorded):
            tensor[...] = live[name]
        elif not has_digest(tensor, recorded):
            raise RunError(
                f"state {t}: expected param.{name} with digest {recorded:016x} from the replay or from the recorded "
                "moments, got it from neither"
            )
    return State(t, params, moments.m, moments.v)
