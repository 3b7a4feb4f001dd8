#!/bin/sh
# Gives sparkinstall an environment of its own, then runs `sparkinstall all` with the options given.
#
#   ./install.sh                      set up this DGX Spark
#   ./install.sh --root ./node        rehearse beneath ./node, on any Linux machine, touching nothing else
#   ./install.sh --tool-only          install the command `sparkinstall` and stop
#   ./install.sh --remove             remove that command again (`sparkinstall uninstall` comes before)
#
# Any other option goes to `sparkinstall all`.
set -eu

HERE=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
HOME_OF_TOOL=${XDG_DATA_HOME:-$HOME/.local/share}/sparkinstall
TOOL=$HOME_OF_TOOL/tool
COMMAND=${XDG_BIN_HOME:-$HOME/.local/bin}/sparkinstall
# What apt installed for us alone, one a line, so that --remove can take it back.
BOOTSTRAPPED=$HOME_OF_TOOL/apt-packages

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "✗ $1"
    [ $# -lt 2 ] || say "  do    $2"
    exit "${3:-1}"
}

need_checkout() {
    [ -f "$HERE/requirements.lock" ] ||
        fail "install.sh has to stand in sparkinstall's own folder" "clone the repository and run it there" 2
}

# The newest Python that is new enough; the tool's own, not the one that vLLM will run with.
find_python() {
    for name in python3.13 python3.12 python3.11 python3; do
        if command -v "$name" >/dev/null 2>&1 &&
            "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
    fail "Python 3.11 or newer is needed to run sparkinstall" "sudo apt-get install python3" 4
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

is_rehearsal() {
    for option in "$@"; do
        case $option in --root | --root=*) return 0 ;; esac
    done
    return 1
}

# Debian and Ubuntu keep the part of Python that fills an environment in a package of its own.
need_ensurepip() {
    "$PYTHON" -c 'import ensurepip' >/dev/null 2>&1 && return
    package=$("$PYTHON" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if is_rehearsal "$@" || ! command -v apt-get >/dev/null 2>&1; then
        fail "$PYTHON cannot make an environment: $package is missing" "sudo apt-get install $package" 4
    fi
    say "Installing $package, which $PYTHON needs to make an environment ..."
    mkdir -p "$HOME_OF_TOOL"
    as_root apt-get update -qq >&2
    planned=$(apt-get -s install --no-install-recommends "$package" | sed -n 's/^Inst \([^ ]*\).*/\1/p')
    printf '%s\n' "$planned" >>"$BOOTSTRAPPED"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >&2 ||
        fail "apt could not install $package" "mend apt (sudo apt-get update), then run this again"
}

digest_of_checkout() {
    (cd "$HERE" && find sparkinstall templates patches pyproject.toml requirements.lock -type f ! -name '*.pyc' \
        -exec sha256sum {} + | sort | sha256sum | cut -d' ' -f1)
}

# Made beside its place and moved there whole: an interrupted installation leaves nothing half done.
install_tool() {
    wanted="$(digest_of_checkout) $PYTHON"
    if [ "$(cat "$TOOL/made-from" 2>/dev/null)" = "$wanted" ] && "$TOOL/bin/sparkinstall" --version >/dev/null 2>&1; then
        return
    fi
    say "Installing the command sparkinstall in $TOOL ..."
    mkdir -p "$HOME_OF_TOOL"
    rm -rf "$TOOL"
    "$PYTHON" -m venv "$TOOL" || fail "$PYTHON could not make an environment in $TOOL"
    run_pip install --quiet --require-hashes -r "$HERE/requirements.lock"
    run_pip install --quiet --no-deps --no-build-isolation --no-index "$HERE"
    printf '%s\n' "$wanted" >"$TOOL/made-from"
}

run_pip() {
    "$TOOL/bin/python" -m pip --disable-pip-version-check "$@" >&2 ||
        fail "the tool's own packages could not be installed" \
            "look at the lines above; with the network mended, run this again"
}

link_command() {
    mkdir -p "$(dirname "$COMMAND")"
    if [ -e "$COMMAND" ] && [ ! -L "$COMMAND" ]; then
        say "! $COMMAND is something else, and stays; the command is $TOOL/bin/sparkinstall"
        return
    fi
    ln -sfn "$TOOL/bin/sparkinstall" "$COMMAND"
    case ":$PATH:" in
        *":$(dirname "$COMMAND"):"*) ;;
        *) say "! $(dirname "$COMMAND") is not on your PATH yet: log in again, or run $COMMAND" ;;
    esac
}

remove_tool() {
    if [ -L "$COMMAND" ] && [ "$(readlink "$COMMAND")" = "$TOOL/bin/sparkinstall" ]; then rm -f "$COMMAND"; fi
    if [ -s "$BOOTSTRAPPED" ]; then
        # shellcheck disable=SC2046 # one word a package is what is wanted
        as_root env DEBIAN_FRONTEND=noninteractive apt-get purge -y -qq $(sort -u "$BOOTSTRAPPED") >&2
    fi
    rm -rf "$HOME_OF_TOOL"
    say "Removed the command sparkinstall. What it set up on a node is taken back by \`sparkinstall uninstall\`."
}

main() {
    case ${1:-} in
        --remove) remove_tool && return ;;
        -h | --help) sed -n '2,/^set -eu/{/^set -eu/d;s/^# \{0,1\}//;p;}' "$0" && return ;;
    esac
    need_checkout
    PYTHON=$(find_python)
    need_ensurepip "$@"
    install_tool
    link_command
    if [ "${1:-}" = --tool-only ]; then return; fi
    exec "$TOOL/bin/sparkinstall" all "$@"
}

main "$@"
