#!/bin/sh
# Makes .venv hold what pyproject.toml and constraints.txt ask for; returns at once, silently, when it already does.
# The Makefile calls it with PYTHON, TORCH_INDEX_URL and PIP_ARGS (see `make help`) and GPU=1 where an NVIDIA GPU is seen.
# NVIDIA_VERSION names the file that holds the driver's version.
set -eu
cd "$(dirname "$0")/.."
root=$(pwd -P)
venv=$root/.venv
constraints=requirements/constraints.txt
log=$venv/setup.log              # of the last call of pip
stamp=$venv/.setup-stamp         # written last, removed first
torch_record=$venv/.torch-source # where torch came from: "cpu", "default" or an index URL
torch_indexes=https://download.pytorch.org/whl
lock=$venv/.setup-lock
cpu_index=$torch_indexes/cpu
: "${PYTHON:=}" "${TORCH_INDEX_URL:=}" "${PIP_ARGS:=}" "${GPU:=}" "${NVIDIA_VERSION:=/sys/module/nvidia/version}"

die() {
    echo "setup: $*" >&2
    exit 1
}

version_of() { # "3.11", or nothing if interpreter $1 does not run
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

why_not() { # why interpreter $1 will not do; nothing if it will
    command -v "$1" >/dev/null 2>&1 || { echo "$1 was not found"; return; }
    "$1" - "$1" 2>/dev/null <<'PY' || echo "$1 does not run"
import sys
if sys.version_info < (3, 11):
    print("%s is Python %d.%d" % ((sys.argv[1],) + sys.version_info[:2]))
else:
    try:
        import ensurepip, venv
    except ImportError:
        print("%s has no venv module (Debian and Ubuntu: apt install python3-venv)" % sys.argv[1])
PY
}

choose_python() { # sets $python; the interpreter below it where it is itself in a virtual environment
    if [ -n "$PYTHON" ]; then set -- "$PYTHON"; else set -- python3 python3.13 python3.12 python3.11; fi
    reason=
    for candidate; do
        refusal=$(why_not "$candidate")
        if [ -z "$refusal" ]; then
            python=$("$candidate" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))')
            return
        fi
        reason=${reason:-$refusal}
    done
    die "Python 3.11 or newer is needed, but $reason; name one with make setup PYTHON=/path/to/python3."
}

fingerprint() { # the directory is part of it because scripts in .venv/bin name it
    echo "$(cat pyproject.toml "$constraints" requirements/setup.sh | cksum) $(version_of "$venv/bin/python") $root"
}

gpu_source() { # the build of torch for the driver: PyPI's is for CUDA 13, which needs R580; CUDA 12 runs from R525 on
    driver=$(cat "$NVIDIA_VERSION" 2>/dev/null || true) # 570.124.06; nothing in an image that is built without a GPU
    major=${driver%%.*}
    case $major in '' | *[!0-9]*) echo default; return ;; esac
    if [ "$major" -ge 580 ]; then echo default
    elif [ "$major" -ge 570 ]; then echo "$torch_indexes/cu128"
    elif [ "$major" -ge 525 ]; then echo "$torch_indexes/cu126"
    else echo "too old: $driver"; fi
}

torch_source() { # what was chosen before stays, except that it gives way where a GPU or its driver needs another build
    recorded=$(cat "$torch_record" 2>/dev/null || true)
    if [ -n "$TORCH_INDEX_URL" ]; then echo "$TORCH_INDEX_URL"
    elif [ -n "$GPU" ] && { [ -z "$recorded" ] || [ "$recorded" = cpu ] || [ "$recorded" = default ]; }; then gpu_source
    elif [ -n "$recorded" ]; then echo "$recorded"
    elif [ "$(uname -s)" = Linux ]; then echo cpu
    else echo default; fi
}

warn_of_compiler() { # Triton compiles a launcher at run time; without it training takes the slower path
    [ -n "$GPU" ] || return 0
    header=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
    missing=
    [ -f "$header" ] || missing="$header (Debian and Ubuntu: apt install python3-dev)"
    command -v "${CC:-gcc}" >/dev/null 2>&1 || command -v clang >/dev/null 2>&1 ||
        missing="${missing:+$missing and }a C compiler (apt install gcc)"
    [ -z "$missing" ] || echo "setup: warning: Triton's kernels need $missing: without it the GPU runs slower ones" >&2
}

is_current() {
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ] || return 1
    [ "$(cat "$torch_record" 2>/dev/null)" = "$(torch_source)" ] || return 1
    [ -z "$PYTHON" ] || [ "$(version_of "$PYTHON")" = "$(version_of "$venv/bin/python")" ]
}

is_usable() { # can the environment that is there be updated, or must it be made anew?
    "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || return 1
    grep -q "^command = .* $venv\$" "$venv/pyvenv.cfg" || return 1
    [ -z "$PYTHON" ] || [ "$(version_of "$PYTHON")" = "$(version_of "$venv/bin/python")" ]
}

try_pip() { # its output goes to $log; PIP_ARGS is split into words on purpose
    PIP_USER=0 "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
        $PIP_ARGS "$@" >"$log" 2>&1
}

pip_install() { # shows the end of what pip said if it fails
    try_pip "$@" || {
        routine='^ *(WARNING: Location|Looking in|Obtaining|Collecting|Downloading|Using|Requirement|Processing|Checking|Preparing)'
        grep -vE "$routine" "$log" | tail -n 25 >&2
        die ".venv is incomplete; all that pip said is in .venv/setup.log"
    }
}

install_torch() {
    torch_version=$(sed -n 's/^torch==//p' "$constraints")
    source=$(torch_source)
    case $source in 'too old: '*) die "the NVIDIA driver is too old for torch ($source): R525 or newer is needed;" \
        "for the CPU alone, GPU= make setup TORCH_INDEX_URL=$cpu_index" ;; esac
    recorded=$(cat "$torch_record" 2>/dev/null || true)
    again=
    [ -z "$recorded" ] || [ "$recorded" = "$source" ] || again=--force-reinstall # versions differ in the local tag only
    rm -f "$torch_record"
    case $source in
    cpu)
        echo "Installing torch $torch_version (CPU build: no NVIDIA GPU here)"
        try_pip --no-deps "torch==$torch_version+cpu" ||
            try_pip --no-deps --retries 2 --timeout 15 --index-url "$cpu_index" "torch==$torch_version+cpu" ||
            {
                echo "No CPU build of torch within reach: installing the default one, which may bring CUDA (gigabytes)"
                pip_install --no-deps "torch==$torch_version"
            } ;;
    default)
        echo "Installing torch $torch_version"
        pip_install --no-deps $again "torch==$torch_version" ;;
    *)
        echo "Installing torch $torch_version from $source"
        pip_install --no-deps $again --index-url "$source" "torch==$torch_version" ;;
    esac
    echo "$source" >"$torch_record"
}

update() {
    started=$(date +%s)
    rm -f "$stamp"
    if ! is_usable; then
        choose_python
        find "$venv" -mindepth 1 ! -path "$lock" -delete
        echo "Creating .venv with Python $(version_of "$python") ($python)"
        "$python" -m venv "$venv" || die ".venv could not be created"
    else
        echo "Updating .venv"
    fi
    install_torch
    echo "Installing moe-train, its dependencies and the test tools"
    pip_install -c "$constraints" --no-deps setuptools # builds the line below, so that nothing else is downloaded for it
    pip_install -c "$constraints" --no-build-isolation -e '.[test]'
    warn_of_compiler
    fingerprint >"$stamp"
    echo "Installed in $(($(date +%s) - started)) s"
}

[ -z "$PYTHON" ] || choose_python
is_current && exit 0
[ -d "$venv" ] || choose_python # before the folder is made: a refusal leaves nothing behind
mkdir -p "$venv"
if command -v flock >/dev/null 2>&1; then
    exec 9>"$lock"
    flock -n 9 || {
        echo "Waiting for another make that is setting up .venv"
        flock 9
    }
    is_current && exit 0
fi
update
