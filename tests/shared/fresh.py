"""A Python process that knows nothing of this one: no environment, and chosen packages not to be imported."""

import os
import subprocess
import sys


def run(code, *arguments, without=()):
    """The standard output of ``code``; its ``sys.argv[1:]`` are ``arguments``."""
    hidden = "".join(f"sys.modules[{name!r}] = None\n" for name in without)
    environment = {"HOME": os.environ.get("HOME", "/"), "PATH": os.environ["PATH"]}  # a home: torch looks up the user
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys\n{hidden}{code}", *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env=environment, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
