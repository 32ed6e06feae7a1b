"""An HTTP server with OpenAI's API in front of models in the swarm: `shoal gateway`.

It may import the client, and nothing of servers; only `shoal.cli` imports it.

    app           the FastAPI application: routes, and how a request is answered
    guard         who may ask, how often, how many at once, and what is counted
    endpoints     what each endpoint answers
    replies       one answer as it is generated: text up to a stop text, log-probabilities, usage
    bodies        the bodies of requests, typed, with their limits
    token_options, structure
                  what a request says about choosing tokens, and the grammar that it keeps to
    served_model  a model with its tokenizer: prompts become tokens, tokens become text
    error_objects OpenAI's error objects, and which error becomes which
    page          a chat and a map of the swarm
"""
