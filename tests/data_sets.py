"""Small data sets to try readers on: laid out in a folder, prepared and checked."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

import commands
import config
import prepare_dataset
from dataset import DataPaths, data_paths, load_captions
from settings import Parser, load_settings


def rows_of(captions: dict[str, list[str]]) -> dict[str, str]:
    """The same captions in each form that is understood, by the file's name."""
    pairs = [(name, text) for name, texts in captions.items() for text in texts]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in pairs]
    lists = [json.dumps({"image_id": name, "captions": texts}) for name, texts in captions.items()]
    table = [f'{name},"{text}"' for name, text in pairs]
    return {
        "metadata.jsonl": "\n".join(lines) + "\n",
        "captions.jsonl": "\r\n".join(lists),
        "captions.csv": "\n".join(["file_name,caption", *table]),
        "captions.txt": "\n".join(table),
    }


PAIRS = [("1.jpg", "A red dog"), ("1.jpg", "A dog runs"), ("2.jpg", "Two cats"), ("3.jpg", "A car")]
SENTENCES = {name: [{"raw": t} for n, t in PAIRS if n == name] for name, _ in PAIRS}
IDS = {"1.jpg": 1, "2.jpg": 2, "3.jpg": 3}
COCO = {
    "images": [{"id": number, "file_name": name} for name, number in IDS.items()],
    "annotations": [{"image_id": IDS[name], "id": 7, "caption": text} for name, text in PAIRS],
}
KARPATHY = {
    "images": [
        {"filepath": "val2014", "filename": name, "split": "train", "sentences": sentences}
        for name, sentences in SENTENCES.items()
    ]
}
TOKENS = "".join(f"{name}#{n}\t{text}\n" for n, (name, text) in enumerate(PAIRS))


def rows(header: str, line: str) -> str:
    return f"{header}\n" + "".join(f"{line.format(name, text)}\n" for name, text in PAIRS)


FORMS = {  # file: (content, what is said of it)
    "captions.json": (json.dumps(COCO), "COCO's captions: 4 captions of 3 photos"),
    "dataset_coco.json": (json.dumps(KARPATHY), "Karpathy's captions and split: 4 captions"),
    "Flickr8k.token.txt": (TOKENS + "1.jpg.1#0\tA row\n", "'1.jpg.1' is not the name of a photo"),
    "results_20130124.token": (TOKENS, "a table: 4 captions of 3 photos"),
    "metadata.csv": (rows("width,file_name,text,split", '9,{},"{}",train'), "width, split are ign"),
    "images/metadata.csv": (rows("file_name,text", "{},{}"), "a table: 4 captions of 3 photos"),
    "images/metadata.jsonl": (
        "\n".join(json.dumps({"file_name": name, "text": text}) for name, text in PAIRS),
        "JSON lines: 4 captions of 3 photos",
    ),
    "captions.tsv": (rows("filepath\tid\ttitle", "{}\t5\t{}"), "the columns id are ignored"),
    "captions.csv": (rows("image;caption", "{};{}"), "a table: 4 captions of 3 photos"),
    "captions.txt": (rows("image,caption", "{},{}").replace("\n", "\r"), "a table: 4 captions"),
    "styles.csv": (
        rows("id,season,productDisplayName", '{},Fall,"{}"'),
        "columns season are ignored",
    ),
    "results.csv": (rows("image,caption", "images/{},{}"), "'images/1.jpg' as '1.jpg'"),
}


def lay_out(folder: Path, files: dict[str, str], names: list[str] | None = None) -> Path:
    (folder / "images").mkdir(parents=True)
    for name in names or IDS:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 70), tuple(name.encode()[:3].ljust(3))).save(folder / "images" / name)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    return folder


def paths_in(folder: Path, **others: str) -> DataPaths:
    return data_paths(SimpleNamespace(DATA_DIR=folder, **others))


def prepared(folder: Path, *flags: object) -> dict[str, list[str]]:
    assert check(folder, *flags) == 0
    return load_captions(paths_in(folder).captions)


EXPECTED = {name: [text for n, text in PAIRS if n == name] for name in IDS}


SIX = [f"{n}.jpg" for n in range(1, 7)]
OF = dict(zip(SIX, "train train train train val test".split(), strict=True))


def lines_of(part: str, **more: str) -> str:
    said = [{"image": n, "caption": "A dog", **more} for n in SIX if OF[n] == part]
    return "\n".join(map(json.dumps, said)) + "\n"


def talk(who: str, what: str, one: str, other: str, answer: str) -> list[dict]:
    return [{who: one, what: "<image>\nDescribe it."}, {who: other, what: answer}]


def settings_of(folder: Path, *flags: object):
    argv = ["--dataset", "custom", "--data_dir", folder, "--split", "ratio", *flags]
    parser = Parser("")
    commands.add_sources(parser)
    return load_settings(config, [str(text) for text in argv], parser)


def check(data: Path, *flags: object) -> int:
    argv = [
        "--dataset",
        "custom",
        "--data_dir",
        data,
        "--split",
        "ratio",
        "--train_split_ratio",
        0.7,
        "--check",
        *flags,
    ]
    return prepare_dataset.main([str(part) for part in argv])


ASKED = {"question": "Which?", "answer": "red"}
