"""Attacks on real servers, and what an honest client notices of them: `python -m benchmarks.abuse`.

An attack is a coroutine that speaks to the servers with raw frames, from a process and with identities of its own. Each
family of attacks is a module with `ATTACKS`, which `__main__` lists.
"""
