"""`report`: one self-contained HTML page about a run, or about several side by side."""

from __future__ import annotations

import base64
import html
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from .figures import TIMES, Run, lines_figure, loads_figure, loss_figure, short, time_shares, times_figure
from .metrics import read_metrics

STYLE = """
:root { color-scheme: light; --ink: #23262f; --faint: #6f7480; --line: #e6e3dc; --accent: #2f6db3; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f4ef; color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 44px 24px 72px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.015em; }
h2 { font-size: 21px; margin: 48px 0 4px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
.sub { color: var(--faint); margin: 0 0 22px; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); gap: 10px; margin: 0 0 16px; }
.tile, section { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 16px 11px; }
.tile b { display: block; font-size: 23px; font-weight: 600; letter-spacing: -0.01em; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--faint); font-size: 12.5px; }
section { padding: 18px 22px 16px; margin: 14px 0; }
h3 { font-size: 16px; margin: 0; }
section > p { color: var(--faint); font-size: 13.5px; margin: 2px 0 10px; max-width: 76ch; }
img { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
.wide { width: 100%; } .scroll { overflow-x: auto; }
th, td { text-align: left; padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--faint); font-weight: 500; white-space: nowrap; }
.wide td:not(:first-child), .wide th:not(:first-child) { text-align: right; }
td { overflow-wrap: anywhere; }
.bar { display: flex; height: 16px; border-radius: 5px; overflow: hidden; margin: 6px 0 8px; }
.keys { display: flex; flex-wrap: wrap; gap: 4px 22px; font-size: 13.5px; margin-bottom: 6px; }
.keys i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; }
.keys small { color: var(--faint); font-size: 12.5px; }
summary { cursor: pointer; font-weight: 600; } .groups { margin-top: 16px; }
.groups { columns: 2; column-gap: 40px; } .groups div { break-inside: avoid; margin-bottom: 18px; }
.groups table { width: 100%; } .groups h4 { margin: 0 0 2px; font-size: 13.5px; color: var(--accent); }
footer { color: var(--faint); font-size: 12.5px; margin-top: 36px; }
@media (max-width: 720px) { .groups { columns: 1; } main { padding: 24px 12px; } section { padding: 14px 12px; } }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""


def report(run_dir: str | Path, *others: str | Path, output: str | Path | None = None) -> Path:
    """Writes the page and returns its path. A run that still trains, or was cut off, is reported as far as it got.

    Args:
        run_dir: A run directory: metrics.jsonl, and config.json, environment.json and baselines.json where they are.
        others: More runs to lay over its losses.
        output: The file; None: report.html in `run_dir`.

    Raises:
        FileNotFoundError: No run directory.
        ValueError: No whole row in its metrics, or a damaged config.json.
    """
    directories = [Path(run_dir), *map(Path, others)]
    runs = [_read_run(path, name) for path, name in zip(directories, _names(directories), strict=True)]
    parts = [_compare(runs)] if len(runs) > 1 else []
    parts += [_run_page(run, alone=len(runs) == 1) for run in runs]
    title = " and ".join(r.name for r in runs) if len(runs) < 4 else f"{len(runs)} runs"
    path = Path(output) if output else directories[0] / "report.html"
    write_page(path, title, "".join(parts), "coterie report")
    return path


def write_page(path: Path, title: str, body: str, command: str) -> None:
    """Writes a page in the house's style, whole or not at all."""
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)} · coterie</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><main>\n{body}<footer>Written by <code>{command}</code>; every figure is in this file."
        "</footer></main></body></html>\n"
    )
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(page, encoding="utf-8")
    draft.replace(path)


def _names(directories: list[Path]) -> list[str]:
    """The last part of each path; as much more of it as makes them different."""
    for depth in range(1, 8):
        names = ["/".join(path.resolve().parts[-depth:]) for path in directories]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({i})" for i, path in enumerate(directories, 1)]


def _read_run(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a run directory: give the one that holds metrics.jsonl")
    latest = {r["step"]: r for r in read_metrics(path) if isinstance(r, dict) and isinstance(r.get("step"), int)}
    if not latest:
        raise ValueError(f"{path / 'metrics.jsonl'} has no step yet: report the run when it has made one")
    facts = {}
    for file in ("config", "environment", "baselines"):
        try:
            facts[file] = json.loads((path / f"{file}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            facts[file] = {}
        except ValueError:
            raise ValueError(f"{path / file}.json is not JSON: mend it or take it away") from None
    return Run(name, [latest[step] for step in sorted(latest)], **facts)


def picture(svg: str, what: str) -> str:
    """A figure inside the page; `what` it shows, for who does not see it."""
    data = base64.b64encode(svg.encode()).decode()
    return f'<img alt="{html.escape(what, quote=True)}" src="data:image/svg+xml;base64,{data}">'


def section(title: str, text: str, body: str) -> str:
    """A part of a page; nothing where there is no body."""
    return f"<section><h3>{title}</h3><p>{text}</p>{body}</section>\n" if body else ""


def _last(run: Run, *keys: str) -> float | None:
    """Mean over the last fiftieth of the run."""
    _, values = run.series(*keys)
    return float(values[-max(1, len(values) // 50) :].mean()) if len(values) else None


def _facts(run: Run) -> dict[str, str]:
    """What is known of the run, in the order of interest."""
    facts: dict[str, str] = {}

    def add(name: str, value: float | None, form: str = "{:.3f}") -> None:
        if value is not None and math.isfinite(value):
            facts[name] = form.format(value)

    valid = run.series("valid_loss")[1]
    add("training loss", _last(run, "loss"))
    if len(valid):
        add("validation loss", float(valid[-1]))
        add("perplexity", math.exp(min(float(valid[-1]), 700)), "{:.2f}")
    last = run.rows[-1]
    facts["steps"] = f"{last['step']:,}"
    if run.has_tokens:
        facts["tokens"] = short(last["tokens"])
    speed = run.series("tokens_per_s")[1]
    add("tokens/s", float(np.median(speed)) if len(speed) else None, "{:,.0f}")
    mfu = run.series("mfu")[1]
    add("of peak (MFU)", float(np.median(mfu)) if len(mfu) else None, "{:.1%}")
    if run.has_loads:
        add("max / mean load", _last(run, "max_mean"), "{:.2f}")
        add("dropped", _last(run, "drop"), "{:.1%}")
    for link, name in (("intra", "sent within the node"), ("inter", "sent to other nodes")):
        if size := _last(run, "sent", f"{link}_bytes"):
            facts[name] = f"{size / 2**20:,.1f} MiB a step"
    skipped = run.series("skipped")[1]
    if len(skipped) and skipped.max() > 0:
        facts["steps skipped"] = f"{skipped.max():.0f}"
    return facts


def _subtitle(run: Run) -> str:
    model, parts = run.config.get("model") or {}, []
    if model:
        experts = [e for e in model.get("experts") or [] if e]
        parts.append(f"{model.get('layers', '?')} layers of width {model.get('dim', '?')}")
        if experts:
            parts.append(f"{len(experts)} of them with {min(experts)}" + _upto(experts) + " experts")
    environment = run.environment
    if environment.get("world"):
        parts.append(f"{environment['world']} rank{'s' if environment['world'] != 1 else ''}")
    parts += list(dict.fromkeys(environment.get("devices") or []))[:1]
    if environment.get("commit"):
        parts.append(f"commit {str(environment['commit'])[:10]}")
    return html.escape(" · ".join(parts)) or "A pretraining run"


def _upto(experts: list[int]) -> str:
    return f" to {max(experts)}" if max(experts) != min(experts) else ""


def _compare(runs: list[Run]) -> str:
    facts = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for fact in facts for name in fact))
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr><td>{name}</td>" + "".join(f"<td>{fact.get(name, '-')}</td>" for fact in facts) + "</tr>"
        for name in names
    )
    table = f'<div class="scroll"><table class="wide"><tr><th></th>{head}</tr>{rows}</table></div>'
    return (
        f'<h1>{len(runs)} runs, compared</h1><p class="sub">Details of each follow below.</p>'
        + section("Loss", "Faint: every step. Strong: running mean. Dots: validation.", _losses(runs))
        + section("Side by side", "", table)
    )


def _losses(runs: list[Run]) -> str:
    return picture(loss_figure(runs), "training and validation loss over tokens")


def _run_page(run: Run, alone: bool) -> str:
    level, facts = ("h1", "h2")[not alone], _facts(run)
    tiles = "".join(f'<div class="tile"><b>{v}</b><span>{html.escape(k)}</span></div>' for k, v in facts.items())
    parts = [f'<{level}>{html.escape(run.name)}</{level}><p class="sub">{_subtitle(run)}</p>']
    parts.append(f'<div class="tiles">{tiles}</div>')
    if alone:
        parts.append(section("Loss", "Faint: every step. Strong: running mean. Dots: validation.", _losses([run])))
    schedule = {"Learning rate": ("lr",), "Gradient norm, before clipping": ("grad_norm",)}
    parts.append(section("Optimization", "What the optimizer was told and what it met.", _lines(run, schedule)))
    parts.append(
        section(
            "Expert load",
            "Share of the tokens that each expert of a layer received, relative to an even share. "
            "A good router keeps this pale; a dark blue line is an expert that starves.",
            _heat(run),
        )
    )
    if run.has_loads:
        router = {
            "Busiest expert / mean load": ("max_mean",),
            "Share of assignments dropped": ("drop",),
            "Router entropy (1: undecided)": ("entropy",),
            "Balance loss (1 a layer: even)": ("aux",),
            "Router z-loss": ("z",),
        }
        parts.append(section("Routing", "How evenly and how decidedly tokens are routed.", _lines(run, router, 3)))
    parts.append(section("Step time", "Where the time of a step goes.", _times(run)))
    speed = {"Tokens per second": ("tokens_per_s",), "Share of the machine's peak (MFU)": ("mfu",)}
    parts.append(section("Throughput", "All ranks together.", _lines(run, speed)))
    parts.append(_tree("Configuration", run.config))
    parts.append(_tree("Environment", run.environment))
    return "".join(parts)


def _lines(run: Run, panels: dict[str, tuple[str, ...]], columns: int = 2) -> str:
    svg = lines_figure(run, panels, columns)
    return picture(svg, ", ".join(panels)) if svg else ""


def _heat(run: Run) -> str:
    svg = loads_figure(run)
    return picture(svg, "heat maps of expert load over tokens, one a layer") if svg else ""


def _times(run: Run) -> str:
    svg, shares = times_figure(run), time_shares(run)
    total = sum(shares.values())
    if not svg or not total:
        return ""
    bar = "".join(
        f'<div style="width:{100 * s / total:.2f}%;background:{TIMES[n]}"></div>' for n, s in shares.items()
    )
    keys = "".join(
        f'<span><i style="background:{TIMES[name]}"></i>{_span(name)} '
        f"<small>{1e3 * seconds:,.3g} ms, {seconds / total:.0%}</small></span>"
        for name, seconds in shares.items()
    )
    return f'<div class="bar">{bar}</div><div class="keys">{keys}</div>' + picture(
        svg, "step time by part over tokens"
    )


def _span(name: str) -> str:
    return "all-to-all" if name == "alltoall" else name


def _tree(title: str, values: dict[str, Any]) -> str:
    """A folded table; nested dictionaries become groups of their own."""
    if not values:
        return ""
    groups: dict[str, dict[str, Any]] = {}

    def walk(name: str, node: dict[str, Any]) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(f"{name}.{key}" if name else key, value)
            else:
                groups.setdefault(name, {})[key] = value

    walk("", values)
    body = ""
    for name, leaves in groups.items():
        rows = "".join(
            f"<tr><th>{html.escape(k)}</th><td>{html.escape(_leaf(v))}</td></tr>" for k, v in leaves.items()
        )
        body += f"<div><h4>{html.escape(name or 'general')}</h4><table>{rows}</table></div>"
    return f'<section><details><summary>{title}</summary><div class="groups">{body}</div></details></section>\n'


def _leaf(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_leaf, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "":
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
