"""Python without Triton's interpreter, where kernels are compiled: what is decorated under the
interpreter cannot be. One process for all tests of this one, since its imports take seconds."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVE = """
import contextlib, io, json, sys, traceback
for line in sys.stdin:
    told, failure = io.StringIO(), None
    with contextlib.redirect_stdout(told):
        try:
            exec(json.loads(line), {})
        except BaseException:
            failure = traceback.format_exc()
    print(json.dumps([told.getvalue(), failure]), flush=True)
"""


def outside_the_interpreter(code: str) -> str:
    """What the code prints; it ends well, or the test fails with its traceback."""
    process = _process()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(code) + "\n")
    process.stdin.flush()
    told, failure = json.loads(process.stdout.readline())
    assert failure is None, failure
    return told


@cache
def _process() -> subprocess.Popen[str]:
    """It ends when its standard input does, that is with this process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, "-c", SERVE],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
