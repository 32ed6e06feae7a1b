"""Whole swarms in virtual time, and what may happen to them: see `schedule.py`."""
