"""A training run that is killed at any moment and started again comes to the end that it would have come to."""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import signal
import sys
import time
import zipfile
import zlib
from typing import Any, Dict, List, NamedTuple, Optional

import chainer_accum  # noqa: F401
import numpy
import pytest
from training import CONFIGURATIONS, STAGES, UPDATES, snapshots_in, train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")

KILLS_PER_STAGE = 4
PATIENCE = 60  # seconds until a run that says nothing is taken for one that hangs
# What the server has imported, no run has to: it is at work at once.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["chainer_accum"])


class Moment(NamedTuple):
    """When a run is killed: so many seconds after it has come to a stage for the n-th time."""

    stage: str
    time: int
    delay: float


def draw_moments(seed: int) -> List[Moment]:
    """Returns moments of all stages in a random order, of which none lets a run get further than one snapshot."""
    random = numpy.random.RandomState(seed)
    most = {"start": 1, "load": 1, "update": 5, "write": 2, "rename": 2}
    return [
        Moment(str(stage), int(random.randint(1, most[stage] + 1)), float(random.uniform(0, 0.006)))
        for stage in random.permutation(STAGES * KILLS_PER_STAGE)
    ]


def run(out: pathlib.Path, configuration: str, moment: Optional[Moment] = None) -> None:
    """Starts the training run and lets it come to its end, or to the moment at which it is killed."""
    connection, its_connection = server.Pipe()
    process = server.Process(target=train, args=(out, configuration, its_connection))
    process.start()
    its_connection.close()
    left = moment.time if moment is not None else -1
    while left != 0:
        assert connection.poll(PATIENCE), "the run does not go on"
        try:
            stage = connection.recv()
        except EOFError:  # it is over
            break
        left -= moment is not None and stage == moment.stage
        connection.send("go on")
    if moment is not None:
        time.sleep(moment.delay)
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == (0 if moment is None else -signal.SIGKILL)


def state_at_the_end(out: pathlib.Path) -> Dict[str, Any]:
    """Returns all that is in the snapshot after the last update, but for the time."""
    with numpy.load(str(snapshots_in(out)[UPDATES]), allow_pickle=True) as snapshot:
        state = {name: snapshot[name] for name in snapshot.files}
    del state["_snapshot_elapsed_time"]
    log = json.loads(str(state.pop("extensions/LogReport/_log")))
    for entry in log:
        del entry["elapsed_time"]
    return {**state, "log": log}


def is_whole(snapshot: pathlib.Path) -> bool:
    return zipfile.is_zipfile(str(snapshot)) and zipfile.ZipFile(str(snapshot)).testzip() is None


def truncate(snapshot: pathlib.Path) -> None:
    content = snapshot.read_bytes()
    snapshot.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_a_run_that_is_killed_again_and_again_ends_where_one_ends_that_was_not(
    configuration: str, tmp_path: pathlib.Path, record_property: Any
) -> None:
    run(tmp_path / "uninterrupted", configuration)
    out = tmp_path / "killed"
    truncated = None
    moments = draw_moments(seed=zlib.crc32(configuration.encode()))
    for number, moment in enumerate(moments, 1):
        print(f"kill {number}: {moment}")  # which pytest shows if the test fails
        run(out, configuration, moment)
        for path in snapshots_in(out).values():
            assert is_whole(path) or path == truncated
        if number % 5 == 0 and len(snapshots_in(out)) > 1:
            truncated = next(iter(snapshots_in(out).values()))
            truncate(truncated)  # as a disk that fails could
    assert snapshots_in(out) and UPDATES not in snapshots_in(out)
    run(out, configuration)
    actual, expected = state_at_the_end(out), state_at_the_end(tmp_path / "uninterrupted")
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        numpy.testing.assert_array_equal(actual[name], value, err_msg=name)
    record_property("kills", len(moments))
