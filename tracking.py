"""Weights & Biases: curves, captions and the best checkpoint of a run, offline where it must be."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoint import link_for_others
from encoder import open_image
from utils import first_line, program

OFFLINE = ("offline", "dryrun")  # two spellings of the library's for one mode
INIT_TIMEOUT = 15  # seconds to reach the server before a run is tracked offline
FINISH_TIMEOUT = 60  # seconds for what is still to be sent at the end
THUMBNAIL = 224  # pixels along the longer side of a photo in the table of captions


def login() -> str:
    return shlex.join([program("wandb"), "login"])


class Tracker:
    """Tracks one run: on the server where there is a login and a network, in files where not.

    Tracking never stops training: a failure is said once, and nothing is tracked from there on.
    """

    def __init__(
        self,
        folder: Path,
        *,
        project: str,
        run_id: str = "",
        report: Callable[[str], None] = print,
        **options: Any,
    ):
        """Begin a run, or go on with `run_id`; its files stand in `folder`/wandb.

        Without a `project` nothing is tracked. `report` receives lines for the user; `options`
        are the library's: entity, name, config.
        """
        self.run_id = run_id  # for a resumed run to give again; empty without tracking
        self._report = report
        self._run: Any = None
        self._photos: dict[str, Any] = {}
        if not project:
            return
        if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
            report("tracking: off (WANDB_DISABLED)")  # as Hugging Face's trainer has it
            return
        with self._careful():
            folder.mkdir(parents=True, exist_ok=True)
            options |= {"project": project, "id": run_id or None, "resume": "allow", "dir": folder}
            self._run = self._begin(options)
            mode = self._run.settings.mode
            if mode == "disabled":  # by the user, in WANDB_MODE
                self._run = None
                report("tracking: off (WANDB_MODE=disabled)")
                return
            self.run_id = self._run.id
            if mode in OFFLINE:
                report(f"tracking: Weights & Biases, offline (`{login()}` to see runs online)")
            else:
                report(
                    "tracking: Weights & Biases is sent the settings, figures, best checkpoints "
                    "and small pictures of a few validation photos with their captions, see "
                    f"{self._run.url}; to keep them here: WANDB_MODE=offline"
                )

    def _begin(self, options: dict[str, Any]) -> Any:
        import wandb  # takes seconds, and a run without tracking shouldn't pay for it

        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            finish_timeout_raises=True,
        )
        known = "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
        try:
            return wandb.init(**options, mode=None if known else "offline", settings=settings)
        except (wandb.Error, OSError) as error:
            reason = first_line(error)
            wandb.teardown()  # or the run that didn't begin keeps its id, which a resumed one has
            if options["id"] and "created and deleted" in reason:  # an id that is never taken again
                self._report(f"tracking: in a new run, as {options['id']} was deleted there")
                return self._begin(options | {"id": None})
            self._report(
                f"tracking: Weights & Biases can't be reached ({reason}); tracking offline"
            )
            return wandb.init(**options, mode="offline", settings=settings)

    @property
    def sync_command(self) -> str:
        """The command that sends what is in the run's files, of this and earlier sessions."""
        files = Path(self._run.dir).parent
        session = re.sub(r"run-[\d_]+-", "run-*-", files.name)
        return f"{shlex.join([program('wandb'), 'sync', str(files.parent)])}/{session}"

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Show values at an update of the training; steps must not fall."""
        if self._run is None:
            return
        with self._careful():
            # The step is ours, not the library's count of calls: resumed, it goes on.
            self._run.log(dict(values), step=step)

    def log_captions(
        self, rows: Iterable[tuple[int, str, str]], image_dir: Path, step: int
    ) -> None:
        """Show a table of rows (epoch, photo, caption), those of all epochs, with the photos."""
        if self._run is None:
            return
        with self._careful():
            import wandb

            table = wandb.Table(columns=["epoch", "photo", "name", "caption"])
            for epoch, name, caption in rows:
                if name not in self._photos:
                    image = open_image(image_dir / name, THUMBNAIL)
                    image.thumbnail((THUMBNAIL, THUMBNAIL))
                    self._photos[name] = wandb.Image(image, file_type="jpg")
                table.add_data(epoch, self._photos[name], name, caption)
            self._run.log({"val/captions": table}, step=step)

    def log_checkpoint(self, path: Path, scores: Mapping[str, float]) -> None:
        """Keep a checkpoint as the run's artifact of type "model", under the alias "best"."""
        if self._run is None:
            return
        with self._careful():
            import wandb

            artifact = wandb.Artifact(f"model-{self.run_id}", "model", metadata=dict(scores))
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".artifact-") as folder:
                told = Path(folder, path.name)
                link_for_others(path, told)
                artifact.add_file(str(told))  # of which the library makes a copy of its own
            self._run.log_artifact(artifact, aliases=["best"])

    def close(self) -> None:
        """End the run; waits at most `FINISH_TIMEOUT` seconds for what is still to be sent."""
        if self._run is None:
            return
        with self._careful():
            self._run.finish()
            if self._run.settings.mode in OFFLINE:
                self._report(f"tracking: to see this run online: {login()} && {self.sync_command}")
            self._run = None

    @contextlib.contextmanager
    def _careful(self) -> Iterator[None]:
        """The border that no failure of the tracker's crosses."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - its errors share no base, and none may stop us
            # Of a setting in the environment the second line has the name, the third what is wrong.
            lines = (str(error).strip() or repr(error)).splitlines()[:3]
            reason = first_line(RuntimeError(" ".join(map(str.strip, lines))))
            text = f"tracking: stopped ({reason}); training goes on"
            if self._run is not None:
                text += f"; what was tracked can be sent later: {self.sync_command}"
            self._run = None
            self._report(text)
            # Now, or at exit it would fail once more, with a traceback.
            import wandb

            with contextlib.suppress(Exception):
                wandb.teardown()
