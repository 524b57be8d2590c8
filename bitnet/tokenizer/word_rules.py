"""The rules by which byte-level tokenizers cut a text into words before they merge, and what such rules cost.

The rules are the regular expressions of the models' own tokenizer.json; each in turn cuts the words that the ones
before have left. llama.cpp runs approximations of them, with which the ids agree but for rare characters: its `tekken`
and `gpt-4o` know the case of a to z only and no combining marks, its `deepseek-llm` and `deepseek-coder` take wide
spaces such as U+3000 for ordinary ones, and none takes the long s of U+017F for an s in a contraction.
"""

import re

# Endings that several rules share: contractions, then symbols and whitespace.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2_RULE = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _SYMBOLS
_QWEN2 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _SYMBOLS
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + "+", r"[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*"
_SYMBOLS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
_IDEOGRAPHS = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_PUNCTUATED = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r" ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES
)
_SENTENCE_MARKS = r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"

PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}$+<=>^~|]+", GPT2_RULE, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (GPT2_RULE,),
    "smollm": (r"\p{N}", GPT2_RULE),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "qwen35": (_CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES,),
    "falcon": (r"[\p{P}$+<=>^~|`]+", GPT2_RULE, r"[0-9][0-9][0-9]"),
    # The model's list of letters is that of cased letters without the mathematical alphabets.
    "deepseek-llm": (
        r"[\r\n]",
        r"\s?[\p{Lu}\p{Ll}\p{Lt}&&[^\x{1D400}-\x{1D7CB}]]+",
        r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _IDEOGRAPHS,
        r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _IDEOGRAPHS, r"\p{N}"),
    "deepseek-v3": (r"\p{N}{1,3}", r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _PUNCTUATED),
    "tekken": ("|".join((*_CASED, r"\p{N}", _SYMBOLS_SLASH)),),
    "gpt-4o": ("|".join((*(f"{case}{_CONTRACTION}?" for case in _CASED), r"\p{N}{1,3}", _SYMBOLS_SLASH)),),
    "bloom": (_SENTENCE_MARKS,),
    "viking": (_SENTENCE_MARKS, r"\p{N}"),
    "seed-coder": (_CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + _SPACES,),
}
"""Name of a rule to its regular expressions (Oniguruma's syntax)."""

_SAME_AS = {
    "gpt-2": "phi-2 gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion granite-docling exaone4 "
    "jina-es jina-de jina-v2-es jina-v2-de",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe chatglm-bpe glm4",
    "qwen2": "deepseek-r1-qwen kormo megrez stablelm2 hunyuan grok-2",
    "deepseek-v3": "hunyuan-dense",
    "gpt-4o": "llama4 kanana2 minimax-m2",
    "bloom": "poro-chat gpt3-finnish",
}
RULE_OF = {name: name for name in PRE_TOKENIZERS} | {
    name: rule for rule, names in _SAME_AS.items() for name in names.split()
}
# A word that is a piece as it stands is that piece, whatever the merges would make of it; and the begin of text token
# is in front unless the file says otherwise.
WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}


def rule_names(expressions: tuple[str, ...], whole_words: bool) -> list[str]:
    """The names under which llama.cpp knows a rule, [] where it does not: first those that agree with `whole_words`,
    whether a word that is a piece stays whole."""
    wanted = tuple(map(_spelled_out, expressions))
    for rule, known in PRE_TOKENIZERS.items():
        if tuple(map(_spelled_out, known)) == wanted:
            names = [rule, *_SAME_AS.get(rule, "").split()]
            return sorted(names, key=lambda name: (name in WHOLE_WORDS) != whole_words)  # keeps the order otherwise
    return []


def _spelled_out(regex: str) -> str:
    """An expression with its characters as they are instead of by number."""
    return re.sub(r"\\u([0-9a-fA-F]{4})|\\x\{([0-9a-fA-F]+)\}", lambda found: chr(int(found[1] or found[2], 16)), regex)


# One character, as an expression names it: a class, an escape or itself.
_CHARACTER = r"(?:\\[pP]\{\^?\w+\}|\\[dDsSwWnrt]|\\[^\w]|\[\^?(?:\\.|[^\\\[\]&])+\]|[^\\\[\](){}|*+?.^$])"
_PLAIN = re.compile(rf"(?:{_CHARACTER}\??)?{_CHARACTER}*(?:[*+]|\{{\d(?:,\d*)?\}})?", re.DOTALL)
_ALTERNATIVE = re.compile(r"(?:\\.|\[(?:\\.|[^\]\\])*\]|[^|])+", re.DOTALL)
_LONGEST = 2000
_KNOWN = {_spelled_out(regex) for rule in PRE_TOKENIZERS.values() for regex in rule} - {r"\s+$"}


def is_linear(regex: str) -> bool:
    """Whether an expression is known to search any text in a time that grows as the text does.

    So do the rules above, but for the end of deepseek-llm's, which reads a run of n spaces n times; and alternatives
    without groups that repeat their last character alone, since what they have read they take, or it is short.
    """
    if len(regex) > _LONGEST:
        return False
    regex = _spelled_out(regex)
    return regex in _KNOWN or all(_PLAIN.fullmatch(alternative) for alternative in _ALTERNATIVE.findall(regex))
