"""One run of a script in a process of its own. The standard library only, so that a Ray worker need not load torch."""

import os
import signal
import subprocess
import time
from pathlib import Path

from utils.files import locked


def unfinished_run(folder):
    """Whether a run that keeps its state in ``folder`` has not come to its end."""
    return any(Path(folder).glob("*-resume-*"))


def run_script_apart(command, folder, cwd, states, retries, stopped=lambda: False):
    """Run ``command`` (a list) in ``cwd``, its output at the end of log.txt in ``folder``; with --resume if the folder
    ``states`` holds an unfinished run.

    One that a signal killed is run again, up to ``retries`` times; when ``stopped()`` it is interrupted as by Ctrl-C.
    It holds the folder's lock, also if this process dies before it. Returns (exit code, negative for a signal; the last
    line of its output); (None, "") at once if another process holds the lock.
    """
    folder = Path(folder)
    for _ in range(retries + 1):
        with locked(folder / "lock", wait=False) as lock, open(folder / "log.txt", "a", encoding="utf-8") as out:
            if lock is None:
                return None, ""
            if not (folder / "config.json").exists():
                return 0, ""  # another process finished the cell just now, and cleaned up
            again = ["--resume"] if unfinished_run(states) else []
            process = subprocess.Popen([*command, *again], cwd=cwd, stdout=out,
                                       stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                       pass_fds=(lock,) if os.name == "posix" else ())
            try:
                told = False
                while process.poll() is None:
                    if stopped() and not told:
                        process.send_signal(signal.SIGINT)
                        told = True
                    time.sleep(0.1)  # in place of wait(), during which a thread does not see that Ray cancels its task
            finally:
                process.kill()  # nothing happens to one that has ended
                code = process.wait()
        if code >= 0 or code == -signal.SIGINT:
            break
    lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return (130 if code == -signal.SIGINT else code), lines[-1] if lines else ""
