"""pytest plugin of a child: runs the operator tests of one backend that fall to one shard, and reports each.

Read from the environment: ``GPU_CHECK_STEM``; ``GPU_CHECK_SHARD``, "number/shards". Tests of the same problem fall to
the same shard, so that kernels which are compiled at their first call are compiled once.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
import torch

from .child import EventLog, last_line

_log = EventLog(Path(os.environ["GPU_CHECK_STEM"]))
_outcomes: dict[str, tuple[str, str, float]] = {}


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed and not _reported(report.nodeid):
        _log.write(test=report.nodeid, outcome="failed", reason=last_line(report.longreprtext), seconds=0.0)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, shards = map(int, os.environ["GPU_CHECK_SHARD"].split("/"))
    chosen = [item for item in items if (key := _problem(item)) and zlib.crc32(key.encode()) % shards == number]
    if not any("collected" in event for event in _log.events()):
        _log.write(collected=len(chosen))
    items[:] = [item for item in chosen if not _reported(item.nodeid)]


def pytest_runtest_logstart(nodeid: str) -> None:
    _log.at(nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcome, reason, seconds = _outcomes.get(report.nodeid, ("passed", "", 0.0))
    if report.failed:
        outcome, reason = "failed", last_line(_message(report))
    elif report.skipped and outcome == "passed":
        outcome, reason = "skipped", last_line(_message(report))
    _outcomes[report.nodeid] = outcome, reason, seconds + report.duration
    if report.when == "teardown":
        outcome, reason, seconds = _outcomes.pop(report.nodeid)
        if outcome == "failed":
            _give_up_if_broken(report.nodeid, reason)
        _log.write(test=report.nodeid, outcome=outcome, reason=reason, seconds=round(seconds, 3))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus != pytest.ExitCode.INTERRUPTED or session.testscollected:
        _log.write(finished=True)


def _problem(item: pytest.Item) -> str:
    """What decides on the shard; empty for a test that runs on no particular backend."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if not {"target", "any_target"} & set(parameters):
        return ""
    return str(parameters.get("case", item.nodeid))


def _reported(nodeid: str) -> bool:
    return any(nodeid in (event.get("test"), *event.get("lost", ())) for event in _log.events())


def _message(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return crash.message.strip().split("\n")[0]
    return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext


def _give_up_if_broken(nodeid: str, reason: str) -> None:
    """After some CUDA errors every later call fails: the other tests need a new process."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        _log.give_up([nodeid], reason)
