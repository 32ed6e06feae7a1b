"""Rules of other systems, written from their papers, to compare with. No live server uses them."""
