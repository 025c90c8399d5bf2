"""Text scores of a generated answer against its references: Rouge-L and exact match, any script."""

import re
import string
import unicodedata
from collections.abc import Sequence
from functools import cache

from rouge_score.rouge_scorer import RougeScorer

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORD = re.compile(r"[A-Za-z0-9]")
# Scripts without spaces between words, by the start of their characters' Unicode names.
_WITHOUT_SPACES = (
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "HALFWIDTH KATAKANA",
    "BOPOMOFO",
    "THAI",
    "LAO",
    "KHMER",
    "MYANMAR",
    "TIBETAN",
)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Return the best Rouge-L F-measure (Lin 2004) over the references, in 0..1.

    A reference that is ASCII and has a letter or digit is scored as usual for English: with the
    tokens of `rouge_score` and the Porter stemmer. Those tokens are `[a-z0-9]` only, so all other
    references use `unicode_tokens`. Two empty strings score 1.
    """
    return max(_rouge_l(prediction, reference) for reference in references)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if the prediction equals a reference, else 0.

    Both are compared in lower case, without ASCII punctuation and with single spaces. A text of
    punctuation alone keeps its punctuation, because that is the answer.
    """
    answer = _folded(prediction)
    return float(any(answer == _folded(reference) for reference in references))


def unicode_tokens(text: str) -> list[str]:
    """Return tokens in lower case: words, symbols, single characters of scripts without spaces."""
    tokens: list[str] = []
    in_word = False
    for character in unicodedata.normalize("NFKC", text).lower():
        kind = unicodedata.category(character)[0]
        if kind in "ZC":
            in_word = False
        elif kind == "M" and tokens:
            # vowel signs and accents belong to the letter before them
            tokens[-1] += character
        elif in_word and _belongs_to_word(character, kind):
            tokens[-1] += character
        else:
            tokens.append(character)
            in_word = _belongs_to_word(character, kind)
    return tokens


def _rouge_l(prediction: str, reference: str) -> float:
    if not unicode_tokens(reference):
        return float(not unicode_tokens(prediction))
    scorer = _scorer(reference.isascii() and _WORD.search(reference) is not None)
    score: float = scorer.score(reference, prediction)["rougeL"].fmeasure
    return score


class _UnicodeTokenizer:
    """Tokenizer with the interface that `RougeScorer` needs."""

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of `text`."""
        return unicode_tokens(text)


@cache
def _scorer(english: bool) -> RougeScorer:
    if english:
        return RougeScorer(["rougeL"], use_stemmer=True)
    return RougeScorer(["rougeL"], tokenizer=_UnicodeTokenizer())


@cache
def _belongs_to_word(character: str, kind: str) -> bool:
    return kind in "LN" and not unicodedata.name(character, "").startswith(_WITHOUT_SPACES)


def _folded(text: str) -> str:
    folded = " ".join(text.lower().translate(_NO_PUNCTUATION).split())
    return folded or " ".join(text.split())
