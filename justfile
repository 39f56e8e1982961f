# The make targets under the names of just (https://just.systems), and a recipe for each experiment.
# Nothing needs just: `make` is what CI runs.

# Set up, then train on the built-in corpus and replay a step of that run
run:
    make run

# Train with a fault: seed=42 injection=scale injection_step=500 just phase-19-train
phase-19-train:
    make phase-19-train

# Set up, then lint, types and tests
test:
    make test

# All tests, with the full counts
test-long:
    make test-long

lint:
    make lint

types:
    make types

# Side by side with PyTorch
bench:
    make bench

clean:
    make clean

# List the experiments
experiments: _installed
    .venv/bin/minitrain experiment

# Make an experiment: just experiment 18-train-mini --out-dir NEW
experiment name *options: _installed
    .venv/bin/minitrain experiment {{ name }} {{ options }}

# The healthy run, then the runs with a fault at step 500, each held against the same run without it
injections: _installed
    just experiment 18-baseline
    just experiment 19-injection-A
    just experiment 19-injection-B
    just experiment 19-injection-C

_installed:
    make .stamps/installed
