"""The workflows that bring a review into a pull request, safe for forks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.report.review_markdown import MARKER
from harness.tests.review.factory import HOSTILE, a_grid, case, recorded

WORKFLOWS = Path(__file__).parents[3] / ".github" / "workflows"
pytestmark = pytest.mark.skipif(not WORKFLOWS.is_dir(), reason="no checkout: no workflows here")

#: What the job that renders the comment installs, and what that brings along.
_INSTALLED = ("harness", "jinja2", "markupsafe", "rich", "markdown_it", "mdurl", "pygments")


def workflow(name: str) -> dict[Any, Any]:
    return yaml.safe_load((WORKFLOWS / name).read_text(encoding="utf-8"))


def steps(name: str, job: str) -> list[dict[str, Any]]:
    return workflow(name)["jobs"][job]["steps"]


def step(name: str, job: str, key: str, value: str) -> dict[str, Any]:
    """The step whose *key* starts with *value*."""
    return next(item for item in steps(name, job) if str(item.get(key, "")).startswith(value))


@pytest.mark.parametrize("name", ["review.yml", "review-comment.yml"])
def test_every_action_is_pinned_to_a_commit(name: str):
    uses = [item["uses"] for job in workflow(name)["jobs"] for item in steps(name, job)
            if "uses" in item]  # fmt: skip
    assert len(uses) >= 4
    assert not [
        action for action in uses if not re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", action)
    ]


def test_what_runs_the_pull_requests_code_can_only_read():
    found = workflow("review.yml")
    assert found["permissions"] == {"contents": "read"}
    assert found[True] == {"pull_request": None}  # YAML reads `on` as true
    assert "secrets." not in (WORKFLOWS / "review.yml").read_text()


def test_what_may_write_runs_nothing_of_the_pull_request():
    found = workflow("review-comment.yml")
    assert list(found[True]) == ["workflow_run"]
    assert found[True]["workflow_run"]["workflows"] == [workflow("review.yml")["name"]]
    assert found["permissions"] == {}
    assert found["jobs"]["write"]["permissions"] == {"actions": "read", "contents": "read"}
    assert found["jobs"]["post"]["permissions"] == {"pull-requests": "write"}
    checkout = step("review-comment.yml", "write", "uses", "actions/checkout@")
    assert checkout["with"]["ref"] == "${{ github.event.repository.default_branch }}"
    # The job that holds the token that writes checks nothing out and installs nothing.
    assert [item["uses"].split("@")[0] for item in steps("review-comment.yml", "post")] == [
        "actions/download-artifact", "actions/github-script",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["review.yml", "review-comment.yml"])
def test_no_expression_is_put_into_a_script(name: str):
    for job in workflow(name)["jobs"]:
        for item in steps(name, job):
            script = str(item.get("run", "")) + str(item.get("with", {}).get("script", ""))
            assert "${{" not in script


def test_the_comment_is_written_without_torch_or_a_model(tmp_path: Path):
    """With nothing importable but what that job installs."""
    script = (
        "import sys, importlib.machinery\n"
        f"allowed = set(sys.stdlib_module_names) | set({_INSTALLED!r})\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] not in allowed: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from harness.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    comment = tmp_path / "comment.md"
    options = ["review", "--root", str(a_grid(tmp_path)), "--markdown", str(comment)]
    found = subprocess.run(
        [sys.executable, "-c", script, *options], capture_output=True, text=True, check=False
    )
    assert found.returncode == 1, found.stderr
    assert comment.read_text().startswith(MARKER)


def written(tmp_path: Path, number: bytes) -> tuple[int, Path]:
    """Run the step that writes the comment, for what a pull request's run recorded."""
    reviewed, workspace = tmp_path / "temp" / "reviewed", tmp_path / "workspace"
    workspace.mkdir()
    for place, text in enumerate(HOSTILE):
        recorded(reviewed, case(prompt=f"p{place}", now=text))
    (reviewed / ".pending" / ".pull-request").write_bytes(number)
    (reviewed / ".pending" / "secret.json").symlink_to("/etc/passwd")
    command = tmp_path / "bin" / "lora-stack"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m harness.cli "$@"\n')
    command.chmod(0o755)
    found = subprocess.run(
        ["bash", "-e", "-c", step("review-comment.yml", "write", "name", "comment")["run"]],
        cwd=workspace,
        env=os.environ | {
            "REVIEWED": str(reviewed), "RUNNER_TEMP": str(tmp_path / "temp"),
            "GITHUB_WORKSPACE": str(workspace), "PATH": f"{command.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).parents[3]),
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return found.returncode, workspace / "out"


def test_the_step_that_writes_the_comment_takes_the_artifact_as_data(tmp_path: Path):
    code, out = written(tmp_path, b"17\n; touch owned\n")
    assert code == 0
    assert (out / "number").read_text() == "17"
    assert (out / "review.md").read_text().startswith(MARKER)
    assert "root:" not in (out / "review.md").read_text()
    assert not list(tmp_path.rglob("owned"))


_MOCK = """
const fs = require("fs");
const given = JSON.parse(process.argv[1]);
const calls = [];
const core = {
  setFailed: why => calls.push(["failed", why]), notice: why => calls.push(["notice", why]) };
const context = { repo: { owner: "o", repo: "r" }, payload: { workflow_run: given.run } };
const github = {
  paginate: async (what, options) => given.comments,
  rest: {
    pulls: { get: async ({ pull_number }) => ({ data: { ...given.pull, number: pull_number } }) },
    issues: {
      listComments: "list",
      updateComment: async call => calls.push(["update", call.comment_id, call.body]),
      createComment: async call => calls.push(["create", call.issue_number, call.body]),
    },
  },
};
const script = given.script;
(async () => {
  await new (Object.getPrototypeOf(async () => {}).constructor)(
    "require", "github", "context", "core", script)(require, github, context, core);
  console.log(JSON.stringify(calls));
})();
"""
_RUN = {"head_sha": "abc", "head_repository": {"id": 5}, "html_url": "https://run"}
_PULL = {"head": {"sha": "abc", "repo": {"id": 5}}}


def posted(
    tmp_path: Path,
    *,
    number: str = "17",
    text: str = f"{MARKER}\nreview",
    pull: dict[str, Any] = _PULL,
    comments: tuple[dict[str, Any], ...] = (),
) -> list[list[Any]]:
    """What the posting script does, with GitHub's interface played by a stand-in."""
    if shutil.which("node") is None:
        pytest.skip("no node here to run the workflow's script")
    (tmp_path / "comment").mkdir()
    (tmp_path / "comment" / "number").write_text(number)
    (tmp_path / "comment" / "review.md").write_text(text)
    script = step("review-comment.yml", "post", "uses", "actions/github-script@")["with"]["script"]
    given = {"run": _RUN, "pull": pull, "comments": list(comments), "script": script}
    found = subprocess.run(
        ["node", "-e", _MOCK, json.dumps(given)],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    calls: list[list[Any]] = json.loads(found.stdout)
    return calls


def test_the_comment_is_posted_once(tmp_path: Path):
    ((what, number, body),) = posted(tmp_path)
    assert (what, number) == ("create", 17)
    assert body.startswith(MARKER)
    assert "https://run" in body


def test_a_comment_that_is_there_is_updated_and_nobody_elses(tmp_path: Path):
    bot = {"login": "github-actions[bot]"}
    comments = (
        {"id": 1, "user": {"login": "somebody"}, "body": f"{MARKER} mine!"},
        {"id": 2, "user": bot, "body": "another comment"},
        {"id": 3, "user": bot, "body": f"{MARKER}\nolder"},
    )
    ((what, identity, _),) = posted(tmp_path, comments=comments)
    assert (what, identity) == ("update", 3)


@pytest.mark.parametrize(
    "pull", [{"head": {"sha": "other", "repo": {"id": 5}}}, {"head": {"sha": "abc", "repo": None}},
             {"head": {"sha": "abc", "repo": {"id": 6}}}],
)  # fmt: skip
def test_a_number_of_another_pull_request_posts_nothing(tmp_path: Path, pull: dict[str, Any]):
    assert [call[0] for call in posted(tmp_path, pull=pull)] == ["notice"]


@pytest.mark.parametrize("number", ["", "0", "17a", "1" * 12, "-1"])
def test_what_is_no_number_posts_nothing(tmp_path: Path, number: str):
    assert [call[0] for call in posted(tmp_path, number=number)] == ["failed"]


@pytest.mark.parametrize("text", ["no marker", MARKER + "x" * 60_001])
def test_what_is_no_review_posts_nothing(tmp_path: Path, text: str):
    assert [call[0] for call in posted(tmp_path, text=text)] == ["failed"]
