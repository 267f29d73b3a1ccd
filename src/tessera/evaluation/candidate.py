"""The program's side of a session: runs its text, then calls its functions as it is asked to.

    python -I -S candidate.py VALUES REQUESTS REPLIES      a path and two open file descriptors

Runs inside the sandbox, by itself and without tessera. Requests and replies are lines of JSON:

    ["run", source]           -> ["done"]              the text has run, as __main__
    ["call", name, line]      -> ["value", line]       line: [arguments, keywords] and the result, by values.dump
                              or ["unsendable", why]
    any                       -> ["raised", type, text]

Nothing here is trusted: the program can reach all of it, and say whatever a function of its own could have returned.
"""

import json
import os
import sys
import types
from typing import Any


def main(path: str, requests: str, replies: str) -> None:
    values: dict[str, Any] = {"__name__": "values"}
    with open(path) as file:
        exec(compile(file.read(), "values", "exec"), values)
    program = types.ModuleType("__main__")
    sys.modules["__main__"] = program
    dump, load, bad = values["dump"], values["load"], values["BadValue"]
    with os.fdopen(int(requests)) as asked, os.fdopen(int(replies), "w") as answers:
        for line in asked:
            json.dump(_answer(json.loads(line), program, dump, load, bad), answers)
            answers.write("\n")
            answers.flush()


def _answer(request: list[str], program: types.ModuleType, dump: Any, load: Any, bad: type[Exception]) -> list[str]:
    try:
        if request[0] == "run":
            exec(compile(request[1], "program.py", "exec"), program.__dict__)
            return ["done"]
        arguments, keywords = load(request[2])
        result = getattr(program, request[1])(*arguments, **keywords)
        try:
            return ["value", dump(result)]
        except bad as error:
            return ["unsendable", str(error)]
    except Exception as error:
        return ["raised", type(error).__name__, _text(error)]


def _text(error: Exception) -> str:
    try:
        return str(error)[:1000]
    except Exception:
        return ""


if __name__ == "__main__":
    main(*sys.argv[1:])
