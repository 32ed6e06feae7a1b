"""How far honest servers are apart, and which liars audits find: `python -m benchmarks.audits`."""
