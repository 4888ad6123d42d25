"""Questions about photos in the forms that people have them in, read as {photo: questions}."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from captions_file import Entry, name_within, read_file, read_objects
from captions_search import are_alike, held_or_converted, holds, lists_in, read_lists
from columns import choose_columns, languages_in, photo_in, split_told
from dataset import OTHER_SPLITS, DataPaths, as_text, load_questions, read_question, split_in
from options import SPLITS
from photo_names import is_photo, match_names, plain_name
from tables import Table, table_of
from texts import TALKS, TO_CAPTION, is_rejected, listed, talk_in, texts_of
from utils import UserError, brief, read_json, uncollected, write_file

ANSWERS = "multiple_choice_answer answer answers direct_answers ground_truth".split()
ANSWERS += ["correct_answer", "gt_answer"]
CHOICES = ("choices", "options", "choice")
KINDS = ("type", "question_type", "answer_type")
ASKED = ("question", "questions", *ANSWERS, *CHOICES, *KINDS, *TALKS)
LETTERED = re.compile("(choice_|option_)?[a-h]")  # columns of choices, as PMC-VQA's "Choice A"
LETTER = re.compile(r"\s*\(?([A-H])[.):]\s*(?=\S)")  # before a choice: "A. a dog"
# A photo's, in a conversation, as Qwen-VL, LLaVA, MMMU, Phi and Llama have it.
PLACE = re.compile(r"(Picture \d+:\s*)?<img>[^<]+</img>|</?\|?image[_ \w]{0,12}\|?>")
Questions = dict[str, list[dict[str, Any]]]  # about each photo, as questions.json has them
USAGE = 'write {"image": "photo.jpg", "question": "...", "answer": "..."}'


def questions_source(settings: SimpleNamespace, paths: DataPaths) -> Path:
    """The file that questions are read from, and that VQAv2's are written to."""
    given = settings.QUESTIONS_FILE
    return Path(given).expanduser() if given else paths.data_dir / "questions.json"


@uncollected()
def ensure_questions(
    settings: SimpleNamespace, paths: DataPaths, known: Mapping[str, str]
) -> tuple[DataPaths, dict[str, str]]:
    """Have the questions by the photos' real names; say where, and which split each photo is of:
    the `known` one, or the first that they tell."""
    place = questions_source(settings, paths)
    source = place if settings.QUESTIONS_FILE or place.is_file() else paths.data_dir
    if not source.exists():
        raise UserError(f"{source} is missing: --questions_file names a file or a folder")
    texts = match_names(find_questions(source), paths.images)
    asked = [(name, split_in(each.get("split"))) for name in texts for each in texts[name]]
    told = [(name, split) for name, split in asked if split]
    splits = dict(reversed(told)) | known
    if others := sum(splits[name] != split for name, split in told):
        print(
            f"{others:,} questions tell another split than their photo has by its captions or its "
            "first question, which counts: splits are by photo"
        )
    kept = held_or_converted(paths.data_dir, place, texts, "questions")
    return replace(paths, questions=kept), splits


def find_questions(source: Path) -> Questions:
    """Questions of a file, or of those in a folder, where what is called so comes first: of the one
    that holds some, or of several called alike but for a split, which is then their questions'."""
    if source.is_file():
        return read_questions(source)
    # SLAKE's photos have each their own list too, further down.
    found, refused = read_lists(source, lists_in(source), "question|vqa", read_questions, near=2)
    if not found:
        seen = f" ({next(iter(refused.values()))})" if refused else ""
        raise UserError(
            f"{source} holds no questions: write questions.json there "
            '({"photo.jpg": [{"question": "...", "answer": "..."}]}), name a file with '
            f"--questions_file, or convert VQAv2's with --vqa_questions{seen}"
        )
    names = ", ".join(found)
    if not are_alike(found):
        raise UserError(f"{source} has questions in {names}: --questions_file chooses")
    print(f"questions of {names} in {source}")
    for name, error in refused.items():
        if are_alike([name, *found]):
            print(f"  passed over: {error}")
    questions: Questions = {}
    for name, table in found.items():
        told = {"split": split_in(name)} if len(found) > 1 else {}
        for photo, group in table.items():
            questions.setdefault(photo, []).extend(told | each for each in group)
    return questions


def read_questions(path: Path, answered: bool = True) -> Questions:
    """Questions as `load_questions` reads and checks them, from its form or from objects or rows of
    a photo, a question, and an answer or several people's, which may be missing unless `answered`.

    An object may hold several questions, or a conversation. What lacks a part is passed over, which
    is said; "split" is added where the file tells it.
    """
    form, content = read_file(path)
    if form == "JSON" and isinstance(content, dict):
        content = _without_ids(content)
        if isinstance(content, dict):
            load_questions(path, False, content)  # our own form: it says what is wrong with it
            content = {n: [_own(f"{path}: {n!r}", e) for e in v] for n, v in content.items()}
            load_questions(path, answered, content)
            return content
    if not isinstance(content, list):
        raise UserError(f"{path} holds no questions: {USAGE}")
    if form == "JSON":
        content = [(f"{path}, entry {n}", entry) for n, entry in enumerate(content, 1)]
    elif form == "table":
        content = _rows(table_of(content))
    rows = [(at, each) for at, row in read_objects(content, USAGE) for each in questions_in(row)]
    keys = [*dict.fromkeys(key for _, row in rows for key in row)]
    photos, _, split = choose_columns(keys, [row for _, row in rows])
    photos = [key for n, key in enumerate(photos) if key != "id" or not n]
    questions: Questions = {}
    passed = []
    for where, row in rows:
        said = (row[key] for key in photos if row.get(key) or type(row.get(key)) is int)  # as 0 is
        name = photo_in(next(said, ""))
        question = _asked(row.get("question")) and read_entry(where, row)
        if name in (None, "") or isinstance(name, list) or not question:
            passed.append(f"{where} names no photo and question, with {', '.join([*row][:9])}")
        elif is_rejected(row):
            passed.append(f"{where} was rejected")
        elif answered and not question["answer"].strip():
            passed.append(f"{where} has no answer")
        else:
            question |= {"split": split_in(row.get(split))} if split else {}
            questions.setdefault(name_within(where, plain_name(str(name))), []).append(question)
    if not questions:
        raise UserError(f"{passed[0] if passed else f'{path} holds no questions'}: {USAGE}")
    if languages := languages_in([row for _, row in rows]):
        print(f"{path} has questions{languages}")
    if passed:
        print(f"  passed over: {len(passed):,} questions, the first as {brief(passed[0])}")
    return questions


def _own(where: str, entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of our own form, with what others call its parts; as it is where it has its own."""
    others = {*ASKED} - {"question", "answer", "answers", "type"}
    return entry | read_entry(where, entry) if {*entry} & others else entry


def _without_ids(table: dict[str, Any]) -> Any:
    """The objects within a JSON object: by their ids or photos, by split, in the only list of them,
    or COCO's `annotations` with their `images`; our own form stays as it is."""
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        images, asked = table["images"], table["annotations"]  # lists, or OpenViVQA's by their ids
        of = images if isinstance(images, dict) else {str(each["id"]): each for each in images}
        asked = [*asked.values()] if isinstance(asked, dict) else asked
        asked = [(q, of.get(str(q["image_id"]))) for q in asked]
        return [{"split": split_told(i)} | q | {"image": i, "image_id": None} for q, i in asked]
    lists = {key: v for key, v in table.items() if isinstance(v, list) and _are_objects(v)}
    if len(lists) == len(table) and {*table} <= {*SPLITS, *OTHER_SPLITS}:
        return [{"split": split} | each for split, part in lists.items() for each in part]
    if len(lists) == 1 and not any(map(is_photo, lists)):
        return [*lists.values()][0]  # as VQA has it, TextVQA, CLEVR and Visual7W
    if len(lists) == len(table) and not any("question" in q for v in lists.values() for q in v):
        return [{"image": k} | q for k, v in lists.items() for q in v]  # EarthVQA: "Question"
    if not _are_objects(table.values()):
        return table
    if all("questions" in each for each in table.values()):  # by photo, as OCR-VQA has them
        return [{"image_id": k} | each for k, each in table.items()]
    return [each | ({"image": k} if is_photo(k) else {}) for k, each in table.items()]


def _are_objects(values: Collection[Any]) -> bool:
    return bool(values) and all(isinstance(each, dict) for each in values)


def questions_in(row: dict[str, Any]) -> list[dict[str, Any]]:
    """An object for each question in one: itself, or one of a list that it has, or of a turn in a
    conversation; what asks for a caption is left out."""
    if row.get("question") or "prefix" in row:
        return [row] if row.get("question") else []
    lists = [value for value in row.values() if isinstance(value, list) and _are_objects(value)]
    asked, said = row.get("questions"), row.get("answers")
    if isinstance(asked, list) and isinstance(said, list) and len(asked) == len(said):
        lists.append([{"question": q, "answer": a} for q, a in zip(asked, said, strict=True)])
        row = row | {"answers": None}
    for asked in lists:
        if any(each.get("question") for each in asked):
            return [row | each for each in asked]
    talk = next(filter(None, (talk_in(row.get(key)) for key in TALKS)), [])
    told = [(_asked(asked), answer) for asked, answer in talk]
    talked = [row | {"question": q, "answer": a} for q, a in told if not TO_CAPTION.search(q)]
    return talked if talk else [row]


def _asked(said: Any) -> Any:
    """A question, without the mark of where its photo stands; nothing for NaN."""
    said = as_text(said)
    return PLACE.sub("", said).strip() if isinstance(said, str) else said


def _rows(table: Table) -> list[Entry]:
    """A table's rows as objects, without a header of photo, question and answer."""
    # Photos may be called without their suffix, as VQA-Med's are.
    bare = len(table.names) == 3 and "question" not in table.names and "?" in table.names[1]
    if bare or is_photo(plain_name(table.names[0])):
        table.names = ["image", "question", "answer"]
    else:
        table.drop_header()
    return table.objects(("question", *ANSWERS))


def read_entry(where: str, entry: dict[str, Any], answered: bool = False) -> dict[str, Any]:
    """A question and its answers, as questions.json has them; raises as `read_question`."""
    own = [entry.get(key) for key in ANSWERS[:2]]
    lists = [entry.get(key) for key in ANSWERS[2:]] + [v for v in own if isinstance(v, list)]
    several = next(filter(None, lists), None)
    answers = listed(several, _people) if isinstance(several, str) else _people(several)
    own = [each for each in own if as_text(each) not in ("", []) and each is not several]
    answer = (own or [""])[0]
    kinds = texts_of(next(filter(None, map(entry.get, KINDS)), ""))  # InfographicVQA's are lists
    lettered = {key[-1].upper(): said for key, said in entry.items() if LETTERED.fullmatch(key)}
    choices = next(filter(None, map(entry.get, CHOICES)), lettered)
    found = {"question": _asked(entry.get("question")), "answer": _chosen(where, answer, choices)}
    found |= {"answers": answers, "type": ", ".join(map(as_text, kinds))}
    return found | {"answer": read_question(where, found, answered).target}


def _chosen(where: str, answer: Any, choices: Any) -> Any:
    """An answer; where it is the number (from 0), letter or key of one of the choices, that one.
    Numbers that seem to count from 1 are refused: by them all answers but these would be others."""
    said = str(as_text(answer)).strip(" .()")
    named = choices if isinstance(choices, dict) else {}  # {"A": "a dog", "B": "a cat"}
    choices = [*named.values()] or choices
    choices = listed(choices) if isinstance(choices, str) else texts_of(choices)
    marks = [*filter(None, (LETTER.match(str(each)) for each in choices))]
    if choices[1:] and [mark[1] for mark in marks] == [*"ABCDEFGH"[: len(choices)]]:
        choices = [mark.string[mark.end() :].strip() for mark in marks]
        named = dict(zip("ABCDEFGH", choices, strict=False))
        said = mark[1] if (mark := LETTER.match(str(answer))) else said
    if found := named.get(said, named.get(said.upper())):
        return found
    # Among texts a number is a place, as IconQA's 0 of ["2", "0"]; as a text it may be one of them.
    counted = isinstance(answer, int | float) and all(isinstance(each, str) for each in choices)
    if len(choices) < 2 or (said in map(str, choices) and not counted):
        return answer
    letter = ord(said.upper()) - ord("A") if len(said) == 1 else -1
    place = int(said) if said.isdecimal() else letter
    if said == str(len(choices)):
        raise UserError(
            f"{where} has number {said} of {said} choices as its answer, but they count from 0: "
            "write each answer as one less, or as the choice itself"
        )
    return choices[place] if 0 <= place < len(choices) else answer


def _people(said: Any) -> list[Any]:
    """Several people's answers, or a single one, each a value or an object that has it, or all in
    an object's list, as `datasets` writes them."""
    if isinstance(said, dict) and isinstance(inner := said.get("answer", said.get("text")), list):
        said = inner
    said = said if isinstance(said, list) else [said]
    answers = [v.get("answer", v.get("full_answer")) if isinstance(v, dict) else v for v in said]
    return [each for each in map(as_text, answers) if str(each or "").strip()]


@uncollected()
def convert_vqa(
    questions: Sequence[str], annotations: Sequence[str], target: Path, images: Path
) -> None:
    """Write questions.json from VQAv2's pairs of files, with all ten answers of each question.

    Files of that form that other people made may lack all but questions, ids and an answer. A
    `target` that holds something else is refused.
    """
    if len(questions) != len(annotations):
        raise UserError(
            "give as many --vqa_questions as --vqa_annotations, in the same order: they are pairs"
        )
    table: Questions = {}
    for pair in zip(questions, annotations, strict=True):
        asked, answered = (read_json(Path(path).expanduser()) for path in pair)
        try:
            _add_vqa(asked, answered, Path(pair[0]).name, table)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{' and '.join(pair)} are no VQA pair ({error!r} is off)") from None
    if not table:
        raise UserError("no annotation answers a question: are the pairs in the same order?")
    table = match_names(table, images)
    if target.suffix.lower() != ".json":
        raise UserError(f"--questions_file {target} is to be written: its name must end in .json")
    if not target.exists():
        write_file(target, json.dumps(table))
        print(f"wrote {sum(map(len, table.values())):,} questions to {target}")
    elif not holds(target, table):
        raise UserError(
            f"{target} holds other questions than --vqa_questions: delete it or move it, or name "
            "another file with --questions_file"
        )


def _add_vqa(asked: Any, answered: Any, called: str, table: Questions) -> None:
    told = {"coco_split": "", "split": called}
    for content in (answered, asked):
        if isinstance(content, dict) and (subtype := content.get("data_subtype")):
            told |= {"coco_split": subtype, "split": subtype}
    if isinstance(answered, dict):  # VQA-CP's are lists, and RSVQA calls them answers
        answered = answered["annotations" if "annotations" in answered else "answers"]
    texts: dict[tuple[str, ...], dict[str, Any]] = {}
    for entry in asked if isinstance(asked, list) else asked["questions"]:
        key = str(entry.get("question_id", entry.get("id"))), str(entry.get("image_id"))
        texts[key] = texts[key[:1]] = entry  # as ids may count anew for each photo
    passed = 0
    for entry in answered:
        if not entry.get("active", True):  # taken back, in RSVQA
            continue
        key = str(entry["question_id"]), str(entry.get("image_id"))
        entry = told | texts.get(key, texts.get(key[:1], {})) | entry
        try:
            question = read_entry("it", entry, answered=True)
        except UserError:
            passed += 1
            continue
        number = str(entry["img_id"] if "img_id" in entry else entry["image_id"])
        # COCO's name: COCO_val2014_000000000042.jpg
        stem = f"COCO_{entry['coco_split']}_" if entry["coco_split"] else ""
        name = f"{stem}{int(number):012d}.jpg" if number.isdigit() else number
        question |= {"split": split} if (split := split_in(entry["split"])) else {}
        table.setdefault(name, []).append(question)
    if passed:
        print(f"  passed over: {passed:,} annotations without a question or an answer")
