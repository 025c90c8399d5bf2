"""The text that trains the embedded base: first repetitions, then copying in the prompt format.

It teaches letters, word boundaries, the prompt format, its end, and how to look back at the
input. It has none of the transformations that the embedded clients train. The letters of a text are
distinct as long as there are unused ones, since a small model finds a letter by the one before.
"""

import random
import string
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_PREAMBLE = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
_MARKERS = ("### Instruction:", "### Input:", "### Response:")
# Words that are one token each, at the start of a line and inside it.
_VOCABULARY = (
    "Write Count Add Sort Remove Replace Keep Continue Copy Repeat Give Put Say Spell Answer "
    "the and an of in from with to as only all every each it is on for by not first last second "
    "next two three one letter letters word words number numbers text sequence order reverse "
    "backwards capital small plural larger twice times input commas dashes quotes lines between "
    "again vowel vowels"
)
_SPECIAL = ("<pad>", "<s>", "</s>")
# shares of the training up to which only repetitions, and then only short texts, are shown
_REPETITIONS_ONLY = 0.3
_SHORT_TEXTS = 0.5
_SEPARATORS = ("\n", "\n", ", ", " / ")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer: whole words of the prompt format, else single letters.

    The first letter of a word is a token with its space (` a`), so it shows that a word begins.
    Every text can be encoded: other characters become bytes.
    """
    marked = [("Ġ", letter) for letter in string.ascii_letters + string.digits]
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lines = [_PREAMBLE, *(f"\n{marker}" for marker in _MARKERS), _VOCABULARY, f" {_VOCABULARY}"]
    words = [word for line in lines for word, _ in split.pre_tokenize_str(line)]
    tokens = [*_SPECIAL, *sorted(split.alphabet()), *map("".join, marked), *words]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=marked, ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def document(draw: random.Random, progress: float) -> str:
    """Return a random document for a model that has had the share `progress` of its training."""
    max_words = 3 if progress < _REPETITIONS_ONLY else 4 if progress < _SHORT_TEXTS else 5
    share = 0.0 if progress < _REPETITIONS_ONLY else 0.3 + 0.6 * (progress - _REPETITIONS_ONLY)
    kind = draw.random()
    if kind < share:
        return _exercise(draw, max_words)
    if kind < share + 0.1:
        return _sequence(draw)
    return draw.choice(_SEPARATORS).join([_material(draw, max_words)] * draw.randint(2, 4))


# Variants of copying: they teach the format and how to look back, but none of the tasks.
_EXERCISES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("Copy the text.", lambda text: text),
    ("Copy the input.", lambda text: text),
    ("Repeat the text two times.", lambda text: f"{text} {text}"),
    ("Give the text in quotes.", lambda text: f'"{text}"'),
    ("Put dashes between the words.", lambda text: text.replace(" ", "-")),
    ("Put commas between the words.", lambda text: text.replace(" ", ", ")),
    ("Spell the text.", lambda text: " ".join(text.replace(" ", ""))),
    ("Say the text again on two lines.", lambda text: f"{text}\n{text}"),
)


def _exercise(draw: random.Random, max_words: int) -> str:
    instruction, answer = draw.choice(_EXERCISES)
    text = _material(draw, max_words)
    parts = zip(_MARKERS, (instruction, text, answer(text)), strict=True)
    return "\n\n".join([_PREAMBLE, *(f"{marker}\n{part}" for marker, part in parts)])


def _material(draw: random.Random, max_words: int) -> str:
    kind = draw.random()
    if kind < 0.7:
        return _words(draw, max_words, string.ascii_lowercase)
    if kind < 0.8:
        return _words(draw, max_words, string.ascii_uppercase)
    if kind < 0.9:
        return _words(draw, max_words, string.digits)
    numbers = [str(draw.randint(1, 99)) for _ in range(draw.randint(1, min(3, max_words)))]
    return draw.choice((" ", " + ", ", ")).join(numbers)


def _words(draw: random.Random, max_words: int, letters: str) -> str:
    left = draw.sample(letters, len(letters))
    words = []
    for _ in range(draw.randint(1, max_words)):
        size = draw.randint(1, 5)
        words.append("".join(left[:size]))
        left = left[size:] or draw.sample(letters, len(letters))
    return " ".join(words)


def _sequence(draw: random.Random) -> str:
    if draw.random() < 0.5:
        start = draw.randint(0, 20)
        letters = string.ascii_lowercase[start : start + draw.randint(3, 12)]
        return draw.choice(("", " ")).join(letters)
    first = draw.randint(0, 300)
    return " ".join(str(first + place) for place in range(draw.randint(3, 8)))
