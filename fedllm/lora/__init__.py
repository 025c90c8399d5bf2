"""LoRA factors and their algebra, pure torch."""
