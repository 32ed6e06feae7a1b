"""The memory of processes that load models (`python -m benchmarks.memory`), of a head, and of what a client keeps."""
