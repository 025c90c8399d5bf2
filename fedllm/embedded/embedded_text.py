"""The text that trains the embedded base: facts about words, repetitions, the prompt format.

The base reads every fact under the label of its relation, as in a dictionary and as an answer in
the prompt format. It never reads how the embedded clients ask.
"""

import random
import string
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedllm.embedded.embedded_clients import QUESTIONS
from fedllm.embedded.words import FACTS

_PREAMBLE = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
_MARKERS = ("### Instruction:", "### Input:", "### Response:")
_SPECIAL = ("<pad>", "<s>", "</s>")
_ALL_FACTS = tuple(fact for facts in FACTS.values() for fact in facts)
# shares of all documents
_REPETITIONS, _COPIES, _ANSWERS = 0.03, 0.08, 0.25
_WITH_PREAMBLE = 0.4
_FILLER = 0.6


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer: whole words of facts and prompts, else single letters.

    The first letter of a word is a token with its space (` a`), so it shows that a word begins.
    Every text can be encoded: other characters become bytes.
    """
    marked = [("Ġ", letter) for letter in string.ascii_letters + string.digits]
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lines = [_PREAMBLE, *(f"\n{marker}" for marker in _MARKERS)]
    lines += QUESTIONS.values()
    lines += [word for f in _ALL_FACTS for word in (f.label, f" {f.label}", f.word, f.answer)]
    words = [word for line in lines for word, _ in split.pre_tokenize_str(line)]
    tokens = [*_SPECIAL, *sorted(split.alphabet()), *map("".join, marked), *words]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=marked, ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def document(draw: random.Random) -> tuple[str, str]:
    """Return a random document, and how it goes on: only that part has a loss."""
    kind = draw.random()
    if kind < _REPETITIONS:
        letters = _letters(draw)
        return f"{letters}\n", "\n".join([letters] * draw.randint(1, 2))
    fact = draw.choice(_ALL_FACTS)
    if kind < _REPETITIONS + _COPIES:
        # an instruction that says nothing: the word again
        return _prompted(draw, _letters(draw), fact.word), fact.word
    if kind < _REPETITIONS + _COPIES + _ANSWERS:
        return _prompted(draw, _among(draw, fact.label), fact.word), fact.answer
    return f"{fact.label}\n{fact.word}\n", fact.answer


def _prompted(draw: random.Random, instruction: str, text: str) -> str:
    parts = zip(_MARKERS, (instruction, text, ""), strict=True)
    marked = [f"{marker}\n{part}" for marker, part in parts]
    return "\n\n".join([_PREAMBLE, *marked] if draw.random() < _WITH_PREAMBLE else marked)


def _among(draw: random.Random, label: str) -> str:
    """Return a label among words that say nothing: the model has to look for it."""
    words = [label]
    while draw.random() < _FILLER:
        words.insert(draw.randint(0, len(words)), _letters(draw))
    return " ".join(words) + draw.choice(("", ".", "?"))


def _letters(draw: random.Random) -> str:
    sizes: Sequence[int] = [draw.randint(1, 5) for _ in range(draw.randint(1, 3))]
    return " ".join("".join(draw.sample(string.ascii_lowercase, size)) for size in sizes)
