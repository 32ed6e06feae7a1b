"""What servers and witnesses computed, compared: how far apart it is, and what follows from that.

It imports `audit_book` of `shoal.client.swarm`, `shoal.policy.audits` and below.
"""
