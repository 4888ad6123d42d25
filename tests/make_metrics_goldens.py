"""Make `goldens/metrics.json` anew. A development tool: needs pycocoevalcap 1.2 and Java.

    python tests/make_metrics_goldens.py ../shared/data/dataset_flickr8k_trainval.json captions.json

Tokens come from the hand-written `goldens/sentences.txt`. Of the data set only scores are kept:
each human caption of its validation photos against the photo's other four, and generated captions
(`evaluate.py --save_captions captions.json`), which are kept too, against all five.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

GOLDENS = Path(__file__).parent / "goldens"

CAPTIONS = {
    "bridge.jpg": "Two men cross a bridge.",
    "kite.jpg": "a kite a kite a kite",
    "boat.jpg": "It's a man (in a boat) 1 1/2 miles out",
    "horse.jpg": "",
    "market.jpg": "A woman sells fruit at the well-lit market, and she smiles at the people",
    "cat.jpg": "The cat's asleep.",
}
REFERENCES = {
    "bridge.jpg": ["Two men walk over a bridge .", "People cross a long bridge", "A bridge."],
    "kite.jpg": ["A girl flies a kite", "a red kite is in the sky", "Kite!"],
    "boat.jpg": ["A man in a boat", "it's 1 1/2 miles to the boat", "a man rows", "..."],
    "horse.jpg": ["A horse can't jump the fence", "the horse stands"],
    "market.jpg": ["A woman sells fruit at a market"],
    "cat.jpg": ["The cat's asleep.", "A cat sleeps on the sofa", "the cat is asleep"],
}


def tokenized(table: dict[str, list[str]]) -> dict[str, list[str]]:
    entries = {name: [{"caption": text} for text in texts] for name, texts in table.items()}
    return PTBTokenizer().tokenize(entries)


def scores(captions: dict[str, str], references: dict[str, list[str]]) -> dict:
    ours = tokenized({name: [text] for name, text in captions.items()})
    theirs = tokenized(references)
    bleu, _ = Bleu(4).compute_score(theirs, ours, verbose=0)
    cider, per_image = Cider().compute_score(theirs, ours)
    found = {f"BLEU-{n}": 100 * value for n, value in enumerate(bleu, start=1)}
    found["ROUGE-L"] = 100 * float(Rouge().compute_score(theirs, ours)[0])
    found["CIDEr-D"] = 100 * float(cider)
    return {"scores": found, "per_image": [100 * float(value) for value in per_image]}


def main() -> None:
    sentences = (GOLDENS / "sentences.txt").read_text(encoding="utf-8").split("\n")[:-1]
    tokens = tokenized({str(i): [text] for i, text in enumerate(sentences)})
    images = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["images"]
    human = {
        image["filename"]: [sentence["raw"] for sentence in image["sentences"]]
        for image in images
        if image["split"] == "val"
    }
    rounds = []
    for k in range(5):
        one = {name: group[k] for name, group in human.items()}
        others = {name: group[:k] + group[k + 1 :] for name, group in human.items()}
        rounds.append(scores(one, others)["scores"])
    generated = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    goldens = {
        "tokens": {text: tokens[str(i)][0] for i, text in enumerate(sentences)},
        "corpus": {
            "captions": CAPTIONS,
            "references": REFERENCES,
            **scores(CAPTIONS, REFERENCES),
        },
        "human": rounds,
        "generated": {"captions": generated, "scores": scores(generated, human)["scores"]},
    }
    text = json.dumps(goldens, indent=1, ensure_ascii=False) + "\n"
    (GOLDENS / "metrics.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
