"""How a client uses the servers of a model: routes, connections, and the one retry loop; `known` has what it knows.

It imports `options` and `history` of `shoal.client`, `shoal.net`, `shoal.model.peft.factors`, `shoal.policy` and below.
"""
