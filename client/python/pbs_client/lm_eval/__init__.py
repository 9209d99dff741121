r"""lm-evaluation-harness over a remote prefill: its model `pbs`.

    python -m pbs_client.lm_eval --model pbs --tasks TASK \
        --model_args server=127.0.0.1:50051,pretrained=/models/llama,method=pbs

The harness has no hook that would find the models of other packages, so its own command
`lm_eval` does not know `pbs`. The command above is that command, after register(). In
Python, import this package; lm_eval.simple_evaluate(model="pbs", ...) then knows it.

Needs lm_eval (0.4.13), torch and transformers: pip install "pbs-client[lm-eval]".

Modules: model.py (PbsLM, the model), settings.py (the settings of the paper, as files),
data_sets.py (data sets that a task downloads), __main__.py (the command).
"""

from __future__ import annotations

MODEL_NAME = "pbs"
_TARGET = "pbs_client.lm_eval.model:PbsLM"

try:
    # The harness registers its own models only while there are no others.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry
except ImportError as error:
    raise ImportError(
        f"{error}; pbs_client.lm_eval needs lm_eval >= 0.4.13: "
        'pip install "pbs-client[lm-eval]"'
    ) from error


def register() -> None:
    """Registers the model `pbs`, by name: its module is imported when it is used."""
    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target=_TARGET)


register()
