"""Fine-tuning through a swarm: exactness, speed, memory, and killed servers: `python -m benchmarks.training`."""
