"""What peers sign of sessions: the digests of tokens, and the receipts that a server gives for them.

`shoal.net.signing.receipt_signatures` has the signatures, `shoal.net.signing.token_digests` the digests.
"""
