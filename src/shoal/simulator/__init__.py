"""A swarm in virtual time: thousands of simulated machines that decide with the functions of the live servers.

    python -m shoal.simulator --help        docs/scale.md explains the studies and the formats of traces and clusters

`world` has what is there without shoal: machines, places, and when each machine comes and goes. `fluid` simulates which
blocks are where, and takes throughput from formulas. `steps` simulates each step of each client. `studies` answer
questions with tables and plots. `serving` simulates one server by itself, pass by pass.

It imports `shoal.policy`, `shoal.net.records`, `shoal.net.identity`, the limits of `shoal.protocol`, and the ground;
only programs import it.
"""
