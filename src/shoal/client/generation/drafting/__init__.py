"""Where guesses of the next tokens come from. A drafter knows a text so far, and guesses how it goes on.

It imports options of the client, weights, and what is below.
"""
