"""What both `suites/` and `harness/tests/` need from pytest itself."""

from importlib.util import find_spec

pytest_plugins = ["pytester"]

# A borrowed GPU machine may lack what the harness' own tests need; its stack is measured all the
# same, by `suites/`.
_ABSENT = [name for name in ("syrupy", "tomli_w", "hypothesis") if find_spec(name) is None]
collect_ignore_glob = ["harness/tests/*"] if _ABSENT else []


def pytest_report_header():
    return f"harness/tests are left out: {', '.join(_ABSENT)} absent" if _ABSENT else None
