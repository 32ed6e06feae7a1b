"""Forward and backward passes without a cache: blocks with clients' adapters, and what is saved between the two.

It imports `executor`, `step_inputs` and `refusals` of `shoal.server`, `shoal.model` and below.
"""
