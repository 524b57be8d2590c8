"""Minimal pairs of English grammar made by rules: two sentences that differ in the form or the place of one word.

Ten rules, the same number of pairs of each. A model is right where it finds the first sentence more likely than the
second. The pairs are our own, and no published test's.
"""

from collections.abc import Iterator
from itertools import product

Pair = tuple[str, str]
"""The right sentence and the wrong one."""

_NOUNS = (
    ("man", "men"), ("woman", "women"), ("child", "children"), ("teacher", "teachers"), ("worker", "workers"),
    ("friend", "friends"), ("farmer", "farmers"), ("doctor", "doctors"), ("soldier", "soldiers"), ("boy", "boys"),
)  # fmt: skip
_THINGS = (
    ("book", "books"), ("house", "houses"), ("road", "roads"), ("letter", "letters"), ("law", "laws"),
    ("school", "schools"), ("problem", "problems"), ("table", "tables"), ("plan", "plans"), ("city", "cities"),
)  # fmt: skip
_VERBS = (  # base, third person, past, participle
    ("take", "takes", "took", "taken"), ("see", "sees", "saw", "seen"), ("give", "gives", "gave", "given"),
    ("write", "writes", "wrote", "written"), ("know", "knows", "knew", "known"),
    ("choose", "chooses", "chose", "chosen"), ("forget", "forgets", "forgot", "forgotten"),
    ("show", "shows", "showed", "shown"),
)  # fmt: skip
_ADJECTIVES = ("new", "old", "large", "small", "good", "great", "long", "young")
_VOWELS = ("apple", "answer", "office", "island", "uncle", "example", "idea", "army")
_CONSONANTS = ("book", "letter", "doctor", "garden", "horse", "river", "plan", "table")
_PRONOUNS = (("he", "him"), ("she", "her"), ("they", "them"), ("we", "us"), ("I", "me"))


def pairs(count: int) -> list[Pair]:
    """`count` pairs, or as many as the rules make; the same ones on every call."""
    rules = [list(rule()) for rule in _RULES]
    each = -(-count // len(rules))
    # Spread over what a rule makes, and the rules in turn, so that any count holds every rule.
    chosen = [[rule[i * len(rule) // each] for i in range(each)] for rule in rules if len(rule) >= each]
    chosen += [rule for rule in rules if len(rule) < each]
    turns = range(max(map(len, chosen)))
    return [rule[turn] for turn in turns for rule in chosen if turn < len(rule)][:count]


def _agreement() -> Iterator[Pair]:
    for (one, many), (base, third, _, _), (_, things) in product(_NOUNS, _VERBS, _THINGS):
        yield f"The {one} {third} the {things}.", f"The {one} {base} the {things}."
        yield f"The {many} {base} the {things}.", f"The {many} {third} the {things}."


def _distant_agreement() -> Iterator[Pair]:
    for (one, many), (thing, things), adjective in product(_NOUNS, _THINGS, _ADJECTIVES):
        yield f"The {thing} of the {many} is {adjective}.", f"The {thing} of the {many} are {adjective}."
        yield f"The {things} of the {one} are {adjective}.", f"The {things} of the {one} is {adjective}."


def _determiner() -> Iterator[Pair]:
    for (subject, _), (thing, things), (_, _, past, _) in product(_PRONOUNS, _THINGS, _VERBS):
        subject = subject[0].upper() + subject[1:]
        yield f"{subject} {past} these {things}.", f"{subject} {past} this {things}."
        yield f"{subject} {past} that {thing}.", f"{subject} {past} those {thing}."


def _article() -> Iterator[Pair]:
    for (subject, _), (_, _, past, _), (vowel, consonant) in product(
        _PRONOUNS, _VERBS, zip(_VOWELS, _CONSONANTS, strict=True)
    ):
        subject = subject[0].upper() + subject[1:]
        yield f"{subject} {past} an {vowel}.", f"{subject} {past} a {vowel}."
        yield f"{subject} {past} a {consonant}.", f"{subject} {past} an {consonant}."


def _case() -> Iterator[Pair]:
    for (subject, thing), (_, _, past, _), (_, nouns) in product(_PRONOUNS, _VERBS, _NOUNS):
        first, wrong = (word[0].upper() + word[1:] for word in (subject, thing))
        yield f"{first} {past} the {nouns}.", f"{wrong} {past} the {nouns}."
        yield f"The {nouns} {past} {thing}.", f"The {nouns} {past} {subject}."


def _participle() -> Iterator[Pair]:
    for (_, nouns), (_, _, past, participle), (thing, _) in product(_NOUNS, _VERBS, _THINGS):
        if past != participle:
            yield f"The {nouns} have {participle} the {thing}.", f"The {nouns} have {past} the {thing}."


def _modal() -> Iterator[Pair]:
    for (one, _), (base, third, past, _), modal in product(_NOUNS, _VERBS, ("will", "must", "can", "should")):
        yield f"The {one} {modal} {base} it.", f"The {one} {modal} {third} it."
        yield f"The {one} {modal} {base} it.", f"The {one} {modal} {past} it."


def _reflexive() -> Iterator[Pair]:
    for (_, many), adverb, verb in product(_NOUNS, ("often", "always", "never"), ("defended", "blamed", "found")):
        yield f"The {many} {adverb} {verb} themselves.", f"The {many} {adverb} {verb} itself."


def _order() -> Iterator[Pair]:
    for (subject, _), (_, _, past, _), (thing, _), adjective in product(_PRONOUNS, _VERBS, _THINGS, _ADJECTIVES):
        subject = subject[0].upper() + subject[1:]
        yield f"{subject} {past} the {adjective} {thing}.", f"{subject} {past} the {thing} {adjective}."


def _negation() -> Iterator[Pair]:
    for (one, many), (base, third, past, _), (thing, _) in product(_NOUNS, _VERBS, _THINGS):
        yield f"The {one} does not {base} the {thing}.", f"The {one} does not {third} the {thing}."
        yield f"The {many} did not {base} the {thing}.", f"The {many} did not {past} the {thing}."


_RULES = (
    _agreement, _distant_agreement, _determiner, _article, _case, _participle, _modal, _reflexive, _order, _negation,
)  # fmt: skip
