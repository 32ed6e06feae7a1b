"""Other people's clients of OpenAI's API, unmodified, against a real gateway. `scripts/clients` installs them."""
