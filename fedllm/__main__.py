"""`python -m fedllm`: the command line, where no `fedllm` is on the path."""

from fedllm.cli.main import main

main()
