"""Caption metrics as the field reports them: BLEU-1..4, ROUGE-L and CIDEr-D, without Java.

The values equal those of pycocoevalcap 1.2 with its Java tokenizer, times 100. All functions work
on plain strings; `CiderD` also works on sequences of any hashable tokens.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np

SCORER = "BLEU, ROUGE-L, CIDEr-D as in pycocoevalcap 1.2"
TOKENIZER = "PTB as in Stanford CoreNLP 3.4.1, lower case, punctuation removed"

MAX_N = 4
CIDER_SIGMA = 6.0
ROUGE_BETA = 1.2

# --- Tokens ---------------------------------------------------------------------------------

# Words that keep their full stop. Single letters do too ("a dog on a." ends in the token "a.").
_ABBREVIATIONS = """
    adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bancorp bhd bldg blvd brig
    bros calif capt cf cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec
    ens esq est etc ext feb fla fri ft ga gen gov govs hon inc ind insp intl invt jan jos jr jul
    jun kan kans ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mr mrs ms
    msgr mt mtg natl neb nev nov oct okla penn pfc ph plc ppte pptes ppty pptys pres prof profs pte
    ptes pty ptys pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt supts
    sys tel tenn thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo"""
_CAPITALISED_ABBREVIATIONS = "Ark Az Del Ill La LA Mass Miss Ore Pa Tex Wash"  # not "miss."
_NUMBERED_ABBREVIATIONS = "art ca fig figs no nos op pp prop"  # only before a number: "no. 5"

_PUNCTUATION = frozenset("'' ' `` ` \" . ? ! , : ; - -- ... – — ― … &quot; &apos; &nbsp;".split())
_SPELLED = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
    "£": "#", "€": "$", "¤": "$", "¢": "cents", "&amp;": "&", "&lt;": "<", "&gt;": ">",
}  # fmt: skip
_CURLY = {"‘": "`", "‛": "`", "‹": "`", "’": "'", "›": "'", "“": "``", "«": "``", "”": "''"}
_STRAIGHT = str.maketrans({**_CURLY, "»": "''"})
_CLITICS = frozenset("'s 'd 'm 'll 're 've n't n`t".split())
_SPLIT_WORDS = ("can not", "gon na", "got ta", "wan na", "lem me", "gim me")


def _either(words: str) -> str:
    return "|".join(sorted(words.split(), key=len, reverse=True))


def _token_rules() -> list[re.Pattern[str]]:
    """The lexer: the rule that matches the longest text wins, and its group 1 is the token.

    What stands outside the group is only looked at, but counts as matched text.
    """
    letter = r"(?:[^\W\d_²³¹¼½¾⁰-₉⅐-⓿❶-➓]|[\u0300-\u036f])"
    word = rf"(?:{letter}|\d)+"
    name = rf"{letter}(?:{letter}|\d)*"
    end = rf"(?!{letter}|\d)"
    quote, any_quote = "['’]", "(?:['’‘‛`]|&apos;)"
    abbreviation = rf"(?i:[a-z]|{_either(_ABBREVIATIONS)})|{_either(_CAPITALISED_ABBREVIATIONS)}"
    acronym = r"(?:[A-Za-z]\.)+[A-Za-z]\."
    hyphenated = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
    rules = [
        # Contractions and other words with an apostrophe.
        *(r"(?i:({})({}))".format(*pair.split()) + end for pair in _SPLIT_WORDS),
        rf"((?:'|&apos;)(?i:[sdm]|ll|re|ve)){end}",
        r"(’(?i:[sdm]|ll|re|ve))",
        rf"([A-Za-z0-9]*?[A-MO-Za-mo-z0-9])(?i:n{any_quote}t)",
        rf"((?i:n{any_quote}t)){end}",
        rf"((?:{quote}|&apos;)(?i:em|till?|cause)|{quote}n{quote})",
        rf"({quote}n|{quote}\d\d)(?!\S)",
        rf"({quote}[2-9]0s)",
        r"('[Tt])(?i:is|was)",
        rf"((?i:ol|dunkin|somethin){quote})",
        rf"((?i:o{quote}clock|ma{quote}am|cap{quote}n|li'l|c'mon|d'ye)){end}",
        rf"([Yy]{quote}){letter}",
        rf"((?i:[ldj]){quote})",
        rf"([A-HJ-XZdlno]{quote}[A-Za-z]{{2,}}|[Oo]{quote}[aeiou])",
        rf"([A-Za-z]+[aeiouyAEIOUY]{any_quote}[aeiouAEIOU][A-Za-z]*)",
        # Words. A full stop is part of what stands before a hyphen, or before , ; and :
        rf"({word})",
        rf"({name}(?:[_-][^\W_]+)+)",
        rf"({name}(?:[.!?]{name})+)",
        rf"({word}(?:{letter}|[\d.,])*(?:[-‐‑](?:{acronym}|{word}))+)",
        rf"({hyphenated}(?:\\?/{hyphenated}){{1,2}})",
        r"([A-Z]+(?:(?:&|&amp;|\+)[A-Z]+)+)",
        r"((?:[A-Za-z]\.)+)",
        rf"((?:{abbreviation})\.)",
        r"((?i:ph\.d\.))",
        rf"((?i:{_either(_NUMBERED_ABBREVIATIONS)})\.)[ ]?\d",
        rf"({name}(?:[.&]{name})*\.|{word}(?:\.?-{word})*\.)[,;:]",
        r"((?i:anti|pro)-)",
        # Numbers.
        r"([-+]?\d*(?:[.:,]\d+)+|[-+]\d+)",
        r"(\d+[ -]\d+/\d+)",
        r"((?:\+\d+[ ])?(?:\(\d{3}\)[ ]?|\d{3}[ -])\d{3}[ -]\d{4})",
        r"([A-Z]{1,3}\$)",
        # Addresses, tags and smileys.
        rf"(\w[\w.+-]*@(?:\w[\w-]*\.)*\w+|@{letter}\w*|\#{letter}+)",
        r"(https?://[^\s\"<>|()]+\.[^\s\"<>|()]*[\w/])",
        r"((?:\w+\.)+(?:com|net|org|edu)(?:/[^\s\"<>|()]+[\w/])?)",
        r"(<!--.*?-->|</?[A-Za-z][^<>]*>)",
        r"([:;=][-o']?(?:[()\\|@\[\]]|[DdPpO3](?!\w))|\^_\^)",
        # Everything else.
        r"(&(?:amp|lt|gt|quot|apos|nbsp|\#39);)",
        r"(''|``|[‘’‛“”‹›«»]{1,2}|<<|>>|\.\.\.|[?!]+|[Cc]\+\+|[CFcf]\#)",
        r"(-----+|--+|__+|\#\#+|\*+|\S)",
    ]
    return [re.compile(rule) for rule in rules]


_RULES = _token_rules()
_PLAIN_WORD = re.compile(r"[a-z]+(?!\S)")
_WHOLE_SPLIT_WORDS = frozenset(pair.replace(" ", "") for pair in _SPLIT_WORDS)
# Emoji, control characters and the like: the lexer knows no rule for them, and drops them.
_UNKNOWN = re.compile(r"[^!-~\s¡-῾‐‑–-⁞⁰-⯿ぁ-퟿豈-﫿！-￯]")


def tokenize(text: str) -> list[str]:
    """Split a caption as pycocoevalcap's PTBTokenizer does.

    That is Stanford CoreNLP 3.4.1 with -preserveLines -lowerCase, minus 17 punctuation tokens. The
    rules here were found by comparing outputs. Brackets become words ("-lrb-"), as they do there,
    and a few tokens hold a no-break space ("1 1/2").
    """
    text = _UNKNOWN.sub(" ", text.replace("\xad", ""))
    tokens = []
    position = 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        match = _PLAIN_WORD.match(text, position)
        if match and match[0] not in _WHOLE_SPLIT_WORDS:
            position = match.end()
            tokens.append(match[0])
            continue
        matches = (match for rule in _RULES if (match := rule.match(text, position)))
        match = max(matches, key=re.Match.end)
        position = match.end(1)
        token = _spell(match[1])
        if token not in _PUNCTUATION and not re.fullmatch("-{2,4}", token):
            tokens.append(token)
    return tokens


def _spell(token: str) -> str:
    """Write a token as the lexer prints it, in lower case."""
    if token in _SPELLED:
        return _SPELLED[token]
    token = token.lower().replace(" ", "\xa0").replace("&amp;", "&")
    straight = token.translate(_STRAIGHT).replace("&apos;", "'")
    if straight in _CLITICS or not straight.strip("`'"):
        return straight
    return token.replace("(", "-lrb-").replace(")", "-rrb-")
