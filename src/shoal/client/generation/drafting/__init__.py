"""Where guesses of the next tokens come from. A drafter knows a text so far, and guesses how it goes on.

It imports the ground and decisions, and no sessions.
"""
