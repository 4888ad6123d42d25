"""Caption metrics as the field reports them: BLEU-1..4, ROUGE-L and CIDEr-D, without Java.

The values equal those of pycocoevalcap 1.2 with its Java tokenizer, times 100. All functions work
on plain strings, `CiderD` on sequences of any hashable tokens: of a string it would take letters.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from tokenizer import FULL_STOPS, HAN, THAI, composed

SCORER = "BLEU, ROUGE-L, CIDEr-D as in pycocoevalcap 1.2"
TOKENIZER = "PTB as in Stanford CoreNLP 3.4.1, lower case, punctuation removed"

MAX_N = 4
_SIZES = range(1, MAX_N + 1)
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
# A single letter keeps no full stop where one of these, capitalised, follows: "on a. The".
_SENTENCE_STARTS = """
    a about according additionally after an as at but he her here however if in it last many more
    now once one other our she since so some such that the their then there these they this we what
    when while yet you"""

_PUNCTUATION = frozenset(
    "'' ' `` ` \" . ? ! , : ; - -- ... – — ― … ‐ ‑ &quot; &apos; &nbsp;".split()
)
_SPELLED = dict(
    zip(
        "( ) [ ] { } ½ ¼ ¾ ⅓ ⅔ £ € ¤ ¢ &amp; &lt; &gt;".split(),
        "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb- 1/2 1/4 3/4 1/3 2/3 # $ $ cents & < >".split(),
        strict=True,
    )
)
_CURLY = {"‘": "`", "‛": "`", "‹": "`", "’": "'", "›": "'", "“": "``", "«": "``", "”": "''"}
_STRAIGHT = str.maketrans({**_CURLY, "»": "''"})
_CLITICS = frozenset("'s 'd 'm 'll 're 've n't n`t".split())
_SPLIT_WORDS = ("can not", "gon na", "got ta", "wan na", "lem me", "gim me")
# Combining marks that count as letters, by which Hindi and Thai words stay whole.
_MARKS = (
    "\u0300-\u036f\u0483-\u0487\u0591-\u05c7\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06ed"
    "\u0711-\u07b0\u07eb-\u07f3\u0900-\u0903\u093c-\u094e\u0951-\u0955\u0962\u0963"
    "\u0981-\u09e3\u0a01-\u0a4d\u0a81-\u0acd\u0b82-\u0bcd\u0c01-\u0c56\u0d3e-\u0d48\u0e31-\u0e3a"
    "\u0e47-\u0e4e\u0eb1-\u0ecd"
)
# Scripts without spaces, and how many signs between two spaces are too many for words that stand
# apart; a Japanese loan word counts as one.
_LOANS = r"\u30a0-\u30ff"
_UNSPACED = ((re.compile(f"[{HAN}{_LOANS}]"), 3), (re.compile(f"[{THAI}]"), 5))
_SIGN = re.compile(rf"[{_LOANS}]+|[{HAN}]|[{THAI}][{_MARKS}]*")


def _either(words: str) -> str:
    return "|".join(sorted(words.split(), key=len, reverse=True))


def _token_rules() -> list[re.Pattern[str]]:
    """The lexer: the rule that matches the longest text wins, and its group 1 is the token.

    What stands outside the group is only looked at, but counts as matched text.
    """
    letter = rf"(?:[^\W\d_²³¹¼½¾⁰-₉⅐-⓿❶-➓]|[{_MARKS}])"
    word = rf"(?:{letter}|\d)+"
    name = rf"{letter}(?:{letter}|\d)*"
    end = rf"(?!{letter}|\d)"
    quote, any_quote = "['’]", "(?:['’‘‛`]|&apos;)"
    abbreviation = rf"(?i:[a-z]|{_either(_ABBREVIATIONS)})|{_either(_CAPITALISED_ABBREVIATIONS)}"
    acronym = r"(?:[A-Za-z]\.)+[A-Za-z]\."
    hyphenated = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
    elision = rf"(?:[DLOdlo]{quote}{letter}(?={letter}))?"  # "jack-o'lantern"
    compound = rf"{word}(?:[_-][^\W_]+)+"
    company = r"[A-Z]+(?:(?:&|&amp;|\+)[A-Z]+)+"
    rules = [
        # Contractions and other words with an apostrophe.
        *(r"(?i:({})({}))".format(*pair.split()) + end for pair in _SPLIT_WORDS),
        r"((?i:cont'd\.))",
        rf"({word})'(?i:[sdm]|ll|re|ve)(?:[^A-Za-z]|$)",
        r"((?:'|&apos;)(?i:[sdm]|ll|re|ve))(?![A-Za-z])",
        r"(’(?i:[sdm]|ll|re|ve))",
        rf"([A-Za-z0-9]*?[A-MO-Za-mo-z])(?i:n{any_quote}t)",
        rf"((?i:n{any_quote}t))(?![A-Za-z])",
        rf"((?:{quote}|&apos;)(?i:em|till?|cause)|{quote}[nN]{quote})",
        rf"('[nN]|{quote}\d\d)(?!\S)",
        rf"(’[nN]|{quote}[2-9]0[sS])",
        r"('[Tt])(?i:is|was)",
        rf"((?i:ol|dunkin|somethin){quote})",
        rf"((?i:o{quote}clock|ma{quote}am|cap{quote}n|c{quote}est|li'l|c'mon|d'ye)){end}",
        rf"((?i:e'er|ev'ry|nat'l|nor'easter|s'mores)){end}",
        rf"([Yy]{quote}){letter}",
        rf"((?i:[ldj]){quote})",
        rf"([A-HJ-XZdlno]{any_quote}[A-Za-z]{{2,}}|[Oo]{quote}[aeiou])",
        rf"([A-Za-z]+[aeiouyAEIOUY]{any_quote}[aeiouA-Z][A-Za-z]*)",
        # Words. A full stop is part of what stands before a hyphen, or before , ; and :
        rf"({word})",
        rf"({compound})",
        rf"({name}(?:[.!?]{name})+)",
        r"([A-Za-z0-9][A-Za-z0-9.,]*"
        rf"(?:[-‐‑](?:{acronym}|{word}))+)",
        rf"({elision}{word}(?:[-‐‑]{elision}{word})+)",
        rf"({hyphenated}(?:\\?/{hyphenated}){{1,2}})",
        rf"({company})",
        r"((?:[A-Za-z]\.)+)",
        rf"((?:{abbreviation})\.)",
        rf"([A-Za-z])\.\s+(?=[A-Z])(?i:{_either(_SENTENCE_STARTS)})(?!\S)",
        r"((?i:ph\.d\.))",
        rf"((?i:{_either(_NUMBERED_ABBREVIATIONS)})\.)[ ]?\d",
        rf"({name}(?:\.{name})*\.|{word}(?:\.?-{word})*\.|(?:{compound}|{company})\.)[,;:]",
        r"((?i:anti|pro)-)",
        # Numbers.
        r"([-+]?\d*(?:[.:,]\d+)+|[-+]\d+)",
        r"(\d+[ -]\d+/\d+)",
        r"((?:\(\d{2,3}\)[ ]?|\+{0,2}(?:\d{2,4}[ -])?\d{2,4}[ -])\d{3,4}[ -]?\d{3,5})",
        r"((?:\+{0,2}\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5})",
        r"([A-Z]{1,3}\$)",
        # Addresses, tags and smileys.
        r"([A-Za-z0-9][^\s\"<>|()]{0,300}@(?!\.)[^\s\"<>|()]*[^\s\"<>|().])",
        rf"(@{letter}\w*|\#{letter}+)",
        r"((?i:https?)://[^\s\"<>|()]+\.[^\s\"<>|()]*[\w/])",
        r"((?:\w+\.)+(?:com|net|org|edu)(?:/[^\s\"<>|()]+[\w/])?)",
        r"(<!--.*?-->|</?[A-Za-z][^<>]*>)",
        r"([:;=][-o']?[()\\|@\[\]DdPpO3](?!\w)|\^_\^)",
        # Everything else.
        r"(&(?:amp|lt|gt|quot|apos|nbsp|\#39);)",
        r"(''|``|[‘’‛“”‹›«»][‘’‛“”‹›«»`]?|<<|>>|\.\.\.|[?!]+|[Cc]\+\+|[CFcf]\#)",
        r"(-----+|--+|__+|@@+|\#\#+|\*+|\S)",
    ]
    return [re.compile(rule) for rule in rules]


_RULES = _token_rules()
_PLAIN_WORD = re.compile(r"[a-z]+(?!\S)")
_WHOLE_SPLIT_WORDS = frozenset(pair.replace(" ", "") for pair in _SPLIT_WORDS)
# Emoji, control characters and the like: the lexer knows no rule for them, and drops them.
_UNKNOWN = re.compile(
    r"[^!-~\s\u00a1-\u1fff\u2010\u2011\u2013-\u2023\u2026\u2030-\u203b\u203e-\u2042\u2044"
    r"\u2070-\u209c\u20a0\u20a4\u20ac\u2100-\u214f\u2153-\u215e\u2190-\u2bff"
    r"\u3001-\u3006\u3041-\ud7ff\uf900-\ufdfb\ufe70-\ufefc\uff01-\uffee]"
)


def tokenize(text: str) -> list[str]:
    """Split a caption as pycocoevalcap's PTBTokenizer does.

    That is Stanford CoreNLP 3.4.1 with -preserveLines -lowerCase, minus 17 punctuation tokens. The
    rules here were checked against its output. Brackets become words ("-lrb-"), as they do there,
    and a few tokens hold a no-break space ("1 1/2"). Two things differ: another script's closing
    full stop, which the decoder doesn't write, is no token; and of a caption in a script without
    spaces each sign is one, in its usual width, where PTB takes phrases for words, which no two
    people share.
    """
    text = composed(text).replace("\xad", "")
    if not text.isascii():
        text = text.rstrip(f" {FULL_STOPS}")
        wide = unicodedata.normalize("NFKC", text)
        if _lacks_spaces(wide):
            text = _SIGN.sub(r" \g<0> ", wide)
    text = _UNKNOWN.sub(" ", text)
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


def _lacks_spaces(text: str) -> bool:
    """Does it run on without spaces between its words?"""
    parts = text.split()
    for script, most in _UNSPACED:
        runs = [part for part in parts if script.search(part)]
        if runs and len(_SIGN.findall(" ".join(runs))) >= most * len(runs):
            return True
    return False


def without_spaces(captions: Sequence[str]) -> str:
    """How scores are meant where most captions are in a script without spaces, or ""."""
    if 2 * sum(map(_lacks_spaces, captions)) <= len(captions):
        return ""
    return (
        "these captions have no spaces between words, and are scored sign by sign: segment them "
        "(jieba, MeCab) before scores are compared with others'"
    )


def _spell(token: str) -> str:
    """Write a token as the lexer prints it, in lower case."""
    if token in _SPELLED:
        return _SPELLED[token]
    token = token.lower().replace(" ", "\xa0").replace("&amp;", "&")
    straight = token.translate(_STRAIGHT).replace("&apos;", "'")
    if straight in _CLITICS or not straight.strip("`'"):
        return straight
    return token.replace("(", "-lrb-").replace(")", "-rrb-")


# --- BLEU, ROUGE-L, CIDEr-D ------------------------------------------------------------------


def score(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[dict[str, float], dict[str, float]]:
    """All metrics of one caption per image against that image's references, times 100.

    Returns `{"BLEU-1": ..., ..., "BLEU-4": ..., "ROUGE-L": ..., "CIDEr-D": ...}` of them all, and
    the CIDEr-D of each image, in the order of `captions`; its document frequencies come from
    `references`.
    """
    if not captions or captions.keys() != references.keys() or not all(references.values()):
        raise ValueError("a score needs at least one image, and of each a caption and a reference")
    pairs = [
        (tokenize(caption), [tokenize(reference) for reference in references[image]])
        for image, caption in captions.items()
    ]
    cider = CiderD({i: [*map(_words, targets)] for i, (_, targets) in enumerate(pairs)})
    each = [cider.score(i, _words(caption)) for i, (caption, _) in enumerate(pairs)]
    table = {f"BLEU-{n}": value for n, value in enumerate(_bleu(pairs), start=1)}
    table |= {"ROUGE-L": _rouge_l(pairs), "CIDEr-D": float(np.mean(each))}
    return table, dict(zip(captions, each, strict=True))


class CiderD:
    """CIDEr-D against fixed references, with their document frequencies (Vedantam et al. 2015).

    Tokens are any hashable values, words or ids.
    """

    def __init__(self, references: Mapping[Any, Sequence[Sequence[Hashable]]]):
        """Count in how many images each n-gram occurs.

        Args:
            references: image -> its reference captions, each a sequence of tokens.
        """
        if not references or not all(references.values()):
            raise ValueError("CIDEr-D needs at least one reference for each image")
        self.references = references
        frequency: Counter[tuple[Hashable, ...]] = Counter()
        for captions in references.values():
            frequency.update(
                {gram for tokens in captions for n in _SIZES for gram in _ngrams(tokens, n)}
            )
        # What stands in one image's references alone weighs as much as what stands in none's.
        self._most = math.log(len(references)) ** 2
        self._weights = {
            gram: (math.log(len(references)) - math.log(count)) ** 2
            for gram, count in frequency.items()
            if count > 1
        }
        self._prepared: dict[Hashable, tuple] = {}  # of the image that was scored last

    def score(self, image: Hashable, tokens: Sequence[Hashable]) -> float:
        """CIDEr-D times 100 of one hypothesis for `image`."""
        if image not in self._prepared:
            self._prepared = {image: self._prepare(image)}
        lengths, levels = self._prepared[image]
        penalties = [
            math.exp(-((len(tokens) - length) ** 2) / (2 * CIDER_SIGMA**2)) for length in lengths
        ]
        total = 0.0
        for n, (table, norms) in enumerate(levels, start=1):
            square = 0.0
            products = [0.0] * len(lengths)
            for gram, times in _ngrams(tokens, n).items():
                weight = self._weights.get(gram, self._most)
                square += times * times * weight
                # Clipping: what a hypothesis repeats beyond the reference earns nothing.
                for reference, wanted in table.get(gram, ()):
                    products[reference] += min(times, wanted) * wanted * weight
            norm = math.sqrt(square)
            for product, reference_norm, penalty in zip(products, norms, penalties, strict=True):
                if product:
                    total += product / (norm * reference_norm) * penalty
        return 1000 * total / (MAX_N * len(lengths))

    def _prepare(self, image: Hashable) -> tuple[list[int], list[tuple[dict, list[float]]]]:
        """The lengths of an image's references; and for each n which of them hold an n-gram, and
        how often, and each one's norm."""
        references, levels = self.references[image], []
        for n in _SIZES:
            table: dict[tuple[Hashable, ...], list[tuple[int, int]]] = {}
            norms = []
            for reference, tokens in enumerate(references):
                square = 0.0
                for gram, count in _ngrams(tokens, n).items():
                    table.setdefault(gram, []).append((reference, count))
                    square += count * count * self._weights.get(gram, self._most)
                norms.append(math.sqrt(square))
            levels.append((table, norms))
        return [*map(len, references)], levels


_Pairs = list[tuple[list[str], list[list[str]]]]  # a caption's tokens, and its references'


def _words(tokens: list[str]) -> list[str]:
    """The tokens as BLEU and CIDEr see them in the original: cut at no-break spaces too."""
    return " ".join(tokens).split()


def _ngrams(tokens: Sequence[Hashable], n: int) -> Counter[tuple[Hashable, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(n)), strict=False))


def _bleu(pairs: _Pairs) -> list[float]:
    """BLEU-1..4 of the corpus (Papineni et al. 2002).

    The brevity penalty compares with the reference of the closest length; nothing is smoothed.
    """
    matches, guesses = [0] * MAX_N, [0] * MAX_N
    length = wanted_length = 0
    for caption, references in pairs:
        words = _words(caption)
        targets = [_words(reference) for reference in references]
        length += len(words)
        wanted_length += min((abs(len(t) - len(words)), len(t)) for t in targets)[1]
        for n in _SIZES:
            most: Counter[tuple[Hashable, ...]] = Counter()
            for target in targets:
                most |= _ngrams(target, n)
            matches[n - 1] += (_ngrams(words, n) & most).total()
            guesses[n - 1] += max(0, len(words) - n + 1)
    # The two tiny terms are the original's guard against dividing by zero.
    tiny, small = 1e-15, 1e-9
    ratio = (length + tiny) / (wanted_length + small)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    precisions = [(m + tiny) / (g + small) for m, g in zip(matches, guesses, strict=True)]
    return [100 * penalty * math.prod(precisions[:n]) ** (1 / n) for n in _SIZES]


def _rouge_l(pairs: _Pairs) -> float:
    """ROUGE-L, the mean over images (Lin 2004), with beta 1.2.

    Precision and recall are each the best over the references, as in the COCO caption evaluation.
    """
    return 100 * float(np.mean([_rouge_l_of(*pair) for pair in pairs]))


def _rouge_l_of(caption: list[str], references: list[list[str]]) -> float:
    # An empty caption counts as one empty word in the original, which cuts at single spaces.
    caption = caption or [""]
    common = [_common_subsequence(caption, reference or [""]) for reference in references]
    precision = max(common) / len(caption)
    recall = max(c / max(len(r), 1) for c, r in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]


# --- Answers --------------------------------------------------------------------------------

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
    you're you've
"""
# With one apostrophe forgotten they are mended; the last one is the original's slip.
_MENDED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, sign in enumerate(word)
    if sign == "'"
} | {"somebody'd": "somebodyd"}
_VQA_PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`,?!؟،؛、「」『』«»„“”¿¡]")
_WIDE = re.compile("[\uff01-\uff9f]+")  # full-width Latin, and half-width kana


def normalize_answer(answer: str) -> str:
    """An answer as VQA's evaluation compares it: without case, articles and punctuation.

    Number words become digits, and contractions get their apostrophe. Beyond VQA's script, whose
    answers are English, other scripts' punctuation and full-width letters are alike.
    """
    given = _plain(answer).lower()
    text, thousands = given, re.search(r"\d,\d", given)
    for sign in set(_VQA_PUNCTUATION.findall(given)):
        # As there: between two words a sign parts them, beside a space it just goes.
        beside = f"{sign} " in given or f" {sign}" in given or thousands
        text = text.replace(sign, "" if beside else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)  # a slip of the original's
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)


def _plain(answer: str) -> str:
    usual_width = _WIDE.sub(lambda found: unicodedata.normalize("NFKC", found[0]), composed(answer))
    return usual_width.replace("\n", " ").replace("\t", " ").strip(f" {FULL_STOPS}")


def _as_written(answer: str) -> str:
    return _plain(answer).lower().removesuffix(".")


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """How right an answer is, 0 to 1, by VQA's formula (Antol et al. 2015).

    With several people's answers: against all but one of them, min(1, those that agree / 3),
    averaged over which one is left out. Where fewer than three are left, all of them are enough,
    which VQA's script, made for ten answers, doesn't know. As there, answers are normalised only
    if people don't agree to the letter; where they do, only case and a closing full stop, which
    the decoder never writes, don't count. With a single answer, for which the script has no
    formula: whether it is the same, normalised, or as written where nothing is left ("+", "A").
    """
    alike = len({_plain(other) for other in answers}) == 1
    alike = alike and (len(answers) > 1 or not normalize_answer(answers[0]))
    read = _as_written if alike else normalize_answer
    given = read(answer)
    agree = [read(other) == given for other in answers]
    if len(agree) == 1:
        return float(agree[0])
    total, enough = sum(agree), min(3, len(agree) - 1)
    return sum(min(1.0, (total - one) / enough) for one in agree) / len(agree)


# --- Around the scores ----------------------------------------------------------------------


def bootstrap_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Where 95 % of the means of `values` lie that a thousand resamples of the images have.

    Document frequencies aren't recomputed for a resample, so it is the photos' luck alone.
    """
    values = np.asarray(values, dtype=np.float64)
    dice, count = np.random.default_rng(0), len(values)
    means = [values[dice.integers(count, size=count)].mean() for _ in range(1000)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _distinct(captions: list[list[str]], n: int) -> float:
    """Different n-grams among all n-grams, in percent (Li et al. 2016)."""
    grams: Counter[tuple[Hashable, ...]] = Counter()
    for tokens in captions:
        grams.update(_ngrams(tokens, n))
    return 100 * len(grams) / max(grams.total(), 1)


def diversity(captions: Sequence[str], training_captions: Iterable[str]) -> dict[str, float]:
    """How varied a model's captions are, of which there must be some, apart from being right.

    Returns:
        `distinct-1`, `distinct-2`: different n-grams among all, in percent.
        `length`: mean number of tokens, without punctuation.
        `repetitive`: percent of captions that say a word twice in a row or a trigram twice.
        `most_frequent`: percent of captions that are the most frequent one.
        `novel`: percent of captions that no training caption equals.
    """
    tokenized = [tokenize(caption) for caption in captions]
    counts = Counter(map(tuple, tokenized))
    known = {tuple(tokenize(caption)) for caption in training_captions}
    percent = 100 / len(tokenized)
    return {
        "distinct-1": _distinct(tokenized, 1),
        "distinct-2": _distinct(tokenized, 2),
        "length": sum(map(len, tokenized)) / len(tokenized),
        "repetitive": percent * sum(map(_repeats_itself, tokenized)),
        "most_frequent": percent * max(counts.values()),
        "novel": percent * sum(tuple(tokens) not in known for tokens in tokenized),
    }


def _repeats_itself(tokens: list[str]) -> bool:
    stutters = any(first == second for first, second in pairwise(tokens))
    return stutters or any(count > 1 for count in _ngrams(tokens, 3).values())
