"""What both `suites/` and `harness/tests/` need from pytest itself."""

pytest_plugins = ["pytester"]
