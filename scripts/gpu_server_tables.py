"""Tables and plot of a served model on a GPU, from docs/results/gpu_server.json."""

from __future__ import annotations

import matplotlib.pyplot as plt
from report import goal, save, table

LAYERS = 32  # of Llama-3.1-8B
LINEAR_GOAL = 0.95
DENSE_GOAL = 1.05  # times a plain torch model's time, at most
SELECTION_GOAL = 0.97
REPLAY_GOALS = {32768: 1.26, 131072: 2.2}
HIDDEN_GOAL = 0.95
STAGES = ("queue", "embed", "qkv", "permute", "select", "attend", "mlp", "copy")


def cell(text: object) -> str:
    """On one line, without what ends a cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def not_of_a_gpu(results: dict) -> str | None:
    """Why these results may not stand where a GPU's do; None if they may."""
    backend, gpu = results.get("backend"), results.get("gpu") or {}
    if backend != "cuda":
        return f"they are of backend {backend}"
    if not gpu.get("name"):
        return "no driver named a GPU"
    for part in ("ttft", "concurrent"):
        model = results.get(part, {}).get("model")
        if model is None:
            continue
        if model["backend"] != "cuda":
            return f"the server of {part} ran on backend {model['backend']}"
        if not model["device"].startswith(gpu["name"]):
            return f"the server of {part} ran on {model['device']}, not on {gpu['name']}"
    return None


def ordered(results: dict) -> list[dict]:
    """Rows of prefills by length, in the order in which they ran."""
    return sorted(results.get("ttft", {}).get("timings", []), key=lambda row: row["tokens"])


def length(tokens: int) -> str:
    """Such as 32K."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def linear_table(results: dict) -> str:
    """Products beside torch's."""
    rows = []
    for group in results.get("linear", {}).get("groups", []):
        ours, torch = group["cases"]["ours"], group["cases"]["torch"]
        n, wide, out = group["shape"]
        flops = 2e-12 * n * wide * out * results["linear"]["repetitions"]
        rows.append([group["name"], f"{n} x {wide} x {out}", f"{flops / torch['wall']:.0f}",
                     f"{flops / ours['wall']:.0f}", goal(ours["speedup_wall"], LINEAR_GOAL)])
    head = ["linear layer, bf16", "rows x in x out", "torch, TFLOP/s", "ours", "ratio, goal"]
    return table(head, rows) if rows else "Linear layers were not measured."


def over_dense(row: dict) -> str:
    """Ratio of our dense time to this one, with its goal."""
    ratio = row.get("dense_over_this")
    if ratio is None or row["name"] == "torch":
        return ""
    if row["name"] == "pbs":
        return goal(ratio, SELECTION_GOAL)
    limit = REPLAY_GOALS.get(row["tokens"])
    return f"{ratio:.2f}x" if limit is None else goal(ratio, limit)


def over_torch(row: dict) -> str:
    """Time over the plain torch model's; dense has a goal."""
    ratio = row.get("torch_over_this")
    if ratio is None:
        return ""
    if row["name"] != "dense":
        return f"{1 / ratio:.2f}x"
    within = 1 / ratio <= DENSE_GOAL
    return f"{1 / ratio:.2f}x {'<=' if within else '**>**'} {DENSE_GOAL}"


def hidden(row: dict) -> str:
    """Share of the copies of keys and values that ran beside other work."""
    share = row.get("hidden_share")
    if share is None:
        return ""
    return f"{100 * share:.1f} % {'>=' if share >= HIDDEN_GOAL else '**<**'} {100 * HIDDEN_GOAL:.0f}"


def label(row: dict) -> str:
    """What ran."""
    name = {"torch": "plain torch model", "dense": "ours, dense", "pbs": "pbs, real selection"}
    text = name.get(row["name"], row["name"] or "nothing")
    return f"{text}, SDPA on {row['sdpa']}" if row.get("sdpa") else text


def prefill_table(results: dict) -> str:
    """Times to first token and to the cache."""
    rows = []
    for row in ordered(results):
        begin = [length(row["tokens"]), label(row)]
        if "ttft_seconds" not in row:
            rows.append([*begin, cell(row.get("error", "?")), *[""] * 6])
            continue
        served = "kv_ready_seconds" in row
        rows.append([
            *begin, f"{row['ttft_seconds']:.3f} s",
            f"{row['kv_ready_seconds']:.3f} s" if served else "",
            f"{row['density']:.3f}" if served else "",
            over_dense(row), over_torch(row), hidden(row), str(row["rounds"]),
        ])  # fmt: skip
    head = ["L", "run", "TTFT", "KV ready", "density", "our dense / this", "this / torch",
            "KV copies hidden", "rounds"]
    return table(head, rows) if rows else "Prefills were not measured."


def stage_table(results: dict) -> str:
    """Where the time of the served prefills goes."""
    rows = [
        [length(row["tokens"]), label(row)]
        + [f"{1e3 * row['stages'][stage]:.1f}" for stage in STAGES]
        + [f"{1e3 * row['kv_copy_seconds']:.1f}"]
        for row in ordered(results)
        if "stages" in row
    ]
    head = ["L", "ms of each stage", *STAGES, "(all of the copies)"]
    return table(head, rows) if rows else ""


def facts(results: dict) -> list[str]:
    """What a reader of the tables must know."""
    said = []
    if model := results.get("ttft", {}).get("model"):
        said.append(f"random model in the shape of Llama-3.1-8B, {model['layers']} of its "
                    f"{LAYERS} layers, {model['weight_bytes'] / 1e9:.1f} GB of weights")
    if tests := results.get("tests"):
        failed = f", **wrong**: {cell(', '.join(tests['failed']))}" if tests["failed"] else ""
        said.append(f"authors' outputs and transformers' models through the server: "
                    f"{tests['right']} tests right, {tests['skipped']} skipped{failed}")
    for row in results.get("handoff", {}).get("rows", []):
        right = "right" if row["right"] else f"**wrong**, {cell(row.get('error', ''))}"
        said.append(f"answer decoded by pbs-decode from a {row['name']} cache: {right}")
    if together := results.get("concurrent"):
        said.append(f"{together['prompts']} prompts of {together['tokens']} tokens at once: "
                    f"{together['alone_over_together']:.2f}x the speed of one after another, "
                    f"tokens {'right' if together['right'] else '**wrong**'}")
    said += [
        f"**wrong**: logits of {label(row)}, {length(row['tokens'])}, differ from {row['from']}'s"
        for row in ordered(results)
        if row.get("right") is False
    ]
    said += results.get("checks", [])
    return said if results.get("done") else [*said, "the run was cut short"]


def server_tables(results: dict) -> str:
    """The page's section."""
    gpu = results["gpu"]
    source = (
        f"[`docs/results/gpu_server.json`](results/gpu_server.json): {gpu['name']}, driver "
        f"{gpu.get('driver_version', '?')}, SM clock {gpu.get('clocks.sm', '?')} before, "
        f"{(results.get('gpu_after') or {}).get('clocks.sm', '?')} after, commit "
        f"`{results['commit']}`, `{results['command']}`."
    )
    tables = [linear_table(results), prefill_table(results), stage_table(results)]
    if any("dense_over_this" in row for row in ordered(results)):
        tables.append("![time to first token](results/gpu_server.svg)")
    return "\n\n".join([*filter(None, tables), source, "\n".join(f"* {f}" for f in facts(results))])


def plot_server(results: dict) -> None:
    """How much sooner the first token is there than with our dense attention."""
    figure, axis = plt.subplots(figsize=(6, 3.2))
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in ordered(results):
        if "dense_over_this" in row:
            replays = (row["name"] or "").startswith("density replay")
            name = "published density, by threshold" if replays else label({"name": row["name"]})
            lines.setdefault(name, []).append((row["tokens"], row["dense_over_this"]))
    for name, points in lines.items():
        axis.plot(*zip(*points), marker="o", markersize=3, label=name)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set(xscale="log", xlabel="prompt tokens", ylabel="TTFT of ours, dense / this")
    ticks = sorted({row["tokens"] for row in ordered(results)})
    axis.set_xticks(ticks, [length(t) for t in ticks], minor=False)
    axis.minorticks_off()
    if lines:
        axis.legend(fontsize=7)
    save(figure, "gpu_server")
