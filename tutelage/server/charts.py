"""The page's charts: which series each shows, and ECharts' options that do not change. Points come later, see page.js."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from nicegui import ui


@dataclass(frozen=True)
class Chart:
    """One chart. It draws the series named in `names`, and those that begin with one of `prefixes`."""

    key: str
    title: str
    unit: str
    names: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    stack: bool = False  # shares, one above the other
    symbols: bool = False  # few points: each is shown
    overlay: bool = True  # branches are drawn over it
    bare: bool = False  # no legend, no zoom: the small one of the first screen
    always: bool = True  # shown also before it has points
    tiny: bool = False  # numbers such as 3e-4
    percent: bool = False
    bytes: bool = False  # numbers such as 1.24 GB

    def spec(self) -> dict[str, Any]:
        """What page.js needs of it."""
        return asdict(self)


MEMORY = {"memory": "in use", "memory_peak": "peak"}
CHARTS = (
    Chart("loss", "Loss", "nats per token", ("loss",), ("loss/",), {"loss": "all"}),
    Chart("bits", "Bits per byte, held out", "lower is better", (), ("eval/bits_per_byte/",), symbols=True),
    Chart("rate", "Learning rate in use", "schedule included", ("lr",), ("lr/",), {"lr": "rate"}, tiny=True),
    Chart("mix", "Mixture", "share of each source", (), ("weights/",), stack=True, overlay=False, percent=True),
    Chart("norm", "Gradient norm", "before clipping", ("grad_norm",), (), {"grad_norm": "norm"}),
    Chart("speed", "Throughput", "tokens per second", ("tokens_per_second",), (), {"tokens_per_second": "tokens/s"}),
    Chart("memory", "Memory", "held by the process", tuple(MEMORY), labels=MEMORY, always=False, bytes=True),
)
SPARK = Chart("spark", "Loss", "", ("loss",), labels={"loss": "loss"}, overlay=False, bare=True)
WANTED = ("loss", "lr", "grad_norm", "tokens_per_second", *MEMORY)  # series by name, and these by prefix:
PREFIXES = ("loss/", "lr/", "weights/", "eval/bits_per_byte/")


def options(chart: Chart, element: int) -> dict[str, Any]:
    """What stays the same while points come: axes, legend, tooltip. Colors follow the page's theme, set in page.js."""
    tip: dict[str, Any] = {"trigger": "axis", "confine": True, ":formatter": f"(p) => tutelage.tip({element}, p)"}
    found: dict[str, Any] = {
        "animation": False,
        "aria": {"enabled": True, "label": {"description": f"{chart.title}, {chart.unit}, by tick"}},
        "grid": {"left": 8, "right": 12, "top": 14, "bottom": 2, "containLabel": True},
        "xAxis": {"type": "value"},
        "yAxis": {"type": "value", "scale": not (chart.stack or chart.bytes), "splitNumber": 3 if chart.bare else 4},
        "tooltip": tip | {"axisPointer": {"type": "line", "lineStyle": {"opacity": 0.4}}},
        "series": [],
    }
    if chart.stack:
        found["yAxis"] |= {"min": 0, "max": 1, "interval": 0.25}
    if not chart.bare:
        found["legend"] = {"type": "scroll", "top": 0, "left": 0, "icon": "roundRect", "itemWidth": 12, "itemHeight": 3}
        found["dataZoom"] = [{"type": "inside", "zoomOnMouseWheel": "shift", "filterMode": "none"}]
    return found


def place(chart: Chart) -> ui.echart:
    """A chart where one is now; its points are drawn as soon as the browser has them."""
    element = ui.echart({}).classes("spark" if chart.bare else "chart")
    element.options.update(options(chart, element.id))
    element.props(f'role="img" aria-label="{chart.title}, {chart.unit}"')
    ui.run_javascript(f"tutelage.add({element.id}, {json.dumps(chart.spec())})")
    return element
