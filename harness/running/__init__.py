"""Running every mode over every prompt: in this process, or in children that may be lost.

`in_process` loads once and goes on after a mode that runs out of memory; `isolated` watches a child
that does the same, ends it when it hangs and starts another for what is left. Both fill a
`Collected`, which is whole at every moment: what was done before an interrupt is not lost.
"""

from harness.running.collected import Collected, Request

__all__ = ["Collected", "Request"]
