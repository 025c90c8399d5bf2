"""Answer loss, generation, Rouge-L, exact match."""
