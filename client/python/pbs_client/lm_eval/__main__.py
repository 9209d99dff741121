"""The harness's command, with the model `pbs` and the settings of the paper.

python -m pbs_client.lm_eval --help
"""

from __future__ import annotations

import sys

from lm_eval.__main__ import cli_evaluate

from pbs_client.lm_eval import register

if __name__ == "__main__":
    register()
    sys.exit(cli_evaluate())
