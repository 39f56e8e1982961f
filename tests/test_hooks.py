"""Hooks: what they hear, in which order, and that hearing changes nothing."""

from __future__ import annotations

import ctypes
import platform
import random

import numpy as np
import pytest

from minitrain import assembly
from minitrain._ext.plan import CompiledBackend, Plan, ReferenceBackend
from minitrain.config import load_config
from minitrain.errors import HookError, KernelArgumentError
from minitrain.hooks import Hooks
from minitrain.model import MiniGPT
from minitrain.optim import AdamW
from minitrain.tensors import sites

VARIANTS = [
    {"tie_weights": tie, "dropout": dropout, "n_layer": layers}
    for tie in (True, False)
    for dropout in (0.0, 0.1)
    for layers in (1, 3)
]


def parts(config, *, threads=1, backend=None):
    """A model and an optimizer that clips by value too, with the same hooks."""
    model = MiniGPT(config, seed=3, threads=threads, backend=backend)
    return model, AdamW(backend=model.backend, hooks=model.hooks)


def run(model, optimizer, batch, n=1):
    """The next n training steps."""
    for _ in range(n):
        model.forward(*batch)
        optimizer.step(model.params, model.backward())
        model.step += 1


def steps(config, batch, n=1, *, listener=None, **how):
    """Model and optimizer after n training steps, with the listener at every site."""
    model, optimizer = parts(config, **how)
    if listener:
        model.hooks.listen(listener)
    run(model, optimizer, batch, n)
    return model, optimizer


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("reference", [False, True], ids=["compiled", "reference"])
def test_sites_are_what_a_listener_hears(variant, reference, odd_config, make_batch):
    """`sites(config)` is the order of a whole training step: forward, backward, clip, moments, parameters."""
    config = odd_config.model_copy(update=variant)
    heard = []
    backend = ReferenceBackend() if reference else None
    steps(config, make_batch(config, 2), listener=lambda site, tensor: heard.append(site), backend=backend)
    assert heard == sites(config)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_shapes_and_moments_of_sites(dropout, odd_config, make_batch):
    """A site shows the array as it is at that moment: `grad.x` what backward returns, `clip` the clipped gradients,
    `m`, `v` and `param` what the step leaves."""
    config = odd_config.model_copy(update={"dropout": dropout})
    heard = {}
    model, optimizer = steps(config, make_batch(config, 2), listener=lambda site, x: heard.update({site: x.copy()}))
    grads, T, C = model.grads, config.max_seq_len, config.d_model
    factor = np.float32(1.0 / (optimizer.norms.before + 1e-12)) if optimizer.norms.before > 1 else np.float32(1)
    for name in model.params:
        assert np.array_equal(heard[f"param.{name}"], model.params[name])
        assert np.array_equal(heard[f"m.{name}"], optimizer.m[name])
        assert np.array_equal(heard[f"v.{name}"], optimizer.v[name])
        assert np.array_equal(heard[f"grad.{name}"] * factor, grads[name])
    assert np.array_equal(heard["clip"], grads.flat)
    assert heard["embed"].shape == heard["grad:embed"].shape == (2, T, C)
    assert heard["block.1.attn.probs"].shape == (2, config.n_head, T, T)
    assert heard["block.0.ffn.pre"].shape == heard["grad:block.0.ffn.pre"].shape == (2, T, config.d_ff)
    assert heard["logits"].shape == heard["log_softmax"].shape == heard["grad:logits"].shape
    assert heard["loss"].shape == (1,)
    np.testing.assert_allclose(heard["softmax"].sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.exp(heard["log_softmax"]), heard["softmax"], rtol=1e-5)


def test_a_site_stands_before_the_next_operation():
    """With a listener the plan stops at the site: later operations have not run yet, in place ones included."""
    x = np.ones(5, np.float32)
    plan, hooks, heard = Plan(CompiledBackend(2)), Hooks(), []
    for i in range(3):
        plan.add("scale", x, np.array([2.0]))
        plan.site(f"after.{i}", x)
    assert plan.sites == ["after.0", "after.1", "after.2"]
    hooks.listen(lambda site, tensor: heard.append((site, tensor[0])), "after.[02]")
    plan.run(hooks)
    assert heard == [("after.0", 2), ("after.2", 8)]
    plan.run(None)
    assert x[0] == 64
    assert len(heard) == 2


def test_what_cannot_be_a_site():
    """Probes read memory: another type or layout is refused when the plan is made."""
    plan = Plan(CompiledBackend())
    for array in np.zeros(4, np.int64), np.zeros((4, 4), np.float32).T[1:]:
        with pytest.raises(KernelArgumentError, match=r"^site x: expected contiguous float32 or float64, got "):
            plan.site("x", array)


def test_one_plan_serves_several_hooks():
    """Each is called by its own, whoever ran the plan before."""
    x, plan, heard = np.ones(5, np.float32), Plan(CompiledBackend()), []
    plan.site("here", x)
    two = [Hooks(["here"]), Hooks(["here"])]
    for i, hooks in enumerate(two):
        hooks.listen(lambda site, tensor, i=i: heard.append(i))
    for i in (0, 1, 1, 0):
        plan.run(two[i])
    assert heard == [0, 1, 1, 0]


def twisted_rounding(site, tensor):
    """What an imported library may do: leave another rounding mode behind."""
    round_down = 0x400
    assert ctypes.CDLL(None).fesetround(round_down) == 0


def drawing(site, tensor):
    """What a careless listener does."""
    random.random()
    np.random.random(3)  # noqa: NPY002 - the global generator is the point


LISTENERS = {
    "silent": lambda site, tensor: None,
    "drawing": drawing,
    "twisted": pytest.param(
        twisted_rounding, marks=pytest.mark.skipif(platform.machine() != "x86_64", reason="0x400 is x86's")
    ),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("listener", LISTENERS.values(), ids=LISTENERS)
def test_listening_changes_no_bit(listener, threads, dropout, odd_config, make_batch):
    """Five steps with a listener and a probe at every site leave the bits of five steps with none: also where the
    listener draws from the global generators, or leaves another floating-point environment behind."""
    config = odd_config.model_copy(update={"dropout": dropout})
    batch = make_batch(config, 3)
    silent = steps(config, batch, 5, threads=threads)
    model, optimizer = parts(config, threads=threads)
    probe = model.hooks.probe()
    model.hooks.listen(listener)
    model.hooks.probe("*ffn*", every=2)
    run(model, optimizer, batch, 5)
    assert np.array_equal(silent[0].params.flat.view("u4"), model.params.flat.view("u4"))
    assert np.array_equal(silent[1].v.flat.view("u4"), optimizer.v.flat.view("u4"))
    assert silent[1].norms == optimizer.norms
    assert list(probe.stats) == sites(config)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="0x400 is x86's")
def test_the_environment_is_put_back():
    """After a listener that changed the rounding, Python's own arithmetic is what it was, an error or not."""
    plan, hooks, third = Plan(CompiledBackend()), Hooks(), 1.0
    plan.site("here", np.ones(3, np.float32))

    def fails(site, tensor):
        twisted_rounding(site, tensor)
        raise KeyboardInterrupt

    with hooks.listen(twisted_rounding):
        plan.run(hooks)
        assert ctypes.c_double(-third / 3).value == -0.3333333333333333
    with hooks.listen(fails):
        with pytest.raises(KeyboardInterrupt):
            plan.run(hooks)
        assert ctypes.c_double(-third / 3).value == -0.3333333333333333


@pytest.mark.parametrize("backend", [CompiledBackend(), ReferenceBackend()], ids=["compiled", "reference"])
def test_views_are_read_only(backend, odd_config, make_batch):
    """No listener writes into the run by mistake, and none makes its view writeable; trying ends the step."""
    refused = []

    def vandal(site, tensor):
        with pytest.raises(ValueError, match="read-only"):
            tensor[...] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            tensor.flags.writeable = True
        refused.append(site)

    model, _ = steps(odd_config, make_batch(odd_config, 2), listener=vandal, backend=backend)
    assert refused == sites(odd_config)

    def writes(site, tensor):
        tensor[0] = 1

    message = r"^hook \S*writes at site block\.0\.q, step 1: ValueError: assignment destination is read-only \("
    with model.hooks.listen(writes, "block.0.q"), pytest.raises(HookError, match=message):
        model.forward(*make_batch(odd_config, 2))


def test_globs_and_order(odd_config, make_batch):
    """A hook hears the sites of its glob; at one site they are called in the order in which they came, a probe among
    them: who comes after it reads what it measured there."""
    model, heard = MiniGPT(odd_config), []

    def listener(name):
        return lambda site, tensor: heard.append((name, site, len(probe.stats)))

    model.hooks.listen(listener("first"), "block.?.ffn.gelu")
    probe = model.hooks.probe("block.*.gelu")
    model.hooks.listen(listener("second"), "block.0.*.gelu")
    model.forward(*make_batch(odd_config, 2))
    first, second = "block.0.ffn.gelu", "block.1.ffn.gelu"
    assert heard == [("first", first, 0), ("second", first, 1), ("first", second, 1)]
    assert list(probe.stats) == [first, second]


def test_cadence(odd_config, make_batch):
    """`every=n`: at steps 0, n, 2n, by the step of the model that also the optimizer's sites go by."""
    model, optimizer = parts(odd_config)
    heard = []
    model.hooks.listen(lambda site, tensor: heard.append((site, model.hooks.step)), "l*s", every=3)
    probe = model.hooks.probe("param.ln_f.bias", every=2)
    measured = []
    assert probe.step is None
    assert probe.stats == {}
    for _ in range(6):
        run(model, optimizer, make_batch(odd_config, 2))
        measured.append((probe.step, probe.stats["param.ln_f.bias"].max == model.params["ln_f.bias"].max()))
    assert heard == [(site, step) for step in (0, 3) for site in ("logits", "loss")]
    assert measured == [(step, step == now) for now in range(6) for step in [now - now % 2]]


def test_hooks_of_an_optimizer_alone(odd_config, make_batch):
    """Without a model's hooks it has its own, and its updates are the steps."""
    model, optimizer, heard = MiniGPT(odd_config), AdamW(), []
    optimizer.hooks.listen(lambda site, tensor: heard.append((site, optimizer.hooks.step)), "[cp]*.bias", every=2)
    optimizer.hooks.listen(lambda site, tensor: heard.append((site, optimizer.hooks.step)), "clip")
    model.hooks.listen(lambda site, tensor: heard.append((site, -1)), "param.*")
    model.forward(*make_batch(odd_config, 2))
    for _ in range(3):
        optimizer.step(model.params, model.backward())
    biases = [f"param.{name}" for name in model.params if name.endswith(".bias")]
    assert heard == [(s, t) for t in range(3) for s in ("clip", *(biases if t != 1 else []))]


def test_parts_share_their_hooks(tiny):
    """One object for forward, backward, clipping and update of a configured run."""
    config = load_config(None, tiny)
    assembled = assembly.assemble(config, assembly.prepare_data(config))
    assert assembled.hooks is assembled.model.hooks is assembled.optimizer.hooks
    assert assembled.hooks.sites == tuple(sites(config.model))


def test_a_handle_takes_its_hook_off(odd_config, make_batch):
    """`remove`, or the end of a `with` block, also after an error in it; twice is no harm, and the others stay."""
    model, batch, heard = MiniGPT(odd_config), make_batch(odd_config, 2), []

    def listener(site, tensor):
        heard.append(site)

    kept = model.hooks.listen(listener, "loss")
    same = model.hooks.listen(listener, "loss")
    model.forward(*batch)
    assert heard == ["loss", "loss"]
    same.remove()
    same.remove()
    with model.hooks.listen(listener, "logits"), model.hooks.probe("logits") as probe:
        model.forward(*batch)
    measured = probe.stats
    model.params.flat[:] = 0
    model.forward(*batch)
    assert probe.stats == measured
    assert heard == ["loss", "loss", "logits", "loss", "loss"]
    with pytest.raises(KernelArgumentError), model.hooks.listen(listener, "logits"):
        model.forward(None, None, None, None)
    kept.remove()
    assert not model.hooks
    model.forward(*batch)
    assert len(heard) == 5


@pytest.mark.parametrize("backend", [CompiledBackend(2), ReferenceBackend()], ids=["compiled", "reference"])
def test_coming_and_going_in_a_pass(backend, odd_config, make_batch):
    """Who is taken off by another is not called again, in that very pass; who is added is called from the next on."""
    model, batch, heard = MiniGPT(odd_config, backend=backend), make_batch(odd_config, 2), []
    handles = []

    def first(site, tensor):
        heard.append(("first", site))
        handles.pop().remove()
        if site == "embed":
            handles.append(model.hooks.listen(lambda site, tensor: heard.append(("late", site)), "l*s"))

    model.hooks.listen(first, "[el]*[dx]")  # embed, softmax is not
    handles.append(model.hooks.listen(lambda site, tensor: heard.append(("second", site)), "*"))
    model.forward(*batch)
    assert heard == [("first", "embed"), ("first", "log_softmax")]
    heard.clear()
    handles.extend([model.hooks.probe("block*")] * 2)
    model.forward(*batch)
    assert heard == [("first", "embed"), ("first", "log_softmax")]


def test_evaluation_is_not_heard(odd_config, make_batch):
    """Sites belong to the training step."""
    model, heard = MiniGPT(odd_config), []
    model.hooks.listen(lambda site, tensor: heard.append(site))
    probe = model.hooks.probe()
    model.forward(*make_batch(odd_config, 2), training=False)
    assert not heard
    assert not probe.stats


@pytest.mark.parametrize("site", ["block.1.q", "grad:block.0.q", "grad.embed.weight", "clip", "v.lm_head.bias"])
def test_an_error_in_a_hook_names_the_site(site, odd_config, make_batch):
    """It ends the step where it is, as a HookError from what was raised; the next step starts from the front."""
    (model, optimizer), batch = parts(odd_config), make_batch(odd_config, 2)
    model.step = 7
    expected = model.forward(*batch)[1]

    def fails(site, tensor):
        raise ZeroDivisionError(site)

    with (
        model.hooks.listen(fails, site),
        pytest.raises(
            HookError, match=r"^hook \S+\.fails at site (\S+), step 7: ZeroDivisionError: \1 \(.*\.py:\d+\)$"
        ) as caught,
    ):
        run(model, optimizer, batch)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.exit_code == 2
    if site.startswith(("block", "grad", "clip")):
        assert model.forward(*batch)[1] == expected


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_hook_may_be_interrupted(stop, odd_config, make_batch):
    """What is no error of the hook comes out as it is."""

    class Stops:
        def __call__(self, site, tensor):
            raise stop

    model, batch = MiniGPT(odd_config), make_batch(odd_config, 2)
    with model.hooks.listen(Stops()), pytest.raises(stop):
        model.forward(*batch)
    with model.hooks.listen(Stops()), pytest.raises(stop):
        model.forward(*batch)
    model.forward(*batch)


def test_what_cannot_be_a_hook():
    """A glob without a site, a cadence that is none, a listener that cannot be called: one message each."""
    hooks = Hooks(["embed", "block.0.ffn.gelu", "loss"])
    message = (
        r"^hook: sites: expected the name of a site or a glob, got 'block\.\*\.ffn\.glu', which matches none of 3; "
        r"did you mean 'block\.0\.ffn\.gelu'\? \(minitrain\.tensors\.sites lists them\)$"
    )
    with pytest.raises(HookError, match=message):
        hooks.probe("block.*.ffn.glu")
    for every in (0, -1, 2.0, True, "2"):
        with pytest.raises(HookError, match=r"^hook: every: expected a number of steps, at least 1, got "):
            hooks.listen(print, every=every)
    with pytest.raises(HookError, match=r"^hook: expected a function f\(site, tensor\), got 'loss'$"):
        hooks.listen("loss")
    assert not hooks
