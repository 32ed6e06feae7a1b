"""Which blocks are where while machines come and go. Throughput follows from formulas; no token is simulated."""
