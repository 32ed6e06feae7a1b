"""An HTTP server with OpenAI's API in front of models in the swarm: `shoal gateway`.

It may import the client, and nothing of servers; only `shoal.cli` imports it.

    app           the FastAPI application: routes, and what holds for every request
    admission     who may ask, how often, and how many at once
    refusals      OpenAI's error objects, and which error becomes which
    served_model  a model with its tokenizer: prompts become tokens, tokens become text
    requests      the bodies of requests, typed, with their limits
    sampling      what a request says about choosing tokens, as options of `model.stream`
    answers       one answer as it is generated: text, stop strings, log-probabilities, usage
    chat, completions, embeddings
                  the endpoints
"""
