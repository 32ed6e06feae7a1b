"""The prepared run on a GPU: tests and a table (`run`), and the wheels that it takes along. `scripts/gpu` starts it."""
