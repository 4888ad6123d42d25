#!/usr/bin/env bash
# Installs the pinned requirements: see usage below. Safe to run again, quick if nothing changed.
set -euo pipefail
HOME=${HOME:-~} # services may have none

usage() {
    cat <<'TEXT'
usage: bash 01_setup.sh [--active] [--dev] [--help]

Makes .venv beside this script and installs the pinned requirements into it.
  --active  install into the active conda environment or venv instead
  --dev     add what the tests need (requirements-dev.txt)
TEXT
}

fail() {
    echo "error: $*" >&2
    exit 1
}

active=no dev=no find=no
for flag in "$@"; do
    case $flag in
        --active) active=yes ;;
        --dev) dev=yes ;;
        --find) find=yes ;; # for 00_setup.sh
        -h | --help) usage && exit 0 ;;
        *) echo "error: unknown flag $flag" >&2 && usage >&2 && exit 2 ;;
    esac
done
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

# --- Which Python ---------------------------------------------------------------------------

supported() { # is $1 a Python for which every pinned package has a build?
    "$1" -I -c 'import sys
sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

has_pip() {
    "$1" -I -m pip --version >/dev/null 2>&1 || "$1" -I -m ensurepip >/dev/null 2>&1
}

makes_venvs() { # can $1, a Python or a conda, make .venv?
    if [[ ${1##*/} == python* ]]; then # Debian's lacks ensurepip until python3-venv is installed
        supported "$1" && "$1" -I -c 'import ensurepip, venv' >/dev/null 2>&1
    else
        "$1" --version >/dev/null 2>&1
    fi
}

find_maker() { # prints the first that can
    local maker there=$HOME/miniconda3/bin
    local pythons=(python3.14 python3.13 python3.12 python3.11 python3.10 python3 "$there/python")
    for maker in "${pythons[@]}" conda "${CONDA_EXE:-conda}" "$there/conda"; do
        if makes_venvs "$maker"; then
            echo "$maker"
            return
        fi
    done
    return 1
}

make_venv() {
    local maker
    maker=$(find_maker) || fail "no Python 3.10 to 3.14 with venv is here: run bash 00_setup.sh"
    echo "Making .venv with $("$maker" --version)"
    if [[ ${maker##*/} == python* ]]; then
        "$maker" -m venv --clear .venv
    else
        rm -rf .venv
        "$maker" create --yes --quiet --override-channels --channel conda-forge \
            --prefix "$PWD/.venv" python=3.12 pip
    fi
}

if [[ $find == yes ]]; then
    find_maker
    exit
fi
if [[ $active == yes ]]; then
    environment=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    [[ -n $environment ]] ||
        fail "--active, but no environment is active: run conda activate NAME, or leave out --active"
    python=$environment/bin/python
    next="python train.py --demo"
    supported "$python" ||
        fail "$python is missing or isn't Python 3.10 to 3.14: activate an environment that has one"
else
    environment=$PWD/.venv
    python=$environment/bin/python
    next=".venv/bin/python train.py --demo"
fi

# --- What is to do --------------------------------------------------------------------------

# The stamp says which requirements were installed in full, and for which Python.
stamp=$environment/.setup-stamp
wanted() { # the stamp's line for these requirements files
    echo "$* $(cat -- "$@" | cksum) $("$python" -I -V)"
}
files=(requirements.txt)
last=requirements.txt # includes those before it
if [[ $dev == yes ]]; then
    files=(requirements*.txt)
    last=requirements-dev.txt
fi

whole() { # all packages can be found, and torch works; -I: a folder here is not a package
    "$python" -I - "$dev" <<'PYTHON'
import sys
from importlib.util import find_spec

names = "transformers tokenizers huggingface_hub safetensors numpy PIL requests tqdm".split()
names += "matplotlib wandb".split()
if sys.argv[1] == "yes":
    names += "pytest xdist ruff hypothesis starlette uvicorn selenium".split()
    names += "onnx onnxruntime onnxscript webdataset pyarrow".split()
missing = [name for name in names if find_spec(name) is None]
if missing:
    sys.exit(f"missing: {' '.join(missing)}")

import torch

device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
print(f"Python {sys.version.split()[0]} at {sys.executable}")
print(f"torch {torch.__version__}")
print(f"CUDA {'yes, ' + device if device else 'no'}")
PYTHON
}

finish() {
    echo "$report"
    echo "Next: $next"
    exit 0
}

if [[ -x $python && -f $stamp ]] && grep -qxF "$(wanted "${files[@]}")" "$stamp"; then
    if report=$(whole); then
        echo "Nothing to do: $environment has the pinned requirements"
        finish
    fi
    [[ $active == yes ]] || { echo "$environment is damaged: making it anew" && rm -rf .venv; }
fi

# --- Do it ----------------------------------------------------------------------------------

if [[ $active == no ]] && ! { supported "$python" && has_pip "$python"; }; then
    make_venv
fi
rm -f "$stamp"
echo "Installing $last into $environment (the first time a gigabyte or more is downloaded)"
"$python" -I -m pip install -q --no-user --no-input --disable-pip-version-check -r "$last"
report=$(whole) || fail "the installed packages don't work:" \
    "run $python -m pip install --force-reinstall -r $PWD/$last"
{
    wanted requirements.txt
    if [[ $dev == yes ]]; then wanted "${files[@]}"; fi # a later run without --dev has it all
} >"$stamp.new"
mv "$stamp.new" "$stamp"
finish
