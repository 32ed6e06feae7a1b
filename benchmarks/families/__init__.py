"""Eight clients of each kind of model, beside a local batch of eight: `python -m benchmarks.families`."""
