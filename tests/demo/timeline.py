#!/usr/bin/env python3
"""Where the time of one routed request went, and its picture.

    python3 tests/demo/timeline.py    docs/results/demo_disaggregated.json -> .svg

The parts come from the clocks of one machine: when the user sent and received, and the
log lines of gateway and node, which have the time of their end and their seconds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from chat import Answer

RESULT = Path(__file__).resolve().parents[2] / "docs/results/demo_disaggregated.json"
# lane: color. The order is that of the picture.
LANES = {
    "router, pbs-gateway": "#8c8c8c",
    "pbs-prefilld": "#1f77b4",
    "KV cache": "#ff7f0e",
    "vLLM": "#2ca02c",
}


@dataclass(frozen=True)
class Span:
    """A part of a request, in seconds since it was sent."""

    lane: str
    what: str
    begin: float
    end: float


def interval(event: dict[str, Any]) -> tuple[float, float]:
    """Begin and end of what a log line tells of, in seconds since 1970."""
    end = datetime.fromisoformat(event["time"].replace("Z", "+00:00")).timestamp()
    return end - event["seconds"], end


def spans_of(
    answer: Answer, prefill: dict[str, Any], fetches: Sequence[dict[str, Any]]
) -> list[Span]:
    """The parts of a streamed request that follow each other.

    Args:
        answer: of the request.
        prefill: the node's log line of its prefill.
        fetches: the node's log lines of the fetches of its cache.
    """
    prefill_begin, prefill_end = interval(prefill)
    moved = [interval(fetch) for fetch in fetches]
    fetch_begin = min(begin for begin, _ in moved)
    fetch_end = max(end for _, end in moved)
    parts = [
        ("router, pbs-gateway", "chat template, token ids", answer.sent, prefill_begin),
        ("pbs-prefilld", "prefill", prefill_begin, prefill_end),
        ("router, pbs-gateway", "ticket to vLLM", prefill_end, fetch_begin),
        ("KV cache", "transfer, checked", fetch_begin, fetch_end),
        ("vLLM", "first token", fetch_end, answer.first),
        ("vLLM", "further tokens", answer.first, answer.last),
    ]
    return [
        Span(lane, what, round(begin - answer.sent, 4), round(end - answer.sent, 4))
        for lane, what, begin, end in parts
    ]


def as_json(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """For a results file."""
    return [asdict(span) for span in spans]


def draw(result: dict[str, Any]) -> str:
    """The picture of a results file, as SVG."""
    left, width, top, row = 150, 730, 52, 34
    spans = [Span(**span) for span in result["spans"]]
    end = max(span.end for span in spans)
    bottom = top + row * len(LANES)

    def x(seconds: float) -> float:
        return left + width * seconds / end

    first = next(span.end for span in spans if span.what == "first token")
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {bottom + 44}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="900" height="{bottom + 44}" fill="white"/>',
        f'<text x="{left}" y="20" font-size="14">{escape(_title(result))}</text>',
    ]
    for index, lane in enumerate(LANES):
        y = top + row * index
        out.append(f'<text x="{left - 10}" y="{y + 19}" text-anchor="end">{lane}</text>')
        out.append(
            f'<line x1="{left}" y1="{y + row - 2}" x2="{left + width}" y2="{y + row - 2}" '
            'stroke="#e5e5e5"/>'
        )
    for span in spans:
        out += _bar(span, x, top + row * list(LANES).index(span.lane))
    out.append(
        f'<line x1="{x(first):.1f}" y1="{top - 8}" x2="{x(first):.1f}" y2="{bottom + 4}" '
        'stroke="black" stroke-dasharray="4 3"/>'
    )
    anchor = "end" if first > 0.7 * end else "start"
    out.append(
        f'<text x="{x(first):.1f}" y="{top - 12}" text-anchor="{anchor}">'
        f"first token after {first:.2f} s</text>"
    )
    for tick in range(6):
        at = end * tick / 5
        out.append(
            f'<text x="{x(at):.1f}" y="{bottom + 20}" text-anchor="middle" fill="#555">'
            f"{at:.2f} s</text>"
        )
    return "\n".join([*out, "</svg>", ""])


def _bar(span: Span, x: Any, y: int) -> list[str]:
    begin, width = x(span.begin), max(1.5, x(span.end) - x(span.begin))
    text = f"{span.what}, {span.end - span.begin:.2f} s"
    inside = width > 6.5 * len(text)
    # Beside the bar, on the side that has room.
    at, anchor = (begin + width + 5, "start") if begin < 500 else (begin - 5, "end")
    if inside:
        at, anchor = begin + width / 2, "middle"
    color = "white" if inside else "black"
    return [
        f'<rect x="{begin:.1f}" y="{y + 4}" width="{width:.1f}" height="22" rx="2" '
        f'fill="{LANES[span.lane]}"/>',
        f'<text x="{at:.1f}" y="{y + 19}" text-anchor="{anchor}" fill="{color}">'
        f"{escape(text)}</text>",
    ]


def _title(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"{result['model']}, {result['prompt_tokens']:,} prompt tokens, one streamed chat "
        f"request on {machine['cpus']} CPU cores"
    )


def main() -> int:
    """Draws the committed result."""
    picture = RESULT.with_suffix(".svg")
    picture.write_text(draw(json.loads(RESULT.read_text())))
    print(f"wrote {picture}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
