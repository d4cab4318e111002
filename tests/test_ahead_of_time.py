"""Every kernel compiles for every architecture within its budget; the work is done by ``ahead_of_time.py`` in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CAPABILITIES = (80, 90, 100, 120)


def compile_for(capability, *options):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("ahead_of_time.py")
    run = subprocess.run(
        [sys.executable, script, str(capability), *options], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, f"\n{run.stdout}\n{run.stderr}"


@pytest.mark.parametrize("capability", CAPABILITIES, ids="sm_{}".format)
def test_default_cases_fit(capability):
    compile_for(capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids="sm_{}".format)
def test_all_cases_fit(capability):
    compile_for(capability, "--all")
