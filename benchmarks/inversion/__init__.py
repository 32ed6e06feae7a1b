"""A server that reads the prompt from hidden states, and what helps: `python -m benchmarks.inversion`."""
