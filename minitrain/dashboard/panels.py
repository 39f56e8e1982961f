"""The seven panels, in their order, of one run or of two laid over each other."""

from __future__ import annotations

from collections.abc import Callable

from minitrain.dashboard import pictures, readings
from minitrain.dashboard.gather import RunData
from minitrain.dashboard.lanes import Panel
from minitrain.dashboard.pictures import Runs


def panels(runs: Runs) -> list[Panel]:
    """All seven; what a run has not measured is said in the place of its picture."""
    return [
        Panel(
            1,
            "loss",
            "Loss, train and validation",
            "Does it learn, and does what it learns carry over to text it has not seen?",
            _read(runs, readings.loss),
            "no warm-up: a spike in the first 100 steps; a broken mask: train far under the baseline early; "
            "overfitting: the curves part",
            [pictures.losses(runs)],
        ),
        Panel(
            2,
            "lr",
            "Learning rate",
            "Is the learning rate at every step the one that was configured?",
            _read(runs, readings.learning_rate),
            "no ramp at the start; a constant; a cosine that ends early; a jump away from the dashed line",
            [pictures.rates(runs)],
        ),
        Panel(
            3,
            "norm",
            "Gradient norm, before and after clipping",
            "How large are the gradients, how often does the clip act, and which batch was it?",
            _read(runs, readings.gradient),
            "a spike of 30 × that stands alone; a clip that is always engaged",
            [pictures.norms(runs), pictures.batches(runs)],
        ),
        Panel(
            4,
            "activations",
            "Activation magnitude per layer",
            "Do the activations keep their size from layer to layer and over time?",
            _read(runs, readings.activations),
            "a bad initialisation: the first layer at 50 to 200 × of healthy from step 0; attention that collapses: "
            "its entropy goes to 0",
            [pictures.activations(runs), pictures.attention(runs)],
        ),
        Panel(
            5,
            "spectral",
            "Spectral norm per weight matrix",
            "Do the weights grow or collapse?",
            _read(runs, readings.spectral),
            "growth without end: weight decay too low; collapse: too high",
            [pictures.spectral(runs)],
        ),
        Panel(
            6,
            "units",
            "Dead units and update/weight ratio",
            "Is every part of the network alive, and does it learn at a sensible pace?",
            _read(runs, readings.units),
            "a dead layer; parameters that are frozen (ratio near 0) or too fast (over 0.1); gradients that fade with "
            "depth",
            [pictures.dead(runs), pictures.updates(runs), pictures.ratios(runs)],
        ),
        Panel(
            7,
            "classes",
            "Loss per verb class",
            "Does it learn the pattern of regular verbs, and what do irregular ones cost?",
            _read(runs, readings.classes),
            "the irregular tax: irregular above regular; memorising: both low in training, regular high in validation",
            [pictures.classes(runs, "verb form"), pictures.classes(runs, "sentence")],
        ),
    ]


def _read(runs: Runs, reading: Callable[[RunData], str]) -> list[str]:
    return [reading(run) for run in runs]
