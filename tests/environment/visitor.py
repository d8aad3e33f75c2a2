"""Start the command that the arguments name, visit the page whose address it prints, and end it. Runs below strace."""

from __future__ import annotations

import json
import subprocess
import sys
from urllib.request import HTTPCookieProcessor, ProxyHandler, build_opener


def main() -> int:
    with subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True) as process:
        text = ""
        for line in process.stdout or ():
            text += line
            if line.rstrip() == "}":
                break
        try:
            opener = build_opener(ProxyHandler({}), HTTPCookieProcessor())
            for address in (json.loads(text)["result"]["start"], json.loads(text)["result"]["address"] + "healthz"):
                with opener.open(address, timeout=60) as answer:
                    answer.read()
        finally:
            process.terminate()
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
