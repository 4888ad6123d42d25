"""What is said to people, progress, and whole-or-absent file writes."""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn, TextIO

try:
    import fcntl
    import resource
except ModuleNotFoundError:
    sys.exit("error: this does not run on Windows itself: use WSL (wsl --install)")

WRONG_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
WRONG_PLACE |= {errno.ENOENT, errno.ENAMETOOLONG}
FAILING = {errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO}  # a disk, or it is gone
HIDDEN = (".", "@eaDir")  # folders that hold no photos of anybody's: how their names begin


class UserError(Exception):
    """A mistake that the user can mend: the message says what is wrong and what to do."""


def check_output(flag: str, output: str | os.PathLike[str], *inputs: object) -> None:
    """Refuse, before there is a result, a file that can't be written, or is one of the `inputs`."""
    path = Path(os.path.realpath(os.path.expanduser(output)))
    if any(str(path) == os.path.realpath(os.path.expanduser(str(each))) for each in inputs if each):
        raise UserError(f"{flag} {output} is what is read or written already: name another")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{flag} {output} is no file that could be written: name another")
    folder = next(parent for parent in path.parents if os.path.exists(parent))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {output}: {folder} can't be written to, choose another folder")


def require_extra(module: str, requirements: str, use: str = "this") -> ModuleType:
    """Import what only some of the project's uses need."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{use} needs {error.name}: run {pip(requirements)}") from None


def interpreter() -> str:
    """What to write for the Python that runs, in a command to be copied."""
    here = os.path.abspath(shutil.which("python") or "") == sys.executable
    return "python" if here else _from_here(sys.executable)


def program(name: str) -> str:
    """What to write for a program that came with this Python, whose place may not be in PATH."""
    path = os.path.join(os.path.dirname(interpreter()), name)
    return path if os.path.isfile(path) else name


def beside(name: str) -> str:
    """What to write for a file of this project."""
    return _from_here(os.path.join(os.path.dirname(os.path.realpath(__file__)), name))


def command(script: str, *flags: object) -> str:
    """A script of this project, as a command to be copied."""
    return shlex.join([interpreter(), beside(script), *map(str, flags)])


def preparing() -> str:
    """How what stands in a data set of one's own becomes what training and evaluation read."""
    return f"{command('prepare_dataset.py')} with the flags of before"


def pip(what: str) -> str:
    """The command that installs a package, or those that a file of this project's lists."""
    words = ["-r", beside(what)] if what.endswith(".txt") else [what]
    return shlex.join([interpreter(), *"-m pip install".split(), *words])


def _from_here(path: str) -> str:
    near = os.path.relpath(path)
    return path if near.startswith("..") else near


# --- What is said ---------------------------------------------------------------------------

SURROGATES = re.compile("[\ud800-\udfff]")  # halves of characters, as of an emoji cut in two
# Control characters, halves of pairs, and what turns the direction of writing.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: object, spared: str = "") -> str:
    """A text from outside as people may see it: what would steer a terminal is escaped."""

    def escaped(found: re.Match) -> str:
        sign, within = found[0], 0 < found.start() < len(found.string) - 1
        steers = sign not in spared or (sign == "\r" and within)  # bars begin and end with one
        return sign.encode("unicode_escape").decode() if steers else sign

    return CONTROLS.sub(escaped, str(text))


def say_json(value: object) -> None:
    """A line of JSON for programs, in which is escaped as JSON has it what `shown` would escape."""
    text = json.dumps(value, ensure_ascii=False)
    print(CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def brief(text: str) -> str:
    """A text without the midst of lines that nobody could read, such as a photo in base64."""
    return re.sub(r"(?m)^(.{900}).{300,}$", lambda line: f"{line[1]} ... {line[0][-300:]}", text)


def lfs_note(path: str | os.PathLike[str]) -> str:
    """What to do about a file of which Git LFS has left a note alone; nothing of any other."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(23) == b"version https://git-lfs":
            return f" ({Path(path).name} is Git LFS's note of it: run git lfs pull in its folder)"
    return ""


def first_line(error: BaseException) -> str:
    """What an error says, without secrets: its first line, and the next after a colon."""
    text = re.sub(r":\s*\n\s*", ": ", str(error).strip() or repr(error))
    return shown(redact(text.splitlines()[0]))


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Say of what comes from elsewhere, and can be wrong in any way, `what` it is and why."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - what is cut off or made up fails in any way
        if re.search(NO_MEMORY, repr(error)):
            raise  # which is no fault of theirs
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{what} ({kind}{first_line(error)[:300]})") from None


def redact(text: str) -> str:
    """Hide what may be secret: of a `pipe:` all but the program, of an address all but scheme,
    host and path. Servers quote what they were sent, and libraries pass it on in their errors. A
    text that was redacted stays as it is, and a long one takes no longer for its signs."""
    text = hide_keys(text)
    text = re.sub(r"""'pipe:(?:'"'"'|\\.|[^'\\\n])*'|"pipe:(?:\\.|[^"\\\n])*\"""", _program, text)
    text = re.sub(r"\bpipe:(?!\s?\S{0,300} \*\*\*)[^\n'\"][^\n]*", _program, text)
    return re.sub(r"(\w[\w+.-]{0,30}://|https?:/)([^\s\"<>]*)", _address, text)


def last_part(path: str) -> str:
    """Of an absolute path, or of several joined by "::", the last part: where it lies on this
    machine is nobody's business. Other texts stay as they are."""
    return "::".join(
        os.path.basename(os.path.normpath(part)) if part.startswith(("/", "~")) else part
        for part in path.split("::")
    )


def hide_keys(text: str) -> str:
    """Hide keys that the environment holds, and what looks like one."""
    for name, value in os.environ.items():
        if re.search(r"(KEY|TOKEN|SECRET|PASSWORD)$", name) and len(value) >= 8:
            text = text.replace(value, "***")
    text = re.sub(r"\b(Basic|Bearer) [\w+/=.~-]{8,}", r"\1 ***", text)
    return re.sub(r"\bhf_(?:oauth_)?[A-Za-z0-9]{16,}", "hf_***", text)


def _program(found: re.Match) -> str:
    quote = found[0][0] if found[0][0] in "'\"" else ""
    words = found[0].strip(quote).removeprefix("pipe:").split()
    name = next((word for word in words if "=" not in word), "")
    plain = re.fullmatch(r"[\w./+-]+", name)
    hidden = " ***" if words != [name] else ""
    return f"{quote}pipe:{name if plain else ''}{hidden if plain else '***'}{quote}"


def _address(found: re.Match) -> str:
    scheme, rest = found[1], found[2].rstrip("')],.;:")
    closing = found[2][len(rest) :]
    host = re.match(r"[^/?#]*", rest)[0]
    if "@" in host:
        rest = "***@" + host.rpartition("@")[2] + rest[len(host) :]
    elif "@" in rest and not re.fullmatch(r"[^:]*(:\d*)?", host):
        rest = "***@" + rest.rpartition("@")[2]  # a password with a slash or a question mark
    place, query, _ = re.match(r"([^?#]*)([?#]?)(.*)", rest).groups()
    return f"{scheme}{place}{query and '?***'}{closing}"


class Output:
    """Standard output or error, from which nobody may be reading any more.

    That ends no work and costs no result: the rest goes nowhere, and `broken` remembers it. What
    would steer a terminal is escaped, but for what our own progress bars need.
    """

    def __init__(self, stream: TextIO | None, spared: str):
        self.spared, self.broken = spared, stream is None
        self.stream = stream = stream or open(os.devnull, "w")  # noqa: SIM115 - others ask it
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # its encoding may lack a letter

    def write(self, text: str) -> int:
        said = shown(text, self.spared)
        try:
            self._try(lambda: self.stream.write(said))
        except RuntimeError:  # by a signal's handler in the midst of another write: past its buffer
            self._try(lambda: os.write(self.stream.fileno(), said.encode()))
        return len(text)

    def flush(self) -> None:
        self._try(lambda: self.stream.flush())

    def _try(self, act: Callable[[], object]) -> None:
        if self.broken:
            return
        try:
            act()
        except OSError as error:
            self.broken = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if error.errno != errno.EPIPE:  # `| head` has read enough, and knows it
                print(f"what is said can't be written: {error.strerror}", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guard_output() -> None:
    """Let what the script says go through `Output`."""
    if not isinstance(sys.stdout, Output):
        os.environ["PYTHON_COLORS"] = "0"  # of which `Output` would show the signs
        with contextlib.suppress(ImportError):  # `commands.begin` says what is missing
            from tqdm import tqdm

            # One for several processes would start another, which warns of it if ours is killed.
            tqdm.set_lock(threading.RLock())
        while (spare := os.open(os.devnull, os.O_RDWR)) < 3:
            pass  # one that is closed: a file of ours would get its number, and what C code says
        os.close(spare)
        sys.stdout, sys.stderr = Output(sys.stdout, "\n\t"), Output(sys.stderr, "\n\t\r")


def leave(code: object) -> NoReturn:
    """End a script, whose process may go on, as a notebook's does, with what was before."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    said, sys.stdout, sys.stderr = sys.stdout, sys.stdout.stream, sys.stderr.stream
    sys.exit(code or int(said.broken))


def say_error(error: object) -> int:
    """Say a mistake of the user's; returns the exit code."""
    sys.stdout.flush()
    # Lines of ours begin with a space, so that a name from outside can't forge one.
    print("error:", re.sub(r"\n(?! )", "\n  ", brief(redact(str(error)))), file=sys.stderr)
    return 1


NO_MEMORY = "MemoryError|out of memory|an(no|')t allocate memory|CUBLAS_STATUS_ALLOC_FAILED"
# What is said of errors such as torch's plain RuntimeErrors, by their module, class and text.
REMEDIES = {
    NO_MEMORY: (
        "out of memory ({}): halve --batch_size (where it trains, double "
        "--gradient_accumulation_steps), or --feature_batch_size while photos are encoded, or take "
        "a smaller decoder; checkpoints are as before"
    ),
    "no kernel image": "this PyTorch is not made for this GPU ({}): use --device cpu, or install a "
    "build for it (pytorch.org)",
    "determine home directory": "a path begins with ~ and the name of a user who isn't there: "
    "write it out",  # which pathlib says of `~nobody`
    r"^torch\._(dynamo|inductor)\.exc: ": "torch.compile fails ({}): it needs g++, or leave out "
    "--compile",
}


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main`, turning a user's mistake into one message and exit code 1."""
    guard_output()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # `commands.begin` has another
    try:
        code = main()
    except UserError as error:
        code = say_error(error)
    except OSError as error:
        if not error.filename and error.errno not in FAILING:
            raise
        cache = error.errno in WRONG_PLACE and "/.cache" in str(error.filename)
        remedy = ": set HF_HOME to a folder where you may write" * cache
        code = say_error(f"{error.filename or 'a file that was read'}: {error.strerror}{remedy}")
    except (MemoryError, RuntimeError) as error:
        text = f"{type(error).__module__}: {error!r}"
        found = (said for sign, said in REMEDIES.items() if re.search(sign, text))
        if not (said := next(found, "")):
            raise
        code = say_error(said.format(first_line(getattr(error, "inner_exception", error))))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    leave(code)


# --- Progress -------------------------------------------------------------------------------


class Bar(contextlib.AbstractContextManager):
    """A progress bar on a terminal; elsewhere a plain line now and then."""

    PAUSE = 30.0  # seconds between two lines

    def __init__(self, total: int, label: str, unit: str, done: int = 0, quiet: bool = False):
        """Begin with `done` of `total` units behind; `quiet` shows nothing."""
        self.total, self.label, self.done, self.before = total, label, done, done
        self.quiet, self.lines = quiet, None  # where lines go: standard output, unless it is set
        self.started = self.spoken = time.monotonic()
        from tqdm import tqdm  # as above

        self.bar = tqdm(total=total, initial=done, desc=label, unit=unit, disable=quiet or None)

    def step(self, count: int, text: str = "") -> None:
        """Go on by `count` units; `text` is shown beside."""
        now = time.monotonic()
        self.done += count
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(count)
        if self.bar.disable and not self.quiet and now - self.spoken > self.PAUSE:
            self.spoken = now
            left = (now - self.started) / (self.done - self.before) * (self.total - self.done) / 60
            said = f"  {self.label} {self.done / self.total:4.0%}  {text + ', ' if text else ''}"
            print(f"{said}{left:.1f} min left", file=self.lines, flush=True)

    def close(self, *_: object) -> None:
        self.bar.close()

    __exit__ = close


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Don't look for garbage meanwhile: among the millions of texts that are read, of which none
    is, it takes as long as to read them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# --- Files ----------------------------------------------------------------------------------


def files_in(folder: Path, recursive: bool = True, passed: Counter | None = None) -> Iterator[str]:
    """The files in a folder, which need not exist, and in those below, by their names relative to
    it, in order; hidden ones are passed over, and a Synology disk's previews. With `passed`,
    folders that can't be read are said, and links to folders counted in it."""

    def unread(error: OSError) -> None:
        if passed is not None:
            said = f"passed over: {error.filename} can't be read ({error.strerror})"
            print(shown(said), file=sys.stderr)

    for place, folders, files in os.walk(folder, onerror=unread):
        folders[:] = sorted(f for f in folders if recursive and not f.startswith(HIDDEN))
        if passed is not None:
            links = sum(os.path.islink(os.path.join(place, name)) for name in folders)
            passed.update({"links to folders": links} if links else {})
        for name in sorted(files):
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(place, name), folder)


def changed_at(path: str | os.PathLike[str]) -> float:
    """When a file was changed here: a camera's, or another time zone's, may be of the future."""
    return min(os.path.getmtime(path), os.path.getctime(path))


def leads_out(path: Path, *homes: Path) -> bool:
    """Does it lie, links followed, out of all these folders? A stranger's may lead to any file."""
    real = Path(os.path.realpath(path))
    return not any(real.is_relative_to(os.path.realpath(home)) for home in homes)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], elsewhere: str = "") -> Iterator[Path]:
    """Give a temporary path beside `path`; once the block has ended well, it becomes `path`.

    A reader sees the old file or the whole new one, never a part, even if the machine stops, the
    disk is full, or the folder can't be written: `elsewhere` says how to choose another.
    """
    path = Path(os.path.realpath(path))  # what a symbolic link leads to is replaced, not the link
    temporary = handle = None
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no file: a file would take its place; choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name[:40]}."
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=".tmp")
        temporary = Path(name)
        lock(handle)  # until it is closed: a sign that the writer lives
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.umask(mask := os.umask(0))
        with contextlib.suppress(OSError):  # disks of networks may know no modes, or no owner
            os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        raise write_error(error, path, elsewhere) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
            os.close(handle)


def write_file(path: str | os.PathLike[str], content: str | bytes, elsewhere: str = "") -> None:
    """Write a whole file as `atomic_write` does; text as UTF-8."""
    with atomic_write(path, elsewhere) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_changed(path: Path, new: str | bytes) -> None:
    """Write a file of DATA_DIR, if that changes it: where nobody may write, what is there does."""
    new = new.encode() if isinstance(new, str) else new
    if not path.is_file() or path.read_bytes() != new:
        if leads_out(path, path.parent):  # of texts of others, which a shell might run
            raise UserError(f"{path} would be written, and is a link out of its folder: remove it")
        write_file(path, new, "choose another --data_dir, and give --image_dir, --captions_file")


@contextlib.contextmanager
def sole_user(folder: Path, wait: bool = False) -> Iterator[None]:
    """Keep a folder for this process; the lock goes with the process, however it ends.

    Another process that uses it is an error, or waited for. Files of `atomic_write` that a process
    has left half-written there are removed, if it is dead.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")  # noqa: SIM115 - closed below, with the lock
    except OSError as error:
        flag = "--features_dir" if wait else "--output_dir"
        raise write_error(error, folder, f"choose another {flag}") from error
    with file:
        if lock(file, f"waiting for another process to leave {folder}" if wait else None) is False:
            raise UserError(f"another run is writing to {folder}: wait for it, or set --output_dir")
        remove_leftovers(folder, ".*.tmp")
        yield


def lock(file: IO | int, waiting: str | None = None) -> bool | None:
    """Lock an open file until it is closed; of another process's lock `waiting` is said, and its
    end awaited, or else False returned. None: the disk knows no locks, as some of networks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is None:
            return False
        print(waiting, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return None
    return True


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove the temporary files of writers that are dead."""
    for leftover in folder.glob(pattern):
        with contextlib.suppress(OSError), open(leftover, "rb") as left:
            if lock(left):  # its writer may be at work
                leftover.unlink()


def write_error(error: OSError, path: Path, elsewhere: str = "") -> Exception:
    """Say in a user's words that `path` can't be written; other errors come back as they are."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"no room left to write {path}: free some space there and run again")
    if error.errno in WRONG_PLACE:
        reason = f"{path} can't be written ({error.strerror})"
        return UserError(f"{reason}: {elsewhere or 'choose another folder'}")
    if error.errno and not error.filename:  # an open file's errors don't name it
        error.filename = str(path)
    return error


def decoded(content: bytes, older: bool = True) -> str:
    """A text in UTF-8, UTF-16, or else, unless refused, Windows' `older` Western encoding.

    Refused by a UnicodeDecodeError is what is in none of these: languages that are written in other
    encodings have long runs of bytes beyond ASCII, and in a flawed UTF-8 most of them are sound.
    """
    encoding = "utf-8-sig"
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):  # as spreadsheets save "Unicode text"
        encoding = "utf-16"
    elif b"\0" in content[:2]:  # the same without its mark
        encoding = "utf-16-be" if content.startswith(b"\0") else "utf-16-le"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        read = content.decode("utf-8", "replace")
        flawed = sum(sign > "\x7f" for sign in read) > 2 * read.count("\ufffd")
        runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", content)]
        foreign = 4 * sum(run for run in runs if run > 2) > sum(runs)
        foreign |= b"\x83" in content  # what katakana begin with, and no word of Western languages
        if not older or encoding != "utf-8-sig" or flawed or foreign:
            raise
        return content.decode("cp1252")


def read_text(path: Path, older: bool = False) -> str:
    """Read a text file as `decoded` does; what is missing or in another encoding is refused."""
    if path.is_fifo():
        raise UserError(f"{path} is a pipe, no file")  # to read it may never end
    try:
        return decoded(path.read_bytes(), older)
    except FileNotFoundError:
        told = "name your data as in training (--data_dir, --questions_file, ...), or run"
        raise UserError(f"{path} is missing: {told} {preparing()}") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8, or convert it by iconv "
            f"-f ENCODING -t UTF-8 {shlex.quote(str(path))} > NEW (GB18030, SHIFT_JIS, CP1251, ...)"
        ) from None


def read_json(path: Path, older: bool = False) -> Any:
    """Read a JSON file in which no key stands twice, in an encoding as `read_text` does."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):  # else there is nothing to count, which takes long
            key = next(k for k, n in Counter(key for key, _ in pairs).items() if n > 1)
            raise UserError(f"the key {key!r} stands twice: merge the two entries")
        return table

    text = read_text(path, older)
    with refused(f"{path} is not valid JSON"):  # which may nest without end, or hold any number
        return json.loads(text, object_pairs_hook=unique)


@contextlib.contextmanager
def bounded_memory(size: int) -> Iterator[None]:
    """Have MemoryError raised where more than so many bytes are needed beyond what is in use: what
    a library unpacks is known only once it is there. Linux alone can; macOS refuses any limit."""
    if sys.platform != "linux":
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    pages = int(Path("/proc/self/statm").read_text().split()[5])  # of data
    most = pages * resource.getpagesize() + size
    most = min([most, *(limit for limit in limits if limit != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_DATA, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def size_text(size: int) -> str:
    """A number of bytes for people: `4.4 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def require_room(needs: Iterable[tuple[Path, int]], flag: str = "--data_dir") -> None:
    """Check that the disk of each folder, which need not exist yet, has room for so many bytes."""
    places, needed = {}, Counter()
    for folder, size in needs:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        needed[there.stat().st_dev] += size
        places.setdefault(there.stat().st_dev, there)
    for disk, place in places.items():
        if (free := shutil.disk_usage(place).free) < needed[disk]:
            raise UserError(
                f"the disk of {place} has {size_text(free)} free, but "
                f"{size_text(needed[disk])} are needed: free some space, or choose another place "
                f"with {flag}"
            )
