"""Embedded clients: small text transformations, made by code and the same on every machine.

Every client has one task. A task is a function that draws an input and computes its answer.
`TASKS` lists all tasks; a new task is one more row of it.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fedllm.errors import DataError
from fedllm.planning.seeding import seed_of

Example = tuple[str, str]
_CONSONANTS = "bcdfghjklmnpqrstvwxz"
_VOWELS = "aeiou"
# maximum number of draws until a new input is found; every task has at least a thousand inputs
_MAX_DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """Text transformation: `make` draws an input and returns it with its answer."""

    name: str
    category: str
    instruction: str
    make: Callable[[random.Random], Example]


@dataclass(frozen=True, kw_only=True)
class EmbeddedRow:
    """One row, as a user's file would hold it."""

    client: str
    category: str
    instruction: str
    input: str
    output: str


def embedded_rows(num_clients: int, rows_per_client: int) -> Iterator[EmbeddedRow]:
    """Yield the rows of all embedded clients; a client never has the same input twice.

    If there are more clients than tasks, further clients repeat the tasks with other rows.
    """
    for number in range(num_clients):
        task = TASKS[number % len(TASKS)]
        repeat = number // len(TASKS) + 1
        client = task.name if repeat == 1 else f"{task.name}-{repeat}"
        draw = random.Random(seed_of("embedded", client))
        seen: set[str] = set()
        for _ in range(rows_per_client):
            text, answer = _new_example(task, draw, seen)
            yield EmbeddedRow(
                client=client,
                category=task.category,
                instruction=task.instruction,
                input=text,
                output=answer,
            )


def _new_example(task: TextTask, draw: random.Random, seen: set[str]) -> Example:
    for _ in range(_MAX_DRAWS):
        example = task.make(draw)
        # an answer that is the input itself teaches no transformation
        if example[0] not in seen and example[0] != example[1]:
            seen.add(example[0])
            return example
    raise DataError(
        f"data.embedded_rows: the embedded client {task.name} has no more than {len(seen)} "
        "different inputs; ask for fewer rows"
    )


def _words(draw: random.Random, min_words: int = 2, max_words: int = 4) -> list[str]:
    """Return made-up words with one vowel each; no letter occurs twice in all of them."""
    consonants = draw.sample(_CONSONANTS, len(_CONSONANTS))
    vowels = draw.sample(_VOWELS, draw.randint(min_words, max_words))
    words = []
    for vowel in vowels:
        size = draw.randint(2, 3)
        letters, consonants = [vowel, *consonants[:size]], consonants[size:]
        words.append("".join(draw.sample(letters, len(letters))))
    return words


def _word(draw: random.Random, min_letters: int = 4, max_letters: int = 6) -> str:
    """Return a longer made-up word; about a third are vowels, and no letter occurs twice."""
    size = draw.randint(min_letters, max_letters)
    vowels = draw.sample(_VOWELS, max(1, size // 3))
    letters = [*vowels, *draw.sample(_CONSONANTS, size - len(vowels))]
    return "".join(draw.sample(letters, size))


def _reverse_letters(draw: random.Random) -> Example:
    word = _word(draw)
    return word, word[::-1]


def _reverse_words(draw: random.Random) -> Example:
    words = _words(draw)
    return " ".join(words), " ".join(reversed(words))


def _sort_letters(draw: random.Random) -> Example:
    word = _word(draw)
    return word, "".join(sorted(word))


def _sort_words(draw: random.Random) -> Example:
    words = _words(draw, 2, 3)
    return " ".join(words), " ".join(sorted(words))


def _count_words(draw: random.Random) -> Example:
    words = _words(draw, 1, 5)
    return " ".join(words), str(len(words))


def _count_letters(draw: random.Random) -> Example:
    word = _word(draw, 3, 9)
    return word, str(len(word))


def _add(draw: random.Random) -> Example:
    left, right = draw.randint(1, 49), draw.randint(1, 49)
    return f"{left} + {right}", str(left + right)


def _larger_number(draw: random.Random) -> Example:
    left, right = draw.sample(range(10, 100), 2)
    return f"{left} {right}", str(max(left, right))


def _rotate_letters(draw: random.Random) -> Example:
    word = _word(draw)
    return word, word[1:] + word[0]


def _last_letters(draw: random.Random) -> Example:
    words = _words(draw, 2, 4)
    return " ".join(words), " ".join(word[-1] for word in words)


def _remove_vowels(draw: random.Random) -> Example:
    word = _word(draw, 5, 7)
    return word, "".join(letter for letter in word if letter not in _VOWELS)


def _keep_vowels(draw: random.Random) -> Example:
    word = _word(draw, 5, 7)
    return word, "".join(letter for letter in word if letter in _VOWELS)


def _replace_letter(draw: random.Random) -> Example:
    letters = ["a", *draw.sample(_CONSONANTS.replace("x", ""), draw.randint(3, 5))]
    word = "".join(draw.sample(letters, len(letters)))
    return word, word.replace("a", "x")


def _first_word(draw: random.Random) -> Example:
    words = _words(draw)
    return " ".join(words), words[0]


def _last_word(draw: random.Random) -> Example:
    words = _words(draw)
    return " ".join(words), words[-1]


def _every_second_word(draw: random.Random) -> Example:
    words = _words(draw, 3, 5)
    return " ".join(words), " ".join(words[::2])


def _plural(draw: random.Random) -> Example:
    word = _word(draw, 3, 5).rstrip("sy") + draw.choice(("", "", "s", "y"))
    if word.endswith("y"):
        return word, f"{word[:-1]}ies"
    return word, word + ("es" if word.endswith("s") else "s")


def _double_letters(draw: random.Random) -> Example:
    word = _word(draw)
    return word, "".join(letter * 2 for letter in word)


def _initials(draw: random.Random) -> Example:
    words = _words(draw, 2, 5)
    return " ".join(words), "".join(word[0] for word in words)


def _next_number(draw: random.Random) -> Example:
    start, step = draw.randint(1, 200), draw.randint(1, 9)
    numbers = [start + step * place for place in range(4)]
    return " ".join(map(str, numbers[:-1])), str(numbers[-1])


TASKS: tuple[TextTask, ...] = tuple(
    TextTask(name=name, category=category, instruction=instruction, make=make)
    for name, category, instruction, make in (
        ("reverse-letters", "Order", "Write the word backwards.", _reverse_letters),
        ("count-words", "Counting", "Count the words.", _count_words),
        ("initials", "Letters", "Write the first letter of every word.", _initials),
        ("first-word", "Words", "Write only the first word.", _first_word),
        ("sort-letters", "Order", "Sort the letters of the word.", _sort_letters),
        ("add", "Arithmetic", "Add the two numbers.", _add),
        ("remove-vowels", "Letters", "Remove all vowels from the word.", _remove_vowels),
        ("last-word", "Words", "Write only the last word.", _last_word),
        ("reverse-words", "Order", "Write the words in reverse order.", _reverse_words),
        ("count-letters", "Counting", "Count the letters of the word.", _count_letters),
        ("replace-letter", "Letters", "Replace every a with x.", _replace_letter),
        ("plural", "Words", "Write the plural of the word.", _plural),
        ("larger-number", "Arithmetic", "Write the larger number.", _larger_number),
        ("every-second-word", "Words", "Keep every second word.", _every_second_word),
        ("double-letters", "Letters", "Write every letter twice.", _double_letters),
        ("sort-words", "Order", "Sort the words.", _sort_words),
        ("rotate-letters", "Order", "Write the first letter of the word last.", _rotate_letters),
        ("next-number", "Arithmetic", "Continue the sequence of numbers.", _next_number),
        ("last-letters", "Letters", "Write the last letter of every word.", _last_letters),
        ("keep-vowels", "Letters", "Keep only the vowels of the word.", _keep_vowels),
    )
)
