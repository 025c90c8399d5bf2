"""What a run checks before it believes files: whose they are, who wrote them, where they lie."""
