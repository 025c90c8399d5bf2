"""Rows of an optimizer step divided among the processes that compute it, pure."""

from collections.abc import Sequence


def divide_rows(lengths: Sequence[int], num_processes: int) -> list[list[int]]:
    """Return the places of the rows that each process computes, in their order.

    Longest row first, each goes to the process with the fewest tokens so far. A process has no
    rows where there are fewer than processes.

    Args:
        lengths: tokens of each row of the step.
        num_processes: how many shares to make.
    """
    shares: list[list[int]] = [[] for _ in range(num_processes)]
    tokens = [0] * num_processes
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        lightest = tokens.index(min(tokens))
        shares[lightest].append(place)
        tokens[lightest] += lengths[place]
    return [sorted(share) for share in shares]
