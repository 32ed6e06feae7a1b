"""How many tokens a client guesses ahead: what guesses are worth, what they cost, and what was won and lost by them.

Values and functions without clocks. It imports nothing of the package.
"""
