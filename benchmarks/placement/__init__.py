"""Where servers go in published clusters, beside an offline search: `python -m benchmarks.placement`."""
