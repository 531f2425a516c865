"""What both `suites/` and `harness/tests/` need from pytest itself."""

from importlib.util import find_spec

pytest_plugins = ["pytester"]

# A borrowed GPU machine may lack what only snapshots need; it measures all the same.
if not (find_spec("syrupy") and find_spec("tomli_w")):
    collect_ignore_glob = ["harness/tests/*snapshot*"]
