"""Each step of each client: servers that compute waiting steps together, links, failures, replays."""
