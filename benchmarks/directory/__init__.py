"""What it costs to know ten thousand servers: bytes (`python -m benchmarks.directory`), and memory (`memory`)."""
