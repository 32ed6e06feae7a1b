"""Real servers behind slow links, beside what physics allows: `python -m benchmarks.networks`.

One round as a picture: `python -m benchmarks.networks.timeline`.
"""
