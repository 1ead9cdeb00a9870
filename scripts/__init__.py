"""What is not installed: benchmarks, trials, soak tests, and what a release takes.

All but `demo`, `test` and its kin run from the checkout by name, as
`python -m scripts.trials.ablate --help` does.
"""
