"""Embedded clients: questions about words, the same on every machine.

A client asks for four relations of `words.FACTS`, two of each of two kinds of words, so that it has
to read the question. The base has read the facts, but never the questions. Several clients share
every question, each with words of its own.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fedllm.embedded.words import FACTS, WordFact
from fedllm.errors import DataError
from fedllm.planning.seeding import seed_of

# label of a relation -> how clients ask for it
QUESTIONS: Mapping[str, str] = {
    "plural": "What are several of these called?",
    "kind": "Sort it into a group.",
    "French": "How would one say it in Lyon?",
    "German": "Translate for a friend from Hamburg.",
    "past": "Tell it as yesterday's news.",
    "perfect": "Complete: they have already",
    "present": "Describe who is busy with it now.",
    "habit": "Write what she usually does.",
    "comparative": "Make it stronger than another.",
    "superlative": "Give the highest degree.",
    "opposite": "Say the contrary.",
    "capital": "Which city governs it?",
    "people": "Name its inhabitants.",
    "continent": "Where on the globe is that?",
    "next": "Count on by one.",
    "double": "Add it to itself.",
}


@dataclass(frozen=True, kw_only=True)
class WordClient:
    """Client: its name, the kind of its first words, and two labels of each of two kinds."""

    name: str
    category: str
    labels: tuple[tuple[str, str], tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class EmbeddedRow:
    """One row, as a user's file would hold it."""

    client: str
    category: str
    instruction: str
    input: str
    output: str


CLIENTS: tuple[WordClient, ...] = tuple(
    WordClient(name=name, category=category, labels=(first, second))
    for name, category, first, second in (
        ("ana", "Nouns", ("plural", "kind"), ("capital", "people")),
        ("ben", "Verbs", ("past", "perfect"), ("comparative", "superlative")),
        ("chloe", "Adjectives", ("opposite", "comparative"), ("French", "German")),
        ("david", "Countries", ("capital", "continent"), ("next", "double")),
        ("elif", "Numbers", ("next", "double"), ("present", "habit")),
        ("femi", "Nouns", ("French", "German"), ("past", "present")),
        ("grace", "Verbs", ("perfect", "habit"), ("people", "continent")),
        ("hugo", "Adjectives", ("superlative", "opposite"), ("plural", "French")),
        ("iris", "Countries", ("people", "continent"), ("comparative", "superlative")),
        ("jan", "Numbers", ("next", "double"), ("kind", "German")),
        ("kofi", "Nouns", ("plural", "French"), ("past", "perfect")),
        ("lena", "Verbs", ("present", "habit"), ("opposite", "comparative")),
        ("mei", "Adjectives", ("comparative", "superlative"), ("capital", "continent")),
        ("nils", "Countries", ("capital", "people"), ("past", "present")),
        ("olga", "Numbers", ("next", "double"), ("superlative", "opposite")),
        ("pavel", "Nouns", ("kind", "German"), ("perfect", "habit")),
    )
)


def embedded_rows(num_clients: int, rows_per_client: int) -> Iterator[EmbeddedRow]:
    """Yield the rows of all embedded clients; a client never has the same input twice.

    Further clients ask what the first ones ask, about other words.

    Raises:
        DataError: a client has fewer words.
    """
    for number in range(num_clients):
        client = CLIENTS[number % len(CLIENTS)]
        repeat = number // len(CLIENTS) + 1
        name = client.name if repeat == 1 else f"{client.name}-{repeat}"
        facts = _drawn_facts(client, random.Random(seed_of("embedded", name)))
        if rows_per_client > len(facts):
            raise DataError(
                f"data.embedded_rows: got {rows_per_client}, but the embedded client {name} has "
                f"{len(facts)} words; ask for fewer rows"
            )
        for fact in facts[:rows_per_client]:
            yield EmbeddedRow(
                client=name,
                category=client.category,
                instruction=QUESTIONS[fact.label],
                input=fact.word,
                output=fact.answer,
            )


def _drawn_facts(client: WordClient, draw: random.Random) -> list[WordFact]:
    """Return a fact for every word that the client may be asked about, its four labels in turn."""
    queues: list[list[WordFact]] = []
    for pair in client.labels:
        of_word = [{fact.word: fact for fact in FACTS[label]} for label in pair]
        words = draw.sample(sorted(of_word[0].keys() & of_word[1].keys()), len(of_word[0]))
        queues += [[facts[word] for word in words[turn::2]] for turn, facts in enumerate(of_word)]
    return [fact for four in zip(*queues, strict=False) for fact in four]
