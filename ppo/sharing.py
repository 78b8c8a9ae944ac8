"""How several processes share an iteration: who answers which prompt, who computes which response.

What is shared out is a function of the batch and the number of processes, and each result is put back in its place:
the batch is the same one however many processes work on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from llama2_chat import distributed

T = TypeVar("T")


def share_out(sizes: Sequence[int], processes: int) -> list[list[int]]:
    """The places of `sizes`, from 0, dealt to processes so that the sums of sizes are nearly equal.

    The largest first, each to the process with the smallest sum so far that has not yet got
    ceil(places / processes) of them: none computes more rounds of equal batches than needed.

    Returns:
        One ascending list for each process; some are empty where there are more processes than places.
    """
    most = math.ceil(len(sizes) / processes)
    shares: list[list[int]] = [[] for _ in range(processes)]
    sums = [0] * processes
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
        free = [number for number in range(processes) if len(shares[number]) < most]
        process = min(free, key=lambda number: (sums[number], number))
        shares[process].append(place)
        sums[process] += sizes[place]
    return [sorted(share) for share in shares]


def own_share(sizes: Sequence[int]) -> list[int]:
    """The places that this process takes."""
    return share_out(sizes, distributed.process_count())[distributed.process_number()]


def put_together(sizes: Sequence[int], own: Sequence[T]) -> list[T]:
    """What all processes made of their shares, in the batch's order, in every process; all must call it.

    Args:
        own: One result for each place of `own_share(sizes)`.
    """
    shares = share_out(sizes, distributed.process_count())
    results = distributed.gather_objects(list(own))
    placed = {
        place: result
        for share, made in zip(shares, results, strict=True)
        for place, result in zip(share, made, strict=True)
    }
    return [placed[place] for place in range(len(sizes))]
