"""The making of the bundled model: a grammar that generates stories, and the training of a small decoder on them."""
