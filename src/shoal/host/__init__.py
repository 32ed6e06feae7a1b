"""The machine that shoal runs on: what it is, processes of ours on it, files replaced as a whole, large imports.

What is asked of the operating system or of the interpreter, and knows nothing of models or swarms, may live here. It
imports `shoal.errors` only.
"""
