"""Byte-level BPE through `tokenizers`, and the special tokens, defined here and nowhere else.

The special tokens have ids but no merge rule leads to them: a caption that holds the text
"<end>" is encoded as those five characters, never as the token.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from utils import SURROGATES, UserError, refused, write_changed

PAD, START, END, ANSWER = "<pad>", "<start>", "<end>", "<answer>"
SPECIAL_TOKENS = (PAD, START, END, ANSWER)
PAD_ID, START_ID, END_ID, ANSWER_ID = range(len(SPECIAL_TOKENS))
VERSION = "#version: 0.2"  # how merges.txt begins
MERGED_IDS = len(SPECIAL_TOKENS) + 256  # ids from here on are of several bytes
FULL_STOPS = "。．｡।॥۔։።།။។"  # as scripts other than Latin have them
ASKING = " ?？؟"  # how a question ends, if it does
# GPT-2's, in which a letter's marks part words: of Hindi and Thai no piece had two letters.
_PIECES = (
    r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}[\p{L}\p{M}\u200c\u200d]*| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?!\S)|\s+"
)
# Scripts without spaces: Chinese and Japanese, but for loan words; Thai, Lao, Burmese and Khmer.
HAN = r"\u3005\u3040-\u309f\u3400-\u9fff"
THAI = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
# Of these a piece is a sign, or the same one twice, or all there is between two spaces if that may
# be a word: pieces of any length would be phrases, each too rare to be learned.
_LONE, _ENDS = r"(?<![\p{L}\p{M}\p{N}])", r"(?![\p{L}\p{M}\p{N}])"
_SIGNS = "|".join(
    rf" ?{_LONE}[{script}]{{1,{most}}}{_ENDS}"
    rf"| ?(?<s{most}>[{script}]\p{{M}}*+)(?:\k<s{most}>(?!\p{{M}}))?"
    for script, most in ((HAN, 4), (THAI, 16))
)
_UNSPACED = re.compile(f"[{HAN}{THAI}]")


def composed(text: str) -> str:
    """In Unicode's usual spelling, with Turkish "İ" as an "i", of which lower case would make two
    characters: scores read what people wrote in the decoder's letters, or it is another word."""
    return unicodedata.normalize("NFC", text).replace("\u0130", "i")


def normalize(caption: str) -> str:
    """Lower case, single spaces, no closing full stop of any script: what the decoder learns.

    The scorers of the field drop case and punctuation as well, and a vocabulary without them
    sees each word more often.
    """
    return " ".join(composed(caption).lower().split()).rstrip(f" .{FULL_STOPS}")


class CaptionTokenizer:
    """Text to token ids and back. Special tokens have the ids 0 to 3, words the ids after."""

    def __init__(
        self, vocab: dict[str, int], merges: list[tuple[str, str]], question_end: str = "?"
    ):
        """Use a vocabulary, in which the special tokens stand first, and its merge rules; each
        question gets the same end, as people ask with and without ("": as it is written)."""
        if any(vocab.get(token) != i for i, token in enumerate(SPECIAL_TOKENS)):
            raise UserError(f"the vocabulary doesn't begin with {', '.join(SPECIAL_TOKENS)}")
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise UserError("the vocabulary's ids are not 0, 1, 2 and so on, each once")
        if alien := [pair for pair in merges if "".join(pair) not in vocab]:  # the library panics
            raise UserError(f"the merge of {' and '.join(alien[0])} is not in the vocabulary")
        self.vocab, self.merges, self.question_end = vocab, merges, question_end
        self._tokenizer = _byte_level(models.BPE(vocab=vocab, merges=merges))

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> CaptionTokenizer:
        """Learn a vocabulary of at most `vocab_size` entries from captions, of at least 260: the
        special tokens and all bytes."""
        tokenizer = _byte_level(models.BPE())
        signs = pre_tokenizers.Split(Regex(_SIGNS), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([signs, tokenizer.pre_tokenizer])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(map(normalize, captions), trainer)
        return cls.from_json(tokenizer.to_str(), "?")

    @classmethod
    def from_json(cls, text: str, question_end: str = "") -> CaptionTokenizer:
        """Read back what `to_json` wrote, or an older version, which left questions as they were:
        where the end of questions isn't told, it is this one."""
        table = json.loads(text)
        model, end = table["model"], table.get("question_end", question_end)
        return cls(model["vocab"], [tuple(pair) for pair in model["merges"]], end)

    def to_json(self) -> str:
        """The whole tokenizer as one string, for checkpoints."""
        model = {"vocab": self.vocab, "merges": self.merges}
        return json.dumps({"model": model, "question_end": self.question_end})

    @classmethod
    def load(cls, vocab_file: Path, merges_file: Path) -> CaptionTokenizer:
        """Read vocab.json and merges.txt."""
        said = f"{vocab_file} and {merges_file} are no BPE files of this project"
        with refused(f"{said}; without them a vocabulary is learned"):
            made = cls(*models.BPE.read_file(str(vocab_file), str(merges_file)))
            if missing := {*pre_tokenizers.ByteLevel.alphabet()} - made.vocab.keys():
                raise UserError(f"{len(missing)} of the 256 bytes are not in the vocabulary")
        return made

    @classmethod
    def learned(
        cls,
        captions: Callable[[], Iterable[str]],
        vocab_size: int,
        vocab_file: Path,
        merges_file: Path,
    ) -> CaptionTokenizer:
        """As `train`, or what stands in the files if that was learned from the same captions, as
        each start of a training learns from. A new one is written there, where that can be."""
        how = repr((tokenizers.__version__, _PIECES, _SIGNS, vocab_size))
        source = hashlib.sha256(how.encode())
        for text in map(normalize, captions()):  # a list of a million would take 0.2 GB
            source.update(f"\n{text}".encode(errors="surrogatepass"))
        note = f", of {source.hexdigest()[:16]}"
        with contextlib.suppress(OSError, UserError), open(merges_file, encoding="utf-8") as file:
            if file.readline().strip() == f"{VERSION}{note}":
                made = cls.load(vocab_file, merges_file)
                # Of a run that was killed, or two at once, they may not belong together.
                if len(made) == MERGED_IDS + len({*map("".join, made.merges)}):
                    return made
        made = cls.train(captions(), vocab_size)
        if os.access(merges_file.parent, os.W_OK):
            made.save(vocab_file, merges_file, note)
        return made

    def save(self, vocab_file: Path, merges_file: Path, note: str = "") -> None:
        """Write vocab.json and merges.txt, the layout that BPE tokenizers share."""
        files = self.to_files()
        write_changed(vocab_file, files["vocab.json"])
        write_changed(merges_file, files["merges.txt"].replace(VERSION, VERSION + note, 1))

    def to_files(self) -> dict[str, str]:
        """The tokenizer in the files that other programs read, by name.

        vocab.json and merges.txt are what `load` reads; with tokenizer.json, which holds the
        normalisation as well, and tokenizer_config.json, `transformers.AutoTokenizer` loads it.
        """
        alone = _byte_level(models.BPE(vocab=self.vocab, merges=self.merges))
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        ending = normalizers.Replace(Regex(f"[ .{FULL_STOPS}]+$"), "")
        lower = [normalizers.Replace("\u0130", "i"), normalizers.Lowercase()]
        steps = [normalizers.NFC(), *lower, spaces, normalizers.Strip(), ending]
        alone.normalizer = normalizers.Sequence([*steps, alone.normalizer])  # as `normalize` does
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {"pad_token": PAD, "bos_token": START, "eos_token": END}
        return {
            "vocab.json": json.dumps(self.vocab, ensure_ascii=False),
            "merges.txt": "\n".join([VERSION, *map(" ".join, self.merges)]) + "\n",
            "tokenizer.json": alone.to_str(),
            "tokenizer_config.json": json.dumps(config),
        }

    def __len__(self) -> int:
        return len(self.vocab)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, normalised, without special tokens."""
        # No merge crosses a space, so that each word is encoded once, however often it is there.
        # A half of a pair, as of an emoji that was cut, has no bytes.
        rows = [SURROGATES.sub("\ufffd", normalize(text)).split() for text in texts]
        words = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
        ids: dict[str, list[int]] = {}
        for start in range(0, len(words), 1000):  # the library's results take much room
            part = words[start : start + 1000]
            encodings = self._tokenizer.encode_batch_fast(part, add_special_tokens=False)
            ids |= {word: each.ids for word, each in zip(part, encodings, strict=True)}
        return [[i for word in row for i in ids[word]] for row in rows]

    def prefixes(self, questions: Sequence[str], max_length: int) -> list[list[int]]:
        """What a text follows: `[START]`, or `[START, question, ANSWER]` where there is a question,
        which is cut so that all is at most half of `max_length` ids long."""
        most = max(0, max_length // 2 - 2)
        asked: Iterable[str] = filter(None, questions)  # captions, of which are most, have none
        if self.question_end:
            asked = (f"{normalize(q).rstrip(ASKING)}{self.question_end}" for q in asked)
        asked = iter(self.encode([*asked]))
        return [[START_ID, *next(asked)[:most], ANSWER_ID] if q else [START_ID] for q in questions]

    def encode_texts(self, pairs: Sequence[tuple[str, str]], max_length: int) -> list[list[int]]:
        """`[prefix, target, END]` for each question and target; a caption answers no question.

        At most `max_length` ids long. A target that is cut has no END: the decoder must not learn
        to stop there.
        """
        prefixes = self.prefixes([question for question, _ in pairs], max_length)
        targets = self.encode([target for _, target in pairs])
        rows = zip(prefixes, targets, strict=True)
        return [[*prefix, *ids, END_ID][:max_length] for prefix, ids in rows]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids up to the first END, in one line; special tokens are left out."""
        written = itertools.takewhile(lambda i: i != END_ID, map(int, ids))
        text = self._tokenizer.decode([i for i in written if i >= len(SPECIAL_TOKENS)])
        return " ".join(text.split())  # a decoder that has learned little writes line ends as well

    def words(self, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
        """The words of a text's ids, which hold no special tokens, and at which places each stands;
        of a script without spaces the pieces, as soon as their bytes make whole signs."""
        groups: list[list[int]] = []
        for place, i in enumerate(ids):
            # Every word begins with a space, which byte-level BPE writes as this letter.
            begins = not groups or self._tokenizer.id_to_token(i).startswith("\u0120")
            if not begins:
                before, piece = self.decode([ids[p] for p in groups[-1]])[-1:], self.decode([i])[:1]
                mark = piece and unicodedata.category(piece).startswith("M")
                begins = before != "\ufffd" and not mark and _UNSPACED.search(before + piece)
            if begins:
                groups.append([])
            groups[-1].append(place)
        words = [(self.decode([ids[place] for place in group]), group) for group in groups]
        return [(word, group) for word, group in words if word]


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Prepend(" ")
    steps = [
        pre_tokenizers.Split(Regex(_PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
