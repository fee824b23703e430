"""Runs a program in this project's .venv, which set_up.py makes or renews where it has to. Not a command itself.

Every start comes through this file, so it imports next to nothing; and any Python, however old, must be able to read
it, to say that it is too old. That is why it has no type hints and no f-strings.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
VENV = os.path.join(ROOT, ".venv")
STATE = os.path.join(VENV, "set-up-state")
OLDEST = (3, 11)


def run(program, arguments):
    """Become `program` of the .venv with these arguments; return an exit code where that is not possible.

    On POSIX this process turns into the program, so signals, input and the exit code are the program's own.
    """
    if sys.version_info < OLDEST:
        found = ".".join(str(part) for part in sys.version_info[:3])
        sys.stderr.write(
            "This needs Python %d.%d or newer, and %s is Python %s: run it with a newer one, as in `python3.12 %s`.\n"
            % (OLDEST + (sys.executable, found, sys.argv[0]))
        )
        return 1
    wanted = wanted_state()
    if not is_made(wanted):
        import set_up

        code = set_up.make(wanted)
        if code != 0:
            return code
    command = [path_of(program)] + arguments
    try:
        return replace_process(command)
    except OSError as error:
        sys.stderr.write("%s cannot be started (%s): delete .venv and run this again.\n" % (command[0], error.strerror))
        return 1


def wanted_state():
    """What .venv is made from. The finished .venv keeps a copy, so one comparison tells whether anything changed."""
    python = sys.implementation.cache_tag + getattr(sys, "abiflags", "")
    inputs = [read(os.path.join(ROOT, name)) for name in ("pyproject.toml", "constraints.txt")]
    return b"\n".join([os.fsencode(ROOT), python.encode()] + inputs)


def is_made(wanted):
    """Whether .venv is there, finished, and made from what `wanted` says."""
    return read(STATE) == wanted and os.path.exists(path_of("python"))


def read(path):
    """The bytes of a file, none where there is no such file."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return b""


def path_of(program):
    """Where .venv has a program."""
    if os.name == "nt":
        return os.path.join(VENV, "Scripts", program + ".exe")
    return os.path.join(VENV, "bin", program)


def replace_process(command):
    """Go on as `command`. Windows cannot do that: there this process waits for it and returns its exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name != "nt":
        os.execv(command[0], command)
    import signal
    import subprocess

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the child too, and the child decides what it means
    return subprocess.call(command)
