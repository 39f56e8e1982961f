"""Experiments: what a preset asks for, run and told. A new one is a preset; if it asks something new, a function too.

`preset` is what there is, `runner` makes one, `place` is where, `job` what it works with; the others are the kinds.
"""
