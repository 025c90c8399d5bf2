"""Who trains where: attempts, their submission, and what becomes of their workers."""
