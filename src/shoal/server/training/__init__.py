"""Forward and backward passes without a cache: blocks with clients' adapters, and what is saved between the two.

It imports `shoal.model` and below.
"""
