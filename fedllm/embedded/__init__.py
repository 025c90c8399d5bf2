"""The embedded federation: words, the text of its base and the rows of its clients."""
