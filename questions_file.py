"""Questions about photos in the forms that people have them in, read as {photo: questions}."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captions_file import (
    NAME_KEYS,
    Entry,
    listed,
    name_within,
    photo_in,
    read_file,
    read_objects,
)
from dataset import read_question
from photo_names import match_names
from tables import Table, table_of
from utils import UserError, read_json, write_file

ANSWERS = ("multiple_choice_answer", "answer", "answers")


def read_questions(path: Path, answered: bool = True) -> dict[str, list[dict[str, Any]]]:
    """Questions as `load_questions` reads them, from its form or from objects or rows of a photo, a
    question, and an answer or several people's, which may be missing unless `answered`."""
    form, content = read_file(path)
    if form == "JSON" and isinstance(content, dict):
        values = content.get("data", [*content.values()])  # as TextVQA has it, or GQA, by ids
        if not isinstance(values, list) or not all(isinstance(v, dict) for v in values):
            return content  # our own form: `load_questions` says what is wrong with it
        content = values
    usage = 'write {"image": "photo.jpg", "question": "...", "answer": "..."}'
    if not isinstance(content, list):
        raise UserError(f"{path} holds no questions: {usage}")
    if form == "JSON":
        content = [(str(path), entry) for entry in content]
    elif form == "table":
        content = _rows(table_of(content))
    questions: dict[str, list[dict[str, Any]]] = {}
    for where, row in read_objects(content, usage):
        name = str(photo_in(next((row[key] for key in NAME_KEYS if row.get(key)), "")))
        name = name and name_within(where, name)
        if row.get("prefix") and not row.get("question"):
            continue  # it asks for a caption
        if not name or not row.get("question"):
            raise UserError(f"{where} names no photo and question: {usage}")
        question = _question(where, row["question"], row, answered)
        questions.setdefault(name, []).append(question)
    return questions


def _rows(table: Table) -> list[Entry]:
    """A table's rows as objects; a delimiter in a text that isn't quoted is refused where it
    might stand in the question or in the answer."""
    names, rows = table.names, []
    texts = [place for place, name in enumerate(names) if name in ("question", *ANSWERS)]
    for where, row in table.rows[1:]:
        if texts == [len(names) - 1]:
            table.trim(row)
        if len(row) > len(names):
            if len(texts) != 1:
                raise UserError(
                    f"{where} has {len(row)} columns, not {len(names)}: put quotes around a text "
                    f"that holds a {table.delimiter!r}"
                )
            table.join(row, texts[0])
        rows.append((where, {key: cell for key, (cell, _) in zip(names, row, strict=False)}))
    return rows


def _question(
    where: str, asked: Any, entry: dict[str, Any], answered: bool = True
) -> dict[str, Any]:
    """A question with its answer, or several people's, as questions.json has it; raises as
    `read_question`."""
    own = [entry.get(key) for key in ANSWERS[:2]]
    several = entry.get("answers") or next((one for one in own if isinstance(one, list)), None)
    answers = listed(several, _people) if isinstance(several, str) else _people(several)
    answer = next((text for text in own if text not in (None, "") and text is not several), "")
    kind = entry.get("type") or entry.get("question_type") or entry.get("answer_type") or ""
    found = {"question": asked or "", "answer": answer, "answers": answers, "type": kind}
    found |= {key: str(found[key]) for key in found if isinstance(found[key], int | float)}
    return found | {"answer": read_question(where, found, answered).target}


def _people(said: Any) -> list[Any]:
    """Several people's answers, or a single one, each a value or an object that has it."""
    said = said if isinstance(said, list) else [said]
    answers = [each.get("answer") if isinstance(each, dict) else each for each in said]
    answers = [str(each) if isinstance(each, int | float) else each for each in answers]
    return [each for each in answers if str(each or "").strip()]


def convert_vqa(
    questions: Sequence[str], annotations: Sequence[str], target: Path, images: Path | None = None
) -> None:
    """Write questions.json from VQAv2's pairs of files, with all ten answers of each question.

    Files of that form that other people made may lack all but questions, ids and an answer. A
    `target` that holds something else is refused.
    """
    if len(questions) != len(annotations):
        raise UserError(
            "give as many --vqa_questions as --vqa_annotations, in the same order: they are pairs"
        )
    table: dict[str, list[dict[str, Any]]] = {}
    for pair in zip(questions, annotations, strict=True):
        asked, answered = (read_json(Path(path).expanduser()) for path in pair)
        try:
            _add_vqa(asked, answered, table)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{' and '.join(pair)} are no VQA pair ({error!r} is off)") from None
    if not table:
        raise UserError("no annotation answers a question: are the pairs in the same order?")
    if images:
        table = match_names(table, images)
    if target.suffix.lower() != ".json":
        raise UserError(f"--questions_file {target} is to be written: its name must end in .json")
    if not target.exists():
        write_file(target, json.dumps(table))
        print(f"wrote {sum(map(len, table.values())):,} questions to {target}")
    elif not _holds(target, table):
        raise UserError(
            f"{target} holds other questions than --vqa_questions: delete it or move it, or name "
            "another file with --questions_file"
        )


def _holds(path: Path, table: dict[str, Any]) -> bool:
    with contextlib.suppress(UserError):  # that it is no JSON
        return read_json(path) == table
    return False


def _add_vqa(asked: Any, answered: Any, table: dict[str, list[dict[str, Any]]]) -> None:
    subtype = asked.get("data_subtype") or answered.get("data_subtype")
    stem = f"COCO_{subtype}_" if subtype else ""  # COCO's name: COCO_val2014_000000000042.jpg
    texts = {str(entry["question_id"]): entry["question"] for entry in asked["questions"]}
    passed = 0
    for entry in answered["annotations"]:
        try:
            question = _question("it", texts.get(str(entry["question_id"])), entry)
        except UserError:
            passed += 1
            continue
        number = str(entry["image_id"])
        name = f"{stem}{int(number):012d}.jpg" if number.isdigit() else number
        table.setdefault(name, []).append(question)
    if passed:
        print(f"  passed over: {passed:,} annotations without a question or an answer")
