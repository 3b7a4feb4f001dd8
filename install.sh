#!/bin/sh
# Installs sparkinstall in its own environment, then runs `sparkinstall all` with the given options.
#
#   ./install.sh                      set up this DGX Spark
#   ./install.sh --root ./node        rehearse below ./node, on any Linux machine; writes only there,
#                                     to ~/.local (the command) and ~/.cache (downloads)
#   ./install.sh --tool-only          install the command `sparkinstall` and stop
#   ./install.sh --bundle FILE        the same without a network, from a bundle: docs/offline.md
#   ./install.sh --remove             remove that command (run `sparkinstall uninstall` first)
#
# Other options are passed to `sparkinstall all`; an unknown option is an error, and nothing is changed.
set -eu

# Meant for another Python; PYTHONHOME, for one, keeps any other from starting.
for name in $(env | sed -n 's/^\(PYTHON[A-Z0-9_]*\)=.*/\1/p'); do unset "$name"; done

HERE=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
HOME_OF_TOOL=${XDG_DATA_HOME:-${HOME:-}/.local/share}/sparkinstall
TOOL=$HOME_OF_TOOL/tool
COMMAND=${XDG_BIN_HOME:-${HOME:-}/.local/bin}/sparkinstall
# Packages that apt installed only for us, one per line, so that --remove can purge them.
BOOTSTRAPPED=$HOME_OF_TOOL/apt-packages
# Where the uv of a bundle is unpacked while it installs the command.
PLACE_OF_UV=$HOME_OF_TOOL/uv-of-bundle
# Seconds to wait for the lock of apt's package lists.
PATIENCE=300
# The options of `sparkinstall all` with and without a value; a test compares them with the program.
VALUED='--root --config --stack --set --platform --only --skip --ignore --bundle --serve'
PLAIN='--full --partial --keep-old --no-keep-old --yes --json --verbose'
LETTERS=yv
# With --bundle that file.
BUNDLE=
# The folder of the tool's own wheels, uv among them, if they are here already; and the temporary one of this run.
WHEELS=
UNPACKED=
# Set once we create the environment: only then may we restore the one that was moved aside.
making=

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "✗ $1"
    [ $# -lt 2 ] || say "  do    $2"
    exit "${3:-1}"
}

misused() {
    fail "$1" "${2:-see ./install.sh --help}" 2
}

is_one_of() {
    sought=$1
    shift
    for each in "$@"; do
        [ "$each" != "$sought" ] || return 0
    done
    return 1
}

show_help() {
    sed -n '2,/^set -eu/{/^set -eu/d;s/^# \{0,1\}//;p;}' "$0"
    printf '%s\n' "Options of \`sparkinstall all\`: $VALUED (each with a value)," \
        "$PLAIN -y -v; \`sparkinstall all --help\` explains them."
}

# Otherwise a typo such as --roots would be found only by `sparkinstall all`, after the tool was installed.
refuse_unknown() {
    while [ $# -gt 0 ]; do
        case $1 in
            --tool-only | --remove) misused "$1 cannot be combined with other options" "./install.sh $1" ;;
            --*=*) needs_value "${1%%=*}" "${1#*=}" ;;
            --*)
                if ! is_plain "$1"; then
                    needs_value "$@"
                    shift
                fi
                ;;
            -?*) case ${1#-} in *[!$LETTERS]*) misused "unknown option $1" ;; esac ;;
            *) refuse_word "$1" ;;
        esac
        shift
    done
}

is_plain() {
    # shellcheck disable=SC2086 # one word per option
    is_one_of "$1" $PLAIN
}

# An empty value is mostly an unset variable; for --root it would mean the current folder.
needs_value() {
    if is_plain "$1"; then misused "$1 takes no value"; fi
    # shellcheck disable=SC2086
    is_one_of "$1" $VALUED || misused "unknown option $1"
    case ${2:-} in
        '' | -*) misused "$1 needs a value" ;;
    esac
}

refuse_word() {
    # shellcheck disable=SC2086
    if is_one_of "--$1" --tool-only --remove $VALUED $PLAIN; then
        misused "'$1' is not an option" "did you mean --$1?"
    fi
    misused "unexpected argument '$1'"
}

need_checkout() {
    [ -f "$HERE/requirements.lock" ] ||
        fail "install.sh must be in the repository of sparkinstall" "clone the repository and run it there" 2
}

# Find the newest Python for the tool; vLLM gets its own.
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

# No questions, waits for other runs of apt, and English messages that can be matched.
apt_get() {
    as_root env LC_ALL=C DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 \
        apt-get -o DPkg::Lock::Timeout=600 --no-install-recommends "$@"
}

# The timeout above is for dpkg's lock; the lock of the lists is held for minutes after the first boots of a Spark.
update_lists() {
    waited=0
    until output=$(apt_get update -qq 2>&1); do
        case $output in
            *"Could not get lock"* | *"Unable to lock"*) ;;
            *)
                # A source of others may fail: that matters only if the package cannot be installed.
                say "$output"
                say "! apt could not update all of its package lists; continuing with those that it has"
                return 0
                ;;
        esac
        [ "$waited" -lt "$PATIENCE" ] || lists_stayed_held
        [ "$waited" -gt 0 ] || say "apt's package lists are held by $(holder); waiting until they are free ..."
        sleep 5
        waited=$((waited + 5))
    done
    [ -z "$output" ] || say "$output"
}

# The process that apt names in $output; older versions name none.
holder() {
    name=$(printf '%s\n' "$output" | sed -n 's/.*held by process \([0-9]*\) (\(.*\)).*/\2 (process \1)/p' | head -n 1)
    printf '%s\n' "${name:-another program}"
}

lists_stayed_held() {
    fail "apt's package lists were held for $((PATIENCE / 60)) minutes by $(holder)" \
        "wait until it ends (sudo fuser -v /var/lib/apt/lists/lock shows it), then run this again"
}

is_rehearsal() {
    for option in "$@"; do
        case $option in --root | --root=*) return 0 ;; esac
    done
    return 1
}

find_bundle() {
    while [ $# -gt 0 ]; do
        case $1 in
            --bundle=*) BUNDLE=${1#*=} ;;
            --bundle)
                BUNDLE=$2
                shift
                ;;
        esac
        shift
    done
    if [ -z "$BUNDLE" ] || [ -f "$BUNDLE" ]; then return 0; fi
    if [ -e "$BUNDLE" ]; then misused "$BUNDLE is not a regular file" "name the bundle itself"; fi
    misused "there is no bundle $BUNDLE" "name the file that you copied here"
}

# Debian and Ubuntu ship ensurepip in a separate package.
need_ensurepip() {
    # uv creates environments without it.
    if has_wheels || "$PYTHON" -c 'import ensurepip' >/dev/null 2>&1; then return 0; fi
    package=$("$PYTHON" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if is_rehearsal "$@" || ! command -v apt-get >/dev/null 2>&1; then
        fail "$PYTHON cannot create an environment: $package is missing" "sudo apt-get install $package" 4
    fi
    say "Installing $package, which $PYTHON needs to create an environment ..."
    mkdir -p "$HOME_OF_TOOL"
    update_lists
    # A name followed by "[" is only upgraded: it was installed before.
    planned=$(apt_get -s install --no-remove "$package" | sed -n 's/^Inst \([^ ]*\) (.*/\1/p')
    apt_get install -y -qq --no-remove "$package" >&2 ||
        fail "apt could not install $package" "fix apt (sudo apt-get update), then run this again"
    printf '%s\n' "$planned" >>"$BOOTSTRAPPED"
}

# Only a Spark is set up for real; refuse other machines before sudo is used.
need_spark_or_rehearsal() {
    if is_rehearsal "$@"; then return 0; fi
    case " $* " in *" --ignore machine "* | *" --ignore=machine "*) return 0 ;; esac
    if [ -e /etc/dgx-release ] || [ -e /etc/fastos-release ]; then return 0; fi
    if grep -qsx 0x2e12 /sys/bus/pci/devices/*/device; then return 0; fi
    fail "this machine is not a DGX Spark (no GB10 on its PCI bus); nothing was changed" \
        "rehearse below a folder: ./install.sh --root ./node" 4
}

digest_of_checkout() {
    (cd "$HERE" && find sparkinstall templates patches knowledge pyproject.toml requirements.lock -type f ! -name '*.pyc' \
        -exec sha256sum {} + | LC_ALL=C sort | sha256sum | cut -d' ' -f1)
}

# Two runs at once would delete each other's unfinished environment. The parent folder is the lock: it leaves no file
# behind, and the kernel releases it when the last process that holds it ends.
take_turns() {
    above=$(dirname "$HOME_OF_TOOL")
    if [ ! -d "$above" ] || ! command -v flock >/dev/null 2>&1; then return 0; fi
    exec 9<"$above"
    answer=0
    flock -n 9 2>/dev/null || answer=$?
    # Other codes than 1 mean a file system without locks: go on without one.
    [ "$answer" = 1 ] || return 0
    say "Another install.sh is running; waiting for it to finish ..."
    # Short waits, because a Ctrl-C just before flock starts is handled only after it ends.
    until flock -w 1 9 || [ $? != 1 ]; do :; done
}

end_turn() {
    exec 9<&-
}

# Keep the former environment until the new one is complete: a failed update leaves a working command.
install_tool() {
    if is_installed; then
        forget_unpacked
        return
    fi
    # The command may have been removed by another run while this one waited.
    if has_wheels && [ -z "$UNPACKED" ]; then unpack_wheels; fi
    say "Installing the command sparkinstall in $TOOL ..."
    make_folder "$HOME_OF_TOOL"
    move_aside
    [ -z "$UNPACKED" ] || unpack_uv
    make_environment || give_back "$PYTHON could not create an environment in $TOOL"
    run_pip install --quiet ${UNPACKED:+--no-index} --require-hashes -r "$HERE/requirements.lock"
    # Not "$HERE": pip reads a path with `;` or `[` in it as a requirement.
    (cd "$HERE" && run_pip install --quiet --no-deps --no-build-isolation --no-index .)
    write_launcher
    [ -z "$BUNDLE" ] || keep_wheels
    printf '%s\n' "$wanted" >"$TOOL/made-from"
    rm -rf "$TOOL.old"
    forget_unpacked
    making=
}

is_installed() {
    # A bundle brings more than the command.
    [ -z "$BUNDLE" ] || [ -d "$TOOL/own-packages" ] || return 1
    [ "$(cat "$TOOL/made-from" 2>/dev/null)" = "$wanted" ] && "$TOOL/bin/sparkinstall" --version >/dev/null 2>&1
}

make_folder() {
    if problem=$(mkdir -p "$1" 2>&1); then return 0; fi
    forget_unpacked
    fail "the folder $1 cannot be created: ${problem##*: }" "make room there, or make it writable, then run this again"
}

# Every byte of the bundle is checked before anything is created. `sparkinstall all` checks it itself.
check_bundle() {
    if [ -z "$BUNDLE" ]; then return 0; fi
    if [ -n "$only" ] || ! is_installed; then unpack_wheels; fi
}

# `sparkinstall cluster` has put them beside this file.
has_wheels() {
    [ -n "$BUNDLE" ] || [ -d "$HERE/own-packages" ]
}

unpack_wheels() {
    # Read-only, full, or not there: what mktemp says is the reason.
    UNPACKED=$(mktemp -d 2>&1) || {
        problem=$UNPACKED
        UNPACKED=
        fail "no temporary folder can be created: ${problem##*: }" "set TMPDIR to a folder of your own"
    }
    WHEELS=$UNPACKED/own-packages
    if [ -n "$BUNDLE" ]; then unpack_bundle; else ln -s "$HERE/own-packages" "$WHEELS"; fi
}

unpack_bundle() {
    say "Checking the bundle $BUNDLE ..."
    if ! "$PYTHON" -I "$HERE/sparkinstall/payloads/bundle_archive.py" "$BUNDLE" "$WHEELS" "$HERE/requirements.lock"; then
        forget_unpacked
        exit 1
    fi
}

# For `sparkinstall cluster`, which takes the tool to nodes without a network.
keep_wheels() {
    mv "$WHEELS" "$TOOL/own-packages" ||
        give_back "the tool's own packages could not be moved to $TOOL" "free some space there, then run this again"
}

# Beside the tool and not in the temporary folder, from which a careful machine runs no programs (noexec).
unpack_uv() {
    rm -rf "$PLACE_OF_UV"
    if ! output=$("$PYTHON" -I -m zipfile -e "$WHEELS"/uv-*.whl "$PLACE_OF_UV" 2>&1); then
        # The last line of a traceback is the reason.
        problem=$(printf '%s\n' "$output" | tail -n 1)
        give_back "uv, which installs the tool's own packages, could not be unpacked to $PLACE_OF_UV: $problem" \
            "make room there, or make it writable, then run this again"
    fi
    for UV in "$PLACE_OF_UV"/*.data/scripts/uv; do chmod +x "$UV"; done
}

forget_unpacked() {
    [ -z "$UNPACKED" ] || rm -rf "$UNPACKED"
    UNPACKED=
    # Otherwise it is another run's.
    [ -z "$making" ] || rm -rf "$PLACE_OF_UV"
}

bundled_uv() {
    TMPDIR=$PLACE_OF_UV "$UV" --no-config --no-cache --offline "$@"
}

make_environment() {
    if [ -z "$UNPACKED" ]; then
        quietly "$PYTHON" -m venv "$TOOL"
    else
        quietly bundled_uv venv --quiet --no-python-downloads --python "$PYTHON" "$TOOL"
    fi
}

# In place of pip's own script: -I makes Python ignore the user's PYTHON* variables, which can keep it from starting, as
# a folder as stdin does. The first line of that script also cannot name every path.
write_launcher() {
    quoted=$(printf '%s\n' "$TOOL/bin/python" | sed "s/'/'\\\\''/g")
    # shellcheck disable=SC2016 # for the script
    printf '%s\n' '#!/bin/sh' '[ ! -d /dev/stdin ] || exec </dev/null' "exec '$quoted' -I -m sparkinstall \"\$@\"" \
        >"$TOOL/bin/sparkinstall"
}

move_aside() {
    making=yes
    if [ -e "$TOOL/made-from" ]; then
        rm -rf "$TOOL.old"
        mv "$TOOL" "$TOOL.old"
    fi
    rm -rf "$TOOL"
}

# Print a program's output only after it ended: nobody needs the traceback of a program that Ctrl-C ended.
quietly() {
    ended=0
    output=$("$@" 2>&1) || ended=$?
    [ -z "$output" ] || say "$output"
    return "$ended"
}

# Programs contain the path of their environment, so the former one must return to the same path.
put_back() {
    forget_unpacked
    if [ -e "$TOOL/made-from" ]; then return 0; fi
    rm -rf "$TOOL"
    if [ -e "$TOOL.old" ]; then mv "$TOOL.old" "$TOOL"; fi
    rmdir "$HOME_OF_TOOL" 2>/dev/null || :
}

give_back() {
    put_back
    fail "$@"
}

# A run that only waits for another has nothing to restore: the unfinished environment is the other's.
interrupted() {
    trap '' INT TERM HUP
    [ -z "$making" ] || put_back
    forget_unpacked
    say "✗ interrupted; run it again: it continues where this one stopped" || :
    exit 130
}

pip_of_tool() {
    if [ -z "$UNPACKED" ]; then
        "$TOOL/bin/python" -m pip --disable-pip-version-check "$@"
    else
        verb=$1
        shift
        bundled_uv pip "$verb" --python "$TOOL/bin/python" --find-links "$WHEELS" "$@"
    fi
}

run_pip() {
    if quietly pip_of_tool "$@"; then return; fi
    case $output in
        *"No space left"* | *"quota exceeded"*) advice="free some space for $HOME_OF_TOOL, then run this again" ;;
        *Retrying* | *"NewConnectionError"* | *"timed out"*) advice="check the network, then run this again" ;;
        *) advice="see the messages above, then run this again" ;;
    esac
    give_back "the tool's own packages could not be installed" "$advice"
}

link_command() {
    make_folder "$(dirname "$COMMAND")"
    if { [ ! -e "$COMMAND" ] && [ ! -L "$COMMAND" ]; } || is_linked; then ln -sfn "$TOOL/bin/sparkinstall" "$COMMAND"; fi
}

is_linked() {
    [ -L "$COMMAND" ] && [ "$(readlink "$COMMAND")" = "$TOOL/bin/sparkinstall" ]
}

# Print advice, or nothing if plain `sparkinstall` works.
how_to_call() {
    folder=$(dirname "$COMMAND")
    if ! is_linked; then
        printf '%s\n' "! $COMMAND is another program and was kept; the command is $TOOL/bin/sparkinstall"
        return
    fi
    case ":$PATH:" in *":$folder:"*) return ;; esac
    if login_adds "$folder"; then
        printf '%s\n' "! $folder is not on your PATH yet: log in again, or call the command as $COMMAND"
    else
        printf '%s\n' "! $folder is not on your PATH: the command is $COMMAND" \
            "  do    export PATH=\"$folder:\$PATH\"   # add it to your shell's start-up file to keep it"
    fi
}

# bash reads only the first of these at login. Other shells are not covered.
login_adds() {
    case "$1 ${SHELL:-}" in "$HOME/.local/bin "*/bash) ;; *) return 1 ;; esac
    for file in .bash_profile .bash_login .profile; do
        if [ -r "$HOME/$file" ]; then
            grep -q '^[^#]*PATH=.*\.local/bin' "$HOME/$file"
            return
        fi
    done
    return 1
}

# Purge only what apt installed for us, and only if no other package depends on it.
purge_bootstrapped() {
    ours=$(sort -u "$BOOTSTRAPPED" | tr '\n' ' ')
    # shellcheck disable=SC2086 # one word per package
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
    take_turns
    if [ ! -e "$HOME_OF_TOOL" ] && ! is_linked; then
        say "Nothing to remove: the command sparkinstall is not installed here."
        return
    fi
    if is_linked; then rm -f "$COMMAND"; fi
    if [ -s "$BOOTSTRAPPED" ]; then purge_bootstrapped; fi
    rm -rf "$HOME_OF_TOOL"
    say "Removed the command sparkinstall. A node that it set up is undone by \`sparkinstall uninstall\`."
}

provide_tool() {
    PYTHON=$(find_python)
    need_ensurepip "$@"
    wanted="$(digest_of_checkout) $PYTHON"
    check_bundle
    make_folder "$(dirname "$HOME_OF_TOOL")"
    take_turns
    install_tool
    link_command
    end_turn
}

# Repeat at the end how to call the command: the first message has scrolled away.
set_up() {
    [ -n "$advice" ] || exec "$TOOL/bin/sparkinstall" all "$@"
    # Ctrl-C reaches the program itself, which reports it.
    trap : INT TERM HUP
    ended=0
    "$TOOL/bin/sparkinstall" all "$@" || ended=$?
    say "$advice" || :
    exit "$ended"
}

# --remove stands alone, and --tool-only but for a bundle; all other options are for `sparkinstall all`.
read_words() {
    only=
    case "$# ${1:-} ${3:-}" in
        "1 --tool-only " | "1 --remove ") only=$1 ;;
        "3 --tool-only "*) read_bundle_alone "$2" "$3" ;;
        "3 --bundle --tool-only") read_bundle_alone "$1" "$2" ;;
        *) refuse_unknown "$@" ;;
    esac
    find_bundle "$@"
}

read_bundle_alone() {
    [ "$1" = --bundle ] || misused "--tool-only can be combined with --bundle FILE only" "./install.sh --tool-only"
    needs_value "$@"
    only=--tool-only
}

main() {
    [ -n "${HOME:-}" ] || fail "HOME is not set" "run this as a user with a home" 2
    if is_one_of -h "$@" || is_one_of --help "$@"; then
        show_help
        return
    fi
    read_words "$@"
    trap interrupted INT TERM HUP
    if [ "$only" = --remove ]; then
        remove_tool
        return
    fi
    need_checkout
    [ -n "$only" ] || need_spark_or_rehearsal "$@"
    provide_tool "$@"
    advice=$(how_to_call)
    [ -z "$advice" ] || say "$advice"
    [ -n "$only" ] || set_up "$@"
}

main "$@"
