#!/bin/sh
# Gives sparkinstall an environment of its own, then runs `sparkinstall all` with the options given.
#
#   ./install.sh                      set up this DGX Spark
#   ./install.sh --root ./node        rehearse beneath ./node, on any Linux machine; besides it only
#                                     ~/.local (the command) and ~/.cache (downloads) are written to
#   ./install.sh --tool-only          install the command `sparkinstall` and stop
#   ./install.sh --remove             remove that command again (`sparkinstall uninstall` comes before)
#
# Any other option goes to `sparkinstall all`.
set -eu

HERE=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
HOME_OF_TOOL=${XDG_DATA_HOME:-${HOME:-}/.local/share}/sparkinstall
TOOL=$HOME_OF_TOOL/tool
COMMAND=${XDG_BIN_HOME:-${HOME:-}/.local/bin}/sparkinstall
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

# No questions, patience with other runs of apt, and nothing is removed to make room.
apt_get() {
    as_root env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 \
        apt-get -o DPkg::Lock::Timeout=600 --no-install-recommends "$@"
}

is_rehearsal() {
    for option in "$@"; do
        case $option in --root | --root=*) return 0 ;; esac
    done
    return 1
}

# Debian and Ubuntu keep the part of Python that fills an environment in a package of its own.
need_ensurepip() {
    if "$PYTHON" -c 'import ensurepip' >/dev/null 2>&1; then return 0; fi
    package=$("$PYTHON" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if is_rehearsal "$@" || ! command -v apt-get >/dev/null 2>&1; then
        fail "$PYTHON cannot make an environment: $package is missing" "sudo apt-get install $package" 4
    fi
    say "Installing $package, which $PYTHON needs to make an environment ..."
    mkdir -p "$HOME_OF_TOOL"
    apt_get update -qq >&2 || fail "apt could not read its package lists" "sudo apt-get update shows why"
    # A name followed by "[" would only be upgraded: it was here before us.
    planned=$(apt_get -s install --no-remove "$package" | sed -n 's/^Inst \([^ ]*\) (.*/\1/p')
    apt_get install -y -qq --no-remove "$package" >&2 ||
        fail "apt could not install $package" "mend apt (sudo apt-get update), then run this again"
    printf '%s\n' "$planned" >>"$BOOTSTRAPPED"
}

# A real set-up is for a Spark alone; everything else is told so before sudo is used for anything.
need_spark_or_rehearsal() {
    if is_rehearsal "$@"; then return 0; fi
    case " $* " in *" --ignore machine "* | *" --ignore=machine "*) return 0 ;; esac
    if [ -e /etc/dgx-release ] || [ -e /etc/fastos-release ]; then return 0; fi
    if grep -qsx 0x2e12 /sys/bus/pci/devices/*/device; then return 0; fi
    fail "this machine is no DGX Spark (no GB10 on its PCI bus); nothing was changed" \
        "rehearse it beneath a folder: ./install.sh --root ./node" 4
}

digest_of_checkout() {
    (cd "$HERE" && find sparkinstall templates patches knowledge pyproject.toml requirements.lock -type f ! -name '*.pyc' \
        -exec sha256sum {} + | LC_ALL=C sort | sha256sum | cut -d' ' -f1)
}

# The former one is kept until the new one is whole: a failed update leaves a working command.
install_tool() {
    wanted="$(digest_of_checkout) $PYTHON"
    if [ "$(cat "$TOOL/made-from" 2>/dev/null)" = "$wanted" ] && "$TOOL/bin/sparkinstall" --version >/dev/null 2>&1; then
        return
    fi
    say "Installing the command sparkinstall in $TOOL ..."
    mkdir -p "$HOME_OF_TOOL"
    if [ -e "$TOOL/made-from" ]; then
        rm -rf "$TOOL.old"
        mv "$TOOL" "$TOOL.old"
    fi
    rm -rf "$TOOL"
    "$PYTHON" -m venv "$TOOL" || give_back "$PYTHON could not make an environment in $TOOL"
    run_pip install --quiet --require-hashes -r "$HERE/requirements.lock"
    run_pip install --quiet --no-deps --no-build-isolation --no-index "$HERE"
    printf '%s\n' "$wanted" >"$TOOL/made-from"
    rm -rf "$TOOL.old"
}

# A program's paths are those of its environment: the former one can only come back to its own place.
give_back() {
    if [ -e "$TOOL.old" ]; then
        rm -rf "$TOOL"
        mv "$TOOL.old" "$TOOL"
    fi
    fail "$@"
}

run_pip() {
    "$TOOL/bin/python" -m pip --disable-pip-version-check "$@" >&2 ||
        give_back "the tool's own packages could not be installed" \
            "look at the lines above; with the network mended, run this again"
}

link_command() {
    mkdir -p "$(dirname "$COMMAND")"
    if { [ -e "$COMMAND" ] || [ -L "$COMMAND" ]; } && [ "$(readlink "$COMMAND")" != "$TOOL/bin/sparkinstall" ]; then
        say "! $COMMAND is something else, and stays; the command is $TOOL/bin/sparkinstall"
        return
    fi
    ln -sfn "$TOOL/bin/sparkinstall" "$COMMAND"
    case ":$PATH:" in
        *":$(dirname "$COMMAND"):"*) ;;
        *) say "! $(dirname "$COMMAND") is not on your PATH yet: log in again, or run $COMMAND" ;;
    esac
}

# Only what apt installed for us, and only if nothing else would go with it.
purge_bootstrapped() {
    ours=$(sort -u "$BOOTSTRAPPED" | tr '\n' ' ')
    # shellcheck disable=SC2086 # one word a package is what is wanted
    for name in $(apt_get -s purge $ours | sed -n 's/^\(Purg\|Remv\) \([^ ]*\).*/\2/p'); do
        case " $ours" in *" $name "*) ;; *)
            say "! kept the packages $ours: $name needs them"
            return
            ;;
        esac
    done
    # shellcheck disable=SC2086
    apt_get purge -y -qq $ours >&2 || say "! apt could not remove $ours: sudo apt-get purge $ours"
}

remove_tool() {
    if [ -L "$COMMAND" ] && [ "$(readlink "$COMMAND")" = "$TOOL/bin/sparkinstall" ]; then rm -f "$COMMAND"; fi
    if [ -s "$BOOTSTRAPPED" ]; then purge_bootstrapped; fi
    rm -rf "$HOME_OF_TOOL"
    say "Removed the command sparkinstall. What it set up on a node is taken back by \`sparkinstall uninstall\`."
}

main() {
    [ -n "${HOME:-}" ] || fail "HOME is not set" "run this as a user with a home" 2
    tool_only=
    case ${1:-} in
        --remove)
            remove_tool
            return
            ;;
        -h | --help)
            sed -n '2,/^set -eu/{/^set -eu/d;s/^# \{0,1\}//;p;}' "$0"
            return
            ;;
        --tool-only) tool_only=yes ;;
    esac
    need_checkout
    [ -n "$tool_only" ] || need_spark_or_rehearsal "$@"
    PYTHON=$(find_python)
    need_ensurepip "$@"
    install_tool
    link_command
    [ -z "$tool_only" ] || return 0
    exec "$TOOL/bin/sparkinstall" all "$@"
}

main "$@"
