"""How suspicious a line is, by its shape alone: no list of known failures."""

import re

from sparkinstall.diagnose import tracebacks
from sparkinstall.diagnose.lines import KERNEL, Line
from sparkinstall.diagnose.tracebacks import Role

# The texts of the system's error numbers, as C, Go and Rust print them. Those of the second list stand in good logs
# too, so they count only in what says that it failed.
_ANSWERS = (
    "Operation timed out",
    "Connection timed out", "No route to host", "Network is unreachable", "Invalid argument", "Cannot allocate memory",
    "Device or resource busy", "Input/output error", "No such device", "Operation not permitted",
    "Address already in use", "Resource temporarily unavailable", "Too many open files", "Read-only file system",
    "Structure needs cleaning", "Stale file handle", "Remote I/O error", "Text file busy", "No buffer space available",
    "Host is down", "Cannot assign requested address", "Disk quota exceeded", "Argument list too long",
    "Bad file descriptor",
)  # fmt: skip
_OTHER_ANSWERS = (
    "Operation not supported", "Permission denied", "Protocol error", "Bad message", "Bad address", "Is a directory",
    "Not a directory", "Value too large for defined data type", "Function not implemented", "Exec format error",
    "Transport endpoint is not connected", "Too many levels of symbolic links", "File name too long", "No such process",
    "Numerical result out of range", "Invalid cross-device link",
)  # fmt: skip

WORDS = (
    "rror", "ERROR", "xception", "FATAL", "Fatal", "fatal", "CRITICAL", "core dumped", "egmentation fault", "egfault",
    "panic", "NCCL WARN", "ain process exited", "Failed with result", "bort", "cannot open shared object", "what(): ",
    "terminate called", "BUG: ", "SError", "critical temp", "timeout, ", "Oops", "Unable to handle", "E: ",
    "command not found", "ssertion", "blocked for more than", "soft lockup", "hard LOCKUP", "undefined symbol",
    "No such file or directory", "Killed", "NVRM: ", "Exit: ", "Unsupported: ", "Call Trace:", "Bus error",
    "Illegal instruction", "mlx5_core ", " is required", "DPC: ", "Failed: ", " failed: ", "double free", "corrupted ",
    "): invalid", "stack smashing", "Caused by: ", "Memory failure: ", "nvme ", "page allocation failure",
    "PAGE_FAULT", "arm-smmu", "failed command", "exception Emask", "symbol", "ailed to start",
    "unknown flag", "unknown shorthand", "unknown option", "unknown command", "curl: (", "% full", ": denied",
    "CANCELED", "Canceled", ".yaml:", ".yml:", ".toml:", "nvalid YAML", "nvalid JSON", "yaml: line",
    "dditional propert", " must be a", "RTNETLINK", "annot find device", "mount error", "CMake Error",
    "docker: error", "docker: invalid", "[emerg]", "[crit]", "-E- ", "make: *** ",
    "OCI runtime", "toomanyrequests", "ailed: ",
    "ould not ", "ouldn't ", "nable to ", "ailed to ", "ASSERT", "ssert(", "failed with exit code",
    "LLVM ERROR", "*ERROR*", "not enough slots", " was unable", "bad_alloc", ": cannot ", "ABORT", "usercopy",
    "write attempt", "corruption", "protection fault", "detected stall", "pthread_create", " detected ***", "etrying",
    "etry ", "etries", "ttempt", " tries", "gave up", "iving up", "nconsistency ", "libc++abi",
    "No module named", "an't open ", ": not found", "*** SIG", "cannot find -l", "undefined reference",
    "unbound variable", "bad substitution", "Fail : ", "yntax error", "modify QP", "{\"error\"",
    "Timeout: ", "stack trace above", "Refused: ", "Interrupt: ", "did not run succ", ": no such file or dir",
    *(each[1:] for each in (*_ANSWERS, *_OTHER_ANSWERS)),
)  # fmt: skip
"""Every suspicious line outside a traceback contains one of these."""

MOST, STRONG, SOME, WEAK = 4, 3, 2, 1
_SHORT = 40


def _any(*shapes: str, ignore_case: bool = False) -> re.Pattern[str]:
    return re.compile("|".join(shapes), re.IGNORECASE if ignore_case else 0)


# What may stand behind such an answer: its number, and the end of a sentence.
_END = r"(?: \(\d+\))?[.\"')]*$"
# Shapes of a message, each with its weight; a line without any is not suspicious.
_SHAPES = (
    (
        STRONG,
        _any(
            # an exception of Python, of any library
            r"Exception: \S",
            r"(?:[\w.]+\.)?_?[A-Z]\w*(?:Error|Exception|Exit|Unsupported|Failure)\b(?:: \S|:\s*$|\(['\"]|$)",
            r"(?:[a-z_]\w*\.)+[A-Z]\w+: \S",
            # of C++, and a process that crashes
            r"\s*what\(\): ",
            r"terminate called\b",
            r"Fatal Python error: ",
            r"\S*python[\d.]*: (?:No module named \S|can't open file |Error while finding module)",
            r".*(?:\b[Ss]eg(?:mentation )?fault\b|\bcore dumped|\bBus error\b|\bIllegal instruction\b)",
            r".*\bpanic(?:ked)?\b",
            r".*(?:\bFATAL\b|\b[Ff]atal +(?:error\b|: ))",
            r".*(?:cannot open shared object|undefined symbol: |\b[Aa]ssertion\b.* failed)",
            r"Assertion error\b",
            r"Failed: (?!(?:\d+|none)\b)\S",
            # the end of another process's error, of which the beginning stands above
            r"(?!.*Worker failed with).{8,400}['\"], please check the stack trace above",
            # of glog, and of what says the file and the line of an assertion
            r"(?:.{0,120}[\]:] +|\s*)Check failed: \S",
            r"(?:\S+:\d+:? )?(?:[\w:~]+: )?\w*(?:ASSERT|[Aa]ssert)\w*\(.*\):? fail",
            r"\w+_ASSERT: \S+:\d+: \S",
            r"(?:double free or corruption|corrupted (?:size|double|unsorted))",
            r"(?:malloc|free|realloc|munmap_chunk)\(\): ",
            r"\*\*\* (?:stack smashing|[\w ]+ detected \*\*\*|SIG[A-Z]+ received)",
            # of the C library, the loader and OpenMP
            r"(?:[\w./+-]+: )*(?:symbol lookup|relocation) error: \S|Inconsistency detected by ld|Fatal glibc error: ",
            r"(?:OMP: Error #\d|libgomp: |libc\+\+abi: )\S?|.*\bpthread_create failed",
            r".*[:.] ABORT(?:ED|ING)?[.!]?$|cannot allocate memory (?:for|in) \S",
            # of a shell, apt and dpkg
            r"[\s\d.]*CMake Error\b",
            r"\W*[\w .()-]{4,80} did not run successfully\b",
            r"(?:\[[\d/:. -]+\] )?\[[\w.-]+\] \[E\] (?:Error in\b|.*\b[Ff]ailed to\b)",
            # of docker and the kubelet
            r"(?:[\w-]+: )?-E- \S|docker: (?:[Ee]rror\b|invalid )|OCI runtime \w+ failed: \S|toomanyrequests: ",
            r"[Pp]ermission denied\b",
            r"E: (?:[A-Z][\w-]+,? \w|dpkg |flAbsPath)",
            r"sudo: a (?:password|terminal) is required",
            r"dpkg: error\b",
            r"exec .*: exec format error$",
        ),
    ),
    (
        SOME,
        _any(
            r"(?:[\w./+()-]+(?:[:(][\d:,]+\)?)?:? )?(?:[Ee]rror|ERROR)(?: [\w ]{1,40})?: \S",
            r"nvcc +error",
            # of asyncio, below "Future exception was never retrieved"
            r"(?:future: )?<(?:Future|Task) [^>]*\bexception=\w+\(['\"]",
            # of a linker, of tools that measure RDMA, of a server's answer
            r".*(?:\bld(?:\.\w+)?: cannot find -l|undefined reference to )",
            r".*(?:ailed to modify QP\b|got completion with error)",
            r"\{\s*\"error\"\s*:\s*[{\"]",
            # of a shell, which goes on after it
            r"(?:[\w./+-]+: )+(?:line )?\d+: .*(?:unbound variable$|parameter not set$|bad substitution|yntax error\b)",
            r"(?:[\w./+-]+: )*(?:line \d+: )?[\w./+-]+: command not found$|[\w./+-]+:(?:\d+:)? command not found: \S",
            r"(?:[\w./+-]+: )+(?:line )?\d+: (?:cannot (?:open|create) \S+: \S|[Cc]an't open \S)",
            r"wget: server returned error: \S",
            r"(?:(?:[\w./+-]+|['\u2018][\w./+-]+['\u2019]|line \d+): )+"
            r"(?:not found|No such file or directory|[Pp]ermission denied)$",
            # of programs in Go, whose calls of the system are named in small letters
            r"(?:open|l?stat|mkdir|chdir|exec|fork/exec|rename|readlink|unlinkat) /\S+: (?:no such file or directory"
            r"|permission denied|not a directory|is a directory|exec format error|text file busy)$",
            # of curl, of what read a file and names the place in it, of Ray
            r"(?:[\w./+-]+: )?unknown (?:(?:shorthand )?flag|option|command)\b",
            r"(?:.{0,80}: )?yaml: line \d+: \S",
            r"(?:services|networks|volumes|secrets)\.[\w.-]+ .*(?:is required|must be|not allowed)",
            # of tools of the system, which write no level
            r"Cannot find device |RTNETLINK answers: (?!File exists)|mount error\(\d+\): |NVIDIA-SMI couldn't ",
            r"Failed to (?:enable|disable|unmask|restart|start) (?:unit|\S+\.(?:service|socket|mount|timer))\b",
            r"\s*(?:[\w-]+: )?(?:Couldn't (?:connect to \S+[: ]\d|get device attributes)|Unable to Connect the )",
            r"[a-z][\w.-]+: failed to \w+ [^:]{2,60}: \S",
            r"failed to (?:copy|solve|pull|extract|resolve) ?[^:]{0,60}: \S",
            r"curl: \((?!7\)|28\)|52\)|56\) (?!CONNECT))\d+\) ",
            r"\S+\.(?:ya?ml|json|toml|conf):\d+(?::\d+)?: (?![Ww]arning)\S",
            r".*\bis over \d+(?:\.\d+)?% full\b",
            r"(?:failed to start|unable to configure) .*[: ]\S",
            r"\s*Caused by: \S",
            r"[\w.-]+: (?:aborting\b|error - \S)|\s*std::bad_alloc\b|\s*Fail : \S",
            r"(?:cp|mv|ln|tar|rsync|install|chmod|chown|mkdir|touch|dd|cat|stat): (?:cannot|can't|failed to) .*: \S",
            r"LLVM ERROR: \S|There are not enough slots available|(?:ORTE|PRTE|mpi(?:run|exec)) was unable to ",
            r".*\*\*\* \[.*\] Error \d|make: \*\*\* \S|unable to prepare context: \S|.*\bTest NCCL failure \S+:\d+ '",
            # what the operating system answered, at the end of a message
            rf".*: (?i:{'|'.join(_ANSWERS)}){_END}",
            rf"(?i:(?=.*\b(?:failed|unable|cannot|could not|couldn't)\b).*: (?:{'|'.join(_OTHER_ANSWERS)}){_END})",
            r"(?:[\w./+-]+: )+(?:\[\w+\] )?\w+ \"[^\"]+\" failed: \S",
            r".*(?:[Mm]ain process exited|\bAborted\b|\bKilled$|Internal error: |: Killed\b)",
            # of git, Ansible and many scripts, but not what tells a build that it is in no repository
            r"fatal: (?!not a git |no (?:names|tags|annotated)|ambiguous argument|(?:detected )?(?:dubious|unsafe) )\S",
            # of udev: a driver that it could not load; its other programs fail in good logs too
            r"(?:[\w.:@-]+: )?Process '(?:/\S*/)?(?:modprobe|insmod|nvidia-\S+) [^']*' failed with exit code [1-9]",
        ),
    ),
    # what only says that something ended
    (WEAK, _any(r" *[A-Za-z][\w ]{2,40} failed: [A-Z]\w+ \S", r".*Failed with result")),
)
_KERNEL = (
    (
        MOST,
        _any(
            "BUG: |Oops\\b|Internal error: |Unable to handle kernel|Kernel panic|watchdog: BUG",
            ".*soft lockup",
            ".*hard LOCKUP",
            ".*Kernel memory (?:exposure|overwrite) attempt",
            ".*\\bgeneral protection fault|list_(?:add|del) corruption|.*\\brcu\\w*: .*detected stall",
        ),
    ),
    (
        STRONG,
        _any(
            "INFO: task .* blocked for more than",
            "NVRM: Xid",
            "NVRM: .*(?:fail|error|fallen|annot |unable|timed out|mismatch)",
            "Out of memory",
            ".*I/O error",
            "EXT4-fs error",
            "(?!.*(?:corrected|events logged|from APEI|info\\b)).*\\[Hardware Error\\]",
            "\\[drm:.*nvidia.*\\*ERROR\\*",
            "SError",
            ".*IO_PAGE_FAULT",
            "arm-smmu.*(?:fault|timeout|event 0x10 received)",
            "ata\\d.*(?:failed command|exception Emask|error: )",
            "\\w+: (?:disagrees about version of|Unknown) symbol",
            "Memory failure: ",
            "nvme\\S* \\S+ (?:controller is down|Disabling device)",
            ".*critical temperature",
            ".*page allocation failure: order:",
            ignore_case=True,
        ),
    ),
    (
        SOME,
        _any(
            "mlx5_core (?!.*severity=Correct).*(?:timed? ?out|error|fail|health)",
            "(?:nvidia|nvme|r8127|r8169|igc|mt79\\w+)\\b.*\\bprobe .*failed with error",
            ".*\\bAER: .*(?:Fatal|Uncorrect|can't recover)",
            ".*\\bDPC: containment",
            ".*nvme\\S* .*timeout,",
            ignore_case=True,
        ),
    ),
)
# One sentence of a small program that logs no levels: what it could not do, and nothing of what it does instead. What
# it does not find, reach or load may not be needed.
_COULD_NOT = re.compile(
    r"(?:Couldn't|Could not|Unable to|Failed to) "
    r"(?:(?:re)?create|allocate|initiali[sz]e|register|map|bind|attach|modify|launch) [^.;,]{2,80}\.?$"
    r"|(?:Couldn't|Could not|Unable to) (?:get|open|access|read|write|query|set|mount|run) [^.;,]{2,80}\.?$"
)
# A program's last words, as its logger calls them.
_LAST_WORDS = re.compile(r"\b(?:FATAL|FATA)\b|\[?F\d{4} \d\d:|\[(?:emerg|crit)\]")
# Python's own words for an end on request.
_ASKED_FOR = re.compile(r"(?:[\w.]+\.)?(?:KeyboardInterrupt|SystemExit|CancelledError|GeneratorExit|StopIteration)\b")
# Nothing has failed, whoever says it.
_NOT_FATAL = (
    r"\b(?:harmless|not fatal|non-fatal|safe to ignore|can be ignored|recovered)\b",
    # A server that is not up yet; CuTe DSL on a part of it that is not installed.
    r"\bdial tcp \S+ connect: connection refused|while connecting to upstream|error during package walk",
)
_HANDLED = _any(
    *_NOT_FATAL,
    r"\b(?:retry(?:ing)?\b|fall(?:s|ing)? ?back|fallback|ignor(?:ed|ing)\b|skipp(?:ed|ing)\b)",
    r"\b(?:disabling\b|will be disabled|0 errors)",
    r"\b(?:no|without) errors?\b",
    # a number of statistics, a patch's text of CMake, Python's word for no exception
    r"^(?:standard|relative|absolute|mean|average|max(?:imum)?|rms) (?:\w+ )?error\b"
    r"|\bmessage\((?:FATAL|SEND)_ERROR|^NoneType: None$",
    # vLLM about a kernel that was not tuned for this GPU, datasets about one that it has
    r"\bConfig file not found at \S*E=\d+,N=\d+|^Using the latest cached version of the (?:dataset|module)",
    # pip's note about packages that it did not install; Arm's SVE, which need not exist
    r"pip's dependency resolver does not currently",
    r"Error in cpuinfo: prctl\(PR_SVE",
    r"\bwill not be (?:exported|collected|reported|recorded)\b",
    # ldconfig about a library that was copied without its links, which it reads all the same
    r"^(?:\S*/)?ldconfig(?:\.real)?: \S+ is not a symbolic link",
    # NCCL, which goes on with sockets, or without a function that an older library of the card lacks
    r"Failed to open libibverbs",
    r"\bdlv?sym failed on \w",
    # vLLM before the traceback that it prints next, or of what it did at the end
    r"^Error executing method \S+?\.? This might cause deadlock|^Dumping (?:input data|scheduler)",
    # docker on a request that it refuses, and on a container that has ended
    r"\bHandler for (?:GET|HEAD|POST|PUT|DELETE) /|closed fifo",
    ignore_case=True,
)
# What makes an exception that ends a traceback harmless: one that names a fallback did not take it.
_HARMLESS = _any(*_NOT_FATAL, r"\b(?:retrying|falling back)\b", ignore_case=True)
# An exception that only passes on that something else failed: a program, a worker.
_PASSED_ON = re.compile(
    r"[\w.]+: (?:Caught \w+ in |[Cc]ommand .*(?:returned non-zero|failed with)"
    r"|(?!Process ').{0,80}\bfailed with (?:return|exit) code \d)"
)
# A place in the stack of a program in C++, below what it says.
_PLACE = re.compile(r"\s*frame #\d+: ")
# What vLLM prints of its requests when the engine ends, and what takes a model's answer apart, not options: that may
# be malformed, which is no failure of the server.
_PARSING = re.compile(r"\[(?![\w/]*(?:arg|config)\w*parser)(?:[\w/]*parser\w*|[\w/]*dump_input)\.py:\d+\]")
# An error in words, and words about one that is not there.
_OF_AN_ERROR = re.compile(
    r"\[Errno \d+\] "
    r"|(?i:\b(?:error|failed|failure|unable to|cannot|could not|couldn't|denied|refused|timed out|killed|died)\b)"
)
_OF_NONE = _any(
    r"(?:Future|Deprecation|User|Runtime)Warning\b|\b(?:no|without|0|any|not an?) (?:errors?|failures?)\b",
    r"\b(?:may|might|could(?! not)|can|if|when|where|should|would|to avoid) .{0,60}\b(?:errors?|fail(?:ed|ure)?)\b",
    r"pip's dependency resolver does not currently|Error in cpuinfo: prctl\(PR_SVE",
    r"harmless|safe to ignore|can be ignored|originates from a subprocess|^\s*(?:note|hint|tip)\b",
    r"^Error executing method ",
    ignore_case=True,
)
_NAMED_WITHIN = re.compile(
    r"(?i:\b(?:fail(?:ed|ure)?|errors?|could not|couldn't|unable to|cannot|crashed|exception)\b)[^:]{0,80}: ['\"]?"
    r"(?P<error>(?:[a-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): (?:[^\\\n]|\\(?!n))+)"
)
_ATTEMPT = re.compile("[Rr]etr(?:y|ies)|[Aa]ttempt| tries| [Uu]p ")
# The last of the attempts that a program makes, at whatever level it tells of it, and that it failed.
_USED_UP = re.compile(
    r"(?i:(?=.*\b(?:fail(?:ed|ure|s)?|error|refused|timed out|unreachable|unable|cannot|could not|no route)\b)"
    r".*\b(?:retry(?:ing|\s+count|\s+attempt)?|retries|attempts?|tries|try)\b:? ?[(\[#]?"
    r"(?P<last>[2-9]|[1-9]\d+)(?: ?/ ?| of | out of )(?P=last)\b)"
)
# What a program says that goes on without it.
_GOES_ON = re.compile(r"(?i)\b(?:fall(?:s|ing)? back|fallback|skipp(?:ed|ing)|continu(?:es?|ing)|instead|disabl|ignor)")
_NO_MORE = re.compile(
    r"(?i:(?!.*\b(?:if|when|until|unless|once|before) )"
    r".*\b(?:(?:max(?:imum)?|all|retry|retries)\b.{0,30}\b(?:retries|attempts|tries|count|limit)\b.{0,12}"
    r"\b(?:exceeded|exhausted|reached|failed|used up)|(?:giv(?:ing|es)|gave) up (?:after|on|waiting|retrying)\b"
    r"|(?:exceeded|exhausted|reached)\b.{0,24}\b(?:retries|attempts|retry count|tries)\b))"
)
# Programs of the desktop and the system that have no part in this.
_OTHERS = _any(
    r"(?<!\S)(?:sshd|avahi-daemon|gnome-\S+|gdm\S*|gsd-\S+|dbus-\S+|NetworkManager|snapd|pipewire|wireplumber|pulseaudio|cups\S*)\[",
    # A unit that loads a module: what is needed at boot is known by name.
    r"(?<!\S)modprobe\[",
    r"(?<!\S)(?:polkitd|tracker-\S+|systemd-\w+|rtkit-daemon|wpa_supplicant|bluetoothd|packagekitd|PackageKit|fwupd|chronyd)\[",
    r"(?<!\S)(?:cron|CRON|thermald|udisksd|upowerd|ModemManager|colord|xdg-\S+|evolution-\S+|firefox\S*|chrome|Xorg|xrdp\S*)\[",
)
# Units of the desktop, of which systemd reports an end.
_OTHER_UNITS = re.compile(
    r"(?:snap\.(?!nvidia|docker)|app-|user@|session-|gnome-|org\.(?:gnome|freedesktop)\.|gvfs|tracker-|evolution-|xdg-|pipewire|wireplumber|pulseaudio"
    r"|apport|whoopsie|update-notifier|snapd|cups|ModemManager|motd-news|ubuntu-advantage|esm-cache|apt-news|fwupd|packagekit|kerneloops)"
    r"[\w.@\\:-]*(?:\.(?:service|scope|socket|timer))?: "
)


def weight(line: Line, role: Role, number: int) -> int:
    """Return 0 (not suspicious) to `MOST`, which is for the first exception of a chain; `number` is the line's."""
    if role.kind == "frame" or _OTHERS.search(line.who):
        return 0
    message = said(line)
    if "systemd[" in line.who and _OTHER_UNITS.match(message):
        return 0
    return _by_shape(line, role, number, message) or (SOME if is_used_up(message) else 0)


def _by_shape(line: Line, role: Role, number: int, message: str) -> int:
    if line.level == "info" or not message.strip() or tracebacks.HEAD in message or _PLACE.match(message):
        return 0
    handled = _HARMLESS if role.kind == "exception" else _HANDLED
    if handled.search(message) or _ASKED_FOR.match(message):
        return 0
    message = message.strip() if role.kind == "exception" else message
    if KERNEL in line.who.split():
        return _first(_KERNEL, message)
    is_of_request = tracebacks.REFUSING.search(line.prefix) or _PARSING.search(line.prefix)
    if is_of_request and (role.kind != "exception" or tracebacks.REFUSED.match(message)):
        return 0
    if _PASSED_ON.match(message):
        return WEAK
    if role.kind == "exception":
        return 0 if line.level == "warning" else MOST if role.first == number else STRONG
    if "NCCL WARN" in line.text:
        return STRONG
    if line.level == "warning":
        return 0
    # What announces the next line, or continues the one before, tells nothing itself.
    is_whole = (
        re.search(r"\w", message)
        and not message.startswith(" ")
        and not (len(message) < _SHORT and message.rstrip().endswith(":"))
    )
    is_weak = line.level == "error" or (not line.level and "systemd[" not in line.who and _COULD_NOT.match(message))
    if line.level == "error" and _LAST_WORDS.search(line.prefix):
        return STRONG
    return _first(_SHAPES, message) or (WEAK if is_weak and is_whole else 0)


def is_set_aside(line: Line, role: Role) -> bool:
    """Return whether a line tells of an error that the program handled or that it only warns of."""
    message = said(line)
    if role.kind == "frame" or _OTHERS.search(line.who) or tracebacks.HEAD in message or _PLACE.match(message):
        return False
    if line.level == "info" and named_within(message) is None:
        return False
    if tracebacks.REFUSING.search(line.prefix) or _PARSING.search(line.prefix) or _ASKED_FOR.match(message):
        return False
    return _OF_AN_ERROR.search(message) is not None and not _OF_NONE.search(message)


def is_harmless(line: Line) -> bool:
    """Return whether a line tells of what was handled, refuses a request, or is of a program that has no part."""
    message = said(line)
    is_other = _OTHERS.search(line.who) or ("systemd[" in line.who and _OTHER_UNITS.match(message))
    is_of_request = tracebacks.REFUSING.search(line.prefix) or _PARSING.search(line.prefix)
    is_handled = _HANDLED.search(message) or _OF_NONE.search(message) or _ASKED_FOR.match(message)
    return bool(is_other or is_of_request or is_handled or tracebacks.HEAD in message)


def named_within(message: str) -> re.Match[str] | None:
    """Return the exception that a message of another program repeats."""
    return _NAMED_WITHIN.search(message)


def goes_on(message: str) -> bool:
    """Return whether a program says that it goes on without something."""
    return _GOES_ON.search(message) is not None


def is_used_up(message: str) -> bool:
    """Return whether a program says that the last of its attempts has failed."""
    if not _ATTEMPT.search(message) or _GOES_ON.search(message):
        return False
    return bool(_USED_UP.match(message) or _NO_MORE.match(message))


def said(line: Line) -> str:
    """Return the part of a message that the program itself says."""
    return line.message[: max(0, line.quoted - len(line.text) + len(line.message))]


def _first(shapes: tuple[tuple[int, re.Pattern[str]], ...], message: str) -> int:
    return next((weight for weight, shape in shapes if shape.match(message)), 0)
