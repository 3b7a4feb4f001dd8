"""A dead man's handle: a timer of systemd that puts things back unless the run says in time that all is well.

It lives in systemd, not in this process: a tool or an ssh session that is killed cannot take it along.
"""

from collections.abc import Iterable, Sequence

from sparkinstall.errors import CommandFailed, Problem
from sparkinstall.system import Reader, System
from sparkinstall.system.local import LocalSystem, staged

HOME = "/run/sparkinstall-dead-man"
"""Gone after a reboot, as the timers are. Root's alone, since root runs what is in it."""

_UNIT = "sparkinstall-dead-man-"
_FIRED = 9
# Whoever moves the folder away first has won: the timer, or the run that confirms.
_RESTORE = """\
mv -T {home}/{name} {home}/{name}.firing || exit 0
cd {home}/{name}.firing || exit 1
while IFS='|' read -r path waiting; do
  rm -f "$waiting"
  if [ -e "files$path" ] || [ -L "files$path" ]; then
    cp -a "files$path" "$waiting" && mv -fT "$waiting" "$path"
  else
    rm -f "$path"
  fi
done < paths
{script}
cd /
rm -rf {home}/{name}.firing
systemctl --no-block stop {unit}.timer
"""
_ARM = """\
set -eu; umask 077
home=$1 name=$2 unit=$3 seconds=$4 script=$5; shift 5
mkdir -p "$home"; chmod 755 "$home"
if systemctl is-active --quiet "$unit.timer"; then systemctl stop "$unit.timer"; fi
waited=0
while [ "$(systemctl show -P ActiveState "$unit.service")" = activating ] && [ $waited -lt 60 ]; do
  sleep 1; waited=$((waited + 1))
done
into=$home/$name
# A folder that is there was neither put back nor confirmed, even if a kill has left it without its timer.
if [ ! -d "$into" ]; then
  rm -rf "$into".*
  into=$into.new
  mkdir "$into" "$into/files"; : > "$into/paths"
  printf '%s' "$script" > "$into/restore"
fi
for line; do
  path=${line%%|*}
  grep -qxF "$line" "$into/paths" && continue
  if [ -e "$path" ] || [ -L "$path" ]; then (cd "$into/files" && cp -a --parents "$path" .); fi
  printf '%s\\n' "$line" >> "$into/paths"
done
new=
[ "$into" = "$home/$name" ] || { new=yes; mv -T "$into" "$home/$name"; }
systemctl reset-failed "$unit.service" 2> /dev/null || true
systemd-run --quiet --collect --unit="$unit" --on-active="$seconds" --timer-property=AccuracySec=100ms \\
  --property=Type=oneshot /bin/sh "$home/$name/restore" || {
  # Nothing will be changed without a timer, so there is nothing to put back one day.
  [ -z "$new" ] || rm -rf "$home/$name"
  exit 1
}
"""
_DISARM = """\
mv -T "$1/$2" "$1/$2.confirmed" || exit 9
systemctl stop "$3.timer"
rm -rf "$1/$2.confirmed"
"""


class Fired(Problem):
    """The confirmation came too late: the timer has put things back."""

    code = "dead-man"


def armed(on: Reader, name: str | None = None) -> bool:
    """Whether the timer `name`, or any, waits for a confirmation."""
    return bool(_waiting(on) if name is None else on.entry(f"{HOME}/{name}"))


def _waiting(on: Reader) -> tuple[str, ...]:
    return tuple(name for name in on.names(HOME) if "." not in name)


def arm(on: System, name: str, restore_script: str, seconds: int, keep: Sequence[str] = ()) -> None:
    """In `seconds` from now, put the files `keep` back as they are now and run `restore_script`, unless disarmed.

    One of that name that is armed still, or was when its run was killed, is set anew with the files and the script
    that it has: what it remembers is the former state, and what is there now may be a killed run's.

    Args:
        restore_script: lines for /bin/sh, run by root.
        keep: absolute paths; one that is not there is removed again.

    Raises:
        Problem: it could not be set; nothing was changed.
    """
    unit = _UNIT + name
    script = _RESTORE.format(home=HOME, name=name, unit=unit, script=restore_script)
    lines = [f"{path}|{staged(path)}" for path in keep]
    try:
        on.run("sh", "-c", _ARM, "sh", HOME, name, unit, str(seconds), script, *lines, root=True)
    except CommandFailed as failure:
        raise Problem(
            "the timer that would put things back could not be set; nothing was changed",
            why=" ".join(failure.tail[-2:]),
            mend="systemd must run here, and this user must be allowed to use sudo",
            log=failure.log,
        ) from failure


def disarm(on: System | LocalSystem, name: str) -> None:
    """All is well with `name`: what there is now stays.

    Raises:
        Fired: too late, the former state is back.
        Problem: the timer could not be stopped.
    """
    answer = on.query("sh", "-c", _DISARM, "sh", HOME, name, _UNIT + name, root=True)
    if answer.code == _FIRED:
        raise Fired(
            f"the {name} was put back as it was: nobody confirmed it in time",
            mend="give it longer with `network.dead_man` in the config, then run the same command again",
        )
    if not answer.ok:
        raise Problem(
            f"the timer that would put the {name} back could not be stopped",
            why=answer.err.strip(),
            mend="run the same command again as a user who may use sudo",
        )


def confirm(on: System | LocalSystem) -> tuple[str, ...]:
    """Keep all that waits for a confirmation; what that was (empty: nothing waits, or it is too late).

    Raises:
        Fired: a timer was faster.
    """
    names = _waiting(on)
    for name in names:
        disarm(on, name)
    return names


def fire(on: System | LocalSystem, name: str) -> bool:
    """Put things back now; whether that was done. systemd does it: it goes on though the run is killed."""
    on.query("systemctl", "start", f"{_UNIT}{name}.service", timeout=120, root=True)
    # Whatever systemd answers, who moved the folder away has done it: the timer may have been faster.
    return not armed(on, name)


def quoted(words: Iterable[str]) -> str:
    """`words` as one line for /bin/sh."""
    import shlex

    return shlex.join(words)
