"""The commands of `fedllm`, made with typer."""
