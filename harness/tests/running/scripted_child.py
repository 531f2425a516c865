"""A child of an isolated run whose engine is a script: what the real one does, without torch.

`LORA_SCRIPT` says by mode what happens after how many completions: `style=2:kill`. Only the engine
is replaced; the options, the pipe and the messages are the real child's.
"""

import json
import os
import signal
import sys
import time

from harness.running import child
from harness.tests.values import completion

_SCRIPT = dict(part.split("=") for part in os.environ.get("LORA_SCRIPT", "").split() if part)


def _happen(what, mode, collected):
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "hang":
        print("hanging", file=sys.stderr, flush=True)
        time.sleep(600)
    elif what == "exit":
        os._exit(7)
    elif what == "memory":
        collected.failed(mode, "out of memory: 8 GiB asked", "lower --batch-size")
    elif what == "sticky":
        collected.failed(mode, "the device failed: CUDA error: device-side assert triggered")
        return False
    elif what == "full":
        raise MemoryError("8 GiB asked")
    elif what == "bug":
        raise ValueError("a\nbug")
    elif what == "quit":
        return False
    return True


def _run(request, collected, *, loaded, progress):
    if not _happen(_SCRIPT.get("load", ":").split(":")[1], "", collected):
        return
    collected.seconds["load"], collected.device, collected.dtype = 0.5, "cpu", "float32"
    loaded(["✓ loaded"])
    for mode in request.modes:
        count, what = _SCRIPT.get(mode, ":").split(":")
        prompts = request.preset.prompts[: int(count) if count else None]
        for number, prompt in enumerate(prompts):
            progress(mode, number / len(request.preset.prompts))
            said = f"{mode} \ud800 says 你好 to {prompt.id}"
            collected.add(mode, completion(prompt, mode=mode, text=said, token_ids=(len(mode), 4)))
        if what:
            if not _happen(what, mode, collected):
                return
        else:
            collected.done(mode, 0.25)


if __name__ == "__main__":
    child.run_here = _run
    if note := os.environ.get("LORA_CHILDREN"):
        with open(note, "a") as file:  # noqa: PTH123
            print(json.dumps(os.getpid()), file=file)
    child.main()
