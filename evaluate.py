"""Score a checkpoint's captions on a split, as the field does, and write a report to look at.

python evaluate.py --checkpoint captioner_best_cider.safetensors --split val
python evaluate.py --checkpoint captioner_best_cider.safetensors --task questions
"""

from __future__ import annotations

import commands

if __name__ == "__main__":
    commands.begin(commands.evaluate)

import base64
import contextlib
import dataclasses
import html
import importlib.util
import io
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from tqdm import tqdm

import metrics
from captions_search import say_other_split, say_outdated
from checkpoint import load_checkpoint
from dataset import (
    Prompt,
    Text,
    answers_by_kind,
    data_paths,
    load_splits,
    load_texts,
    prompts_about,
    references_of,
)
from device import choose_device, choose_dtype
from encoder import check_sizes, loading_options, open_image, quiet_library
from features import build_features, file_digest
from generation import Hypothesis, generate_cached
from hub import locate_checkpoint
from options import SPLITS, change_options, given_options
from utils import UserError, check_output, command, first_line, pip, refused, run_script, write_file


def main(argv: Sequence[str] | None = None) -> None:
    """Print the scores for people, and as the last line for programs."""
    settings = commands.evaluate(argv)
    asked = settings.task == "questions"
    if asked and (settings.report or settings.save_captions or settings.clip):
        raise UserError("--report, --save_captions and --clip are for captions, not for answers")
    settings.file = locate_checkpoint(settings.checkpoint, settings.revision)
    settings.report = None if asked else report_path(settings)
    scored = Scored(settings)
    scores = score_answers(scored) if asked else score_captions(scored)
    how = {
        "split": settings.split,
        "images": len(scored.names),
        "left out": scored.left_out,
        "beam_size": scored.options.beam_size,
        "options": dataclasses.asdict(scored.options),
        "checkpoint": scored.digest,
        "precision": scored.precision,
    }
    print(json.dumps(scores | how))


# --- What is scored -------------------------------------------------------------------------


class Scored:
    """A checkpoint, what it is scored against, and the features of a split's photos."""

    def __init__(self, settings: SimpleNamespace):
        """Load what the settings name, then encode the photos, which may take long."""
        self.settings = settings
        self.checkpoint = load_checkpoint(settings.file)
        self.digest = file_digest(settings.file)[:16]  # now: a training may replace the file
        self.checkpoint.require(settings.task)
        asked = settings.task == "questions"
        self.options = change_options(self.checkpoint.generation, asked, **given_options(settings))
        self.paths = data_paths(settings)
        taken = [settings.file, self.paths.captions, self.paths.splits]
        for flag in ("report", "save_captions"):
            if output := getattr(settings, flag):
                check_output(f"--{flag}", output, *taken)
                taken.append(output)
        if not self.paths.splits.exists():
            flags = ["--dataset", "custom", "--split", "test", "--tasks", settings.task]
            for name in ("DATA_DIR", "IMAGE_DIR", "CAPTIONS_FILE", "QUESTIONS_FILE"):
                if value := vars(settings)[name]:
                    flags += [f"--{name.lower()}", value]
            how = f"for photos of another source, run {command('prepare_dataset.py', *flags)}"
            raise UserError(
                f"{self.paths.splits} is missing: name --data_dir as in training; {how}"
            )
        self.splits = load_splits(self.paths.splits)
        say_outdated(settings, self.paths, settings.task)
        say_other_split(self.paths, self.checkpoint.settings)
        self.texts = load_texts(self.paths, [settings.task])
        names = [name for name in self.splits[settings.split] if name in self.texts]
        if not names:
            there = [f"--split {s}" for s in SPLITS if self.texts.keys() & self.splits[s]]
            remedy = f": {' or '.join(there)} has some" * bool(there)
            said = f"no photo of the split {settings.split!r} in {self.paths.splits}"
            raise UserError(f"{said} has {settings.task}{remedy}")
        if left := len(self.splits[settings.split]) - len(names):
            print(f"left out {left} photos of the split, for which there are no {settings.task}")
        self.device = choose_device(settings.DEVICE)
        self.dtype = choose_dtype(settings.PRECISION, self.device)
        self.precision = str(self.dtype).removeprefix("torch.")
        self.clip = load_clip(settings.clip, self.device) if settings.clip else None
        self.cache, bad = build_features(
            self.checkpoint.load_encoder(settings.encoder).to(self.device),
            self.paths.images,
            [(name, 0) for name in names],
            self.paths.features,
            dtype=self.dtype,
            batch_size=settings.FEATURE_BATCH_SIZE,
            max_bad=settings.MAX_BAD_IMAGES,
        )
        self.names = [name for name in names if name not in bad]
        self.left_out = len(self.splits[settings.split]) - len(self.names)
        self.prompts = prompts_about(self.texts, self.names, settings.task)

    def write(self, prompts: Sequence[Prompt]) -> list[Hypothesis]:
        """The best hypothesis about each prompt."""
        found = generate_cached(
            self.checkpoint.model.to(self.device),
            self.checkpoint.tokenizer,
            self.cache,
            prompts,
            self.options,
            reranker=self.checkpoint.reranker,
            dtype=self.dtype,
            batch_size=self.settings.batch_size,
        )
        return [*tqdm(found, total=len(prompts), desc="writing", unit="text", disable=None)]


def table(columns: dict[str, dict[str, float]], digits: int) -> str:
    """Figures by column and row as text that fits a phone; the first column has all rows."""
    rows = [*next(iter(columns.values()))]
    begin, lines = max(map(len, rows)), []
    for row in ("", *rows):
        line = f"{row:<{begin}}"
        for name, column in columns.items():
            value = "-" if column.get(row) is None else f"{column[row]:.{digits}f}"
            line += f"{value if row else name:>{max(6, len(name)) + 3}}"
        lines.append(line)
    return "\n".join(lines)


# --- Captions -------------------------------------------------------------------------------


def score_captions(scored: Scored) -> dict[str, object]:
    """Print and report the captions' scores; returns what the JSON line holds of them."""
    settings, names, images = scored.settings, scored.names, scored.paths.images
    hypotheses = scored.write(scored.prompts)
    said = [scored.checkpoint.tokenizer.decode(h.tokens) for h in hypotheses]
    captions = dict(zip(names, said, strict=True))
    if settings.save_captions:  # before what may fail, as where a photo has gone meanwhile
        content = json.dumps(captions, ensure_ascii=False, indent=1)
        write_file(Path(settings.save_captions).expanduser(), content)
    references = references_of(scored.texts, names)
    found, values = metrics.score(captions, references)
    low, high = metrics.bootstrap_interval(list(values.values()))
    training = references_of(scored.texts, scored.splits["train"]).values()
    other = metrics.diversity(said, {text for group in training for text in group})
    if not training:  # of another source's photos
        del other["novel"]
    other["unfinished"] = 100 * sum(not h.ended for h in hypotheses) / len(names)
    more, missing = java_scores(captions, references)
    if scored.clip:
        files = [images / name for name in names]
        more["CLIPScore"] = clip_score(scored.clip, files, said, scored.device)
    else:
        missing["CLIPScore"] = "needs --clip"
    found |= more
    lines = [
        *what_is_scored(scored, references),
        table({"model": found, "human": human_ceiling(references)}, digits=2),
        f"CIDEr-D, 95 % bootstrap interval: {low:.1f} to {high:.1f}"
        + " (it compares photos: that of one alone is 0)" * (len(names) == 1),
        *(f"{name}: {value:.4g}" for name, value in other.items()),
        *(f"{metric}: not computed, {reason}" for metric, reason in missing.items()),
    ]
    summary = "\n".join(lines)
    print(summary)
    write_report(settings.report, images, captions, references, values, summary)
    print(f"report: {settings.report}")
    return {
        **{metric: round(value, 4) for metric, value in found.items()},
        "CIDEr-D interval": [round(low, 4), round(high, 4)],
        **{name: round(value, 4) for name, value in other.items()},
        "not computed": missing,
        "scorer": metrics.SCORER,
        "tokenizer": metrics.TOKENIZER,
    }


def what_is_scored(scored: Scored, references: dict[str, list[str]]) -> Iterator[str]:
    """Which captions of which photos, and what should be known of people's, a line each."""
    count, data = len(references), scored.paths.data_dir.resolve().name
    left = f" ({scored.left_out} left out)" if scored.left_out else ""
    yield (
        f"{Path(scored.settings.file).name}, split {scored.settings.split!r} of {data}: "
        f"{count} photos{left}, beam {scored.options.beam_size}, {scored.precision}"
    )
    several = sum(len(group) > 1 for group in references.values())
    if 0 < several < count:
        yield f"human: of the {several} photos with several captions"
    if odd := metrics.without_spaces([text for group in references.values() for text in group]):
        yield odd


def report_path(settings: SimpleNamespace) -> Path:
    """Where the report goes, unless told: beside the checkpoint (one from the Hub: here), by the
    split and the options, and by the data if they lie elsewhere."""
    if settings.report:
        return Path(settings.report).expanduser()
    checkpoint = Path(settings.checkpoint).expanduser()
    if checkpoint.suffix not in (".safetensors", ".pt"):  # user/repo: its file is among the Hub's
        checkpoint = Path(f"{settings.checkpoint.replace('/', '_')}.safetensors")
    how = "".join(f"_{name}_{value}" for name, value in given_options(settings).items())
    data = Path(settings.DATA_DIR).expanduser().resolve()
    other = "" if data == checkpoint.resolve().parent else f"_{data.name}"
    return checkpoint.with_name(f"{checkpoint.stem}{other}_{settings.split}{how}.html")


def human_ceiling(references: dict[str, list[str]]) -> dict[str, float]:
    """What one human caption scores against the others, averaged over which one it is."""
    usable = {name: group for name, group in references.items() if len(group) > 1}
    if not usable:
        return {}
    found = []
    for k in range(min(map(len, usable.values()))):
        one = {name: group[k] for name, group in usable.items()}
        others = {name: group[:k] + group[k + 1 :] for name, group in usable.items()}
        found.append(metrics.score(one, others)[0])
    return {metric: fmean(each[metric] for each in found) for metric in found[0]}


# --- Answers --------------------------------------------------------------------------------


def score_answers(scored: Scored) -> dict[str, object]:
    """Print the answers' accuracy beside two baselines; returns what the JSON line holds of it.

    The baselines are the most common training answer of each question type, and the same model
    shown another photo's features: what language alone gives.
    """
    questions = [text for _, text in scored.prompts]
    # The next photo: none stands in for itself, unless it is alone.
    other = dict(zip(scored.names, scored.names[1:] + scored.names[:1], strict=True))
    swapped = [(other[name], text) for name, text in scored.prompts]
    decode = scored.checkpoint.tokenizer.decode
    usual = common_answers(prompts_about(scored.texts, scored.splits["train"], "questions"))
    answers = {
        "model": [decode(h.tokens) for h in scored.write(scored.prompts)],
        "wrong picture": [decode(h.tokens) for h in scored.write(swapped)],
    }
    if usual:  # not so of another source's photos
        answers["common answer"] = [usual.get(q.kind, usual[""]) for q in questions]
    accuracies = accuracy_by_kind(questions, answers)
    columns = {
        source: {kind: row[source] for kind, row in accuracies.items()} for source in answers
    }
    print(table(columns, digits=1))
    return {
        "accuracy": accuracies["all"]["model"],
        "accuracies": accuracies,
        "questions": len(questions),
        "questions by type": dict(Counter(text.kind for text in questions)),
        "scorer": "VQA accuracy where several people answered, normalised exact match elsewhere",
    }


def common_answers(prompts: Sequence[Prompt]) -> dict[str, str]:
    """The most frequent answer to each type of question, and under "" to all."""
    counts = answers_by_kind(text for _, text in prompts)
    return {kind: count.most_common(1)[0][0] for kind, count in counts.items()}


def accuracy_by_kind(
    questions: Sequence[Text], answers: dict[str, list[str]]
) -> dict[str, dict[str, float]]:
    """Percent right: for "all" and for each type of question, by who answered."""
    found: dict[str, dict[str, float]] = {}
    for kind in ("all", *sorted({question.kind for question in questions} - {""})):
        places = [i for i, q in enumerate(questions) if kind in ("all", q.kind)]
        for source, given in answers.items():
            pairs = [(given[i], questions[i].answers or [questions[i].target]) for i in places]
            right = [metrics.vqa_accuracy(*pair) for pair in pairs]
            found.setdefault(kind, {})[source] = round(100 * sum(right) / len(right), 4)
    return found


# --- Scorers that others made ----------------------------------------------------------------


def java_scores(
    captions: dict[str, str], references: dict[str, list[str]]
) -> tuple[dict[str, float], dict[str, str]]:
    """METEOR and SPICE by pycocoevalcap, times 100, and why one of them is not computed."""
    both = ("METEOR", "SPICE")
    if shutil.which("java") is None:
        return {}, dict.fromkeys(both, "needs Java")
    if importlib.util.find_spec("pycocoevalcap") is None:
        return {}, dict.fromkeys(both, f"needs {pip('pycocoevalcap')}")
    ours = {name: [" ".join(metrics.tokenize(text))] for name, text in captions.items()}
    theirs = {name: [" ".join(metrics.tokenize(t)) for t in references[name]] for name in captions}
    scores, missing = {}, {}
    for metric in both:
        module = importlib.import_module(f"pycocoevalcap.{metric.lower()}.{metric.lower()}")
        # Their progress goes to standard output, where our last line belongs to programs.
        with contextlib.redirect_stdout(sys.stderr):
            try:
                scorer = getattr(module, metric.capitalize())()
                scores[metric] = 100 * float(scorer.compute_score(theirs, ours)[0])
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                # SPICE downloads its parser when first used, and a Java program may break off.
                missing[metric] = first_line(error)
    return scores, missing


def load_clip(name: str, device: torch.device) -> tuple[Any, Any, Any]:
    """A CLIP model, and what makes its pixels and tokens."""
    load, processor = transformers.CLIPModel.from_pretrained, transformers.AutoImageProcessor
    with refused(f"the CLIP model {name!r} can't be loaded"):
        with quiet_library():
            options = loading_options(name)
            config = transformers.CLIPConfig.from_pretrained(name, **options)
            pictures = processor.from_pretrained(name, backend="pil", **options)
            check_sizes(pictures, config.text_config, config.vision_config)
            model, info = load(name, output_loading_info=True, **options)
            words = transformers.AutoTokenizer.from_pretrained(name, **options)
        # The library fills both gaps by chance or with nothing, and any score would come out.
        if info["missing_keys"] or {*words("a dog").input_ids} <= {*words.all_special_ids}:
            raise UserError("it has no CLIP's weights, or no tokenizer")
    return model.to(device).eval(), pictures, words


@torch.inference_mode()
def clip_score(
    clip: tuple[Any, Any, Any], files: Sequence[Path], captions: Sequence[str], device: torch.device
) -> float:
    """CLIPScore without references (Hessel et al. 2021): 2.5 times the mean cosine, times 100."""
    model, pictures, words = clip
    most, total = model.config.text_config.max_position_embeddings, 0.0
    for start in range(0, len(files), 32):
        images = [open_image(file) for file in files[start : start + 32]]
        texts = [f"A photo depicts {text}" for text in captions[start : start + 32]]
        tokens = words(texts, return_tensors="pt", padding=True, truncation=True, max_length=most)
        pixels = pictures(images=images, return_tensors="pt")
        output = model(**tokens.to(device), pixel_values=pixels["pixel_values"].to(device))
        cosines = (output.image_embeds * output.text_embeds).sum(-1)
        total += float(cosines.clamp(min=0).sum())
    return 100 * 2.5 * total / len(files)


# --- The report -----------------------------------------------------------------------------

SHOWN = 12  # photos of each kind
EXPLAINED = {
    "BLEU-1 to BLEU-4": "how many words, and runs of two to four, people's captions share",
    "ROUGE-L": "the longest sequence of words that a person's caption shares",
    "CIDEr-D": "like BLEU, but what is rarely said of photos counts most; it can exceed 100",
    "METEOR, SPICE": "shared words, stems and synonyms; shared things, attributes and relations",
    "CLIPScore": "how well photo and caption fit, as a CLIP model sees it, without references",
    "human": "what one person's caption scores against the others' of the same photo: one "
    "reference fewer than the model has, which lowers BLEU and ROUGE-L, not CIDEr-D",
    "distinct-1, distinct-2": "different words, and pairs of words, among all written, in %",
    "length": "words a caption",
    "repetitive": "captions that say a word twice in a row, or three words twice, in %",
    "most_frequent": "captions that are the most frequent one, in %",
    "novel": "captions that no training caption equals, in %",
    "unfinished": "captions that were cut at the greatest length, in %",
}
STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em;
  overflow-wrap: anywhere }
pre { background: light-dark(#eee, #333); padding: 1em; white-space: pre-wrap }
article { display: flex; flex-wrap: wrap; gap: 0 1.5em; margin: 1.5em 0 }
article > div { flex: 1 1 16em }
img { width: 224px; height: auto; align-self: start }
p, ul { margin: .3em 0 }
ul { padding: 0 1.5em }
p, li, dd { color: light-dark(#555, #bbb) }
"""


def write_report(
    path: Path,
    image_dir: Path,
    captions: dict[str, str],
    references: dict[str, list[str]],
    values: dict[str, float],
    summary: str,
) -> None:
    """A page without outside parts: of the worst photos, the best and some at random, by CIDEr-D,
    the caption and what people said.
    """
    terms = "".join(f"<dt>{name}<dd>{text}" for name, text in EXPLAINED.items())
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Captions</title>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<style>{STYLE}</style>",
        f"<h1>Captions</h1><pre>{html.escape(summary)}</pre>",
        f"<details><summary>What the numbers mean</summary><dl>{terms}</dl></details>",
    ]
    ranked = sorted(values, key=values.get)
    chance = random.Random(0).sample(ranked, min(SHOWN, len(ranked)))
    groups = {"worst": ranked[:SHOWN], "best": ranked[::-1][:SHOWN], "random": chance}
    for title, names in groups.items():
        parts.append(f"<h2>{title}</h2>")
        for name in names:
            items = "".join(f"<li dir=auto>{html.escape(text)}" for text in references[name])
            parts.append(
                f'<article><img alt="{html.escape(name)}" src="{_thumbnail(image_dir / name)}">'
                f"<div><b dir=auto>{html.escape(captions[name])}</b><p>CIDEr-D {values[name]:.1f}, "
                f"{html.escape(name)}<ul>{items}</ul></div></article>"
            )
    write_file(path, "\n".join(parts))


def _thumbnail(file: Path) -> str:
    image = open_image(file)
    image.thumbnail((320, 320))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


if __name__ == "__main__":
    run_script(main)
