"""The arguments of `pbs-client`, and its help."""

from __future__ import annotations

import argparse

from pbs_client import _version
from pbs_client._transport import check_target
from pbs_client.calibration import THRESHOLDS_DEFAULT
from pbs_client.cli import attention, commands, recipe, sink
from pbs_client.cli.calibrate import calibrate
from pbs_client.client import CONTROL_TIMEOUT_SECONDS, WORK_TIMEOUT_SECONDS
from pbs_client.dtypes import F8_E4M3, FLOAT_DTYPES

_TIMEOUT_SECONDS_MAX = 1_000_000
_FILE_WANTS = ("o", "lse", "order", "block_mask")

EXIT_CODES = {"usage": 2, "refused": 3, "unreachable": 4, "corrupt": 5}

_DESCRIPTION = """\
Talks to a pbs-prefill server: prefills prompts with permuted block-sparse attention,
fetches KV caches, runs raw attention. Results are JSON lines on stdout; a progress bar
appears on stderr when that is a terminal."""

_EPILOG = """\
examples:
  pbs-client models --server 127.0.0.1:50051
  pbs-client prefill --model llama --tokens prompt.json --method pbs --kv kv.safetensors
  pbs-client prefill --model llama --tokens prompt.json --profile paper
  pbs-client calibrate --prompts prompts.jsonl --budget 0.02 --output mine.json
  pbs-client attend --input qkv.safetensors --output out.safetensors --method dense
  pbs-client attend --input qkv.safetensors --method xattention --threshold 0.95

exit codes:
  0  done
  2  wrong usage, or a local file cannot be read or written
  3  the server refused or failed the request; the message has value and limit
  4  the server cannot be reached, is not ready, or ran out of time
  5  received data is corrupt"""

_INFO = "Prints one JSON line: version, backends, methods, limits."
_MODELS = "Prints the models that the server prefills, one JSON line each."
_ATTEND = """\
Runs attention of the tensors in a safetensors file and writes the results to another.

reads:   q [batch, heads, q_len, dim]; k, v [batch, kv_heads, k_len, dim]
         with cu_seqlens [batch + 1]: q [heads, total_q, dim]; k, v [kv_heads, total_k,
         dim]; cu_seqlens_k when the keys have other bounds than the queries
         order [batch, heads or kv_heads, k_len]: only with --use-order
         block_mask [batch, heads, n, n] of 0 and 1 (packed sequences: flat, one after
         the other): only with --use-block-mask
writes:  the tensors of --want: o like q, lse f32, order i32, block_mask u8
prints:  one JSON line: density, lower_density, stages (seconds), backend, isa, ..."""

_PREFILL = """\
Runs a prompt through a model. Prints the first token, the density of attention and the
times of all stages, and writes the KV cache on request.

--kv FILE  writes the cache: layers.N.k, layers.N.v, each [kv_heads, tokens, head_dim];
           keys include the rotary embedding
--lease    keeps the cache on the server and prints its ticket, for a decode tier
--push     sends the cache to a sink, such as `pbs-client sink`
prints:    one JSON line: first_token, top_logits, density (mean over layers), layers,
           stages (seconds), ticket, ..."""

_CAPTURE = """\
Runs a prompt through a model, dense, and writes queries, keys and values of all heads of
chosen layers, after rotation. `attend --layer N` and the recipes read the file.

writes:  layers.N.q [heads, tokens, head_dim]; layers.N.k, layers.N.v [kv_heads, tokens,
         head_dim]; metadata: model, model_digest, layers, tokens, scale
prints:  one JSON line: the metadata, seconds, output"""

_GENERATE = """\
Prefills on the server, fetches the KV cache, and decodes here with transformers,
greedily. Needs torch and transformers: pip install "pbs-client[hf]".

prints:  one JSON line: tokens, first_token, density, seconds, ..."""


_CALIBRATE = """\
Chooses a threshold for every query head of a model from your own prompts, so that heads
together read the fewest blocks while they lose at most --budget of the attention mass on
average. Writes them as a profile: pbs-prefilld --profile MODEL=FILE serves it, and
requests name it with --profile. The method is --method [pbs], and its other options are
part of the profile.

Every prompt is prefilled once for each of --thresholds. With two prompts or more, every
second one is kept apart, and the profile is measured on these beside dense attention.
A warning on stderr says when it loses more than --budget there.

reads:   --prompts, on each line a JSON list of token ids of one prompt
writes:  --output, the profile
prints:  a JSON line for each prefill, then one of the profile: predicted density and
         lost mass, and density, lost_mass, kl (of the last token's logits from those of
         dense attention, in nats), measured on check_prompts other prompts"""


def make_parser() -> argparse.ArgumentParser:
    """The parser; its result has `run`, a function of the parsed arguments."""
    parser = argparse.ArgumentParser(
        "pbs-client",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"pbs-client {_version.__version__}"
    )
    made = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for run, summary, text, usage, groups in (
        (commands.info, "version, backends, methods, limits", _INFO, "", ()),
        (commands.models, "the models of the server", _MODELS, "", ()),
        (commands.attend, "raw attention", _ATTEND, "--input FILE", (_attend,)),
        (
            commands.prefill,
            "run a prompt through a model",
            _PREFILL,
            "--tokens FILE",
            (_prompt, _prefill, attention.add_prefill_arguments),
        ),
        (
            commands.capture,
            "write queries, keys and values of chosen layers",
            _CAPTURE,
            "--tokens FILE --layers LIST --output FILE",
            (_prompt, _capture),
        ),
        (
            recipe.recipe,
            "run an experiment by name",
            recipe.DESCRIPTION,
            "NAME",
            (recipe.add_arguments,),
        ),
        (
            commands.generate,
            "prefill on the server, decode here",
            _GENERATE,
            "--tokens FILE --model-path FOLDER --max-new-tokens N",
            (_prompt, _generate, attention.add_prefill_arguments),
        ),
        (
            calibrate,
            "choose a threshold for every head of a model",
            _CALIBRATE,
            "--prompts FILE --budget SHARE --output FILE",
            (_calibrate,),
        ),
    ):
        command = made.add_parser(
            run.__name__,
            help=summary,
            description=text,
            usage=" ".join(f"%(prog)s {usage} [OPTION ...]".split()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        # A command without options of its own is a control call.
        _connection(
            command, WORK_TIMEOUT_SECONDS if groups else CONTROL_TIMEOUT_SECONDS
        )
        for add_group in groups:
            add_group(command)
        if groups and run not in (commands.capture, recipe.recipe):
            attention.add_arguments(command)
    sink.add_command(made)
    return parser


def _connection(parser: argparse.ArgumentParser, timeout_seconds: float) -> None:
    group = parser.add_argument_group("connection")
    group.add_argument(
        "--server",
        type=_target,
        default="127.0.0.1:50051",
        metavar="HOST:PORT",
        help="address of pbs-prefilld (%(default)s)",
    )
    group.add_argument(
        "--timeout",
        type=_positive_seconds,
        default=timeout_seconds,
        metavar="SECONDS",
        help="time limit; the server refuses a request at once when it cannot meet it "
        "(%(default)s)",
    )
    group.add_argument(
        "--ignore-endpoint",
        action="store_true",
        help="fetch caches from --server, not from where their tickets say, as through "
        "a port forward",
    )


def _attend(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tensors")
    group.add_argument(
        "--input", required=True, metavar="FILE", help="safetensors file with q, k, v"
    )
    group.add_argument(
        "--output", metavar="FILE", help="safetensors file to write [none is written]"
    )
    group.add_argument(
        "--dtype",
        choices=tuple(FLOAT_DTYPES),
        help="cast q, k, v first, rounding to nearest even [no cast]",
    )
    group.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help="the file is a capture: take the heads of this layer",
    )
    group.add_argument(
        "--use-order",
        action="store_true",
        help="pbs, and others with --permute: use the file's order",
    )
    group.add_argument(
        "--use-block-mask",
        action="store_true",
        help="every method except dense: use the file's block_mask",
    )
    group.add_argument(
        "--want",
        type=_wants,
        default=("o",),
        metavar="LIST",
        help="results, of o,lse,order,block_mask [o]",
    )
    group.add_argument(
        "--allow-non-finite", action="store_true", help="dense: accept NaN and Inf"
    )
    group = parser.add_argument_group("timing")
    group.add_argument(
        "--warmup", type=int, default=0, metavar="N", help="extra runs before [0]"
    )
    group.add_argument(
        "--repetitions",
        type=int,
        default=1,
        metavar="N",
        help="runs to time; more than 1 adds `iterations` to the output [1]",
    )


def _model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        default="",
        metavar="NAME",
        help="name of the model; required when the server has several",
    )


def _prompt(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt")
    _model(group)
    group.add_argument(
        "--tokens", required=True, metavar="FILE", help="JSON list of token ids"
    )


def _prefill(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("results")
    group.add_argument(
        "--top-logits",
        type=int,
        default=10,
        metavar="N",
        help="best next tokens to print, 0..100 [10]",
    )
    group.add_argument("--kv", metavar="FILE", help="write the KV cache, safetensors")
    group.add_argument(
        "--kv-dtype",
        choices=tuple(FLOAT_DTYPES),
        help="dtype of --kv and --push [that of the held cache]",
    )
    group.add_argument(
        "--push",
        metavar="HOST:PORT",
        help="the server sends the cache to this sink, one of its push_targets",
    )
    _wire(group)
    group.add_argument(
        "--lease", action="store_true", help="keep the cache on the server"
    )
    group.add_argument(
        "--ttl",
        type=int,
        metavar="SECONDS",
        help="time of the lease, from the end of the prefill [the server's default]",
    )


def _wire(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--wire-dtype",
        choices=(F8_E4M3,),
        help="how the cache travels: about half the bytes of bf16, and an approximation "
        "[as its dtype]",
    )
    group.add_argument(
        "--page-tokens",
        type=int,
        metavar="N",
        help="tokens that share a scale of --wire-dtype [16]",
    )


def _capture(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("capture")
    group.add_argument(
        "--layers",
        required=True,
        type=_layer_list,
        metavar="LIST",
        help="layers, ascending, such as 0,5,10",
    )
    group.add_argument(
        "--output", required=True, metavar="FILE", help="safetensors file to write"
    )
    group.add_argument(
        "--dtype",
        choices=tuple(FLOAT_DTYPES),
        help="dtype of the file [that of the held cache]",
    )


def _generate(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--model-path",
        required=True,
        metavar="FOLDER",
        help="the same model as a Hugging Face folder",
    )
    group.add_argument(
        "--max-new-tokens", type=int, required=True, metavar="N", help="at least 1"
    )
    group.add_argument(
        "--ignore-eos", action="store_true", help="always decode --max-new-tokens"
    )
    group.add_argument(
        "--dtype",
        choices=tuple(FLOAT_DTYPES),
        help="dtype of the model here [the one in config.json]",
    )
    group.add_argument(
        "--device", default="cpu", help="a torch device, such as cuda [%(default)s]"
    )
    _wire(group)


def _calibrate(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration")
    _model(group)
    group.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help="a JSON list of token ids on each line",
    )
    group.add_argument(
        "--budget",
        type=_share,
        required=True,
        metavar="SHARE",
        help="attention mass that may be lost, mean over layers and heads, 0..1",
    )
    group.add_argument(
        "--thresholds",
        type=_thresholds,
        default=THRESHOLDS_DEFAULT,
        metavar="LIST",
        help="thresholds to choose from beside 1, which is dense; they rise inside (0, "
        f"1) [{','.join(map(str, THRESHOLDS_DEFAULT))}]",
    )
    group.add_argument(
        "--name", metavar="NAME", help="of the profile [the name of --output]"
    )
    group.add_argument(
        "--output", required=True, metavar="FILE", help="the profile to write, JSON"
    )


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in [0, 1]")
    return share


def _thresholds(text: str) -> tuple[float, ...]:
    try:
        thresholds = tuple(float(part) for part in text.split(","))
    except ValueError:
        thresholds = ()
    rise = all(a < b for a, b in zip(thresholds, thresholds[1:]))
    if not (thresholds and rise and 0 < thresholds[0] and thresholds[-1] < 1):
        raise argparse.ArgumentTypeError(f"{text!r} does not rise inside (0, 1)")
    return thresholds


def _target(text: str) -> str:
    try:
        check_target(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _positive_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < _TIMEOUT_SECONDS_MAX:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of seconds above 0 and below "
            f"{_TIMEOUT_SECONDS_MAX}"
        )
    return seconds


def _layer_list(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of layers such as 0,5,10"
        ) from None


def _wants(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in _FILE_WANTS:
            raise argparse.ArgumentTypeError(
                f"{name!r} is not one of {', '.join(_FILE_WANTS)}"
            )
    return names
