"""The set-up scripts, offline: real runs of the real scripts with stand-ins for what they call."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("00_setup.sh", "01_setup.sh", ".ci/run")
TOOLS = "bash cat cksum dirname grep mktemp mv rm mkdir chmod".split()


@pytest.fixture
def clone(tmp_path) -> Path:
    """A folder with the set-up's own files and nothing else; its name has a space."""
    folder = tmp_path / "my clone"
    (folder / ".ci").mkdir(parents=True)
    for name in SCRIPTS:
        shutil.copy(ROOT / name, folder / name)
    for path in ROOT.glob("requirements*.txt"):
        shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture
def tools(tmp_path) -> Path:
    """A folder of the few commands a bare machine has: no Python, no conda, no downloader."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name))
    return folder


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{shutil.which('bash')}\n{text}\n")
    path.chmod(0o755)
    return path


def bash(*command: object, path: Path | None = None, **environment: str):
    """Run a script from another folder, with no environment active."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("VIRTUAL_ENV", "CONDA"))
    }
    # The Python that runs the tests is a usable one, wherever it stands.
    clean["PATH"] = str(path or f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return subprocess.run(
        [shutil.which("bash"), *map(str, command)],
        env=clean | environment,
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def fake_environment(folder: Path) -> Path:
    """An environment whose Python answers as if all were installed, and logs every pip install."""
    return script(
        folder / "bin" / "python",
        """home=$(dirname "$0")/..
case "$*" in
    *"pip install"*) echo "$@" >> "$home/pip.log" ;;
    "-I -V") echo Python 3.11.0 ;;
    "-I - "*) cat >/dev/null; [[ ! -e $home/damaged ]] && echo torch 2.13.0 ;;
esac""",
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_syntax(name):
    result = bash("-n", ROOT / name)
    assert (result.returncode, result.stderr) == (0, "")


# --- 01_setup.sh ----------------------------------------------------------------------------


def test_unknown_flag_is_refused(clone):
    result = bash(clone / "01_setup.sh", "--fast")
    assert result.returncode == 2
    assert "unknown flag --fast" in result.stderr and "--active" in result.stderr
    assert not (clone / ".venv").exists()


def test_help(clone):
    result = bash(clone / "01_setup.sh", "--help")
    assert result.returncode == 0
    assert "--active" in result.stdout and "--dev" in result.stdout


def test_active_needs_an_active_environment(clone):
    result = bash(clone / "01_setup.sh", "--active")
    assert result.returncode == 1
    assert "no environment is active" in result.stderr


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_active_installs_there(clone, tmp_path, variable):
    environment = tmp_path / "env"
    fake_environment(environment)
    result = bash(clone / "01_setup.sh", "--active", **{variable: str(environment)})
    assert result.returncode == 0, result.stderr
    assert (environment / "pip.log").read_text().count("-r requirements.txt") == 1
    assert result.stdout.endswith("Next: python train.py --demo\n")
    assert not (clone / ".venv").exists()


def test_second_run_is_quick_and_changed_requirements_are_installed(clone):
    fake_environment(clone / ".venv")
    log = clone / ".venv" / "pip.log"

    def installs(*flags: str) -> list[str]:
        before = log.read_text().splitlines() if log.exists() else []
        result = bash(clone / "01_setup.sh", *flags)
        assert result.returncode == 0, result.stderr
        assert "torch 2.13.0\nNext: .venv/bin/python train.py --demo\n" in result.stdout
        after = log.read_text().splitlines()[len(before) :]
        assert ("Nothing to do" in result.stdout) == (not after)
        return [line.split()[-1] for line in after]

    assert installs() == ["requirements.txt"]
    started = time.monotonic()
    assert installs() == []
    assert time.monotonic() - started < 2
    assert installs("--dev") == ["requirements-dev.txt"]
    assert installs("--dev") == []
    assert installs() == []
    with open(clone / "requirements.txt", "a") as file:
        file.write("# changed\n")
    assert installs() == ["requirements.txt"]
    assert installs("--dev") == ["requirements-dev.txt"]
    for path in clone.glob("requirements-*.txt"):
        path.write_text(path.read_text() + "# changed\n")
        assert (path.name, *installs("--dev")) == (path.name, "requirements-dev.txt")


def test_every_pinned_package_is_looked_for():
    pins = "\n".join(path.read_text() for path in ROOT.glob("requirements*.txt"))
    packages = re.findall(r"^([\w-]+)==", pins, re.M)
    found = re.findall(r"\w+", (ROOT / "01_setup.sh").read_text())
    called = {"pillow": "PIL", "pytest-xdist": "xdist"}
    assert len(packages) > 15 and not {called.get(name, name) for name in packages} - {*found}


@pytest.mark.parametrize("name", SCRIPTS[:2] + ("README.md", "requirements.txt"))
def test_the_same_pythons_are_meant_everywhere(name):
    text = (ROOT / name).read_text()
    assert {*re.findall(r"3\.1\d to 3\.1\d", text)} == {"3.10 to 3.14"}
    if name == "01_setup.sh":  # which 00_setup.sh asks
        assert re.findall(r"python3\.(1\d) ", text)[:5] == "14 13 12 11 10".split()
        assert "(3, 10) <= sys.version_info[:2] <= (3, 14)" in text


def test_every_pin_installs_on_the_oldest_python():
    for path in ROOT.glob("requirements*.txt"):
        for name, pin in re.findall(r"^([\w-]+)==([^\s;]+)(?!.*>=)", path.read_text(), re.M):
            with contextlib.suppress(PackageNotFoundError):  # an optional one
                here = metadata(name)
                if here["Version"].partition("+")[0] == pin:
                    newer = re.search(r">=\s*3\.(1[1-9])", here["Requires-Python"] or "")
                    assert not newer, f"{name}=={pin} in {path.name} needs Python 3.{newer[1]}"


def test_failed_install_is_not_taken_for_done(clone):
    python = fake_environment(clone / ".venv")
    good = python.read_text()
    python.write_text(good.replace('*"pip install"*)', '*"pip install"*) exit 1;'))
    assert bash(clone / "01_setup.sh").returncode == 1
    python.write_text(good)
    assert "Installing" in bash(clone / "01_setup.sh").stdout


def test_environment_that_does_not_work_is_not_taken_for_done(clone, tmp_path):
    environment = tmp_path / "env"
    fake_environment(environment)
    (environment / "damaged").touch()
    for _ in range(2):
        result = bash(clone / "01_setup.sh", "--active", VIRTUAL_ENV=str(environment))
        assert result.returncode == 1
        assert "--force-reinstall" in result.stderr


def test_broken_venv_is_made_anew(clone):
    """A real venv is made, with this Python; only its pip install is cut short, by no index."""
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").symlink_to("/nowhere/python")
    command = ["-c", 'unset HOME; exec bash "$0"', clone / "01_setup.sh"]  # as a service may run it
    settings = {"PIP_NO_INDEX": "1", "PIP_USER": "1", "PIP_CONFIG_FILE": os.devnull}
    result = bash(*command, **settings)
    assert result.returncode == 1 and "--user" not in result.stderr  # which no venv allows
    assert "Making .venv with Python 3.1" in result.stdout
    version = subprocess.run([clone / ".venv/bin/python", "-V"], capture_output=True, text=True)
    assert version.stdout.startswith("Python 3.1")
    assert not (clone / ".venv" / ".setup-stamp").exists()


def test_conda_makes_the_environment_where_no_python_is_usable(clone, tools, tmp_path):
    script(tools / "python3", "exit 1")
    conda = f"""
case $1 in
    --version) echo conda 26.1 ;;
    create)
        echo "$@" > {tmp_path}/conda.log
        while [[ $1 != --prefix ]]; do shift; done
        mkdir -p "$2/bin" && cat {tmp_path}/env/bin/python > "$2/bin/python"
        chmod +x "$2/bin/python" ;;
esac"""
    script(tools / "conda", conda)
    fake_environment(tmp_path / "env")
    result = bash(clone / "01_setup.sh", path=tools, HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "python=3.12" in (tmp_path / "conda.log").read_text()
    assert (clone / ".venv" / ".setup-stamp").exists()


def test_without_any_python_it_names_the_remedy(clone, tools, tmp_path):
    result = bash(clone / "01_setup.sh", path=tools, HOME=str(tmp_path))
    assert result.returncode == 1
    assert "run bash 00_setup.sh" in result.stderr


# --- 00_setup.sh ----------------------------------------------------------------------------


def test_python_that_is_there_is_enough(clone):
    result = bash("-c", 'unset HOME; exec bash "$0"', clone / "00_setup.sh")
    assert result.returncode == 0, result.stderr
    assert "nothing to install" in result.stdout
    assert f"Next: bash {clone}/01_setup.sh" in result.stdout


@pytest.mark.parametrize(
    ("system", "machine", "platform"),
    [
        ("Linux", "x86_64", "Linux-x86_64"),
        ("Linux", "aarch64", "Linux-aarch64"),
        ("Darwin", "arm64", "MacOSX-arm64"),
    ],
)
@pytest.mark.parametrize("downloader", ["curl", "wget"])
def test_miniconda_is_installed_once(clone, tools, tmp_path, system, machine, platform, downloader):
    home = tmp_path / "home"
    (home / "miniconda3").mkdir(parents=True)  # as a run that was broken off leaves it
    script(tools / "uname", f"[[ $1 == -s ]] && echo {system} || echo {machine}")
    installer = (
        "while [[ $1 != -p ]]; do shift; done\nmkdir -p $2/bin\n"
        f"echo '#!{shutil.which('bash')}' > $2/bin/conda\n"
        "echo 'echo conda 26.1' >> $2/bin/conda\nchmod +x $2/bin/conda\n"
    )
    (tmp_path / "installer.sh").write_text(installer)
    fetch = f"""
while [[ $# -gt 1 ]]; do [[ $1 == -[oO] ]] && target=$2; shift; done
echo "$1" >> {tmp_path}/urls
cat {tmp_path}/installer.sh > "$target"
"""
    script(tools / downloader, fetch)
    for says in ("Installed conda 26.1", "Found conda 26.1"):
        result = bash(clone / "00_setup.sh", path=tools, HOME=str(home), TMPDIR=str(tmp_path))
        assert result.returncode == 0, result.stderr
        assert says in result.stdout and "Next: bash" in result.stdout
    (url,) = (tmp_path / "urls").read_text().splitlines()
    assert url.endswith(f"/Miniconda3-latest-{platform}.sh")


def test_unknown_machine_or_no_downloader_is_an_error(clone, tools, tmp_path):
    script(tools / "uname", "[[ $1 == -s ]] && echo Linux || echo riscv64")
    result = bash(clone / "00_setup.sh", path=tools, HOME=str(tmp_path))
    assert result.returncode == 1 and "no Miniconda for Linux on riscv64" in result.stderr
    script(tools / "uname", "[[ $1 == -s ]] && echo Darwin || echo x86_64")
    result = bash(clone / "00_setup.sh", path=tools, HOME=str(tmp_path))
    assert result.returncode == 1 and "PyTorch has no build for Macs with Intel" in result.stderr
    script(tools / "uname", "[[ $1 == -s ]] && echo Linux || echo x86_64")
    result = bash(clone / "00_setup.sh", path=tools, HOME=str(tmp_path))
    assert result.returncode == 1 and "neither curl nor wget" in result.stderr


# --- .ci/run --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setup", "failing", "code"),
    [(0, "", 0), (1, "", 1), (0, "pytest", 1), (0, "ruff check", 1), (0, "ruff format --check", 1)],
)
def test_ci_fails_if_any_part_fails(clone, setup, failing, code):
    script(clone / "01_setup.sh", f'[[ "$*" == --dev ]] && exit {setup}')
    fails = f'echo "$*" >> "$(dirname "$0")/log"; [[ "$*" != "-m {failing}" ]]'
    script(clone / ".venv/bin/python", fails)
    result = bash(clone / ".ci/run", CI="true")
    assert result.returncode == code
    if code == 0:
        log = (clone / ".venv/bin/log").read_text().splitlines()
        assert log == ["-m pytest", "-m ruff check", "-m ruff format --check"]


def test_ci_is_executable():
    assert os.access(ROOT / ".ci/run", os.X_OK)
