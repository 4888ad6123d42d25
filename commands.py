"""The command line of each script, read before PyTorch is loaded, which takes seconds."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from options import SPLITS, TASKS, add_option_flags
from settings import BOUNDS, TEXTS, TEXTS_OR_NONE, Parser, constants, load_settings
from utils import UserError, first_line, guard_output, leave, pip, require_extra, say_error

PREPARED = (
    "DATASET DATA_DIR IMAGE_DIR CAPTIONS_FILE QUESTIONS_FILE TASKS SPLIT KARPATHY_FILE "
    "TRAIN_SPLIT_RATIO MAX_BAD_IMAGES VOCAB_SIZE MAX_CAPTION_LENGTH VAL_SHARDS"
).split()
SCORED = (
    "DATA_DIR IMAGE_DIR CAPTIONS_FILE QUESTIONS_FILE FEATURES_DIR FEATURE_BATCH_SIZE "
    "MAX_BAD_IMAGES DEVICE PRECISION"
).split()
NUMBERS = [name for names in BOUNDS.values() for name in names.split() if name.isupper()]
KINDS = ("txt", "jsonl", "csv")
PARTS = ("losses", "train", "generate", "features")
CRITICAL = "scst_epochs scst_beam_size scst_learning_rate rerank"
SEARCH = f"beam_size length_penalty no_repeat_ngram {CRITICAL}"
EXISTING = ("skip", "overwrite", "append", "error")


def resumes(settings: Any) -> bool:
    return os.path.isfile(os.path.expanduser(settings.RESUME_CHECKPOINT_PATH or ""))


# Flags of any script that change nothing, unless the rest of what is set is so.
WITHOUT_EFFECT = (
    ("temperature top_k top_p seed", "without --sample", lambda s: s.sample),
    ("groups diversity", "with --sample", lambda s: not s.sample),
    ("length_penalty rerank", "with --beam_size 1", lambda s: s.beam_size != 1),
    ("diversity", "without --groups", lambda s: (s.groups or 1) > 1),
    ("existing", "without --write", lambda s: s.write),
    ("prefix suffix batch_size", "with --attention", lambda s: not s.attention),
    ("revision", "on a file", lambda s: not os.path.isfile(s.checkpoint)),
    ("encoder", "without --with-encoder", lambda s: s.format != "onnx" or s.with_encoder),
    ("rerank", "on questions", lambda s: not (s.question or s.questions_file)),
    ("rerank", "on questions", lambda s: s.task == "captions"),
    ("question_weight", "without both tasks", lambda s: all(task in s.TASKS for task in TASKS)),
    ("questions_file", "without questions", lambda s: "questions" in getattr(s, "task", s.TASKS)),
    ("captions_file", "without captions", lambda s: "captions" in getattr(s, "task", s.TASKS)),
    (SEARCH, "without captions", lambda s: "captions" in s.TASKS),
    (CRITICAL, "with --train_shards", lambda s: not s.TRAIN_SHARDS),
    ("preset", "with --demo", lambda s: not s.demo),
    ("image_dir captions_file archive", "with --val_shards", lambda s: not s.VAL_SHARDS),
    ("karpathy_file", "with --split ratio", lambda s: s.SPLIT != "ratio"),
    ("train_split_ratio", "without --split ratio", lambda s: s.SPLIT == "ratio"),
    ("keep_shard_features shuffle_buffer", "without --train_shards", lambda s: s.TRAIN_SHARDS),
    ("scst_beam_size scst_learning_rate", "with --scst_epochs 0", lambda s: s.SCST_EPOCHS),
    ("wandb_entity wandb_run_name", "without --wandb_project", lambda s: s.WANDB_PROJECT),
    ("start_checkpoint", "on resuming", lambda s: not resumes(s)),
    ("vocab_size", "with --vocab_file", lambda s: not s.VOCAB_FILE),
    (
        "vocab_size vocab_file merges_file",
        "where a checkpoint brings its tokenizer",
        lambda s: not (s.START_CHECKPOINT or resumes(s)),
    ),
)


def begin(read: Callable[[], Any]) -> None:
    """Before a script's imports: read its command line, and answer --help or a mistake at once.

    Ctrl-C while they last ends the program without a word of theirs, but does nothing in a
    notebook's process: PyTorch that is half imported can't be imported again, which kills it, with
    all that its user has made.
    """
    # Threads that wait for each other sleep instead of spinning: beside another program training is
    # half as fast again, captioning several times as fast, and alone both are as fast as before
    # (docs/performance.md). It is read while PyTorch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    home = os.path.expanduser("~")  # of a user without a name, as in containers, it is ~ or /
    if not os.access(home, os.W_OK) and not os.path.exists(f"{home}/.cache"):
        os.environ["HOME"] = os.getcwd()  # or matplotlib fails, and tracking stops halfway
    notebook = "IPython" in sys.modules  # in whose own process matplotlib is its user's
    if not notebook:  # which names its backend to all programs, if they have it or not
        os.environ["MPLBACKEND"] = "agg"
    # A photo of more pixels is decoded small, or refused by name.
    warnings.filterwarnings("ignore", "Image size .* could be decompression bomb")
    guard_output()
    if sys.version_info < (3, 10):  # noqa: UP036 - macOS brings 3.9
        said = f"this is Python {sys.version.split()[0]}, too old"
        leave(say_error(f"{said}: run bash 01_setup.sh, and then .venv/bin/python in its place"))
    sys.excepthook = say_versions
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: None if notebook else os._exit(130))
    try:
        settings = read() if os.environ.get("LOCAL_RANK", "0") == "0" else _read_silently(read)
        say_without_effect(settings, sys.argv[1:])
    except (UserError, SystemExit) as end:
        leave(say_error(end) if isinstance(end, UserError) else end.code)


def say_versions(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """What isn't there to be imported, where libraries are missing or of other versions than the
    pinned ones; for `sys.excepthook`, as most imports come after `begin`."""
    missing, wrong = [], []
    for line in Path(__file__).with_name("requirements.txt").read_text("utf-8").splitlines():
        pin, _, condition = line.partition("; python_version ")
        name, _, pinned = pin.partition("==")
        if not pinned or (condition and (sys.version_info >= (3, 14)) == ("<" in condition)):
            continue
        try:
            here = metadata.version(name).partition("+")[0]
            wrong += [f"{name} is {here}, not {pinned}"] * (here != pinned)
        except metadata.PackageNotFoundError:
            missing.append(name)
    wrong += [f"missing: {', '.join(missing)}"] * bool(missing)
    if not issubclass(kind, ImportError) or not wrong:
        sys.__excepthook__(kind, error, trace)
        return
    remedy = f"run {pip('requirements.txt')}, or use the Python that 01_setup.sh made"
    say_error(f"{first_line(error)} ({'; '.join(wrong)}): {remedy}")


def _read_silently(read: Callable[[], Any]) -> Any:
    """What all but torchrun's first process on a machine do: that one says what is wrong."""
    try:
        with open(os.devnull, "w", errors="replace") as nowhere:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                return read()
    except (UserError, SystemExit) as end:
        if code := getattr(end, "code", 1):  # a UserError has none
            time.sleep(10)  # torchrun ends all once one has ended: the first may not have spoken
        sys.exit(code)


def say_without_effect(settings: Any, argv: Sequence[str]) -> None:
    """Say which of the flags given are passed over."""
    if os.environ.get("RANK", "0") != "0":  # torchrun's first process says it
        return
    given = {word.partition("=")[0].removeprefix("--") for word in argv if word[:2] == "--"}
    for flags, how, counts in WITHOUT_EFFECT:
        with contextlib.suppress(AttributeError):  # it is about another script
            if not counts(settings) and (idle := [f for f in flags.split() if f in given]):
                names = ", ".join(f"--{flag}" for flag in idle)
                print(f"note: {names} changes nothing {how}", file=sys.stderr)


def parser_of(script: str) -> Parser:
    """A parser without flags yet; the script's docstring begins and ends what --help says."""
    source = Path(__file__).parent.joinpath(script).read_text(encoding="utf-8")
    return Parser(source.split('"""')[1])


def read_config() -> ModuleType:
    """`config.py`, as people have edited it, with every setting; what these are is checked with the
    flags. Captioning needs none of it."""
    sys.modules.pop("config", None)  # people edit it while a notebook's process lasts
    try:
        import config
    except Exception as error:  # noqa: BLE001 - people may write anything there
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).name == "config.py"]
        line = getattr(error, "lineno", None) or (lines or ["?"])[-1]
        said = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"config.py, line {line}, can't be run ({said})") from None
    if missing := sorted({*TEXTS, *TEXTS_OR_NONE, *NUMBERS, "presets"} - vars(config).keys()):
        compare = "compare it with the project's own, `git show HEAD:config.py`"
        raise UserError(f"config.py lacks {', '.join(missing)}: {compare}")
    presets = config.presets
    if not isinstance(presets, dict) or not all(isinstance(v, dict) for v in presets.values()):
        raise UserError('config.py: presets must be like {"small": {"BATCH_SIZE": 16}}')
    for preset, values in presets.items():
        if unknown := sorted(values.keys() - constants(config).keys()):
            raise UserError(f"config.py: preset {preset!r} sets what is no setting: {unknown[0]}")
    return config


def train(argv: Sequence[str] | None = None) -> SimpleNamespace:
    config = read_config()
    parser = parser_of("train.py")
    parser.add_argument("--demo", action="store_true", help="train on the built-in demo")
    text = "several settings at once, as config.py lists them"
    parser.add_argument("--preset", choices=config.presets, help=text)
    add_sources(parser)

    def preset(flags: argparse.Namespace) -> dict[str, Any]:
        if not flags.demo:
            return config.presets.get(flags.preset, {})
        from demo.settings import DEMO  # what only the demo needs is loaded only for it

        return dict.fromkeys(TEXTS_OR_NONE) | DEMO  # config.py may name data of one's own

    settings = load_settings(config, argv, parser, preset=preset)
    if settings.SPLIT == "test":
        raise UserError("SPLIT is 'test', which leaves no photo to train on: use karpathy or ratio")
    if settings.demo:
        usual = preset(settings)
        for name in ("DATASET", "DATA_DIR", "IMAGE_DIR", "CAPTIONS_FILE", "TRAIN_SHARDS"):
            if getattr(settings, name) != usual[name]:
                raise UserError(f"--demo draws a data set of its own: leave out --{name.lower()}")
    prefix = settings.CHECKPOINT_PREFIX
    if os.path.basename(prefix) != prefix or len(os.fsencode(prefix)) > 200:
        raise UserError(
            f"CHECKPOINT_PREFIX is {prefix!r}: it begins the files' names, of at most 255 bytes; "
            "their folder is --output_dir"
        )
    settings.arguments = list(sys.argv[1:] if argv is None else argv)
    return settings


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where things come from, and are not settings."""
    add, files = parser.add_argument, {"nargs": "+", "default": [], "metavar": "PATH"}
    text = "zip of the data set that you have already (or its parts, in order): no download"
    add("--archive", **files, help=text)
    text = "VQAv2's question files (of train and val): questions.json is made from them"
    add("--vqa_questions", **files, help=text)
    add("--vqa_annotations", **files, help="VQAv2's annotation files, in the same order")
    text = "allow photos that are links to files outside the photo folder"
    add("--follow_links", action="store_true", help=text)


def prepare_dataset(argv: Sequence[str] | None = None) -> SimpleNamespace:
    config = read_config()
    parser = parser_of("prepare_dataset.py")
    add_sources(parser)
    text = "look at every photo and caption; code 1 if training would refuse them"
    parser.add_argument("--check", action="store_true", help=text)
    return load_settings(config, argv, parser, only=PREPARED)


def evaluate(argv: Sequence[str] | None = None) -> SimpleNamespace:
    config = read_config()
    parser = parser_of("evaluate.py")
    add = parser.add_argument
    add_checkpoint_flags(parser)
    add("--task", choices=TASKS, default="captions", help="what to score [%(default)s]")
    add("--split", choices=SPLITS, default="val", help="photos to score [%(default)s]")
    add("--batch_size", type=int, default=64, help="photos at once [%(default)s]")
    add("--report", help="the HTML report [beside the checkpoint, named by data and split]")
    add("--save_captions", help='also write {"photo.jpg": "caption", ...} to this file')
    add("--clip", help="a CLIP model, Hub name or folder, to compute CLIPScore with [none]")
    add_option_flags(parser)
    return load_settings(config, argv, parser, only=SCORED)


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which checkpoint it is, and where its encoder."""
    add = parser.add_argument
    add("--checkpoint", required=True, help=".safetensors, .pt, or user/repo on the Hub")
    add("--revision", help="branch, tag or commit on the Hub [newest]")
    add("--encoder", help="the encoder, if it moved since training [as the checkpoint says]")


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="auto", help="auto, cuda, mps or cpu [%(default)s]")
    add("--precision", default="auto", help="auto, bf16 or fp32 [%(default)s]")


def inference(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of("inference.py")
    add = parser.add_argument
    add("PHOTO", nargs="*", help="photos, and folders of photos")
    add("--image_path", help="a photo or a folder of photos, as PHOTO")
    add_checkpoint_flags(parser)
    add_device_flags(parser)
    ask = parser.add_mutually_exclusive_group().add_argument
    ask("--question", help="answer this question about each photo instead of captioning it")
    ask("--questions_file", help="answer many: a questions.json, with or without answers")
    add("--attention", help="draw where the decoder looked, word by word, into this .png or .jpg")
    add("--n_best", type=int, default=1, help="texts about each photo, best first [%(default)s]")
    add("--batch_size", type=int, default=64, help="photos at once [%(default)s]")
    add("--no-recursive", dest="recursive", action="store_false", help="leave out sub-folders")
    add("--json", action="store_true", help="last line: captions by name, or questions and answers")
    files = parser.add_argument_group("files")
    add = files.add_argument
    add("--write", choices=KINDS, help="txt beside each photo, metadata.jsonl, or captions.csv")
    add("--output", help="the file, or for txt the folder [beside the photos]")
    add("--existing", choices=EXISTING, default="skip", help="what is there already [%(default)s]")
    add("--prefix", default="", help="before each caption")
    add("--suffix", default="", help="after each caption")
    add_option_flags(parser)
    args = parser.parse_args(argv)
    args.paths = [*args.PHOTO, *([args.image_path] if args.image_path else [])]
    if not args.paths:
        parser.error("which photos? give files or folders")
    if len(f"{args.prefix}{args.suffix}|".splitlines()) > 1:
        parser.error("--prefix and --suffix stand on the caption's line: leave out their line ends")
    if args.output and not args.write:
        parser.error("--output needs --write txt, jsonl or csv")
    return args


def app(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of("tools/app.py")
    add = parser.add_argument
    add_checkpoint_flags(parser)
    add_device_flags(parser)
    add("--host", default="127.0.0.1", help="the address to listen on [%(default)s]")
    add("--port", type=int, default=8000, help="0: any free one [%(default)s]")
    add("--max_megabytes", type=float, default=20.0, help="largest photo [%(default)s]")
    args = parser.parse_args(argv)
    for module in ("starlette", "uvicorn"):
        require_extra(module, "requirements-app.txt", "the page")
    return args


def export(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of("tools/export.py")
    add_checkpoint_flags(parser)
    add = parser.add_argument
    add("--format", choices=("onnx", "transformers"), default="onnx")
    text = "for onnx: the frozen encoder too, as a second file"
    add("--with-encoder", action="store_true", default=None, help=text)
    text = "for transformers: the encoder's name in place of its weights"
    add("--without-encoder", dest="with_encoder", action="store_false", help=text)
    add("--out", help="what to write [captioner.onnx, or the folder captioner]")
    args = parser.parse_args(argv)
    args.out = args.out or ("captioner.onnx" if args.format == "onnx" else "captioner")
    return args


def benchmark(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of("tools/benchmark.py")
    add = parser.add_argument
    add("--only", choices=PARTS, help="measure one part [all]")
    add("--repeats", type=int, default=5, help="of each measurement [%(default)s]")
    add_device_flags(parser)
    add("--compile", action="store_true", help="torch.compile our decoder")
    return parser.parse_args(argv)


def pretrain_encoder(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of("demo/pretrain_encoder.py")
    folder = str(Path(__file__).parent / "demo" / "encoder")
    parser.add_argument("--out", default=folder, help="the folder [demo/encoder]")
    args = parser.parse_args(argv)
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        raise UserError(f"--out {args.out} is a file: name a folder")
    return args
