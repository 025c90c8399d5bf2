"""`fedllm doctor`: what stands in the way of a run, and which key to change."""
