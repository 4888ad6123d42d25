"""The Hugging Face Hub: fetch a checkpoint; push checkpoints beside training, with a card and all
by which plain `transformers` loads them."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import re
import shlex
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import (
    CommitOperationAdd,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    get_session,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,  # of the client's own HTTP library, whose name depends on the client's version
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

import utils
from checkpoint import Checkpoint, link_for_others
from encoder import hub_problem
from tokenizer import ANSWER, ANSWER_ID, ASKING, END_ID, FULL_STOPS, PAD_ID, START_ID
from utils import UserError, first_line, program, refused, shown, write_error

WEIGHTS = "model.safetensors"


def login() -> str:
    # A token of the environment counts before that of any login.
    first = "unset HF_TOKEN and " * bool(os.environ.get("HF_TOKEN"))
    return f"{first}run {shlex.join([program('hf'), 'auth', 'login'])}"


# --- Download -------------------------------------------------------------------------------

DOWNLOAD_PROBLEMS = (  # the first that fits counts: some of these are subclasses of later ones
    (HFValidationError, "it is neither a file here nor the name of a Hub repository (user/name)"),
    (GatedRepoError, "its owner gives access on request: ask on its page, then {login}"),
    (RepositoryNotFoundError, "no such Hub repository: check the name; if it's private, {login}"),
    (RevisionNotFoundError, "it has no such revision: check the branch, tag or commit"),
    (RemoteEntryNotFoundError, f"it holds no {WEIGHTS}, so this project's train.py didn't make it"),
    (
        LocalEntryNotFoundError,
        "the Hub can't be reached, and no copy was downloaded before: check the network "
        "(and its proxy, HF_ENDPOINT, HF_HUB_OFFLINE), or give a local file",
    ),
)


def locate_checkpoint(checkpoint: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The file of a checkpoint that is here, or that of the Hub's `user/repo`, fetched into its
    cache; without a network, what is there."""
    name = os.path.expanduser(checkpoint)  # in --checkpoint=~/... no shell does
    here = os.path.exists(name) or Path(name).suffix in (".safetensors", ".pt")
    if here or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return Path(name)  # which need not be there
    try:
        validate_repo_id(name)
        offline = bool(hub_problem())
        return Path(hf_hub_download(name, WEIGHTS, revision=revision, local_files_only=offline))
    except (HTTPError, LocalEntryNotFoundError, ImportError, ValueError) as error:
        # The last two: a name that is none, or a proxy in the environment that the client lacks.
        known = (text for kind, text in DOWNLOAD_PROBLEMS if isinstance(error, kind))
        said = next(known, "").format(login=login()) or _reason(error)
        of = f" (revision {revision})" if revision else ""
        raise UserError(f"checkpoint {name}{of}: {said}") from error
    except OSError as error:
        raise write_error(error, Path(constants.HF_HUB_CACHE)) from error


# --- Upload ---------------------------------------------------------------------------------

LOGIN_TIMEOUT = 5  # seconds that a training's start waits to be told whose login it has
STALL_TIMEOUT = 60.0  # seconds that the Hub may stay silent in one request
QUIET = 5.0  # seconds that a training's end waits for the last push before it says so
REFUSALS = {
    401: "the Hub doesn't accept the login (401): {login}",
    403: "the login may not do this (403): {login} with a token that may, "
    "or choose a repository of yours (HF_REPO_ID)",
    404: "no such repository (404)",
}


@dataclass(frozen=True)
class _Upload:
    checkpoint: Path
    weights: Path  # our own link to it, or what of it may leave this machine
    files: dict[str, bytes]  # the others, by name
    message: str


class HubPusher:
    """Pushes checkpoints to one Hub repository on a background thread; training never waits.

    A newer push replaces one that is still waiting. One that failed waits for the next `push`,
    `retry` or `close`, with a single warning until something arrives again. Without a login, with
    one that can't write to the repository, or with an empty `repo_id`, nothing is pushed. `report`
    receives lines for the user, from either thread.
    """

    def __init__(self, repo_id: str | None, *, report: Callable[[str], None] = print):
        self.repo_id = repo_id
        self.active = False
        self._report = report
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._uploading: _Upload | None = None
        self._waiting: _Upload | None = None
        self._newest: Path | None = None
        self._ready = False  # the repository is there, and ours to write to
        self._problem: str | None = None  # of the last push; "" once it has arrived
        if not repo_id:
            return
        wrong = f"HF_REPO_ID is {repo_id!r}, which can't name a Hub repository: write user/name"
        with refused(f"{wrong}, or leave it empty to push nowhere"):
            validate_repo_id(repo_id)
        if get_token() is None:
            report(f"Hub: no login, checkpoints stay on this machine; to share them, {login()}")
            return
        with contextlib.suppress(Exception):  # the first push asks again
            get_session().timeout = LOGIN_TIMEOUT
            if why := _forbidden(repo_id, HfApi(token=True).whoami()):
                report(f"Hub: nothing is pushed: {why}")
                return
        self.active = True
        # The client's bars and retry notices would break into the training's own bar.
        disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

    def push(self, checkpoint: Path, files: Mapping[str, str], message: str) -> None:
        """Queue one commit of the weights and of other files' texts by name; returns at once.

        `checkpoint` may be deleted, or replaced by renaming, as soon as this has returned.
        """
        if not self.active:
            return
        self._newest = Path(checkpoint)
        weights = checkpoint.with_name(f".{checkpoint.name}.hub-{uuid.uuid4().hex}.tmp")
        try:
            link_for_others(checkpoint, weights)  # which outlives its name
        except (OSError, UserError) as error:
            weights.unlink(missing_ok=True)
            self._failed(error)
            return
        safe = {name: redact(text).encode() for name, text in files.items()}
        upload = _Upload(self._newest, weights, safe, redact(message))
        with self._lock:
            replaced, self._waiting = self._waiting, upload
        if replaced:
            replaced.weights.unlink(missing_ok=True)
        self.retry()

    def retry(self) -> None:
        """Try again what failed, if anything did; returns at once."""
        with self._lock:
            if self._waiting is None or self._thread is not None:
                return
            self._uploading, self._waiting = self._waiting, None
            # A daemon: a Hub that hangs must not keep the program from ending.
            self._thread = threading.Thread(
                target=self._upload, args=(self._uploading,), name="hub", daemon=True
            )
            self._thread.start()

    def close(self, timeout: float = 120.0) -> bool:
        """Wait up to `timeout` seconds for the last push, trying once more if it had failed.

        Returns whether the last push arrived (True if there was none); if not, it is reported
        with the command that does it by hand.
        """
        deadline = time.monotonic() + timeout
        self._wait(deadline)
        self.retry()
        self._wait(deadline)
        with self._lock:
            left = [upload for upload in (self._waiting, self._uploading) if upload]
            self._waiting = None
            was_active, self.active = self.active, False
        to_send = self._kept(left[0]) if left else self._newest
        for upload in left:
            upload.weights.unlink(missing_ok=True)
        arrived = not left and not self._problem
        if was_active and not arrived:
            why = self._problem or f"no end after {timeout:.0f} s"
            send = shlex.join([program("hf"), "upload", self.repo_id, str(to_send), WEIGHTS])
            self._report(f"Hub: the last checkpoint has not arrived ({why}); to send it: {send}")
        return arrived

    @staticmethod
    def _kept(upload: _Upload) -> Path:
        """The file of an upload that didn't arrive: the checkpoint, unless it is gone, or was not
        what was to be sent; then ours, which is given a name of its own."""
        path = upload.checkpoint
        with contextlib.suppress(OSError):  # it may have arrived this moment
            if not (path.exists() and path.samefile(upload.weights)):
                path = path.with_name(f"to_send_{path.name}")
                os.replace(upload.weights, path)
        return path

    def _wait(self, deadline: float) -> None:
        quiet = QUIET
        while (thread := self._thread) and (left := deadline - time.monotonic()) > 0:
            thread.join(min(left, quiet))
            if thread.is_alive() and left > quiet:
                self._tell(f"Hub: waiting for the last push to arrive, {left:.0f} s at most")
                quiet = left

    def _upload(self, upload: _Upload) -> None:
        arrived = False
        try:
            url = self._commit(upload)
            if self._problem != "":
                self._tell(f"Hub: pushed, see {url}")
            self._problem, arrived = "", True
        except Exception as error:  # noqa: BLE001 - what the client raises has no common base
            self._failed(error)
        with self._lock:
            self._thread = self._uploading = None
            if self.active and not arrived and self._waiting is None:
                self._waiting = upload
                return
        upload.weights.unlink(missing_ok=True)
        self.retry()  # or what came meanwhile would wait for the next push

    def _commit(self, upload: _Upload) -> str:
        """Make one commit; returns its address."""
        # The client has no limit of its own for uploads: a silent Hub would hold us for ever.
        get_session().timeout = STALL_TIMEOUT
        api = HfApi(token=True)  # reads the login each time: it may have been renewed
        if not self._ready:
            if why := _forbidden(self.repo_id, api.whoami()):
                raise UserError(why)
            api.create_repo(self.repo_id, exist_ok=True)
            self._ready = True
        files = upload.files | {WEIGHTS: upload.weights}
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        commit = api.create_commit(self.repo_id, operations, commit_message=upload.message)
        return commit.commit_url

    def _failed(self, error: Exception) -> None:
        before, self._problem = self._problem, _reason(error)
        if not before:
            self._tell(f"Hub: checkpoint not pushed: {self._problem}; the next push tries again")

    def _tell(self, line: str) -> None:
        # Once closed, the program may be ending, and its streams with it.
        if self.active:
            self._report(line)


def _forbidden(repo_id: str, account: Mapping[str, Any]) -> str | None:
    """Why this account can't write to the repository, with the remedy; None if it may."""
    token = account.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        return f"the login's token can only read: {login()} with one that can write"
    name = account["name"]
    owner = repo_id.partition("/")[0] if "/" in repo_id else name
    # A contributor writes to what is their own, which only the Hub knows.
    writable = {org["name"] for org in account.get("orgs", ()) if org.get("roleInOrg") != "read"}
    if owner.casefold() in {place.casefold() for place in {name, *writable}}:
        return None
    return (
        f"{name}, who is logged in, can't write to {repo_id}: set HF_REPO_ID (--hf_repo_id) "
        f"to a repository of yours, such as {name}/{repo_id.split('/')[-1]}, or to nothing"
    )


def redact(text: str) -> str:
    """Hide the login's token, wherever it is kept, and all that `utils.redact` hides."""
    token = get_token()
    return utils.redact(text.replace(token, "hf_***") if token else text)


def _reason(error: Exception) -> str:
    """What went wrong with a request, in a user's words and without secrets."""
    if isinstance(error, UserError):
        return redact(str(error))
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return _reason(error.__cause__)  # the client wraps what happened to the large file
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status:
        return REFUSALS.get(status, f"the Hub answered {status}").format(login=login())
    if isinstance(error, HTTPError):
        return f"the Hub can't be reached ({type(error).__name__})"
    return redact(f"{type(error).__name__}: {first_line(error)}")


# --- What plain `transformers` loads ---------------------------------------------------------

CODE = "modeling_captioner"
TRUST = "AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True)"
PROCESSOR = "VisionCaptionerProcessor"  # of which a pipeline that is saved keeps no file
AUTO = {
    "AutoConfig": "VisionCaptionerConfig",
    "AutoModelForImageTextToText": "VisionCaptioner",
    "AutoModel": "VisionCaptioner",
    "AutoProcessor": PROCESSOR,
}


def refusal(tower: dict[str, Any]) -> str:
    """Why a captioner with this encoder can't be used by `transformers` alone, if it can't."""
    takes = inspect.signature(getattr(transformers, tower["class"]).forward).parameters.values()
    needed = {each.name for each in takes if each.default is each.empty}
    if more := sorted(needed - {"self", "pixel_values", "args", "kwargs"}):
        return (
            f"the encoder takes more than pixels ({', '.join(more)}), which transformers alone "
            "would not give it: use the checkpoint itself, with this project"
        )
    return ""


def repository_files(checkpoint: Checkpoint, tower: dict[str, Any]) -> dict[str, str]:
    """All that stands beside `model.safetensors`, {file: text}, unless there is a `refusal`;
    `tower` is `FrozenEncoder.for_others()`."""
    if why := refusal(tower):
        raise UserError(why)
    size, options = checkpoint.model.config, checkpoint.generation
    described = checkpoint.for_others().description()
    described["encoder"] |= {"name": tower.get("name")}
    del described["tokenizer"]  # it has files of its own
    special = {"pad_token_id": PAD_ID, "bos_token_id": START_ID, "eos_token_id": END_ID}
    config = {
        "model_type": "vision_captioner",
        "architectures": ["VisionCaptioner"],
        "auto_map": {auto: f"{CODE}.{kind}" for auto, kind in AUTO.items()},
        "tower": {key: tower[key] for key in tower if key != "processor"},
        "layers": checkpoint.encoder["layers"],
        "feature_width": checkpoint.model.feature_width,
        "vocab_size": size.vocab_size,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "ff_dim": size.ff_dim,
        "max_position_embeddings": size.max_length,
        "tie_word_embeddings": False,  # the output layer is the embedding itself
        "dtype": "float32",
        "transformers_version": transformers.__version__,
        "trained": described,
        "answer_token_id": ANSWER_ID,  # closes a question
        **special,
    }
    generation = {
        **special,
        "suppress_tokens": [PAD_ID, START_ID, ANSWER_ID],
        "num_beams": options.beam_size,
        "length_penalty": options.length_penalty,
        "no_repeat_ngram_size": options.no_repeat_ngram,
    }
    # Classes of the library itself, which would otherwise take what they know of this for their
    # own configuration and give random weights, stumble over these.
    config |= dict.fromkeys(("hidden_act", "activation_function"), TRUST)
    config |= {part: {"model_type": TRUST} for part in ("encoder", "decoder")}
    if held := checkpoint.reranker:
        config |= {"reranker": held.sizes, "rerank": options.rerank}
    ours = {"processor_class": PROCESSOR, "auto_map": {"AutoProcessor": f"{CODE}.{PROCESSOR}"}}
    files = checkpoint.tokenizer.to_files()
    of_tokenizer = json.loads(files["tokenizer_config.json"])
    of_tokenizer |= {"padding_side": "left", "additional_special_tokens": [ANSWER]}
    of_tokenizer["model_max_length"] = size.max_length  # half of which a question may take
    if end := checkpoint.tokenizer.question_end:  # what it takes the place of, one after the other
        of_tokenizer["question_end"] = [f" .{FULL_STOPS}", ASKING, end]
    texts = {
        "config.json": config,
        "generation_config.json": generation,
        "processor_config.json": ours,
        "tokenizer_config.json": of_tokenizer,
    }
    files |= {name: json.dumps(content, indent=2) + "\n" for name, content in texts.items()}
    for name in (CODE, "pictures", "decoder", "rerank"):  # which import nothing else of ours
        files[f"{name}.py"] = Path(__file__).with_name(f"{name}.py").read_text("utf-8")
    return files | {"preprocessor_config.json": tower["processor"]}


# --- Model card -----------------------------------------------------------------------------


def model_card(
    repo_id: str,
    checkpoint: Checkpoint,
    dataset: str,
    *,
    split: str,
    scored: str,
    scorer: str,
    command: str,
    samples: Mapping[str, str],
    question: str = "",
    language: str | None = None,
) -> str:
    """The README of a Hub repository: front matter for machines, then text for people.

    The checkpoint's scores were measured by `scorer`, on `split` of the data set `scored`; it
    learned from `dataset`; `samples` maps photos' names to the captions that the model gave them;
    `question` is one that it can answer, where it can do nothing else; `language`, that of the
    texts, where it is known.
    """
    encoder, revision = checkpoint.encoder["name"], checkpoint.encoder["revision"]
    scores, start = checkpoint.scores, checkpoint.settings["START_CHECKPOINT"]
    # Someone's folder is no address, and its path is nobody's business.
    local = os.path.isabs(encoder) or Path(encoder).exists()
    encoder_name = Path(encoder).name if local else encoder
    data = ModelCardData(
        language=language,
        license="other",
        license_name="see-license-section",
        base_model=None if local else encoder,
        pipeline_tag="visual-question-answering" if question else "image-to-text",
        tags=["pytorch"] if question else ["image-captioning", "pytorch"],
        model_name=repo_id.split("/")[-1],
        eval_results=[
            EvalResult(
                task_type="visual-question-answering" if answers else "image-to-text",
                task_name="Question answering" if answers else "Image captioning",
                dataset_type=re.sub(r"\W+", "-", scored.lower()),
                dataset_name=scored,
                dataset_split=split,
                metric_type=metric.lower(),
                metric_name=metric,
                metric_value=float(value),
                metric_args={"scorer": scorer},
            )
            for metric, value in scores.items()
            for answers in [question or "answer" in metric]
        ],
    )
    rows = "\n".join(f"| {metric} | {round(value, 4):.4g} |" for metric, value in scores.items())
    measured = f"On the {split} split of {_prose(scored)}, measured with {scorer}:\n\n"
    measured += f"| metric | value |\n|---|---|\n{rows}"
    at_revision = f" (revision `{revision}`)" if revision else ""
    asked, texts = json.dumps(question), " and ".join(checkpoint.tasks)
    quoted = {name: shown(name).replace("`", "'") for name in samples}
    said = [f"- `{quoted[name]}`: {_prose(text)}" for name, text in samples.items()]
    body = CARD.format(
        name=data.model_name,
        repo_id=repo_id,
        encoder=f"`{encoder_name}`{at_revision}",
        needs=" (here a folder of its trainer's: give yours as FOLDER below)" if local else "",
        there=', model_kwargs={"encoder": "FOLDER"}' if local else "",
        here=', encoder="FOLDER"' if local else "",
        dataset=_prose(dataset),
        began=f"(starting from `{start}`)" if start else "from scratch",
        does=texts.replace("questions", "answers questions about"),
        texts=texts,
        command=command,
        scores=measured if scores else "Not measured yet.",
        samples="\n".join(said) or "None were made.",
        text=asked,
        flags=(f" --question {shlex.quote(question)}" if question else "")
        + (" --encoder FOLDER" if local else ""),
        call=f'answer("photo.jpg", {asked})' if question else 'caption(["photo.jpg"])',
    )
    return str(ModelCard(redact(f"---\n{data.to_yaml()}\n---\n\n{body}")))


def _prose(text: str) -> str:
    """A text from outside as Markdown that shows it: no picture, link or page's tag of its own."""
    return re.sub(r"([\\`*\[\]<>!&~$])", r"\\\1", shown(text))


CARD = """\
# {name}

A Transformer decoder that {does} photos from the features of the frozen image encoder
{encoder}. It was trained {began} on the {texts} of {dataset}. `model.safetensors` holds
the decoder and its tokenizer; the encoder is not in it and comes from where it is published{needs}.

## Use

With `transformers` alone, 4.57 or newer; `text` may be a question, if it learned to answer any:

```python
from transformers import pipeline

captioner = pipeline("image-text-to-text", "{repo_id}", trust_remote_code=True{there})
print(captioner("photo.jpg", text={text}, return_full_text=False)[0]["generated_text"])
```

In a clone of the project that trained it, on the command line or from Python:

```bash
python inference.py --image_path photo.jpg --checkpoint {repo_id}{flags}
```

```python
from inference import load_captioner

print(load_captioner("{repo_id}"{here}).{call})
```

`tokenizer.json` loads with `transformers.PreTrainedTokenizerFast`, `preprocessor_config.json`
(the encoder's) with `transformers.AutoImageProcessor`.

## Scores

{scores}

## What it wrote

{samples}

## Training

```
{command}
```

## Licence

The decoder's weights were learned {began} from the photos and {texts} of {dataset}, on features of
{encoder}. No licence of their own is granted beyond what those of the photos, the {texts} and
the encoder allow: check them before you use these weights.
"""
