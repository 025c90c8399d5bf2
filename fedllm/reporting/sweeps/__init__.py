"""Sweeps as people read them: status, plan and tuned learning rates."""
