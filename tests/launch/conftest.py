"""Fixtures of the tests that run the scripts of launch/ against stand-ins."""

import pytest
from support.launch_stand_ins import CURL, GCLOUD, GIT, Stand


@pytest.fixture
def stand(tmp_path):
    return Stand(tmp_path)


@pytest.fixture
def cloud(stand):
    stand.have("gcloud", GCLOUD)
    stand.have("git", GIT)
    return stand


@pytest.fixture
def worker(stand):
    stand.have("curl", CURL)
    yield stand
    stand.run("tpu_worker.sh", "stop")
