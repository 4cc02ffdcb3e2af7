"""Importing the package keeps waiting threads from spinning, unless the user has decided."""

import os
import subprocess
import sys

import pytest

CODE = (
    "import sys, region_pretrain.warnings, os\n"
    "assert 'torch' not in sys.modules  # which reads the variables\n"
    "print(*(f'{k}={v}' for k, v in sorted(os.environ.items()) if 'MP_' in k))"
)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "OMP_WAIT_POLICY=PASSIVE"),
        ({"OMP_NUM_THREADS": "3"}, "OMP_NUM_THREADS=3 OMP_WAIT_POLICY=PASSIVE"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "OMP_WAIT_POLICY=ACTIVE"),
        ({"GOMP_SPINCOUNT": "1000"}, "GOMP_SPINCOUNT=1000"),
        ({"KMP_BLOCKTIME": "200"}, "KMP_BLOCKTIME=200"),
    ],
)
def test_the_wait_policy_is_passive_unless_the_user_has_chosen(given, found):
    kept = {name: value for name, value in os.environ.items() if "MP_" not in name}
    output = subprocess.check_output([sys.executable, "-c", CODE], env=kept | given, text=True)
    assert output.strip() == found
