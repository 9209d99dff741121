r"""The harness's command, with the model `pbs` and the settings of the paper.

    python -m pbs_client.lm_eval --settings pbs longbench llama-3.1-8b-instruct \
        --model_args server=HOST:PORT,pretrained=FOLDER
    python -m pbs_client.lm_eval --settings-list
    python -m pbs_client.lm_eval run --help

Everything but --settings and --settings-list is the harness's own.
"""

from __future__ import annotations

import sys

from pbs_client import PbsError
from pbs_client.lm_eval import data_sets, register, settings


def main() -> int:
    """Runs it. 0 is success; 1 is an error that was named."""
    if sys.argv[1:] == [f"{settings.FLAG}-list"]:
        for name in settings.names():
            print(f"{name:<32} {settings.load(name)['about']}")
        return 0
    register()
    from lm_eval.__main__ import cli_evaluate  # imports much

    try:
        sys.argv[1:] = settings.expanded(sys.argv[1:])
        cli_evaluate()
    except (PbsError, settings.SettingsError) as error:
        return _fail(str(error))
    except Exception as error:
        missing = data_sets.missing(error)
        if missing is None:
            raise
        return _fail(data_sets.advice(missing))
    return 0


def _fail(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
