"""The directory on hivemind's hash table: which records it stores and reads, how it finds its peers again.

It imports the other modules of `shoal.net.libp2p` but the transport, and below.
"""
