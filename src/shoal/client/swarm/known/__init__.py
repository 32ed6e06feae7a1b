"""What a client knows of each server: what the directory says, what failed, who answers; and who may be used now.

It imports `audit_book`, `measurements` and `waits` of `shoal.client.swarm`, `options` of `shoal.client`, `shoal.net`,
`shoal.policy` and below.
"""
