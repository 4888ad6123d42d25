#!/usr/bin/env bash
# Installs Miniconda into ~/miniconda3 if this machine has neither conda nor a usable Python.
# Needs no administrator; safe to run again.
set -euo pipefail
HOME=${HOME:-~} # services may have none
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
target=$HOME/miniconda3

done_with() {
    echo "$1"
    echo "Next: bash $here/01_setup.sh"
    exit 0
}

if maker=$(bash "$here/01_setup.sh" --find); then
    done_with "Found $("$maker" --version) at $(command -v "$maker"): nothing to install."
fi

case "$(uname -s)-$(uname -m)" in
    Linux-x86_64) platform=Linux-x86_64 ;;
    Linux-aarch64 | Linux-arm64) platform=Linux-aarch64 ;;
    Darwin-arm64) platform=MacOSX-arm64 ;;
    Darwin-x86_64)
        echo "error: PyTorch has no build for Macs with Intel: use another machine" \
            "(on Apple silicon, run arch -arm64 bash $here/00_setup.sh)" >&2
        exit 1
        ;;
    *)
        echo "error: no Miniconda for $(uname -s) on $(uname -m):" \
            "install Python 3.10 to 3.14 yourself, then run bash $here/01_setup.sh" >&2
        exit 1
        ;;
esac
url=https://repo.anaconda.com/miniconda/Miniconda3-latest-$platform.sh

echo "Found neither conda nor Python 3.10 to 3.14 with venv: installing Miniconda into $target"
installer=$(mktemp -d)
trap 'rm -rf "$installer"' EXIT
if command -v curl >/dev/null; then
    curl -fL --retry 3 --progress-bar -o "$installer/miniconda.sh" "$url"
elif command -v wget >/dev/null; then
    wget -q --tries=3 -O "$installer/miniconda.sh" "$url"
else
    echo "error: neither curl nor wget is here: install one of them and run this again" >&2
    exit 1
fi
bash "$installer/miniconda.sh" -b -u -p "$target" # -u: mends what a broken-off run left behind
done_with "Installed $("$target/bin/conda" --version) in $target."
