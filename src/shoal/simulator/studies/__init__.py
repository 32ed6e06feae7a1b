"""Questions to the simulator, each with a table, a plot and a part of docs/scale.md."""
