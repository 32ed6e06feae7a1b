"""Swarms whose blocks lose all their servers: one kill (`kill`), and half an hour of churn (`churn`)."""
