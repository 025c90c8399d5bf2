"""Checks of `fedllm doctor`: problems before a run, and which key to change."""
