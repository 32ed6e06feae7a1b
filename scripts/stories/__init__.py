"""How the bundled model is made: a grammar that writes stories, and the training of a small decoder on them."""
