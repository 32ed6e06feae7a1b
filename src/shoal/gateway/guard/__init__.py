"""What every request passes: keys and limits, an id, hosts and sizes, and what is counted of it.

It may import `shoal.gateway.error_objects`.
"""
