"""Settings and flags: what they may be, and how a command line changes those of `config.py`."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

from utils import UserError, redact

# How settings and flags are called that name a file or a folder, or else what is on the Hub.
FILES, OR_ON_HUB = ("_DIR", "_FILE", "CHECKPOINT_PATH"), ("ENCODER_MODEL_NAME", "CHECKPOINT")
OF_HUB = (*OR_ON_HUB, "ENCODER", "CLIP")  # with those of flags
NO_ADDRESS = (*FILES, *OF_HUB, "OUTPUT", "REPORT", "OUT", "SAVE_CAPTIONS")
NO_ADDRESS += ("ATTENTION", "ARCHIVE", "PHOTO", "IMAGE_PATH")
TEXTS = (
    "DATASET DATA_DIR TASKS SPLIT ENCODER_MODEL_NAME ENCODER_LAYERS CHECKPOINT_PREFIX DEVICE "
    "PRECISION"
).split()
TEXTS_OR_NONE = (
    "IMAGE_DIR CAPTIONS_FILE QUESTIONS_FILE VOCAB_FILE MERGES_FILE KARPATHY_FILE TRAIN_SHARDS "
    "VAL_SHARDS ENCODER_REVISION FEATURES_DIR OUTPUT_DIR START_CHECKPOINT RESUME_CHECKPOINT_PATH "
    "WANDB_PROJECT WANDB_ENTITY WANDB_RUN_NAME HF_REPO_ID"
).split()
ANY = 2**31 - 1  # stands for: no upper bound

# What settings (capitals), flags and a run's state may be, both ends allowed: whole if the first is
BOUNDS = {
    (0, ANY): "MAX_BAD_IMAGES MAX_IMAGES SAMPLE_IMAGES SCORED_IMAGES NUM_EPOCHS SCST_EPOCHS "
    "WARMUP_STEPS KEEP_CHECKPOINTS NO_REPEAT_NGRAM top_k epoch batch bad_steps",
    (1, ANY): "SHUFFLE_BUFFER FEATURE_BATCH_SIZE BATCH_SIZE MIN_STEPS GRADIENT_ACCUMULATION_STEPS "
    "DECODER_EMBED_DIM DECODER_FF_DIM MAX_BAD_STEPS min_length max_length repeats",
    (1, 1000): "FEATURE_VIEWS DECODER_LAYERS DECODER_HEADS BEAM_SIZE groups n_best",
    (1, 10_000_000): "VOCAB_SIZE",
    (3, 100_000): "MAX_CAPTION_LENGTH",
    (0, 4096): "ENCODER_IMAGE_SIZE",
    (2, 100): "SCST_BEAM_SIZE",
    (False, True): "KEEP_SHARD_FEATURES COMPILE",
    (0.0, 0.95): "DROPOUT PATCH_DROPOUT LABEL_SMOOTHING",
    (0.0, 0.999999): "EMA_DECAY",
    (0.0, 100): "MIN_LEARNING_RATE SCST_LEARNING_RATE WEIGHT_DECAY",
    (1e-12, 100): "LEARNING_RATE",
    (1e-12, ANY): "GRADIENT_CLIP",
    (0, 2**63 - 1): "SEED step loss_count",
    (0.0, 1e18): "QUESTION_WEIGHT seconds loss_sum",
    (-100.0, 100): "LENGTH_PENALTY",
    (0.0, 1000): "RERANK diversity",
    (1e-3, 1000): "temperature",
    (1e-6, 1): "TRAIN_SPLIT_RATIO top_p",
    (0.01, 1000): "max_megabytes",
    (0, 65535): "port",
}
RANGES = {n.upper(): bounds for bounds, names in BOUNDS.items() for n in names.split()}
KINDS = {bool: "True or False", int: "a whole number", float: "a number"}


def constants(config: ModuleType | SimpleNamespace) -> dict[str, Any]:
    """The UPPER_CASE values of a configuration, in the order in which they stand."""
    return {name: value for name, value in vars(config).items() if name.isupper()}


def constant_comments(config: ModuleType) -> dict[str, str]:
    """The comment at the end of each constant's line: it is the flag's help text."""
    source = Path(config.__file__).read_text(encoding="utf-8", errors="replace")
    return dict(re.findall(r"^ *(\w+)(?:: [^=]+)? = .*?  # (.+)$", source, re.M))


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "1", "yes", "on", "false", "0", "no", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes", "on")


def _flag_type(name: str, default: object) -> Callable[[str], Any]:
    if default is None or name in TEXTS_OR_NONE:  # config.py may name one, and a flag none
        return lambda text: None if text.lower() in ("", "none") else text
    kind = type(RANGES.get(name, (default,))[0])  # a rate of 0 may become 0.5
    return _boolean if kind is bool else kind


class Parser(argparse.ArgumentParser):
    """A parser that knows the ranges of flags; `document` begins and ends what `--help` says."""

    def __init__(self, document: str):
        description, _, epilog = document.partition("\n\n")
        parts = {"description": description, "epilog": epilog, "allow_abbrev": False}
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **parts)
        self._negative_number_matcher = re.compile(r"-[\d.][\d.,e+-]*$")  # -1,-4 is no flag

    def error(self, message: str) -> NoReturn:
        super().error(redact(message))  # it quotes what was given

    def parse_args(self, *given: Any) -> argparse.Namespace:
        flags = super().parse_args(*given)
        check_ranges(flags)
        for name, value in vars(flags).items():
            kept = name in ("DATA_DIR", "PHOTO") or name.islower()
            given = value if isinstance(value, list) else [value]
            if kept and self.get_default(name) != "" and not all(str(x).strip() for x in given):
                flag = name if name.isupper() else f"--{name}"
                raise UserError(f"{flag} is empty: is a variable of your shell not set?")
        return flags


def load_settings(
    config: ModuleType,
    argv: Sequence[str] | None,
    parser: Parser,
    *,
    only: Sequence[str] | None = None,
    preset: Callable[[argparse.Namespace], dict[str, Any]] | None = None,
) -> SimpleNamespace:
    """Read the settings of one run: `config`, then a preset, then command-line flags.

    `parser` knows the script's own flags, which arrive in lower case (`settings.demo`). `only`
    names the constants that are flags too (all by default). `preset` maps the parsed flags to
    values that replace the configuration's, but not those given. The module is never changed.
    """
    defaults = constants(config)
    comments = constant_comments(config)
    group = parser.add_argument_group("settings (defaults stand in config.py)")
    for name in only or defaults:
        default = defaults[name]
        if not isinstance(default, str | int | float | os.PathLike | None):
            continue  # of a tuple's text its letters would be made
        group.add_argument(
            f"--{name.lower()}",
            *(["--epochs"] if name == "NUM_EPOCHS" else []),  # as others call it
            dest=name,
            type=_flag_type(name, default),
            default=argparse.SUPPRESS,
            metavar="TEXT" if default is None else type(default).__name__.upper(),
            help=f"{comments.get(name, '')} [{default}]".replace("%", "%%"),
        )
    flags = parser.parse_args(argv)
    root = Path(config.__file__).resolve().parent
    standing = defaults | (preset(flags) if preset else {})
    values = {name: _anchor(root, name, value) for name, value in standing.items()}
    settings = SimpleNamespace(**values | vars(flags))
    check_ranges(settings)  # also of what stands in the module
    return settings


def _anchor(root: Path, name: str, value: object) -> object:
    """A path in the configuration is meant from the configuration's folder, and so is what may be
    on the Hub, if it is there; an address is none."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(value, str) and value and ":" not in value:
        path = os.path.normpath(root / Path(value).expanduser())
        here = name.endswith(OR_ON_HUB) and os.path.exists(path)
        if here or name.endswith((*FILES, "_SHARDS")):
            return path
    return value


def check_ranges(settings: object) -> None:
    """Refuse settings, or a script's own flags, of another kind or outside of `RANGES`, and
    addresses where a file is meant."""
    for name, value in vars(settings).items():
        given = value if isinstance(value, list) else [value]
        for each in given if name.upper().endswith(NO_ADDRESS) else ():
            if "://" in str(each):
                hub = ", or user/repo of the Hub" * name.upper().endswith(OF_HUB)
                raise UserError(f"{name} is {each}, an address: give a file or folder here{hub}")
        text = isinstance(value, str) or (not value and name in TEXTS_OR_NONE)
        if name in (*TEXTS, *TEXTS_OR_NONE) and not text:
            raise UserError(f'{name} is {value!r}: it must be a text, in quotes ("...")')
        least, most = RANGES.get(name.upper(), (None, None))
        if least is None or (value is None and name.islower()):  # a flag that isn't given
            continue
        if not isinstance(value, int | type(least)):
            raise UserError(f"{name} is {value!r}: it must be {KINDS[type(least)]}")
        if not least <= value <= most:  # so put, NaN is refused too
            bound = f"at least {least}" if most == ANY >= value else f"from {least} to {most}"
            raise UserError(f"{name} is {value}: it must be {bound}")
