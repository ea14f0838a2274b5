"""Classification by the nearest embeddings: exact and approximate, in one table or several."""
