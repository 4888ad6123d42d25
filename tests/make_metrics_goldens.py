"""Make `goldens/metrics.json` anew. A development tool: needs pycocoevalcap 1.2 and Java.

    python tests/make_metrics_goldens.py ../shared/data/dataset_flickr8k_trainval.json

Tokens come from hand-written sentences; of the data set only scores are kept, no caption.
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


def tokenized(table: dict[str, list[str]]) -> dict[str, list[str]]:
    entries = {name: [{"caption": text} for text in texts] for name, texts in table.items()}
    return PTBTokenizer().tokenize(entries)


def scores(captions: dict[str, str], references: dict[str, list[str]]) -> dict[str, float]:
    mine = tokenized({name: [text] for name, text in captions.items()})
    others = tokenized(references)
    bleu, _ = Bleu(4).compute_score(others, mine, verbose=0)
    result = {f"BLEU-{n}": 100 * value for n, value in enumerate(bleu, 1)}
    result["ROUGE-L"] = 100 * float(Rouge().compute_score(others, mine)[0])
    result["CIDEr-D"] = 100 * float(Cider().compute_score(others, mine)[0])
    return result


def main() -> None:
    sentences = (GOLDENS / "sentences.txt").read_text(encoding="utf-8").splitlines()
    tokens = tokenized({str(i): [text] for i, text in enumerate(sentences)})
    images = json.loads(Path(sys.argv[1]).read_text())["images"]
    human = {i["filename"]: [s["raw"] for s in i["sentences"]] for i in images
             if i["split"] == "val"}  # fmt: skip
    rounds = []
    for k in range(5):
        one = {name: group[k] for name, group in human.items()}
        rounds.append(scores(one, {n: g[:k] + g[k + 1 :] for n, g in human.items()}))
    result = {"tokens": {text: tokens[str(i)][0] for i, text in enumerate(sentences)},
              "human": rounds}  # fmt: skip
    (GOLDENS / "metrics.json").write_text(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
