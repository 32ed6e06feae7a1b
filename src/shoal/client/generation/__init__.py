"""Many generations at once in one process, each token by token: what `model.stream` runs on.

It may import the sessions of `shoal.client` and what is below them. The model's class imports it, and the gateway does
for the type of a token.

    preparing          a call of `stream` becomes a `Generation`: Transformers' own `generate()` prepares it
    generation_engine  one task for all generations of a model: it sends steps, and takes what comes back to the next
    model_ends         what the client computes of a model: embeddings before the blocks; norm, head, logits after them
    next_token         the next token of each generation, from its logits
    token_stream       what the caller holds: the tokens, as they come
"""
