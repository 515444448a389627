"""`vitkd search --engine ray` on three machines; skipped without Ray (the extra `ray`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from support.cluster_tools import of_a_cluster, processes, three_machines, when_there_are
from support.process_tools import of_tests
from support.search_tools import searched
from vitkd_fast.search import cluster, study

pytestmark = [of_a_cluster, pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with three_machines(tmp_path_factory.mktemp("hook")) as made:
        yield made


def test_a_killed_process_loses_its_trial(
    machines: Any, done: study.Search, copied: Callable[..., study.Search]
) -> None:
    killed: list[int] = []
    hook = machines.hook

    def kill() -> None:
        killed.extend(processes(hook)[:1])
        os.kill(killed[0], signal.SIGKILL)

    found = copied()
    begun = found.folder
    thread = when_there_are(lambda: any(begun.glob("trials/*/*")) * processes(hook), 1, kill)
    cluster.run(found, 3)
    thread.join()
    assert len(killed) == 1 and len(found.trained()) == 3
    [lost] = [x for x in found.study.trials if x.state is TrialState.FAIL]
    [again] = [x for x in found.trained() if x.params == lost.params]
    assert len(again.user_attrs["died_on"]) == 1
    folders = {int(x.name) for x in found.folder.glob("trials/*")}
    assert folders == {x.number for x in found.trained()}
    # two began before either ended; the first that this process drew is among them
    first = done.trained()[0]
    [same] = [x for x in found.trained() if x.params == first.params]
    assert same.user_attrs["accuracy"] == first.user_attrs["accuracy"]


def test_a_killed_driver_is_resumed_here(
    machines: Any, copied: Callable[..., study.Search], images: Path, target: Path
) -> None:
    begun = copied()
    begun.lock.close()
    folder = begun.folder
    driver = subprocess.Popen(
        [sys.executable, __file__, str(folder), str(images), str(target)],
        env=of_tests() | {"RAY_ADDRESS": machines.address},
    )
    thread = when_there_are(lambda: folder.glob("trials/*/*"), 2, driver.kill)
    assert driver.wait(600) == -signal.SIGKILL
    thread.join()
    with searched(folder, images, target) as found:
        failed = [x for x in found.study.trials if x.state is TrialState.FAIL]
        lost = [x for x in failed if x.user_attrs.get("within")]
        ended = len(found.trained())
        assert lost
        found.run(ended + len(lost))
        again = [x.params for x in found.trained()[ended:]]
    assert again == [x.params for x in lost]


if __name__ == "__main__":
    with searched(*map(Path, sys.argv[1:])) as found_there:
        cluster.run(found_there, 6)
