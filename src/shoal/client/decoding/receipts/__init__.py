"""What servers sign of a session is compared with what the client sent them and got from them.

`shoal.client.decoding.receipts.receipt_check` acts on what is found.
"""
