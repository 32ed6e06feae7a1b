"""What OpenAI's endpoints answer: chats, completions, responses and embeddings.

It may import `shoal.client.generation`, and what is in `shoal.gateway` itself, but not `app`, `guard` or `page`.
"""
