"""Reasons of ends are neutral words, whichever scheduler's word a record keeps."""

import pytest

from fedllm.scheduling.endings import exit_status, reason_of
from fedllm.scheduling.seam import Ending, EndReason


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("PREEMPTED", EndReason.PREEMPTED),
        ("NODE_FAIL", EndReason.NODE_LOST),
        ("BOOT_FAIL", EndReason.NODE_LOST),
        ("OUT_OF_MEMORY", EndReason.OUT_OF_MEMORY),
        ("TIMEOUT", EndReason.TIME_LIMIT),
        ("DEADLINE", EndReason.TIME_LIMIT),
        ("CANCELLED", EndReason.CANCELLED),
        ("FAILED", EndReason.FAILED),
        ("exit 3", EndReason.FAILED),
        ("killed by signal 9", EndReason.FAILED),
        *((reason.value, reason) for reason in EndReason),
    ],
)
def test_the_word_of_every_scheduler_has_its_reason(word: str, reason: EndReason) -> None:
    assert reason_of(Ending(state=word)) is reason


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        (Ending(state="FAILED", exit_code="3:0"), 3),
        (Ending(state="FAILED", exit_code="0:9"), None),
        (Ending(state="failed", exit_code="3"), 3),
        (Ending(state="exit 3"), 3),
        (Ending(state="killed by signal 9"), None),
        (Ending(state="PREEMPTED"), None),
    ],
)
def test_an_exit_code_is_that_of_a_program_that_no_signal_ended(
    ending: Ending, status: int | None
) -> None:
    assert exit_status(ending) == status
