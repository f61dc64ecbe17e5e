"""An nsys that records nothing: the same processes, files and exit codes as nsys 2024.2.3.

FAKE_NSYS: ``noreport`` (ends with 0 and writes none), ``empty`` (writes an empty one).
FAKE_EXPORTS: the folder whose ``NAME.sqlite`` is the export of ``NAME.nsys-rep``.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

STATE = Path(os.environ["FAKE_NSYS_STATE"])
HOW = os.environ.get("FAKE_NSYS", "")
VERB, WORDS = sys.argv[1], sys.argv[2:]


def split():
    """Options and the command behind them."""
    index = 0
    while index < len(WORDS) and WORDS[index].startswith("-"):
        index += 2 if WORDS[index] in ("-t", "-o") else 1
    return WORDS[:index], WORDS[index:]


def option(name):
    """An option's value, with %q{VAR} expanded."""
    value = next((w.partition("=")[2] for w in WORDS if w.startswith(f"--{name}=")), "")
    if name == "output":
        value = WORDS[WORDS.index("-o") + 1] if "-o" in WORDS else ""
    for variable, text in os.environ.items():
        value = value.replace("%q{" + variable + "}", text)
    return value


def write_report(session):
    if HOW != "noreport":
        text = "" if HOW == "empty" else "a recording"
        Path((STATE / f"{session}.output").read_text() + ".nsys-rep").write_text(text)


if VERB == "--version":
    print("NVIDIA Nsight Systems version 0.0.0-pretended")
elif VERB in ("launch", "profile"):
    options, command = split()
    session = option("session-new")
    if option("output"):
        (STATE / f"{session}.output").write_text(option("output"))
    app = subprocess.Popen(command, start_new_session=True)
    (STATE / f"{session}.app").write_text(str(app.pid))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = app.wait()
    if VERB == "profile":
        write_report(session)
    sys.exit(128 - code if code < 0 else code)
elif VERB == "start":
    if option("output"):
        (STATE / f"{option('session')}.output").write_text(option("output"))
elif VERB == "stop":
    write_report(option("session"))
elif VERB == "export":
    made = Path(os.environ["FAKE_EXPORTS"]) / f"{Path(WORDS[-1]).stem}.sqlite"
    Path(WORDS[WORDS.index("--output") + 1]).write_bytes(made.read_bytes())
elif VERB == "shutdown":
    os.killpg(int((STATE / f"{option('session')}.app").read_text()), signal.SIGTERM)
else:
    sys.exit(f"unknown verb {VERB}")
