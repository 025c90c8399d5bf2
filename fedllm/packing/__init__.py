"""How rows are computed together: layouts, attention, dropout, and adapters in the base."""
