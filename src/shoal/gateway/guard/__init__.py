"""What every request passes: connections, keys and limits, an id, hosts and sizes, and what is counted of it.

It may import `shoal.gateway.error_objects`.
"""
