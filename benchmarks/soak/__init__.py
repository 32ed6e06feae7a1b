"""Swarms that are used for minutes, and must leak nothing: in peace (`steady`), under churn, behind a gateway."""
