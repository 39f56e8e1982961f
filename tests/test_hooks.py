"""Listeners: what they hear, in which order, and that hearing changes nothing."""

from __future__ import annotations

import numpy as np
import pytest

from minitrain._ext.plan import CompiledBackend, Plan, ReferenceBackend
from minitrain.errors import KernelArgumentError
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


def steps(config, batch, n=1, *, listener=None, threads=1, backend=None):
    """Model and optimizer after n training steps, with the listener at every site."""
    model = MiniGPT(config, seed=3, threads=threads, backend=backend)
    optimizer = AdamW(backend=model.backend)
    if listener:
        model.hooks.listen(listener)
        optimizer.hooks.listen(listener)
    for step in range(n):
        model.step = step
        model.forward(*batch)
        optimizer.step(model.params, model.backward())
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


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_listening_changes_no_bit(threads, dropout, odd_config, make_batch):
    """Five steps with a listener at every site, and with one at a few, leave the bits of five steps with none."""
    config = odd_config.model_copy(update={"dropout": dropout})
    batch = make_batch(config, 3)
    silent = steps(config, batch, 5, threads=threads)
    heard = steps(config, batch, 5, threads=threads, listener=lambda site, tensor: None)
    assert np.array_equal(silent[0].params.flat.view("u4"), heard[0].params.flat.view("u4"))
    assert np.array_equal(silent[1].v.flat.view("u4"), heard[1].v.flat.view("u4"))


def test_views_are_read_only(odd_config, make_batch):
    """No listener writes into the run by mistake."""
    refused = []

    def vandal(site, tensor):
        with pytest.raises(ValueError, match="read-only"):
            tensor[...] = 0
        refused.append(site)

    steps(odd_config, make_batch(odd_config, 2), listener=vandal)
    assert refused == sites(odd_config)


def test_globs_and_order(odd_config, make_batch):
    """A listener hears the sites of its glob; at one site they are called in the order in which they came."""
    model, heard = MiniGPT(odd_config), []
    model.hooks.listen(lambda site, tensor: heard.append(("first", site)), "block.?.ffn.gelu")
    model.hooks.listen(lambda site, tensor: heard.append(("second", site)), "block.0.*.gelu")
    model.forward(*make_batch(odd_config, 2))
    assert heard == [(who, f"block.{i}.ffn.gelu") for who, i in (("first", 0), ("second", 0), ("first", 1))]


def test_a_handle_takes_its_listener_off(odd_config, make_batch):
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
    with model.hooks.listen(listener, "logits"):
        model.forward(*batch)
    model.forward(*batch)
    assert heard == ["loss", "loss", "logits", "loss", "loss"]
    with pytest.raises(KernelArgumentError), model.hooks.listen(listener, "logits"):
        model.forward(None, None, None, None)
    kept.remove()
    assert not model.hooks
    model.forward(*batch)
    assert len(heard) == 5


def test_evaluation_is_not_heard(odd_config, make_batch):
    """Sites belong to the training step."""
    model, heard = MiniGPT(odd_config), []
    model.hooks.listen(lambda site, tensor: heard.append(site))
    model.forward(*make_batch(odd_config, 2), training=False)
    assert not heard


def test_an_error_in_a_listener_comes_out(odd_config, make_batch):
    """It ends the pass where it is, and the next pass starts from the front with the same bits."""
    model, batch = MiniGPT(odd_config), make_batch(odd_config, 2)
    expected = model.forward(*batch)[1]

    def fails(site, tensor):
        raise ZeroDivisionError(site)

    with model.hooks.listen(fails, "block.1.q"), pytest.raises(ZeroDivisionError, match=r"block\.1\.q"):
        model.forward(*batch)
    assert model.forward(*batch)[1] == expected


def test_show_without_listeners_makes_no_view():
    """`show` costs nothing where nobody hears the site."""
    hooks = Hooks()
    hooks.listen(lambda site, tensor: None, "other")
    hooks.show("clip", object())  # would fail on .view()
    assert not hooks.hears("clip")
    assert hooks.hears("other")
